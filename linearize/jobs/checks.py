"""Argument checks that commands share. They import no torch, so a wrong argument fails at once."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from linearize.errors import SHORT_DTYPES, DataError, RecipeError
from linearize.errors import check_numbers as check_numbers
from linearize.runtime.cache import bytes_of

if TYPE_CHECKING:
    from collections.abc import Sequence

    from linearize.recipe import Recipe


def quiet(_: str) -> None:
    """The default of `say`: print nothing."""


def read_recipe(recipe: str | Path | Recipe, overrides: Sequence[str] = ()) -> Recipe:
    """Read a shipped recipe or a file; a `Recipe` is returned unchanged.

    Raises:
        RecipeError: the recipe is not valid, or `overrides` are given with a `Recipe`.
    """
    if isinstance(recipe, (str, Path)):
        from linearize.recipe import load_recipe

        return load_recipe(str(recipe), overrides)
    if overrides:
        raise RecipeError("overrides go with a recipe's name or file, not with one that was read already")
    return recipe


def recipe_to_train(
    recipe: str | Path | Recipe,
    overrides: Sequence[str] = (),
    *,
    model: str | Path | None = None,
    teacher: str | Path | None = None,
) -> Recipe:
    """`read_recipe` with `model` and `teacher` instead of the recipe's own.

    Raises:
        RecipeError: as `read_recipe`, or the recipe has no stages.
    """
    settings = read_recipe(recipe, overrides)
    named = {"model": model, "teacher": teacher}
    settings = settings.model_copy(update={key: str(value) for key, value in named.items() if value is not None})
    if not settings.stages:
        name = recipe if isinstance(recipe, (str, Path)) else "the recipe"
        raise RecipeError(f"{name}: has no stages, so there is nothing to train; take the recipe train")
    return settings


def model_of(recipe: Recipe) -> str:
    """The recipe's `model`.

    Raises:
        RecipeError: the recipe names no model.
    """
    if recipe.model is None:
        raise RecipeError("the recipe names no model; add `model:` or pass --set model=ID_OR_PATH")
    return recipe.model


def check_dtype(name: str, *, int8: bool = False) -> None:
    """Raises:
    DataError: the dtype is unknown, or int8 is not supported here.
    """
    names = ("auto", "float32", "bfloat16", "float16", *(("int8",) if int8 else ()))
    if name not in names:
        short = SHORT_DTYPES.get(name)
        meant = f"; did you mean {short}?" if short else ""
        raise DataError(f"dtype {name}: expected {', '.join(names[:-1])} or {names[-1]}{meant}")


def size_in_bytes(name: str, text: str) -> int:
    """`5GB` as bytes.

    Raises:
        DataError: `text` is not a size, or is 0.
    """
    size = bytes_of(text)
    if not size:
        raise DataError(f"{name} {text}: expected a size, such as 500MB or 5GB")
    return size
