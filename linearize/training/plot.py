"""Plot the training loss over the tokens that were read."""

from __future__ import annotations

import json
import math
from typing import TYPE_CHECKING, Any

from linearize.evaluation.tasks.task import mean_and_error
from linearize.report.formatting import readable_length
from linearize.report.plots import Axis, Lines, Plot, Series

if TYPE_CHECKING:
    from pathlib import Path

PLOT = "training.svg"
_POINTS = 40
"""Points of a stage's line; with more steps, several steps become one point with its standard error."""


def draw_training(metrics: Path, plot: Path) -> None:
    """Plot `metrics.jsonl`: a line per stage, and one for its held-out objective. Without steps no file is written."""
    stages: dict[int, list[tuple[float, float]]] = {}
    held_out: dict[int, list[tuple[float, float, float | None]]] = {}
    before, stage, tokens = 0.0, 0, 0.0
    for line in _lines(metrics):
        if line["stage"] != stage:
            before, stage = before + tokens, line["stage"]
        tokens = float(line["tokens"])
        stages.setdefault(stage, []).append((before + tokens, line["loss"]))
        if math.isfinite(line.get("held_out_objective", math.nan)):
            held_out.setdefault(stage, []).append((before + tokens, line["held_out_objective"], None))
    if not stages:
        return
    series = [Series(f"stage {stage + 1}", _joined(steps), stage) for stage, steps in stages.items()]
    first = max(stages) + 1
    series += [Series(f"stage {stage + 1}, held out", points, first + stage) for stage, points in held_out.items()]
    read = Axis("tokens trained on", readable_length)
    loss = Axis("loss, nats per token", lambda value: f"{value:.3g}")
    plot.write_text(Plot("training", "Training", [Lines(read, loss, series)]).alone, encoding="utf-8")


def _lines(path: Path) -> list[dict[str, Any]]:
    """The records of single steps."""
    records = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    return [one for one in records if {"stage", "tokens", "loss"} <= one.keys() and math.isfinite(one["loss"])]


def _joined(steps: list[tuple[float, float]]) -> list[tuple[float, float, float | None]]:
    size = math.ceil(len(steps) / _POINTS)
    points = []
    for start in range(0, len(steps), size):
        some = steps[start : start + size]
        mean, error = mean_and_error([loss for _, loss in some])
        points.append((sum(x for x, _ in some) / len(some), mean, error if len(some) > 1 else None))
    return points
