"""`linearize inspect`: what a recipe makes of a model, from the configuration alone."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from linearize.conversion.inspection import compare_mixers, every_recurrence, inspect_model
from linearize.conversion.source import DTYPES, find_source, load_config
from linearize.jobs.checks import quiet

if TYPE_CHECKING:
    from collections.abc import Callable

    from linearize.recipe import Recipe
    from linearize.training.memory import Engine, TrainingMemory


def inspect(
    model: str,
    recipe: Recipe,
    *,
    dtype: str = "auto",
    gpus: int | None = None,
    chosen: bool = False,
    trust_remote_code: bool = False,
    say: Callable[[str], None] = quiet,
) -> tuple[dict[str, Any], list[dict[Engine, TrainingMemory]] | None]:
    """The facts of `inspect_model`, and for each stage of the recipe its memory on each of `gpus` GPUs.

    Args:
        dtype: of the caches.
        gpus: None leaves the stages out.
        chosen: whether the user named a mixer; `say` reports it where a converted model has its own.

    Raises:
        LinearizeError: as `inspect_model` and `training_memory`.
    """
    source = find_source(model, trust_remote_code=trust_remote_code)
    facts = inspect_model(source, recipe.mixer, dtype=DTYPES.get(dtype))
    if facts["converted"] and chosen:
        say(f"{source.name}: converted already, shown as it is; the recipe's mixer section is not used")
    if gpus is None:
        return facts, None
    from linearize.training.memory import stages_memory  # imports peft, which takes seconds

    return facts, stages_memory(load_config(source), recipe, gpus)


def inspect_recurrences(
    model: str, recipe: Recipe, *, dtype: str = "auto", trust_remote_code: bool = False
) -> dict[str, Any]:
    """The facts of `compare_mixers` for the recipe's mixer with every recurrence.

    Raises:
        LinearizeError: as `compare_mixers`.
    """
    source = find_source(model, trust_remote_code=trust_remote_code)
    facts, rows = compare_mixers(source, every_recurrence(recipe.mixer), dtype=DTYPES.get(dtype))
    mixer = recipe.mixer.model_dump(mode="json", exclude={"recurrence"})
    return {**facts, "mixer": mixer, "recurrences": rows}
