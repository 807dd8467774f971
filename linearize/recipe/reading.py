"""Read recipes from files, shipped names and `--set`, and say in one line what is wrong with them."""

from __future__ import annotations

import copy
import difflib
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import ValidationError

from linearize.errors import RecipeError
from linearize.recipe import wording
from linearize.recipe.document import DocumentError, parse_document, write_document
from linearize.recipe.schema import Recipe
from linearize.resources import shipped_folder

if TYPE_CHECKING:
    from collections.abc import Sequence

    from linearize.recipe.document import Document
    from linearize.recipe.document import Path as KeyPath

LARGEST_FILE = 1_000_000
"""Bytes; a recipe is a page of text, so anything larger is the wrong file."""

_SUFFIXES = (".yaml", ".yml")


@dataclass(frozen=True)
class ShippedRecipe:
    """A recipe that comes with the package."""

    name: str
    description: str
    path: Path


@dataclass(frozen=True)
class _Override:
    """One `--set`: where it writes, what, and how the user spelled it."""

    path: KeyPath
    value: Any
    text: str


def shipped_recipes() -> list[ShippedRecipe]:
    """The recipes that come with the package, by name."""
    return [
        ShippedRecipe(path.stem, parse_recipe(_read(path, path.name), path.name).description, path)
        for path in sorted(shipped_folder("recipes").glob("*.yaml"))
    ]


def recipe_path(name_or_path: str) -> Path:
    """The file behind a shipped recipe's name or a path.

    A bare name means the shipped recipe; a name with a folder or a YAML suffix means a file.
    Raises `RecipeError` when there is neither.
    """
    folder = shipped_folder("recipes")
    names = sorted(path.stem for path in folder.glob("*.yaml"))
    if name_or_path in names:
        return folder / f"{name_or_path}.yaml"
    path = Path(name_or_path)
    shown = wording.one_line(name_or_path)
    try:
        if path.is_dir():
            raise RecipeError(f"{shown}: a folder, not a recipe; name a .yaml file in it")
        if path.exists():
            return path
    except (OSError, ValueError) as error:
        raise RecipeError(f"{shown}: cannot be read: {getattr(error, 'strerror', None) or error}") from None
    near = difflib.get_close_matches(path.stem if path.suffix in _SUFFIXES else name_or_path, names, n=2, cutoff=0.5)
    hint = f"did you mean {' or '.join(repr(name) for name in near)}? " if near else ""
    what = f"{shown}: no such file" if len(path.parts) > 1 or path.suffix in _SUFFIXES else f"unknown recipe {shown!r}"
    raise RecipeError(f"{what}; {hint}run 'linearize recipes ls' to see the shipped recipes")


def load_recipe(name_or_path: str, overrides: Sequence[str] = ()) -> Recipe:
    """Read a shipped recipe by name, or a file, and lay `key=value` overrides over it; raises `RecipeError`."""
    path = recipe_path(name_or_path)
    where = path.name if path.parent == shipped_folder("recipes") else name_or_path
    return parse_recipe(_read(path, where), where, overrides)


def parse_recipe(text: str, where: str, overrides: Sequence[str] = ()) -> Recipe:
    """Validate a recipe's text. `where` names it in errors; raises `RecipeError`, one line, with the line number."""
    try:
        document = parse_document(text)
    except DocumentError as error:
        raise RecipeError(wording.one_line(f"{_at(where, error.line)}: {error}")) from None
    if not isinstance(document.value, dict):
        got = "an empty document" if document.value is None else wording.shown(document.value)
        raise RecipeError(wording.one_line(f"{where}: expected a mapping of recipe keys, got {got}"))
    value = copy.deepcopy(document.value)
    parsed = [_parse_override(text) for text in overrides]
    for override in parsed:
        _apply(value, override)
    try:
        return Recipe.model_validate(value)
    except ValidationError as error:
        raise RecipeError(_first_error(error, where, document, parsed)) from None


def dump_recipe(recipe: Recipe) -> str:
    """The resolved recipe, every key written out, as YAML that `parse_recipe` reads back to an equal recipe."""
    return write_document(recipe.model_dump())


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


def _first_error(error: ValidationError, where: str, document: Document, overrides: Sequence[_Override]) -> str:
    errors = error.errors(include_url=False)
    path = errors[0]["loc"]
    # The last --set that wrote this key, around it or inside it is to blame; else the line of the nearest key there is.
    blamed = [override for override in overrides if all(a == b for a, b in zip(path, override.path, strict=False))]
    if blamed:
        full = wording.dotted(path)
        place = f"--set {blamed[-1].text}" + (f": {full}" if len(path) > len(blamed[-1].path) else "")
    else:
        line = next(document.lines[path[:n]] for n in range(len(path), -1, -1) if path[:n] in document.lines)
        place = f"{_at(where, line)}: {wording.dotted(path)}"
    more = f" (+{len(errors) - 1} more)" if len(errors) > 1 else ""
    return wording.one_line(f"{place}: {wording.explain(errors[0])}{more}")


def _parse_override(text: str) -> _Override:
    key, equals, raw = text.partition("=")
    if not equals or not key.strip():
        raise _override_error(text, "expected key=value, for example --set mixer.window=128")
    path: KeyPath = tuple(int(part) if _is_index(part) else part for part in key.strip().split("."))
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
    """Write one override into a recipe's plain values, making the sections that are not there yet."""
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
    section = wording.section_at(parent)
    if section is not None and part not in section.model_fields:
        raise _override_error(override.text, wording.unknown_key((*parent, part), full_path=True))
    if not isinstance(target, dict) or (section is None and not wording.is_open(parent)):
        raise _override_error(override.text, f"{wording.dotted(parent)} has no keys of its own; set it as a whole")


def _check_index(target: list[Any], part: str | int, override: _Override, parent: KeyPath) -> None:
    if not isinstance(part, int) or part >= len(target):
        items = f"{len(target)} item{'s' if len(target) != 1 else ''}"
        hint = f"the list has {items}, counted from 0" if target else "the list is empty, set it as a whole"
        raise _override_error(override.text, f"{wording.dotted(parent)}: no item {part!r}; {hint}")
