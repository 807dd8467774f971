"""`linearize inspect` and `convert --dry-run`: the converted form of a model, from its configuration alone."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from linearize.conversion.choices import check_choices, selects
from linearize.conversion.inspection import compare_mixers, every_recurrence, inspect_model
from linearize.conversion.swap import check_convertible, check_reach
from linearize.errors import DataError, RecipeError
from linearize.jobs.checks import quiet
from linearize.runtime.files import check_free
from linearize.sources.source import DTYPES, find_source, load_config

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from linearize.recipe import Recipe
    from linearize.sources.source import Source
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
        dtype: the dtype of the caches.
        gpus: None leaves the stages out.
        chosen: True if the user named a mixer; a line to `say` then notes that a converted model keeps its own.

    Raises:
        LinearizeError: as `inspect_model` and `training_memory`.
    """
    source = find_source(model, trust_remote_code=trust_remote_code)
    facts = inspect_model(source, recipe.mixer, dtype=DTYPES.get(dtype))
    if facts["converted"] and chosen:
        say(f"{source.name}: converted already, shown as it is; the recipe's mixer section is not used")
    if not facts["converted"]:
        _say_refusal(source, recipe, say)
    if gpus is None:
        return facts, None
    from linearize.training.memory import stages_memory  # imports peft, which takes seconds

    return facts, stages_memory(load_config(source), recipe, gpus)


def inspect_recurrences(
    model: str,
    recipe: Recipe,
    *,
    dtype: str = "auto",
    trust_remote_code: bool = False,
    say: Callable[[str], None] = quiet,
) -> dict[str, Any]:
    """The facts of `compare_mixers` for the recipe's mixer with every recurrence.

    Raises:
        LinearizeError: as `compare_mixers`.
    """
    source = find_source(model, trust_remote_code=trust_remote_code)
    facts, rows = compare_mixers(source, every_recurrence(recipe.mixer), dtype=DTYPES.get(dtype))
    _say_refusal(source, recipe, say)
    mixer = recipe.mixer.model_dump(mode="json", exclude={"recurrence"})
    return {**facts, "mixer": mixer, "recurrences": rows}


def _say_refusal(source: Source, recipe: Recipe, say: Callable[[str], None]) -> None:
    """Report if `linearize convert` refuses `recipe` for `source`, although its mixer section fits."""
    try:
        _check_reach(recipe, load_config(source))
    except (DataError, RecipeError) as error:
        say(f"`linearize convert` refuses this: {error}")


def plan_convert(
    model: str | Path,
    output: Path,
    recipe: Recipe,
    *,
    overwrite: bool = False,
    trust_remote_code: bool = False,
    say: Callable[[str], None] = quiet,
) -> tuple[Source, dict[str, Any]]:
    """Make the checks of `run_convert` and write nothing; the facts are those of `inspect_model`."""
    source, config = convertible(model, output, recipe, overwrite=overwrite, trust_remote_code=trust_remote_code)
    if source.kind != "gguf":  # a GGUF file always has a tokenizer; see `has_tokenizer`
        from linearize.jobs.convert import tokenizer_for

        tokenizer_for(source, recipe, config, say=say)
    facts = inspect_model(source, recipe.mixer)
    for line in facts["positions"]:
        say(f"{source.name}: {line}")
    return source, facts


def convertible(
    model: str | Path, output: Path, recipe: Recipe, *, overwrite: bool, trust_remote_code: bool
) -> tuple[Source, Any]:
    """The source and configuration of a model, after output, model and recipe were checked."""
    check_free(output, overwrite=overwrite)
    source = find_source(str(model), trust_remote_code=trust_remote_code)
    config = load_config(source)
    check_convertible(config, source, recipe.mixer)
    _check_reach(recipe, config)
    return source, config


def _check_reach(recipe: Recipe, config: Any) -> None:
    """`check_reach`, and what `convert` would have to measure on texts that are too short for it."""
    check_reach(recipe, config)
    if selects(recipe):
        check_choices(recipe, config)
