"""Small results to test the report with; every figure is chosen so that it can be worked out by hand."""

from __future__ import annotations

import math

import torch

from linearize.evaluation.heldout import RowScores
from linearize.evaluation.results.results import Results, SystemInfo, SystemScores
from linearize.evaluation.tasks.task import TaskScore, mean_and_error

AXIS = [32.0, 128.0, 512.0]


def accuracy(task: str, items: list[float], suite: str = "core", metric: str = "acc", **more: object) -> TaskScore:
    value, stderr = mean_and_error(items)
    return TaskScore(task, metric, value, stderr, True, items, suite, **more)  # type: ignore[arg-type]


def answers(right: int, of: int) -> list[float]:
    return [1.0] * right + [0.0] * (of - right)


def loss_by_position(shift: float) -> TaskScore:
    curves = [(4.0, 3.5 + shift, 3.0 + 2 * shift + 0.1 * i) for i in range(4)]
    items = [math.fsum(curve) / 3 for curve in curves]
    value, stderr = mean_and_error(items)
    return TaskScore("books", "loss", value, stderr, False, items, "length", [], curves, AXIS)


def needles(shares: list[float]) -> TaskScore:
    """Four items at each of two lengths and two depths, of which these shares are found."""
    places = [{"length": length, "depth": depth} for length in (512, 1024) for depth in (0.0, 1.0)]
    tags = [place for place in places for _ in range(4)]
    items = [item for share in shares for item in answers(round(4 * share), 4)]
    return accuracy("needle", items, "recall", tags=tags)


def rows(shift: float) -> RowScores:
    loss = torch.tensor([2.0, 3.0, 4.0, 3.0], dtype=torch.float64) + shift
    kl = shift * torch.tensor([0.5, 1.0, 1.5, 1.0], dtype=torch.float64)
    return RowScores(loss, kl, 1 - kl, torch.tensor([7, 7, 14, 7]))


def system(right: int, shift: float, found: list[float]) -> SystemScores:
    tasks = [
        accuracy("piqa", answers(right, 40)),
        accuracy("arc_easy", answers(right - 2, 40)),
        loss_by_position(shift),
        needles(found),
    ]
    return SystemScores(tasks, rows(shift))


def results(**changes: object) -> Results:
    """The teacher, the window baseline, and a model half-way between."""
    infos = [
        SystemInfo("teacher", "the pretrained transformer", 0, 46_080),
        SystemInfo("window", "its window and sinks", 4_600_000, 0),
        SystemInfo("model", "gla", 6_105_840, 0),
    ]
    scores = {
        "teacher": system(30, 0.0, [1.0, 1.0, 1.0, 1.0]),
        "window": system(20, 0.4, [0.25, 1.0, 0.0, 1.0]),
        "model": system(25, 0.2, [0.75, 1.0, 0.5, 1.0]),
    }
    found = Results("tuned", infos, scores, command="linearize eval tuned", date="2025-01-01T00:00:00+00:00")
    for name, value in changes.items():
        setattr(found, name, value)
    return found
