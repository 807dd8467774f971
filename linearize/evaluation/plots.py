"""The plots of a report: loss along a text, recall by length and depth, and memory by length."""

from __future__ import annotations

import math
import re
from collections import defaultdict
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from linearize.evaluation.drawing import Axis, HeatMap, Series, heat_maps, line_plot, log_ticks
from linearize.evaluation.formatting import is_share, readable_bytes, readable_length
from linearize.evaluation.task import by_row, mean_and_error

if TYPE_CHECKING:
    from collections.abc import Container, Sequence

    from linearize.evaluation.results import Results
    from linearize.evaluation.task import TaskScore

_LENGTHS = tuple(2**power for power in range(8, 21))


@dataclass(frozen=True)
class Plot:
    """A plot: the name of its file without `.svg`, the suite that it belongs to (None: memory), and the SVG."""

    name: str
    suite: str | None
    svg: str


def draw_plots(results: Results) -> list[Plot]:
    """All plots that the results have figures for."""
    looks = {system.name: index for index, system in enumerate(results.systems)}
    plots: list[Plot] = []
    suite: str | None = None

    def add(name: str, svg: str | None) -> None:
        if svg is not None:
            plots.append(Plot(_free(_file_name(name), {plot.name for plot in plots}), suite, svg))

    for (task, metric), scores in results.tasks().items():
        suite = next(iter(scores.values())).suite
        add(f"{task}-{metric}-by-position", _by_position(f"{task}: {_words(metric)} by position", scores, looks))
        add(f"{task}-{metric}-by-length", _by_length(f"{task}: {_words(metric)} by length", metric, scores, looks))
        add(f"{task}-{metric}-by-depth", _by_depth(f"{task}: {_words(metric)} by length and depth", metric, scores))
    suite = None
    add("memory", _memory(results, looks))
    return plots


def _by_position(title: str, scores: dict[str, TaskScore], looks: dict[str, int]) -> str | None:
    series = []
    for name, score in scores.items():
        points = [
            (x, *mean_and_error(column))
            for i, x in enumerate(score.axis)
            if x > 0 and (column := [curve[i] for curve in score.curves if len(curve) > i])
        ]
        if points:
            series.append(Series(name, points, looks[name]))
    if not series:
        return None
    positions = [point[0] for one in series for point in one.points]
    metric = next(iter(scores.values())).metric
    x = Axis("position in the text (tokens)", readable_length, log=True)
    return line_plot(title, x, _measure(metric), series, log_ticks(min(positions), max(positions)))


def _by_length(title: str, metric: str, scores: dict[str, TaskScore], looks: dict[str, int]) -> str | None:
    series = []
    for name, score in scores.items():
        groups = _grouped(score, ("length",))
        points = [(length, *mean_and_error(items)) for (length,), items in sorted(groups.items()) if length > 0]
        if points:
            series.append(Series(name, points, looks[name]))
    lengths = sorted({point[0] for one in series for point in one.points})
    if len(lengths) < 2:
        return None
    ticks = lengths if len(lengths) <= 8 else log_ticks(lengths[0], lengths[-1])
    return line_plot(
        title, Axis("length of the text (tokens)", readable_length, log=True), _measure(metric), series, ticks
    )


def _by_depth(title: str, metric: str, scores: dict[str, TaskScore]) -> str | None:
    if not is_share(metric):
        return None
    maps = []
    for name, score in scores.items():
        groups = _grouped(score, ("depth", "length"))
        cells = {
            (depth, length): (math.fsum(items) / len(items), len(items)) for (depth, length), items in groups.items()
        }
        if cells:
            maps.append(HeatMap(name, cells))
    if not maps:
        return None
    # Depths are shares of the text, or already percent where a benchmark writes them so.
    percent = max(depth for one in maps for depth, _ in one.cells) > 1
    rows = Axis("depth", lambda depth: f"{depth if percent else 100 * depth:.0f} %")
    return heat_maps(title, "depth", "length of the text (tokens)", rows, Axis("length", readable_length), maps)


def _memory(results: Results, looks: dict[str, int]) -> str | None:
    series = []
    for system in results.systems:
        if system.state_bytes is None and system.growth_bytes_per_token is None:
            continue
        constant, growth = system.state_bytes or 0, system.growth_bytes_per_token or 0
        points = [(float(n), float(constant + n * growth), None) for n in _LENGTHS]
        if all(size > 0 for _, size, _ in points):
            series.append(Series(system.name, points, looks[system.name]))
    if not series:
        return None
    x = Axis("context (tokens)", readable_length, log=True)
    y = Axis("memory of one sequence", lambda size: readable_bytes(size).replace(".0 ", " "), log=True)
    return line_plot("Memory by context length", x, y, series, [float(n) for n in _LENGTHS[::2]])


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
