"""The form of `results.json`, described in `results.py`, and its checks on writing and reading."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel, ConfigDict, JsonValue, ValidationError, model_validator

from linearize.errors import DataError

SCHEMA = "linearize.results/1"


class _Part(BaseModel):
    model_config = ConfigDict(strict=True, allow_inf_nan=False, extra="ignore")


class _System(_Part):
    name: str
    description: str
    state_bytes: int | None
    growth_bytes_per_token: int | None
    checkpoint: str | None = None
    dtype: str | None = None


class _Score(_Part):
    value: float
    stderr: float | None
    n: int
    total: int | None = None
    seed: int | None = None
    items: list[float]
    tags: list[dict[str, JsonValue]]
    curves: list[list[float]]

    @model_validator(mode="after")
    def _belong_together(self) -> _Score:
        for name, entries in (("items", self.items), ("tags", self.tags), ("curves", self.curves)):
            if entries and len(entries) != self.n:
                raise ValueError(f"{len(entries)} {name} for n = {self.n}")
        return self


class _Task(_Part):
    task: str
    suite: str
    metric: str
    higher_is_better: bool
    axis: list[float]
    digest: str | None
    systems: dict[str, _Score]

    @model_validator(mode="after")
    def _curves_fit(self) -> _Task:
        if any(len(curve) > len(self.axis) for score in self.systems.values() for curve in score.curves):
            raise ValueError("a curve is longer than the axis")
        return self


class Document(_Part):
    """A document that was checked: its fields are those that `results.py` lists."""

    model: str
    command: str
    date: str
    versions: dict[str, str]
    limit: int | float | None
    systems: list[_System]
    tasks: list[_Task]

    @model_validator(mode="after")
    def _names_agree(self) -> Document:
        names = [system.name for system in self.systems]
        if len(set(names)) < len(names):
            raise ValueError("two systems have one name")
        strangers = {name for task in self.tasks for name in task.systems} - set(names)
        if strangers:
            raise ValueError(f"scores of {min(strangers)!r}, which is not among the systems")
        return self


def check_document(document: Any, where: str) -> Document:
    """The document, if it is one.

    Args:
        where: its name in errors, e.g. its file.

    Raises:
        DataError: it is no such document, of another schema, or has a number that is not finite.
    """
    schema = document.get("schema") if isinstance(document, dict) else None
    if not isinstance(schema, str) or not schema.startswith("linearize.results/"):
        raise DataError(f"{where}: not a results file; `linearize eval --report DIR` writes them")
    if schema != SCHEMA:
        raise DataError(f"{where}: has the schema {schema}, and this version reads {SCHEMA}; update linearize")
    try:
        return Document.model_validate(document)
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(str(part) for part in first["loc"])
        message = first["msg"].removeprefix("Value error, ")
        raise DataError(f"{where}: {place + ': ' if place else ''}{message[0].lower()}{message[1:]}") from None
