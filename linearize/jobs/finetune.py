"""`linearize finetune`: train a model by a recipe and write a merged, loadable checkpoint."""

from __future__ import annotations

import contextlib
import copy
import shutil
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from peft import PeftModel
from transformers import set_seed

from linearize.checkpoint.provenance import sound_provenance, teacher_of
from linearize.conversion.swap import check_convertible, check_reach
from linearize.data.load import load_data, reserved_tokens
from linearize.data.rows import TrainingData, read_data, save_data
from linearize.errors import ModelError, OutputError, RecipeError, counted
from linearize.jobs.checks import model_of, quiet, recipe_to_train
from linearize.jobs.convert import convert_into, make_start, named_after, prepares
from linearize.jobs.result import FinetuneResult, stage_record, write_result
from linearize.model.positions import rotary_notes
from linearize.recipe import SELF, Recipe, Stage, load_recipe
from linearize.runtime import processes
from linearize.runtime.files import check_free, check_space, staged_folder
from linearize.runtime.memory import nbytes
from linearize.sources.limits import check_length, check_tokens, vocabulary_warning
from linearize.sources.source import Source, find_source, load_config, load_model, load_tokenizer
from linearize.training.adapters import add_adapters, base_of, check_dtype, check_four_bit, choose_trained, merged
from linearize.training.checkpoints import (
    checkpoint_of,
    is_done,
    load_trained,
    newest,
    progress_of,
    set_trained,
    stage_to_resume,
    step_of,
    whole_trained,
)
from linearize.training.loop import StageLoop
from linearize.training.memory import stages_memory
from linearize.training.metrics import METRICS, forget_metrics, log_to
from linearize.training.sharding import check_shardable, mesh
from linearize.training.sharding import shard as shard_model
from linearize.training.teachers import Teacher, wants_teacher
from linearize.training.trackers import Trackers, check_trackers
from linearize.training.windows import check_something_to_learn
from linearize.training.workfolder import WORK, finished_stages, recipe_to_resume, shared_work_folder

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from transformers import PreTrainedModel

    from linearize.jobs.convert import Start
    from linearize.training.memory import Engine, TrainingMemory

_CHECKPOINT, _CHECKPOINTS = 3, 3
"""The size of a checkpoint as a multiple of the trained weights (two moments each), and the maximum number of
checkpoints without a best one."""

_WIDENED = (
    "its weights are float16, whose small gradients become 0; trained and written in float32 (dtype: bfloat16 takes "
    "half the memory)"
)


def finetune(
    recipe: str | Path | Recipe,
    output: str | Path,
    *,
    model: str | Path | None = None,
    teacher: str | Path | None = None,
    overrides: Sequence[str] = (),
    resume: bool = False,
    overwrite: bool = False,
    shard: bool = False,
    trust_remote_code: bool = False,
    say: Callable[[str], None] = quiet,
) -> FinetuneResult:
    """Train a model by a recipe's stages, and write it merged and ready to load.

    Args:
        recipe: a shipped recipe's name, a file, or a `Recipe`.
        output: the folder to write; during training, checkpoints and metrics.jsonl are in a work folder beside it.
        model: the model to train, converted or not, instead of the recipe's `model`.
        teacher: the pretrained model, instead of the recipe's `teacher` or the base of the converted model.
        overrides: changes of single keys, such as `stages.0.lr=5e-4`.
        resume: continue an interrupted run from its last checkpoint, with the recipe saved in it; a finished run is
            loaded.
        overwrite: replace the output if it exists.
        shard: split weights, gradients and optimizer state among the processes (FSDP2); see `run_stages`.
        trust_remote_code: run Python code from the model's repository.
        say: called with each progress line.

    Returns:
        the trained model, its tokenizer, and a record of each stage.

    Raises:
        LinearizeError: the recipe, the model, the data or the output is not usable.
    """
    target, first = Path(output), processes.is_first()
    say = say if first else quiet
    if resume and not overwrite and finished_stages(target):
        say(f"{target}: this run is finished, so there is nothing to resume")
        return _finished(target)
    settings = recipe_to_train(recipe, overrides, model=model, teacher=teacher)
    if first:
        check_free(target, overwrite=overwrite)
    shard = processes.join() or shard
    if resume and isinstance(recipe, (str, Path)):
        kept = partial(recipe_to_resume, target, settings, overrides, name=str(recipe), say=say)
        settings = processes.from_the_first(kept)
        _check_named(target, settings, model=model, teacher=teacher)
    with shared_work_folder(target, settings, resume=resume) as work:
        result = run_stages(settings, work, say=say, resume=resume, trust_remote_code=trust_remote_code, shard=shard)
        processes.leave()
        if first:
            with staged_folder(target, overwrite=overwrite) as folder:
                write_result(folder, result, work, target.name)
    named_after(result.model, target)
    return result


def plan_finetune(recipe: Recipe, gpus: int, *, trust_remote_code: bool = False) -> list[dict[Engine, TrainingMemory]]:
    """The memory of each stage by engine, on each of `gpus` GPUs; nothing is trained or written."""
    check_dtype(recipe)
    source = find_source(model_of(recipe), trust_remote_code=trust_remote_code)
    config = load_config(source)
    if not source.is_converted:
        check_reach(recipe, config)
    return stages_memory(config, recipe, gpus)


def _check_named(target: Path, recipe: Recipe, **named: str | Path | None) -> None:
    """Raises:
    OutputError: the unfinished run has another model or teacher than the given one.
    """
    for key, value in named.items():
        own = getattr(recipe, key)
        if value is not None and str(value) != own:
            raise OutputError(
                f"{target}: the unfinished run has {key} {own}, not {value}; leave {key} out to resume it, or begin "
                "anew with another output"
            )


def _finished(target: Path) -> FinetuneResult:
    """The result of the finished run that wrote `target`."""
    source, recipe = find_source(str(target)), load_recipe(str(target / "recipe.yaml"))
    told, model = sound_provenance(source), cast("Any", load_model(source))
    named_after(model, target)
    return FinetuneResult(model, load_tokenizer(source), None, None, recipe, told["stages"], told.get("start", {}))


def run_stages(
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
    """Run the stages of `recipe`.

    Args:
        work: the folder of this run's checkpoints and `metrics.jsonl`; see `work_folder`.
        say: called with each progress line.
        resume: continue from the newest checkpoint in `work`.
        pretrained, tokenizer: those of `recipe.model`, if already loaded.
        begin: loads the result of the conversion, if that is already done.
        shard: split weights, gradients and optimizer states among the processes; the first process has the result.

    Raises:
        LinearizeError: the recipe, the model, the data or a checkpoint is not usable.
    """
    reference = model_of(recipe)
    check_trackers(recipe.report_to)
    check_dtype(recipe)
    source = find_source(reference, trust_remote_code=trust_remote_code)
    asked = any(wants_teacher(stage) or _reads(stage, SELF) for stage in recipe.stages)
    # The base of a converted model may no longer exist; it is needed only by stages that call it.
    base = teacher_of(source, recipe.teacher) if asked or recipe.teacher or not source.is_converted else None
    if source.is_converted and base == source:
        raise RecipeError(f"teacher: {base.name} is the model itself; name the pretrained model that it was made from")
    teacher = Teacher(base, recipe.dtype, pretrained if base == source else None)
    config: Any = load_config(source) if pretrained is None else pretrained.config
    if not source.is_converted and begin is None:
        check_reach(recipe, config)
    tokenizer = tokenizer or load_tokenizer(source)
    if warning := vocabulary_warning(tokenizer, config, source.name):
        say(warning)
    set_seed(recipe.seed)
    written: dict[str, Any] = {}
    told: dict[str, Any] = {}
    if shard:
        check_shardable(recipe)
        mesh()
    four_bit = recipe.lora is not None and recipe.lora.four_bit
    if four_bit:
        check_four_bit(recipe, shard)
    # Copying a loaded model is faster than reading it again, and a stage that calls the teacher needs both.
    shared = base == source and not (shard or four_bit) and asked
    started = None
    apart = processes.count() > 1 or four_bit
    if not source.is_converted and begin is None and apart and prepares(recipe):
        started = work / "start"
        recipe, told = _started(source, recipe, tokenizer, started, resume=resume, say=say)
    elif source.is_converted:
        if config.quantized:
            raise ModelError(
                f"{source.name}: its weights are integers, which cannot be trained; train what it was exported from"
            )
        written = sound_provenance(source)
        told = written.get("start", {})
        say(f"{source.name}: converted already, trained as it is; the recipe's mixer section is not used")
    elif begin is None:
        check_convertible(config, source, recipe.mixer)  # before any weights are loaded
        for line in rotary_notes(config):
            say(f"{source.name}: {line}")
    # A model in 4 bits cannot be cast, so it is loaded in float32 where its configuration says float16.
    half = four_bit and recipe.dtype == "auto" and config.dtype == torch.float16
    if half:
        say(f"{source.name}: {_WIDENED}")

    def converted(**options: Any) -> Any:
        """The converted model; float16 weights (possible with dtype `auto` only) become float32, which is exact."""
        nonlocal half
        model = as_converted(**options)
        if not recipe.stages or options.get("four_bit") or all(p.dtype != torch.float16 for p in model.parameters()):
            return model
        if not half:
            half = True
            say(f"{source.name}: {_WIDENED}")
        return model.float()

    def as_converted(**options: Any) -> Any:
        nonlocal recipe, told
        options["dtype"] = "float32" if half and options.get("four_bit") else recipe.dtype
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

    def student_of(model: Any, **options: Any) -> Any:
        adapted = any(stage.train == "lora" for stage in recipe.stages)
        return add_adapters(model, recipe.lora if adapted else None, **options)

    with processes.in_turns() if shard else contextlib.nullcontext():
        student = student_of(converted(four_bit=four_bit, device="cpu" if shard else None), say=say)
        for number, stage in enumerate(recipe.stages):
            choose_trained(student, stage.train)  # fail early if a later stage has nothing to train
            check_length(base_of(student), stage.length, f"stages.{number}.length")
        if shard:
            shard_model(student)
    records: list[dict[str, Any]] = list(written.get("stages", []))
    earlier = len(records)  # stages of the runs before
    data, reserved = None, reserved_tokens(recipe.stages)
    # The first process alone decides, because it also removes checkpoints and a shared disk may list them late.
    reached = processes.from_the_first(partial(stage_to_resume, work, len(recipe.stages))) if resume else 0

    def rows_of(number: int, stage: Stage) -> TrainingData:
        kept = work / f"stage-{number}.rows.safetensors"
        with processes.first_goes_ahead():  # the other processes read its files
            if kept.is_file() and (resume or not processes.is_first()):
                return read_data(kept)
            found = load_data(
                stage.data,
                tokenizer=tokenizer,
                length=stage.length,
                seed=recipe.seed,
                teacher=teacher,
                student=lambda: base_of(student).eval(),
                draw=earlier + number,
                reserved=reserved,
                progress=say,
            )
            for side in (found.train, found.held_out):
                check_tokens(side.input_ids, tokenizer, config, f"stages.{number}.data")
            save_data(found, kept)
            return found

    # A sharded teacher cannot generate text for one process, so the rows are made before.
    ahead = [rows_of(number, stage) for number, stage in enumerate(recipe.stages)] if shard else None
    for number, stage in enumerate(recipe.stages):
        data = rows_of(number, stage) if ahead is None else ahead[number]
        untrained = not (earlier + number or told or recipe.teacher)
        adapted = recipe.lora is not None
        if warning := check_something_to_learn(
            base_of(student), data.train, stage, adapters=adapted, untrained=untrained
        ):
            say(f"stage {number + 1}: {warning}")
        if not shard:
            choose_trained(student, stage.train)
        folder = work / f"stage-{number}"
        start = processes.from_the_first(partial(newest, folder)) if resume else None
        done = step_of(start) if start else 0
        finished = start is not None and is_done(start)
        if number < reached and not finished:
            # Later stages started from weights of a checkpoint that is lost.
            reached = number
            say(f"stage {number + 1}: its last checkpoint is damaged or gone; stages after it begin anew")
            if processes.is_first():
                for later in range(number + 1, len(recipe.stages)):
                    shutil.rmtree(work / f"stage-{later}", ignore_errors=True)
        if start is not None and finished:
            say(f"stage {number + 1}: done before ({start.name})")
            progress = progress_of(start)
            load_trained(student, checkpoint_of(folder, progress.best_step or progress.step))
            records.append(stage_record(stage, data, progress))
            continue
        kept = _CHECKPOINT * (_CHECKPOINTS + (stage.keep == "best"))
        check_space(work, nbytes(student) + kept * sum(p.nbytes for p in student.parameters() if p.requires_grad))
        if processes.is_first():
            forget_metrics(work / METRICS, number, done)
        with teacher.serving(stage, data.train, say, shard=shard) as served:
            log = log_to(work / METRICS, number, len(recipe.stages))
            name = work.name.removesuffix(WORK)
            runs = str(work.with_name(f"{name}.runs") / f"stage-{number + 1}")
            trackers = Trackers(recipe.report_to, f"{name}, stage {number + 1}", runs) if recipe.report_to else None
            if start:
                say(f"stage {number + 1}: going on from {start.name}")
            loop = StageLoop(student, served, stage, data, folder, recipe.seed, log, say, trackers)
            loop.train(start)
        progress = loop.progress
        if progress.step < loop.steps.total:
            worse = counted(progress.worse, "evaluation", "evaluations")
            say(f"stage {number + 1}: ended after step {progress.step}, {worse} without a better held-out loss")
        if progress.best_step:
            load_trained(student, checkpoint_of(folder, progress.best_step))
            say(f"stage {number + 1}: kept step {progress.best_step}, held-out loss {progress.best:.4f}")
        records.append(stage_record(stage, data, progress))
    if shard or four_bit:
        trained = whole_trained(student)
        if not processes.is_first():
            return FinetuneResult(base_of(student), tokenizer, None, data, recipe, records, told)
        # Rebuilt on the CPU without shards, because the frozen weights on disk are unchanged.
        student = student_of(converted(device="cpu"))
        choose_trained(student, recipe.stages[-1].train)
        set_trained(student, trained)
    if isinstance(student, PeftModel) and data is not None and processes.is_first():
        student = merged(student, data.train, str(work))
    elif isinstance(student, PeftModel):
        student = student.merge_and_unload(safe_merge=True)
    student.requires_grad_(False).eval()
    return FinetuneResult(student, tokenizer, teacher.model, data, recipe, records, told)


def _started(
    source: Source, recipe: Recipe, tokenizer: Any, folder: Path, *, resume: bool, say: Callable[[str], None]
) -> tuple[Recipe, dict[str, Any]]:
    """Run `convert_into` in the first process, which leaves the result in `folder` for all. Returns the recipe with the
    chosen layers or heads named in it, and the `start` record."""
    with processes.first_goes_ahead():
        if processes.is_first() and not (resume and folder.is_dir()):
            shutil.rmtree(folder, ignore_errors=True)
            with staged_folder(folder) as staging:
                convert_into(source, recipe, staging, say=say, tokenizer=tokenizer)
    kept = load_recipe(str(folder / "recipe.yaml"))
    return kept, sound_provenance(find_source(str(folder))).get("start", {})


def _reads(stage: Stage, source: str) -> bool:
    return any(one.source == source for one in stage.data.sources)
