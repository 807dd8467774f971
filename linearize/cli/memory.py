"""The memory of training, for `inspect` and `finetune --dry-run`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table

if TYPE_CHECKING:
    from linearize.recipe import Recipe
    from linearize.training.memory import Engine, TrainingMemory

GPUS = 8
"""The default number of GPUs."""


def memory_facts(stages: list[dict[Engine, TrainingMemory]]) -> list[dict[str, Any]]:
    """The memory of each stage by engine, as plain data."""
    return [{engine: memory.facts() for engine, memory in stage.items()} for stage in stages]


def show_memory(recipe: Recipe, stages: list[dict[Engine, TrainingMemory]], processes: int) -> None:
    """Print the memory as one table per stage."""
    from linearize.training.memory import memory_rows

    out = Console(highlight=False, soft_wrap=True)
    for number, (stage, engines) in enumerate(zip(recipe.stages, stages, strict=True)):
        trained = {"lora": "adapters", "mixer": "mixers", "full": "all weights"}[stage.train]
        passes = f"{stage.micro_batch} x {stage.length:,} tokens a pass"
        checkpointing = ", checkpointing" if stage.gradient_checkpointing else ""
        out.print(
            f"stage {number + 1}: {' + '.join(stage.weights)}, trains {trained}, {passes}{checkpointing}; bytes on "
            f"each GPU, of {processes} but for single",
            markup=False,
        )
        table = Table("", *engines)
        for column in table.columns[1:]:
            column.justify = "right"
        for row in memory_rows(engines):
            table.add_row(*row)
        out.print(table)
