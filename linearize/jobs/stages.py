"""Run the stages of a recipe: the model to train, the rows of each stage, the training, and the merged weights."""

from __future__ import annotations

import contextlib
import copy
import shutil
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from peft import PeftModel
from transformers import set_seed

from linearize.checkpoint.provenance import sound_provenance, teacher_of
from linearize.conversion.swap import check_convertible, check_reach
from linearize.data.load import load_data, reserved_tokens
from linearize.data.rows import TrainingData, read_data, save_data
from linearize.errors import ModelError, RecipeError, counted
from linearize.jobs.checks import model_of
from linearize.jobs.convert import convert_into, make_start, prepares
from linearize.jobs.result import FinetuneResult, stage_record
from linearize.model.positions import rotary_notes
from linearize.recipe import SELF, Recipe, Stage, load_recipe
from linearize.runtime import processes
from linearize.runtime.files import check_space, staged_folder
from linearize.runtime.memory import nbytes
from linearize.sources.limits import check_length, check_tokens, vocabulary_warning
from linearize.sources.source import find_source, load_config, load_model, load_tokenizer
from linearize.training.adapters import add_adapters, base_of, check_dtype, check_four_bit, choose_trained, merged
from linearize.training.checkpoints import (
    Progress,
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
from linearize.training.metrics import METRICS, forget_metrics, log_to
from linearize.training.sharding import check_shardable, mesh
from linearize.training.sharding import shard as shard_model
from linearize.training.teachers import Teacher, wants_teacher
from linearize.training.trackers import Trackers, check_trackers
from linearize.training.windows import check_something_to_learn
from linearize.training.workfolder import WORK

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from transformers import PreTrainedModel

    from linearize.jobs.convert import Start

_CHECKPOINT, _CHECKPOINTS = 3, 3
"""The size of a checkpoint as a multiple of the trained weights (two moments each), and the maximum number of
checkpoints without a best one."""

_WIDENED = (
    "its weights are float16, whose small gradients become 0; trained and written in float32 (dtype: bfloat16 takes "
    "half the memory)"
)


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
    models = _Models(recipe, work, say, resume, trust_remote_code, pretrained, tokenizer, begin, shard)
    student = models.first_student()
    rows = _StageRows(models, student)
    records: list[dict[str, Any]] = list(models.written.get("stages", []))
    data = None
    # The first process alone decides, because it also removes checkpoints and a shared disk may list them late.
    reached = processes.from_the_first(partial(stage_to_resume, work, len(recipe.stages))) if resume else 0
    # A sharded teacher cannot generate text for one process, so the rows are made before.
    ahead = [rows.of(number) for number in range(len(recipe.stages))] if shard else None
    for number, stage in enumerate(models.recipe.stages):
        data = rows.of(number) if ahead is None else ahead[number]
        if warning := check_something_to_learn(
            base_of(student),
            data.train,
            stage,
            adapters=models.recipe.lora is not None,
            untrained=not (records or models.told or recipe.teacher),
        ):
            say(f"stage {number + 1}: {warning}")
        if not shard:
            choose_trained(student, stage.train)
        folder = work / f"stage-{number}"
        start = processes.from_the_first(partial(newest, folder)) if resume else None
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
        else:
            progress = _train(models, student, number, data, start)
        records.append(stage_record(stage, data, progress))
    result = FinetuneResult(student, models.tokenizer, None, data, models.recipe, records, models.told)
    if shard or models.four_bit:
        trained = whole_trained(student)
        if not processes.is_first():
            result.model = base_of(student)
            return result
        # Rebuilt on the CPU without shards, because the frozen weights on disk are unchanged.
        student = models.adapted(models.converted(device="cpu"))
        choose_trained(student, recipe.stages[-1].train)
        set_trained(student, trained)
    if isinstance(student, PeftModel) and data is not None and processes.is_first():
        student = merged(student, data.train, str(work))
    elif isinstance(student, PeftModel):
        student = student.merge_and_unload(safe_merge=True)
    student.requires_grad_(False).eval()
    result.model, result.teacher = student, models.teacher.model
    return result


class _Models:
    """The models of a run: checked on creation, and loaded on demand.

    Attributes:
        recipe: the recipe; after the conversion, with the chosen layers or heads named in it.
        written: the provenance of a model that was converted before; empty for a pretrained one.
        told: the `start` record of the conversion.
        started: the folder of a conversion that one process made for all; None without one.
    """

    def __init__(
        self,
        recipe: Recipe,
        work: Path,
        say: Callable[[str], None],
        resume: bool,
        trust_remote_code: bool,
        pretrained: PreTrainedModel | None,
        tokenizer: Any,
        begin: Callable[[], Start] | None,
        shard: bool,
    ) -> None:
        self.recipe, self.work, self.say, self.resume, self.begin, self.shard = recipe, work, say, resume, begin, shard
        check_trackers(recipe.report_to)
        check_dtype(recipe)
        self.source = source = find_source(model_of(recipe), trust_remote_code=trust_remote_code)
        asked = any(wants_teacher(stage) or _reads(stage, SELF) for stage in recipe.stages)
        # The base of a converted model may no longer exist; it is needed only by stages that call it.
        base = teacher_of(source, recipe.teacher) if asked or recipe.teacher or not source.is_converted else None
        if source.is_converted and base == source:
            raise RecipeError(
                f"teacher: {base.name} is the model itself; name the pretrained model that it was made from"
            )
        self.teacher = Teacher(base, recipe.dtype, pretrained if base == source else None)
        self.config: Any = load_config(source) if pretrained is None else pretrained.config
        if not source.is_converted and begin is None:
            check_reach(recipe, self.config)
        self.tokenizer = tokenizer or load_tokenizer(source)
        if warning := vocabulary_warning(self.tokenizer, self.config, source.name):
            say(warning)
        set_seed(recipe.seed)
        if shard:
            check_shardable(recipe)
            mesh()
        self.four_bit = recipe.lora is not None and recipe.lora.four_bit
        if self.four_bit:
            check_four_bit(recipe, shard)
        # Copying a loaded model is faster than reading it again, and a stage that calls the teacher needs both.
        self.shared = base == source and not (shard or self.four_bit) and asked
        self.written: dict[str, Any] = {}
        self.told: dict[str, Any] = {}
        self.started: Path | None = None
        self._check_model()
        # A model in 4 bits cannot be cast, so it is loaded in float32 where its configuration says float16.
        self.widened = self.four_bit and recipe.dtype == "auto" and self.config.dtype == torch.float16
        if self.widened:
            say(f"{source.name}: {_WIDENED}")

    def _check_model(self) -> None:
        """Check the model before any weights are loaded. Convert it here if only the first process can."""
        source, apart = self.source, processes.count() > 1 or self.four_bit
        if not source.is_converted and self.begin is None and apart and prepares(self.recipe):
            self._convert_once()
        elif source.is_converted:
            if self.config.quantized:
                raise ModelError(
                    f"{source.name}: its weights are integers, which cannot be trained; train what it was exported from"
                )
            self.written = sound_provenance(source)
            self.told = self.written.get("start", {})
            self.say(f"{source.name}: converted already, trained as it is; the recipe's mixer section is not used")
        elif self.begin is None:
            check_convertible(self.config, source, self.recipe.mixer)
            for line in rotary_notes(self.config):
                self.say(f"{source.name}: {line}")

    def _convert_once(self) -> None:
        """Run `convert_into` in the first process, which leaves the result in the work folder for all."""
        self.started = folder = self.work / "start"
        with processes.first_goes_ahead():
            if processes.is_first() and not (self.resume and folder.is_dir()):
                shutil.rmtree(folder, ignore_errors=True)
                with staged_folder(folder) as staging:
                    convert_into(self.source, self.recipe, staging, say=self.say, tokenizer=self.tokenizer)
        self.recipe = load_recipe(str(folder / "recipe.yaml"))
        self.told = sound_provenance(find_source(str(folder))).get("start", {})

    def first_student(self) -> Any:
        """The model to train, with its adapters.

        Raises:
            LinearizeError: a stage has nothing to train, or rows that are too long for the model.
        """
        with processes.in_turns() if self.shard else contextlib.nullcontext():
            model = self.converted(four_bit=self.four_bit, device="cpu" if self.shard else None)
            student = self.adapted(model, say=self.say)
            for number, stage in enumerate(self.recipe.stages):
                choose_trained(student, stage.train)  # fail early if a later stage has nothing to train
                check_length(base_of(student), stage.length, f"stages.{number}.length")
            if self.shard:
                shard_model(student)
        return student

    def adapted(self, model: Any, **options: Any) -> Any:
        """`model` with the recipe's adapters, if a stage trains them."""
        adapted = any(stage.train == "lora" for stage in self.recipe.stages)
        return add_adapters(model, self.recipe.lora if adapted else None, **options)

    def converted(self, **options: Any) -> Any:
        """The converted model; float16 weights (possible with dtype `auto` only) become float32, which is exact."""
        options["dtype"] = "float32" if self.widened and options.get("four_bit") else self.recipe.dtype
        model = self._converted(options)
        in_half = any(p.dtype == torch.float16 for p in model.parameters())
        if not self.recipe.stages or options.get("four_bit") or not in_half:
            return model
        if not self.widened:
            self.widened = True
            self.say(f"{self.source.name}: {_WIDENED}")
        return model.float()

    def _converted(self, options: dict[str, Any]) -> Any:
        if self.source.is_converted or self.started is not None:
            return load_model(self.source if self.started is None else find_source(str(self.started)), **options)
        if self.begin is None:
            model = copy.deepcopy(self.teacher()) if self.shared else load_model(self.source, **options)
            check_convertible(model.config, self.source)
            begun = make_start(self.source, self.recipe, model, self.tokenizer, say=self.say)
        else:
            begun = self.begin()
        self.recipe, self.told = begun.recipe, begun.record
        return begun.model


class _StageRows:
    """The rows of each stage, made by one process and kept in the work folder."""

    def __init__(self, models: _Models, student: Any) -> None:
        self.models, self.student = models, student
        self.reserved = reserved_tokens(models.recipe.stages)
        self.earlier = len(models.written.get("stages", []))  # stages of the runs before

    def of(self, number: int) -> TrainingData:
        models, stage = self.models, self.models.recipe.stages[number]
        kept = models.work / f"stage-{number}.rows.safetensors"
        with processes.first_goes_ahead():  # the other processes read its files
            if kept.is_file() and (models.resume or not processes.is_first()):
                return read_data(kept)
            found = load_data(
                stage.data,
                tokenizer=models.tokenizer,
                length=stage.length,
                seed=models.recipe.seed,
                teacher=models.teacher,
                student=lambda: base_of(self.student).eval(),
                draw=self.earlier + number,
                reserved=self.reserved,
                progress=models.say,
            )
            for side in (found.train, found.held_out):
                check_tokens(side.input_ids, models.tokenizer, models.config, f"stages.{number}.data")
            save_data(found, kept)
            return found


def _train(models: _Models, student: Any, number: int, data: TrainingData, start: Path | None) -> Progress:
    """Train stage `number`, from the checkpoint `start` if it is given; `student` then has the weights to keep."""
    recipe, work, say = models.recipe, models.work, models.say
    stage, folder = recipe.stages[number], work / f"stage-{number}"
    kept = _CHECKPOINT * (_CHECKPOINTS + (stage.keep == "best"))
    check_space(work, nbytes(student) + kept * sum(p.nbytes for p in student.parameters() if p.requires_grad))
    if processes.is_first():
        forget_metrics(work / METRICS, number, step_of(start) if start else 0)
    with models.teacher.serving(stage, data.train, say, shard=models.shard) as served:
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
    return progress


def _reads(stage: Stage, source: str) -> bool:
    return any(one.source == source for one in stage.data.sources)
