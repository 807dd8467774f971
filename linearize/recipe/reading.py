"""Read recipes from files, shipped names and `--set`, with one-line errors.

A recipe may build on another: `base: NAME|FILE` takes everything from it except the description. Sections are merged
key by key; a list (`stages`) or a plain value replaces the base's.
"""

from __future__ import annotations

import difflib
import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import ValidationError

from linearize.errors import RecipeError, counted
from linearize.recipe import wording
from linearize.recipe.document import DocumentError, parse_document, write_document
from linearize.recipe.schema import GONE, Recipe
from linearize.runtime.folders import shipped_folder

if TYPE_CHECKING:
    from collections.abc import Sequence

    from pydantic_core import ErrorDetails

    from linearize.recipe.document import Path as KeyPath

LARGEST_FILE = 1_000_000
"""Bytes. A recipe is a page of text, so a larger file is the wrong file."""

LEADING = ("default", "small", "train", "liger-gla")
"""The first recipes of `shipped_recipes`; the others follow by name."""

_SUFFIXES = (".yaml", ".yml")


@dataclass(frozen=True)
class ShippedRecipe:
    """A recipe that comes with the package."""

    name: str
    description: str
    measured: str
    path: Path


@dataclass
class _Draft:
    """A recipe before validation: its plain values merged over its base's, and the `file:line` of every key."""

    value: dict[Any, Any]
    places: dict[KeyPath, str]


_LONGEST_NAME = 300
"""The maximum number of characters of a name or path in an error."""


@dataclass(frozen=True)
class _Override:
    """One `--set`: the path, the value, and the user's spelling."""

    path: KeyPath
    value: Any
    text: str


def shipped_recipes() -> list[ShippedRecipe]:
    """The recipes that come with the package: `LEADING`, then the others by name."""
    found = []
    for name in recipe_names():
        path = shipped_folder("recipes") / f"{name}.yaml"
        recipe = parse_recipe(_read(path, path.name), path.name, path=path)
        found.append(ShippedRecipe(name, recipe.description, recipe.measured, path))
    return found


def recipe_names() -> list[str]:
    """The names of `shipped_recipes`, in their order."""
    names = sorted(path.stem for path in shipped_folder("recipes").glob("*.yaml"))
    return [*(name for name in LEADING if name in names), *(name for name in names if name not in LEADING)]


def recipe_path(name_or_path: str, folder: Path | None = None) -> Path:
    """The file of a recipe, given by a shipped recipe's name or by a path relative to `folder` (the working directory).

    A bare name means the shipped recipe, with hyphens or underscores; a name with a folder or a YAML suffix means a
    file.

    Raises:
        RecipeError: there is neither.
    """
    beside = folder or Path()
    shipped = shipped_folder("recipes")
    names = recipe_names()
    if (name := name_or_path.replace("_", "-")) in names:
        return shipped / f"{name}.yaml"
    path = beside / name_or_path
    shown = wording.cut(wording.one_line(name_or_path), _LONGEST_NAME)
    try:
        if path.is_dir():
            if (path / "config.json").is_file():
                raise RecipeError(f"{shown}: a model, not a recipe; name a recipe first, and --set model={shown}")
            raise RecipeError(f"{shown}: a folder, not a recipe; name a .yaml file in it")
        if path.exists():
            return path
    except (OSError, ValueError) as error:
        raise RecipeError(f"{shown}: cannot be read: {getattr(error, 'strerror', None) or error}") from None
    near = difflib.get_close_matches(path.stem if path.suffix in _SUFFIXES else name_or_path, names, n=2, cutoff=0.5)
    hint = f"did you mean {' or '.join(repr(name) for name in near)}? " if near else ""
    is_file = len(Path(name_or_path).parts) > 1 or path.suffix in _SUFFIXES
    what = f"{shown}: no such file" if is_file else f"unknown recipe {shown!r}"
    raise RecipeError(f"{what}; {hint}run 'linearize recipes ls' to see the shipped recipes")


def load_recipe(name_or_path: str, overrides: Sequence[str] = ()) -> Recipe:
    """Read a shipped recipe by name, or a file, and apply `key=value` overrides.

    Raises:
        RecipeError: one line, with the file and line of the key.
    """
    path = recipe_path(name_or_path)
    where = _shown_path(path)
    return parse_recipe(_read(path, where), where, overrides, path=path)


def parse_recipe(text: str, where: str, overrides: Sequence[str] = (), *, path: Path | None = None) -> Recipe:
    """Validate a recipe's text, merged over its base, with `overrides` applied.

    Args:
        where: the name of the text in errors.
        path: the file of the text; a relative base is looked up in its folder, without a path in the working directory.

    Raises:
        RecipeError: one line, with the file and line of the first wrong key; `every` has one line for each.
    """
    draft = _draft(text, where, () if path is None else (path,))
    for section, key in GONE:
        values = draft.value.get(section)
        if isinstance(values, dict) and values.get(key, ...) is None:
            del values[key]
    parsed = [_parse_override(text) for text in overrides]
    for override in parsed:
        _apply(draft.value, override)
    try:
        return Recipe.model_validate(draft.value)
    except ValidationError as error:
        lines = [*dict.fromkeys(_error_line(one, draft, parsed) for one in error.errors(include_url=False))]
        more = f" (+{len(lines) - 1} more; 'linearize recipes check' shows all)" if len(lines) > 1 else ""
        raise RecipeError(lines[0] + more, every=lines) from None


def dump_recipe(recipe: Recipe) -> str:
    """The resolved recipe as YAML with every key; `parse_recipe` reads it back to an equal recipe."""
    return write_document(recipe.model_dump())


def _draft(text: str, where: str, chain: tuple[Path, ...]) -> _Draft:
    """The values of a recipe's text merged over those of its base; `chain` are the files from the first recipe on."""
    try:
        document = parse_document(text)
    except DocumentError as error:
        raise RecipeError(wording.one_line(f"{_at(where, error.line)}: {error}")) from None
    if not isinstance(document.value, dict):
        got = "an empty document" if document.value is None else wording.shown(document.value)
        raise RecipeError(wording.one_line(f"{where}: expected a mapping of recipe keys, got {got}"))
    own = _Draft(document.value, {key: _at(where, line) for key, line in document.lines.items()})
    if "base" not in own.value:
        return own
    name, place = own.value.pop("base"), f"{own.places[('base',)]}: base"
    if not isinstance(name, str) or not name:
        raise RecipeError(wording.one_line(f"{place}: expected a recipe's name or file, got {wording.shown(name)}"))
    try:
        path = recipe_path(name, chain[-1].parent if chain else None)
    except RecipeError as error:
        raise RecipeError(wording.one_line(f"{place}: {error}")) from None
    if path.resolve() in (earlier.resolve() for earlier in chain):
        raise RecipeError(wording.one_line(f"{place}: {name} builds on this recipe in turn; name another base"))
    below = _draft(_read(path, _shown_path(path)), _shown_path(path), (*chain, path))
    for key in ("description", "measured"):  # of the base, not of this recipe
        below.value.pop(key, None)
    replaced: list[KeyPath] = []
    _lay_over(below.value, own.value, (), replaced)
    kept = {key: at for key, at in below.places.items() if not any(key[: len(new)] == new for new in replaced)}
    return _Draft(below.value, kept | own.places)


def _lay_over(base: dict[Any, Any], own: dict[Any, Any], parent: KeyPath, replaced: list[KeyPath]) -> None:
    """Merge `own` into `base`, section by section; adds the paths of replaced values to `replaced`."""
    for key, value in own.items():
        path: KeyPath = (*parent, key)
        if isinstance(value, dict) and isinstance(base.get(key), dict) and wording.section_at(path) is not None:
            _lay_over(base[key], value, path, replaced)
        else:
            base[key] = value
            replaced.append(path)


def _shown_path(path: Path) -> str:
    return path.name if path.parent == shipped_folder("recipes") else str(path)


def _read(path: Path, where: str) -> str:
    where = wording.one_line(where)
    try:
        if not path.is_file():
            raise RecipeError(f"{where}: not a regular file")
        with path.open("rb") as file:
            data = file.read(LARGEST_FILE + 1)
    except OSError as error:
        raise RecipeError(f"{where}: cannot be read: {error.strerror}") from None
    if len(data) > LARGEST_FILE:
        raise RecipeError(f"{where}: larger than {LARGEST_FILE // 1000} kB; this is not a recipe")
    if b"\0" in data:
        raise RecipeError(f"{where}: contains NUL bytes; a recipe is UTF-8 text")
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise RecipeError(f"{_at(where, line)}: not UTF-8 text; save the file as UTF-8") from None


def _at(where: str, line: int | None) -> str:
    return where if line is None else f"{where}:{line}"


def _error_line(error: ErrorDetails, draft: _Draft, overrides: Sequence[_Override]) -> str:
    path = error["loc"]
    needs = (error.get("ctx") or {}).get("needs")
    if needs is not None and (at := [one for one in overrides if one.path == (*path[:-1], needs)]):
        return wording.one_line(
            f"--set {at[-1].text}: this recipe keeps tokens in {needs} and needs 1 or more; "
            "for none take another recipe, such as --recipe window-gla"
        )
    # Blame the last --set that wrote this key, a parent or a child; otherwise the line of the nearest existing key.
    blamed = [override for override in overrides if all(a == b for a, b in zip(path, override.path, strict=False))]
    if blamed:
        full = wording.dotted(path)
        place = f"--set {blamed[-1].text}" + (f": {full}" if len(path) > len(blamed[-1].path) else "")
    else:
        nearest = next(draft.places[path[:n]] for n in range(len(path), -1, -1) if path[:n] in draft.places)
        place = f"{nearest}: {wording.dotted(path)}"
    return wording.one_line(f"{place}: {wording.explain(error)}")


def _parse_override(text: str) -> _Override:
    key, equals, raw = text.partition("=")
    if not equals or not key.strip():
        raise _override_error(text, "expected key=value, for example --set mixer.window=128")
    dotted = re.sub(r"\[(\d+)\]", r".\1", key.strip())  # stages[0].lr is stages.0.lr
    path: KeyPath = tuple(int(part) if _is_index(part) else part for part in dotted.split("."))
    try:
        value = parse_document(raw).value
    except DocumentError as error:
        raise _override_error(text, str(error)) from None
    return _Override(path, value, text)


def _is_index(part: str) -> bool:
    return part.isascii() and part.isdigit() and len(part) < 10


def _override_error(text: str, message: str) -> RecipeError:
    return RecipeError(wording.one_line(f"--set {text}: {message}"))


def _apply(recipe: dict[Any, Any], override: _Override) -> None:
    """Write one override into a recipe's plain values, creating missing sections."""
    target: Any = recipe  # a mapping or a list of the document
    for depth, part in enumerate(override.path):
        parent, last = override.path[:depth], depth == len(override.path) - 1
        if isinstance(target, list):
            _check_index(target, part, override, parent)
        else:
            _check_key(target, part, override, parent)
        if last:
            target[part] = override.value
            return
        child = target.get(part) if isinstance(target, dict) else target[part]
        if child is None:
            child = target[part] = [] if wording.is_list((*parent, part)) else {}
        target = child


def _check_key(target: Any, part: str | int, override: _Override, parent: KeyPath) -> None:
    if (*parent, part) == ("base",):
        raise _override_error(override.text, "a base is not set on top of a recipe; name that recipe itself")
    section = wording.section_at(parent)
    if section is not None and part not in section.model_fields:
        raise _override_error(override.text, wording.unknown_key((*parent, part), full_path=True))
    if not isinstance(target, dict) or (section is None and not wording.is_open(parent)):
        raise _override_error(override.text, f"{wording.dotted(parent)} has no keys of its own; set it as a whole")


def _check_index(target: list[Any], part: str | int, override: _Override, parent: KeyPath) -> None:
    if not isinstance(part, int) or part >= len(target):
        items = counted(len(target), "item", "items")
        hint = f"the list has {items}, counted from 0" if target else "the list is empty, set it as a whole"
        raise _override_error(override.text, f"{wording.dotted(parent)}: no item {part!r}; {hint}")
