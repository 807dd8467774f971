"""The result of a fine-tuning run, and the files that it is written to."""

from __future__ import annotations

import shutil
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from safetensors.torch import save_file

from linearize.checkpoint.provenance import sound_provenance
from linearize.checkpoint.write import base_record, write_checkpoint
from linearize.sources.source import find_source
from linearize.training.metrics import METRICS
from linearize.training.plot import PLOT, draw_training
from linearize.training.steps import Steps

if TYPE_CHECKING:
    from pathlib import Path

    from transformers import PreTrainedModel

    from linearize.data.rows import Rows, TrainingData
    from linearize.model import LinearizedForCausalLM
    from linearize.recipe import Recipe, Stage
    from linearize.training.checkpoints import Progress

HELD_OUT = "held_out.safetensors"


@dataclass
class FinetuneResult:
    """A run's result in memory.

    Attributes:
        model: the trained and merged model.
        teacher: the pretrained model, if a stage needed it.
        data: the rows of the last stage.
        recipe: the recipe, with the chosen layers or heads named in it.
        stages, start: the records of each stage and of the conversion, as in `linearize.json`.
    """

    model: LinearizedForCausalLM
    tokenizer: Any
    teacher: PreTrainedModel | None
    data: TrainingData | None
    recipe: Recipe
    stages: list[dict[str, Any]] = field(default_factory=list)
    start: dict[str, Any] = field(default_factory=dict)


def write_result(folder: Path, result: FinetuneResult, work: Path, name: str) -> None:
    """Write the checkpoint of a run, its metrics and its held-out rows into `folder`."""
    source = find_source(result.recipe.model or "")
    record = sound_provenance(source)["base"] if source.is_converted else base_record(source, None)
    if (work / METRICS).is_file():
        shutil.copyfile(work / METRICS, folder / METRICS)
        draw_training(folder / METRICS, folder / PLOT)
    if result.data is not None and len(result.data.held_out):
        write_held_out(folder, result.data.held_out)
    write_checkpoint(
        folder, result.model, result.tokenizer, result.recipe, record, result.stages, name, start=result.start
    )


def write_held_out(folder: Path, rows: Rows) -> None:
    """Write the rows that the task `held_out` scores a checkpoint on."""
    save_file(
        {"input_ids": rows.input_ids, "labels": rows.labels, "position_ids": rows.position_ids}, folder / HELD_OUT
    )


def stage_record(stage: Stage, data: TrainingData, progress: Progress) -> dict[str, Any]:
    """A stage's record in `linearize.json`, with the number of skipped steps, the step of an early end, and the step of
    the kept weights if it is not the last."""
    steps = Steps(stage, len(data.train))
    record = {
        "objective": " + ".join(f"{weight:g} {name}" for name, weight in stage.weights.items()),
        "data": data.source,
        "tokens": steps.tokens_after(progress.step),
        "length": stage.length,
        "steps": steps.total,
    }
    if progress.skipped:
        record["skipped_steps"] = progress.skipped
    if progress.step < steps.total:
        record["stopped_after"] = progress.step
    if progress.best_step:
        record |= {"kept_step": progress.best_step, "held_out_loss": progress.best}
    return record
