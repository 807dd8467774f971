"""`linearize finetune`: from a recipe to a trained, merged, loadable checkpoint."""

from __future__ import annotations

import contextlib
import copy
import io
import json
import os
import shutil
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from peft import LoraConfig, MissConfig, PeftConfig, PeftModel, TaskType, get_peft_model
from safetensors.torch import save_file
from transformers import PreTrainedModel, set_seed
from transformers.pytorch_utils import Conv1D

from linearize.calibration.start import convert, make_start, prepares
from linearize.conversion.claims import claimed
from linearize.conversion.convert import base_record, check_convertible, nbytes, write_checkpoint
from linearize.conversion.output import check_space, staged_file, staged_folder, telling
from linearize.conversion.source import (
    Source,
    find_source,
    load_config,
    load_model,
    load_tokenizer,
    sound_provenance,
    teacher_of,
)
from linearize.errors import ModelError, OutputError, RecipeError
from linearize.model.modeling import family_of
from linearize.recipe import SELF, LoraSpec, Recipe, Stage, dump_recipe, load_recipe
from linearize.training import processes
from linearize.training.checkpoints import checkpoints, manifest, newest, step_of
from linearize.training.data import load_data, reserved_tokens
from linearize.training.plot import PLOT, draw_training
from linearize.training.rows import TrainingData, read_data, save_data
from linearize.training.sharding import check_shardable, is_sharded, mesh
from linearize.training.sharding import shard as shard_model
from linearize.training.teachers import KeptLogits, keep_logits, offloaded
from linearize.training.trackers import check_trackers, tracker_arguments, tracking
from linearize.training.trainer import (
    ProgressLine,
    StageTrainer,
    append_json_line,
    base_of,
    is_adapter,
    is_own_parameter,
    load_trained,
    set_trained,
    total_steps,
    whole_trained,
)
from linearize.training.windows import nothing_to_recall

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from torch import nn

    from linearize.calibration.start import Start
    from linearize.model import LinearizedForCausalLM
    from linearize.training.rows import Rows

HELD_OUT = "held_out.safetensors"
METRICS = "metrics.jsonl"
WORK = ".training"
"""What the name of a run's working folder ends in."""
_CHECKPOINT = "stage-*/checkpoint-*"
_CHECKPOINTS = 9
"""Sizes of what is trained that checkpoints take: three of them at most, each with two moments."""


@dataclass
class FinetuneResult:
    """What a run left in memory.

    Attributes:
        model: trained and merged.
        teacher: the pretrained model, if a stage needed it.
        data: of the last stage.
        recipe: with what is kept as softmax named in it.
        stages, start: a record of each stage, and of what came before training, as in `linearize.json`.
    """

    model: LinearizedForCausalLM
    tokenizer: Any
    teacher: PreTrainedModel | None
    data: TrainingData | None
    recipe: Recipe
    stages: list[dict[str, Any]] = field(default_factory=list)
    start: dict[str, Any] = field(default_factory=dict)


class _Teacher:
    """The pretrained model, loaded when it is first wanted.

    Args:
        model: if it is loaded already; it is not let go then.
    """

    def __init__(self, source: Source, dtype: str, model: PreTrainedModel | None) -> None:
        self.source, self.dtype, self.model = source, dtype, model
        self.is_ours = model is None

    def __call__(self, device: str | None = None) -> PreTrainedModel:
        if self.model is None:
            self.model = load_model(self.source, dtype=self.dtype, device=device).requires_grad_(False)
        return self.model

    @contextlib.contextmanager
    def serving(
        self, stage: Stage, rows: Rows, say: Callable[[str], None], *, shard: bool = False
    ) -> Iterator[PreTrainedModel | KeptLogits | None]:
        """What a stage's trainer is given, where its recipe wants it; None where the stage has no use for a teacher."""
        if not wants_teacher(stage):
            yield None
        elif stage.teacher_at == "disk" and stage.top_k is not None:
            options: dict[str, Any] = {"top_k": stage.top_k, "temperature": stage.temperature}
            with processes.first_goes_ahead():
                kept = keep_logits(self(), rows, **options, batch=stage.micro_batch, progress=say)
            if self.is_ours:
                self.model = None
            yield kept
        elif stage.teacher_at == "cpu":
            with offloaded(self(), self().device):
                yield self()
        else:
            if shard and (self.model is None or not is_sharded(self.model)):
                with processes.in_turns():
                    shard_model(self("cpu"))
            yield self()


def finetune(
    recipe: Recipe,
    work: Path,
    *,
    say: Callable[[str], None],
    resume: bool = False,
    trust_remote_code: bool = False,
    pretrained: PreTrainedModel | None = None,
    tokenizer: Any = None,
    begin: Callable[[], Start] | None = None,
    shard: bool = False,
) -> FinetuneResult:
    """Runs the stages of `recipe`.

    Args:
        work: the folder of this run's checkpoints and `metrics.jsonl`; see `work_folder`.
        say: gets lines for the person at the terminal.
        resume: go on from the newest checkpoint in `work`.
        pretrained, tokenizer: of `recipe.model`, where they are loaded already.
        begin: loads what the conversion came to, where that has been done already.
        shard: split weights, gradients and optimizer among the processes; the result is the first one's.

    Raises:
        LinearizeError: the recipe, the model, the data or a checkpoint is not usable.
    """
    if recipe.model is None:
        raise RecipeError("the recipe names no model; add `model:` or pass --set model=ID_OR_PATH")
    check_trackers(recipe.report_to)
    source = find_source(recipe.model, trust_remote_code=trust_remote_code)
    base = find_source(recipe.teacher, trust_remote_code=trust_remote_code) if recipe.teacher else teacher_of(source)
    teacher = _Teacher(base, recipe.dtype, pretrained if base == source else None)
    tokenizer = tokenizer or load_tokenizer(source)
    set_seed(recipe.seed)
    written: dict[str, Any] = {}
    told: dict[str, Any] = {}
    if shard:
        check_shardable(recipe)
        mesh()
    four_bit = recipe.lora is not None and recipe.lora.four_bit
    if four_bit:
        _check_four_bit(recipe, shard)
    # Reading a model can take longer than copying it, and where a stage wants the teacher both are needed anyway.
    shared = (
        base == source and not (shard or four_bit) and any(wants_teacher(s) or _reads(s, SELF) for s in recipe.stages)
    )
    started = None
    apart = processes.count() > 1 or four_bit
    if not source.is_converted and begin is None and apart and prepares(recipe):
        started = work / "start"
        recipe, told = _started(source, recipe, tokenizer, started, resume=resume, say=say)
    elif source.is_converted:
        if load_config(source).quantized:
            raise ModelError(
                f"{source.name}: its weights are integers, which cannot be trained; train what it was exported from"
            )
        written = sound_provenance(source)
        told = written.get("start", {})
        say(f"{source.name}: converted already, trained as it is; the recipe's mixer section is not used")

    def converted(**options: Any) -> Any:
        nonlocal recipe, told
        options["dtype"] = recipe.dtype
        if source.is_converted or started is not None:
            return load_model(source if started is None else find_source(str(started)), **options)
        if begin is None:
            model = copy.deepcopy(teacher()) if shared else load_model(source, **options)
            check_convertible(model.config, source)
            begun = make_start(source, recipe, model, tokenizer, say=say)
        else:
            begun = begin()
        recipe, told = begun.recipe, begun.record
        return begun.model

    def student_of(model: Any) -> Any:
        return add_adapters(model, recipe.lora if any(stage.train == "lora" for stage in recipe.stages) else None)

    with processes.in_turns() if shard else contextlib.nullcontext():
        student = student_of(converted(four_bit=four_bit, device="cpu" if shard else None))
        for stage in recipe.stages:
            choose_trained(student, stage.train)  # what a later stage lacks is told now
        if shard:
            shard_model(student)
    records: list[dict[str, Any]] = list(written.get("stages", []))
    data, reserved = None, reserved_tokens(recipe.stages)
    reached = _stage_to_resume(work, len(recipe.stages)) if resume else 0

    def rows_of(number: int, stage: Stage) -> TrainingData:
        kept = work / f"stage-{number}.rows.safetensors"
        with processes.first_goes_ahead():  # what it wrote or fetched, the others read
            if kept.is_file() and (resume or not processes.is_first()):
                return read_data(kept)
            found = load_data(
                stage.data,
                tokenizer=tokenizer,
                length=stage.length,
                seed=recipe.seed,
                teacher=teacher,
                student=lambda: base_of(student).eval(),
                draw=number,
                reserved=reserved,
                progress=say,
            )
            save_data(found, kept)
            return found

    # A teacher that is split cannot write text for one process, so that is done before.
    ahead = [rows_of(number, stage) for number, stage in enumerate(recipe.stages)] if shard else None
    for number, stage in enumerate(recipe.stages):
        data = rows_of(number, stage) if ahead is None else ahead[number]
        records.append(stage_record(stage, data))
        if not stage.hide_window and (warning := nothing_to_recall(base_of(student), data.train)):
            say(f"stage {number + 1}: {warning}")
        if not shard:
            choose_trained(student, stage.train)
        folder = work / f"stage-{number}"
        start = newest(folder) if resume else None
        if start is not None and number < reached:
            say(f"stage {number + 1}: done before")
            load_trained(student, start)
            _count_skipped(records[-1], (manifest(start) or {}).get("skipped", 0))
            continue
        check_space(
            work, nbytes(student) + _CHECKPOINTS * sum(p.nbytes for p in student.parameters() if p.requires_grad)
        )
        if processes.is_first():
            _forget_metrics(work / METRICS, number, step_of(start) if start else 0)
        with teacher.serving(stage, data.train, say, shard=shard) as served:
            log = _log_to(work / METRICS, number, len(recipe.stages))
            name = work.name.removesuffix(WORK)
            reporting = tracker_arguments(recipe.report_to, f"{name}, stage {number + 1}")
            if start:
                say(f"stage {number + 1}: going on from {start.name}")
            with _quiet(), tracking(recipe.report_to, work.with_name(f"{name}.runs") / f"stage-{number + 1}"):
                trainer = StageTrainer(student, served, stage, data.train, folder, recipe.seed, log, say, reporting)
                trainer.train(resume_from_checkpoint=str(start) if start else None)
        _count_skipped(records[-1], trainer.skipped)
    if shard or four_bit:
        trained = whole_trained(student)
        if not processes.is_first():
            return FinetuneResult(base_of(student), tokenizer, None, data, recipe, records, told)
        # Built again, whole, on the CPU: what is frozen is on disk as it was.
        student = student_of(converted(device="cpu"))
        choose_trained(student, recipe.stages[-1].train)
        set_trained(student, trained)
    merged = student.merge_and_unload(safe_merge=True) if isinstance(student, PeftModel) else student
    merged.requires_grad_(False).eval()
    return FinetuneResult(merged, tokenizer, teacher.model, data, recipe, records, told)


def _started(
    source: Source, recipe: Recipe, tokenizer: Any, folder: Path, *, resume: bool, say: Callable[[str], None]
) -> tuple[Recipe, dict[str, Any]]:
    """What `make_start` came to in the first process, which leaves it in `folder` for all: the recipe with what is kept
    as softmax named in it, and a record of it."""
    with processes.first_goes_ahead():
        if processes.is_first() and not (resume and folder.is_dir()):
            shutil.rmtree(folder, ignore_errors=True)
            with staged_folder(folder) as staging:
                convert(source, recipe, staging, say=say, tokenizer=tokenizer)
    kept = load_recipe(str(folder / "recipe.yaml"))
    return kept, sound_provenance(find_source(str(folder))).get("start", {})


def _check_four_bit(recipe: Recipe, shard: bool) -> None:
    """Raises:
    RecipeError: what the recipe or the engine wants does not go with frozen weights in 4 bits.
    """
    if shard:
        raise RecipeError("lora.four_bit: does not go with --shard; leave one of them out")
    for number, stage in enumerate(recipe.stages):
        if stage.train != "lora":
            raise RecipeError(f"stages.{number}.train: {stage.train} does not go with lora.four_bit; take lora")
        if "align" in stage.weights:
            raise RecipeError(f"stages.{number}.objective: align does not go with lora.four_bit; take distill or sft")
    if recipe.lora is not None and recipe.lora.kind == "pissa":
        raise RecipeError("lora.kind: pissa changes the weights that four_bit freezes; take lora, rslora or dora")


def write_result(folder: Path, result: FinetuneResult, work: Path, name: str) -> None:
    """Writes the checkpoint of a run, its metrics and its held-out rows into `folder`."""
    source = find_source(result.recipe.model or "")
    base = teacher_of(source)
    record = sound_provenance(source)["base"] if source.is_converted else base_record(base, None)
    if (work / METRICS).is_file():
        shutil.copyfile(work / METRICS, folder / METRICS)
        draw_training(folder / METRICS, folder / PLOT)
    if result.data is not None and len(result.data.held_out):
        write_held_out(folder, result.data.held_out)
    write_checkpoint(
        folder, result.model, result.tokenizer, result.recipe, record, result.stages, name, start=result.start
    )


def write_held_out(folder: Path, rows: Rows) -> None:
    """Writes the rows that the task `held_out` scores a checkpoint on."""
    save_file(
        {"input_ids": rows.input_ids, "labels": rows.labels, "position_ids": rows.position_ids}, folder / HELD_OUT
    )


@contextlib.contextmanager
def shared_work_folder(target: Path, recipe: Recipe, *, resume: bool) -> Iterator[Path]:
    """`work_folder`, kept by the first of several processes for all of them.

    Raises:
        OutputError: as `work_folder`, in the first.
    """
    if processes.is_first():
        with work_folder(target, recipe, resume=resume) as work:
            processes.wait()
            yield work
    else:
        processes.wait()
        yield _work(target)


def is_resumable(target: Path, recipe: Recipe) -> bool:
    """Whether an interrupted run of this very recipe is waiting beside `target`."""
    kept = _work(target) / "recipe.yaml"
    return kept.is_file() and kept.read_text(encoding="utf-8") == dump_recipe(recipe)


def _work(target: Path) -> Path:
    target = Path(os.path.abspath(target))  # "." has no name
    return target.with_name(f"{target.name}{WORK}")


@contextlib.contextmanager
def work_folder(target: Path, recipe: Recipe, *, resume: bool) -> Iterator[Path]:
    """The folder beside `target` where a run keeps its checkpoints; it goes when the run is done.

    If the run fails it stays for `resume`, unless there is no checkpoint in it yet.

    Raises:
        OutputError: an unfinished run is there and `resume` is not set, or the other way round, or of another recipe.
    """
    with claimed(target):
        yield from _working(_work(target), dump_recipe(recipe), resume)


def _working(work: Path, text: str, resume: bool) -> Iterator[Path]:
    kept = work / "recipe.yaml"
    if not resume and kept.is_file() and not any(work.glob(_CHECKPOINT)):
        shutil.rmtree(work, ignore_errors=True)  # of a run that was killed before it had anything to keep
    if not resume:
        if work.exists():
            raise OutputError(f"{work}: an unfinished run is there; pass --resume to go on, or remove the folder")
    elif not kept.is_file():
        raise OutputError(f"{work}: no unfinished run to resume; leave --resume out")
    elif kept.read_text(encoding="utf-8") != text:
        raise OutputError(f"{kept}: the unfinished run has another recipe; resume it with that one")
    try:
        work.mkdir(parents=True, exist_ok=True)
        kept.write_text(text, encoding="utf-8")
    except OSError as error:
        raise OutputError(f"{work}: cannot be written: {(error.strerror or str(error)).lower()}") from error
    done = False
    try:
        with telling(work, "earlier checkpoints are kept, and --resume goes on from the last one"):
            yield work
        done = True
    finally:
        if done or not any(work.glob(_CHECKPOINT)):
            shutil.rmtree(work, ignore_errors=True)


def add_adapters(model: LinearizedForCausalLM, lora: LoraSpec | None) -> Any:
    """The model with peft's adapters on the targets of `lora`, in float32, or as it is; see `choose_trained`.

    Raises:
        RecipeError: a target is not there, or is of a kind that the adapters do not take.
    """
    model.requires_grad_(False)
    if lora is None:
        return model
    modules = _target_modules(model, lora.targets)
    try:
        return get_peft_model(model, _adapter_config(lora, modules))
    except (ValueError, TypeError, NotImplementedError) as error:
        raise RecipeError(f"lora: {lora.kind} does not fit this model: {str(error).splitlines()[0]}") from error


def _adapter_config(lora: LoraSpec, modules: dict[str, nn.Module]) -> PeftConfig:
    if lora.kind == "miss":
        return MissConfig(
            r=lora.rank, miss_dropout=lora.dropout, target_modules=list(modules), task_type=TaskType.CAUSAL_LM
        )
    return LoraConfig(
        r=lora.rank,
        lora_alpha=lora.alpha,
        lora_dropout=lora.dropout,
        target_modules=list(modules),
        fan_in_fan_out=any(isinstance(module, Conv1D) for module in modules.values()),
        task_type=TaskType.CAUSAL_LM,
        use_rslora=lora.kind == "rslora",
        use_dora=lora.kind == "dora",
        init_lora_weights="pissa" if lora.kind == "pissa" else True,
    )


def choose_trained(student: Any, train: Literal["lora", "mixer", "full"]) -> None:
    """Lets gradients reach what a stage trains, and nothing else.

    Raises:
        RecipeError: nothing is left to train.
    """
    for name, parameter in student.named_parameters():
        adapter = is_adapter(name)
        chosen = {"lora": adapter, "mixer": False, "full": not adapter}[train] or is_own_parameter(name)
        parameter.requires_grad_(chosen)
    if not any(parameter.requires_grad for parameter in student.parameters()):
        raise RecipeError("nothing to train: the recipe has no lora, and this mixer has no parameters of its own")


def _target_modules(model: LinearizedForCausalLM, targets: list[str]) -> dict[str, nn.Module]:
    """What the names of the modules that LoRA targets end in, with one module of each.

    Raises:
        RecipeError: a target is not there.
    """
    projections = family_of(model.config.text_config).projections
    modules: dict[str, nn.Module] = {}
    for target in targets:
        ending = projections.get(target, target)
        found = next((module for name, module in model.named_modules() if f".{name}".endswith(f".{ending}")), None)
        if found is None:
            raise RecipeError(f"lora.targets: the model has no module {target!r} ({ending})")
        modules[ending] = found
    return modules


def stage_record(stage: Stage, data: TrainingData) -> dict[str, Any]:
    """What `linearize.json` says of a stage."""
    steps = total_steps(stage, len(data.train))
    return {
        "objective": " + ".join(f"{weight:g} {name}" for name, weight in stage.weights.items()),
        "data": data.source,
        "tokens": steps * stage.batch_tokens,
        "length": stage.length,
        "steps": steps,
    }


def _count_skipped(record: dict[str, Any], skipped: int) -> None:
    if skipped:
        record["skipped_steps"] = skipped


def _forget_metrics(path: Path, stage: int, step: int) -> None:
    """Takes out of a killed run's metrics what is going to be trained again: the steps after the checkpoint."""
    if not path.is_file():
        return
    kept = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            record = json.loads(line)
        except ValueError:  # torn
            continue
        if (record["stage"], record["step"]) <= (stage, step):
            kept.append(line + "\n")
    with staged_file(path) as staging:
        staging.write_text("".join(kept), encoding="utf-8")


def wants_teacher(stage: Stage) -> bool:
    """Whether a stage's objective looks at the teacher."""
    return "sft" not in stage.weights or len(stage.weights) > 1


def _reads(stage: Stage, source: str) -> bool:
    return any(one.source == source for one in stage.data.sources)


def _stage_to_resume(work: Path, stages: int) -> int:
    """The last stage that has a checkpoint."""
    return max((n for n in range(stages) if checkpoints(work / f"stage-{n}")), default=0)


def _log_to(path: Path, stage: int, stages: int) -> Callable[[dict[str, Any]], None]:
    line = ProgressLine()
    if not processes.is_first():
        return lambda _: None

    def log(figures: dict[str, Any]) -> None:
        append_json_line(path, {"stage": stage, **figures})
        left = figures["seconds_left"]
        of = f"stage {stage + 1} of {stages}, " if stages > 1 else ""
        line.show(
            f"{of}step {figures['step']} of {figures['steps']}  loss {figures['loss']:.4f}  "
            f"{figures['tokens_per_second']:,.0f} tok/s  {int(left // 60)}:{int(left % 60):02d} left",
            final=figures["step"] == figures["steps"],
        )

    return log


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """The Trainer prints a summary on stdout, which belongs to data."""
    with contextlib.redirect_stdout(io.StringIO()):
        yield


__all__ = ["FinetuneResult", "add_adapters", "finetune", "work_folder", "write_result"]
