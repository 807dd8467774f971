"""The wording of recipe errors: the value that the schema expects at a path, and suggestions for misspelled keys."""

from __future__ import annotations

import difflib
import re
import types
from typing import TYPE_CHECKING, Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel

from linearize.errors import SHORT_DTYPES
from linearize.recipe.schema import GONE, Recipe

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from pydantic_core import ErrorDetails

    from linearize.recipe.document import Path

_PLURALS = {"an integer": "integers", "a number": "numbers"}
_BOUNDS = (("ge", ">="), ("gt", ">"), ("le", "<="), ("lt", "<"))
_LONGEST = 60

_ELSEWHERE: dict[str, Path] = {
    "learning_rate": ("stages", 0, "lr"),
    "batch_size": ("stages", 0, "micro_batch"),
    "per_device_train_batch_size": ("stages", 0, "micro_batch"),
    "gradient_accumulation_steps": ("stages", 0, "batch_tokens"),
    "num_train_epochs": ("stages", 0, "epochs"),
    "max_seq_length": ("stages", 0, "length"),
    "max_length": ("stages", 0, "length"),
    "max_grad_norm": ("stages", 0, "clip"),
    "warmup_ratio": ("stages", 0, "warmup"),
    "lr_scheduler_type": ("stages", 0, "schedule"),
    "dataset": ("stages", 0, "data", "source"),
    "r": ("lora", "rank"),
    "lora_r": ("lora", "rank"),
    "lora_alpha": ("lora", "alpha"),
    "lora_dropout": ("lora", "dropout"),
    "target_modules": ("lora", "targets"),
    "window_size": ("mixer", "window"),
    "sliding_window": ("mixer", "window"),
    "num_sinks": ("mixer", "sinks"),
    "torch_dtype": ("dtype",),
}
"""Names that transformers, peft and others have for a key of the recipe."""


def one_line(text: str) -> str:
    """The text without line breaks or control characters, so that an error stays one line on any terminal."""
    return " ".join("".join(c if c.isprintable() else " " for c in text).split())


def dotted(path: Path) -> str:
    """`("stages", 0, "lr")` as `stages.0.lr`."""
    return ".".join(str(part) for part in path)


def shown(value: Any) -> str:
    """A value in a recipe's spelling, cut to a readable length."""
    spelled = {None: "null", True: "true", False: "false"}
    text = spelled[value] if value is None or isinstance(value, bool) else repr(value)
    return cut(text, _LONGEST)


def cut(text: str, most: int) -> str:
    """The text, cut to at most `most` characters."""
    return text if len(text) <= most else text[: most - 3] + "..."


def section_at(path: Path) -> type[BaseModel] | None:
    """The section of the schema at a path; None if the path leads to a value or does not exist."""
    found = _lookup(path)
    if found is None:
        return None
    return next((kind for kind in _alternatives(found[0]) if _is_section(kind)), None)


def is_open(path: Path) -> bool:
    """True if the schema does not list the keys at this path (a mapping of weights, an unused key)."""
    found = _lookup(path)
    return found is not None and (
        found[0] in (None, type(None)) or any(get_origin(kind) is dict for kind in _alternatives(found[0]))
    )


def is_list(path: Path) -> bool:
    """True if the path leads to a list."""
    found = _lookup(path)
    return found is not None and any(get_origin(kind) is list for kind in _alternatives(found[0]))


def unknown_key(path: Path, full_path: bool = False) -> str:
    """Message for a path whose last key is not in its section.

    The suggestion is the bare key, or the full dotted path if the key is in another section or `full_path` is True.
    """
    if path in GONE:
        return GONE[path]
    *parents, key = path
    section = section_at(tuple(parents))
    fields = list(section.model_fields) if section else []
    if section is Recipe:
        fields.insert(0, "base")  # removed by `reading` before validation
    # An exact match in another section is a better suggestion than a similar spelling in this one.
    if elsewhere := [dotted(known) for known in _all_paths(Recipe, ()) if known[-1] == key]:
        if elsewhere[0] == key:
            return f"unknown key here; {key} is a key of the recipe itself, not of {dotted(tuple(parents))}"
        return f"unknown key; did you mean {elsewhere[0]!r}?"
    if key in _ELSEWHERE:
        return f"unknown key; did you mean {dotted(_ELSEWHERE[key])!r}?"
    if near := difflib.get_close_matches(str(key), fields, n=1):
        meant = dotted((*parents, near[0])) if full_path else near[0]
        return f"unknown key; did you mean {meant!r}?"
    return f"unknown key; expected one of {', '.join(fields)}"


def explain(error: ErrorDetails) -> str:
    """One pydantic error as a short clause: the expected value, the value found, and a suggestion."""
    path, kind = error["loc"], error["type"]
    if kind == "recipe":
        return error["msg"]
    if pair := next((part for part in path if isinstance(part, str) and re.fullmatch(r"\d+:\S+", part)), None):
        return f"write {pair.replace(':', ': ', 1)}, with a space after the colon"
    if kind == "extra_forbidden":
        return unknown_key(path)
    found = _lookup(path)
    expected = _expected(*found) if found else error["msg"]
    if kind == "missing":
        return f"missing key; expected {expected}"
    value = error["input"]
    text = f"expected {expected}, got {shown(value)}"
    if kind == "literal_error" and found and isinstance(value, str):
        near = difflib.get_close_matches(SHORT_DTYPES.get(value, value), _choices(found[0]), n=1)
        text += f"; did you mean {near[0]!r}?" if near else ""
    return text


def _lookup(path: Path) -> tuple[Any, Sequence[Any]] | None:
    """The annotation at a path of the schema, and its constraints."""
    annotation: Any = Recipe
    constraints: Sequence[Any] = ()
    for part in path:
        for kind in _alternatives(annotation):
            if _is_section(kind) and part in kind.model_fields:
                info = kind.model_fields[part]
                annotation, constraints = info.annotation, info.metadata
                break
            if get_origin(kind) in (list, dict):
                annotation, constraints = get_args(kind)[-1], ()
                break
        else:
            return None
    return annotation, constraints


def _alternatives(annotation: Any) -> tuple[Any, ...]:
    union = get_origin(annotation) in (Union, types.UnionType)
    return get_args(annotation) if union else (annotation,)


def _is_section(kind: Any) -> bool:
    return isinstance(kind, type) and issubclass(kind, BaseModel)


def _choices(annotation: Any) -> list[str]:
    return [name for kind in _alternatives(annotation) if get_origin(kind) is Literal for name in get_args(kind)]


def _all_paths(section: type[BaseModel], prefix: Path) -> Iterator[Path]:
    for name in section.model_fields:
        path: Path = (*prefix, name)
        yield path
        inner: Path = (*path, 0) if is_list(path) else path
        below = section_at(inner)
        if below is not None:
            yield from _all_paths(below, inner)


def _expected(annotation: Any, constraints: Sequence[Any]) -> str:
    """For example `an integer >= 1`, `one of 'gla', 'none'`, `a list of text or null`."""
    kinds = [kind for kind in _alternatives(annotation) if kind is not type(None)]
    text = " or ".join(dict.fromkeys(_kind(kind, constraints) for kind in kinds))
    return f"{text} or null" if len(kinds) < len(_alternatives(annotation)) else text


def _kind(kind: Any, constraints: Sequence[Any]) -> str:
    if get_origin(kind) is Literal:
        names = ", ".join(repr(name) for name in get_args(kind))
        return f"one of {names}" if len(get_args(kind)) > 1 else names
    if get_origin(kind) is list:
        item = _expected(get_args(kind)[0], ())
        empty = "a non-empty list of " if any(getattr(c, "min_length", 0) for c in constraints) else "a list of "
        return empty + _PLURALS.get(item, item.replace("a mapping", "mappings"))
    if kind in (int, float):
        bounds = [f"{sign} {getattr(c, name)}" for name, sign in _BOUNDS for c in constraints if hasattr(c, name)]
        return " ".join(("an integer" if kind is int else "a number", " and ".join(bounds))).strip()
    if kind is str:
        return "non-empty text" if any(getattr(c, "min_length", 0) for c in constraints) else "text"
    return "true or false" if kind is bool else "a mapping"
