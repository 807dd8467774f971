"""The plots of an evaluation: loss along a text, recall by length and depth, and memory by length."""

from __future__ import annotations

import math
import re
from collections import defaultdict
from typing import TYPE_CHECKING, Any

from linearize.evaluation.tasks.task import by_row, mean_and_error
from linearize.report.formatting import is_share, readable_bytes, readable_length
from linearize.report.plots import Axis, HeatMap, Lines, Plot, Series, log_ticks

if TYPE_CHECKING:
    from collections.abc import Container, Sequence

    from linearize.evaluation.results.results import Results
    from linearize.evaluation.tasks.task import TaskScore

_LENGTHS = tuple(2**power for power in range(8, 21))
BYTES = Axis("", lambda size: readable_bytes(size).replace(".0 ", " "), log=True)
"""A logarithmic axis of sizes in memory."""


def plots_of(results: Results) -> dict[str | None, list[Plot]]:
    """All plots that the results have figures for, by their suite; those of memory under None."""
    looks = {system.name: index for index, system in enumerate(results.systems)}
    plots: dict[str | None, list[Plot]] = defaultdict(list)
    taken: set[str] = set()

    def add(suite: str | None, name: str, title: str, panels: Sequence[Lines] | Sequence[HeatMap]) -> None:
        if panels:
            plots[suite].append(Plot(_free(_file_name(name), taken), title, panels))
            taken.add(plots[suite][-1].name)

    for (task, metric), scores in results.tasks().items():
        suite, name, words = next(iter(scores.values())).suite, f"{task}-{metric}", f"{task}: {_words(metric)}"
        add(suite, f"{name}-by-position", f"{words} by position", _by_position(metric, scores, looks))
        add(suite, f"{name}-by-length", f"{words} by length", _by_length(metric, scores, looks))
        add(suite, f"{name}-by-depth", f"{words} by length and depth, in percent", _by_depth(metric, scores))
    add(None, "memory", "Memory of one sequence by context length", _memory(results, looks))
    return dict(plots)


def _by_position(metric: str, scores: dict[str, TaskScore], looks: dict[str, int]) -> list[Lines]:
    series = []
    for name, score in scores.items():
        points = [
            (x, *mean_and_error(column))
            for i, x in enumerate(score.axis)
            if x > 0 and (column := [curve[i] for curve in score.curves if len(curve) > i])
        ]
        if points:
            series.append(Series(name, points, looks[name]))
    positions = [point[0] for one in series for point in one.points]
    if not positions:
        return []
    ticks = log_ticks(min(positions), max(positions))
    return [Lines(_tokens("position in the text (tokens)", ticks), _measure(metric), series)]


def _by_length(metric: str, scores: dict[str, TaskScore], looks: dict[str, int]) -> list[Lines]:
    series = []
    for name, score in scores.items():
        groups = _grouped(score, ("length",))
        points = [(length, *mean_and_error(items)) for (length,), items in sorted(groups.items()) if length > 0]
        if points:
            series.append(Series(name, points, looks[name]))
    lengths = sorted({point[0] for one in series for point in one.points})
    if len(lengths) < 2:
        return []
    ticks = lengths if len(lengths) <= 8 else log_ticks(lengths[0], lengths[-1])
    return [Lines(_tokens("length of the text (tokens)", ticks), _measure(metric), series)]


def _by_depth(metric: str, scores: dict[str, TaskScore]) -> list[HeatMap]:
    if not is_share(metric):
        return []
    cells = {
        name: {place: (math.fsum(items) / len(items), len(items)) for place, items in groups.items()}
        for name, score in scores.items()
        if (groups := _grouped(score, ("depth", "length")))
    }
    # Depths are shares of the text, or already percent where a benchmark writes them so.
    percent = any(depth > 1 for found in cells.values() for depth, _ in found)
    depth = Axis("depth", lambda depth: f"{depth if percent else 100 * depth:.0f} %")
    length = Axis("length (tokens)", readable_length)
    return [HeatMap(name, length, depth, found) for name, found in cells.items()]


def _memory(results: Results, looks: dict[str, int]) -> list[Lines]:
    series = []
    for system in results.systems:
        if system.state_bytes is None and system.growth_bytes_per_token is None:
            continue
        constant, growth = system.state_bytes or 0, system.growth_bytes_per_token or 0
        points = [(float(n), float(constant + n * growth), None) for n in _LENGTHS]
        if all(size > 0 for _, size, _ in points):
            series.append(Series(system.name, points, looks[system.name]))
    return [Lines(_tokens("context (tokens)", _LENGTHS[::2]), BYTES, series)] if series else []


def _tokens(title: str, ticks: Sequence[float]) -> Axis:
    return Axis(title, readable_length, log=True, ticks=ticks)


def _measure(metric: str) -> Axis:
    """The axis of a metric's values."""
    if is_share(metric):
        return Axis(f"{_words(metric)} (%)", lambda share: f"{100 * share:.0f}", limits=(0.0, 1.0))
    unit = " (nats per token)" if metric in ("loss", "loss_rise", "kl") else ""
    return Axis(f"{_words(metric)}{unit}", lambda value: f"{value:.4g}")


def _grouped(score: TaskScore, keys: Sequence[str]) -> dict[tuple[float, ...], list[float]]:
    """Items by these tags, where a task has them all as numbers; of several about one text, what is one value."""
    groups: dict[tuple[float, ...], list[tuple[float, Any]]] = defaultdict(list)
    for item, tags in zip(score.items, score.tags, strict=False):
        place = tuple(tags.get(key) for key in keys)
        if all(isinstance(part, (int, float)) for part in place):
            groups[place].append((item, tags))  # type: ignore[index]
    return {place: by_row(*zip(*found, strict=True)) for place, found in groups.items()}


def _words(metric: str) -> str:
    return {"acc": "accuracy", "acc_norm": "accuracy"}.get(metric, metric.replace("_", " "))


def _file_name(name: str) -> str:
    return re.sub(r"[^A-Za-z0-9]+", "-", name).strip("-").lower()[:80] or "plot"


def _free(name: str, taken: Container[str]) -> str:
    number, free = 1, name
    while free in taken:
        number += 1
        free = f"{name}-{number}"
    return free
