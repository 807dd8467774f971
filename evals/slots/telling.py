"""The figures as a table, and as plots of quality over bytes."""

from __future__ import annotations

import statistics
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, Any

from evals.slots.systems import TEACHER
from evals.slots.texts import READING, RULER, TASKS, WHOLE
from linearize.evaluation.tasks.task import mean_and_error
from linearize.report.formatting import readable_bytes
from linearize.report.plots import Axis, Lines, Plot, Series

if TYPE_CHECKING:
    from collections.abc import Collection, Mapping, Sequence

_NONE = "not run"


def columns(figures: Mapping[str, Any]) -> list[str]:
    """The measured `task length` columns, RULER's first, then by length."""
    names = list(TASKS | WHOLE)
    return sorted(figures["values"], key=lambda key: (names.index(key.split()[0]), int(key.split()[1])))


def chosen(
    figures: Mapping[str, Any], tasks: Sequence[str], lengths: Sequence[int], systems: Sequence[str]
) -> dict[str, Any]:
    """The figures of some tasks, lengths and systems (patterns of names) alone, so that means are over those."""
    named = {
        name: one for name, one in figures["systems"].items() if any(fnmatchcase(name, pattern) for pattern in systems)
    }
    kept = {f"{task}{part} {length}" for task in tasks for part in ("", "_whole") for length in lengths}
    values = {
        column: {name: texts for name, texts in cells.items() if name in named or name == TEACHER}
        for column, cells in figures["values"].items()
        if column in kept
    }
    return {**figures, "systems": named, "values": values}


def mean(figures: Mapping[str, Any], column: str, system: str) -> tuple[float, float | None, int] | None:
    """Mean, standard error and number of texts of a cell; None if it was not run."""
    values = list(figures["values"].get(column, {}).get(system, {}).values())
    return (*mean_and_error(values), len(values)) if values else None


def above(figures: Mapping[str, Any], column: str, system: str, among: Collection[str] | None = None) -> float | None:
    """Loss above the teacher's in nats per token, over the texts that both have; None if there are none.

    Args:
        among: the texts that count; None for all.
    """
    own, teacher = (figures["values"].get(column, {}).get(name, {}) for name in (system, TEACHER))
    both = sorted(text for text in own.keys() & teacher.keys() if among is None or text in among)
    return statistics.fmean(own[text] - teacher[text] for text in both) if both else None


def read_by_all(figures: Mapping[str, Any], column: str, systems: Collection[str]) -> set[str]:
    """The texts of a column that each of `systems` with a figure in it has read."""
    found = figures["values"][column].items()
    return set.intersection(*(set(texts) for system, texts in found if system in systems and texts))


def average(figures: Mapping[str, Any], system: str) -> float | None:
    """Mean over RULER's measured columns; None if one of them was not run."""
    cells = [mean(figures, column, system) for column in columns(figures) if column.split()[0] in RULER]
    return statistics.fmean(cell[0] for cell in cells if cell) if cells and all(cells) else None


def table(figures: Mapping[str, Any]) -> str:
    """Markdown: answers in %, then losses in nats per token and those above the teacher's; a row for each system that
    has any figure of a table."""
    shown = columns(figures)
    answers, losses = ([key for key in shown if (key.split()[0] in RULER) == recall] for recall in (True, False))
    return "\n\n".join(_table(figures, keys, recall) for keys, recall in ((answers, True), (losses, False)) if keys)


def _table(figures: Mapping[str, Any], shown: list[str], recall: bool) -> str:
    heads = ["system", "memory"] + [f"{(TASKS | WHOLE)[key.split()[0]]}, {int(key.split()[1]):,}" for key in shown]
    heads += ["mean"] * recall
    lines = [f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
    for name, system in sorted(figures["systems"].items(), key=lambda item: item[0] != TEACHER):
        if not any(mean(figures, key, name) for key in shown):
            continue
        held = f"{readable_bytes(system['bytes'])} = {system['tokens']:,} tokens" if system["bytes"] else "grows"
        whole = average(figures, name)
        cells = [_cell(figures, key, name) for key in shown]
        cells += [_NONE if whole is None else f"{100 * whole:.0f}"] * recall
        lines.append(f"| {name} | {held} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _cell(figures: Mapping[str, Any], column: str, system: str) -> str:
    cell = mean(figures, column, system)
    if cell is None:
        return _NONE
    if column.split()[0] in RULER:
        return f"{100 * cell[0]:.0f} ({cell[2]})"
    gap = None if system == TEACHER else above(figures, column, system)
    told = "" if gap is None else f" ({gap:+.4f})".replace("-", "−")
    return f"{cell[0]:.4f}{told} ({cell[2]})"


def plots(figures: Mapping[str, Any]) -> list[Plot]:
    """Recall and loss over the bytes of the memory, a line for each kind of system."""
    kinds: dict[str, list[tuple[str, int]]] = {}
    for name, system in figures["systems"].items():
        if system["bytes"]:
            kinds.setdefault(system["kind"], []).append((name, system["bytes"]))
    bytes_ = Axis("bytes of one sequence's memory", lambda value: readable_bytes(int(value)), log=True)
    found = []
    ruler = _lines(kinds, lambda name: average(figures, name))
    if ruler:
        share = Axis("RULER's tasks, mean", lambda value: f"{100 * value:.0f} %", limits=(0, 1))
        found.append(Plot("recall", "Answers found, over the memory's size", [Lines(bytes_, share, ruler)]))

    keys = [key for key in columns(figures) if key.split()[0] in READING]

    # Texts differ more than systems do.
    among = {key: read_by_all(figures, key, figures["systems"]) for key in keys}

    def lost(name: str) -> float | None:
        gaps = [gap for key in keys if (gap := above(figures, key, name, among[key])) is not None]
        return statistics.fmean(gaps) if gaps and len(gaps) == len(keys) else None

    reading = _lines(kinds, lost)
    if reading:
        loss = Axis("nats per token above the teacher", lambda value: f"{value:.3f}")
        found.append(Plot("loss", "Loss of text, over the memory's size", [Lines(bytes_, loss, reading)]))
    return found


def _lines(kinds: Mapping[str, list[tuple[str, int]]], value: Any) -> list[Series]:
    made = []
    for look, (kind, members) in enumerate(kinds.items()):
        points = [(float(size), y, None) for name, size in members if (y := value(name)) is not None]
        if points:
            made.append(Series(kind, sorted(points), look))
    return made
