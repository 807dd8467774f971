"""Trouble for runs that train, and what became of them."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import torch

from linearize.jobs.stages import run_stages
from linearize.training import metrics
from linearize.training.loop import StageLoop

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    import pytest

    from linearize.recipe import Recipe

Weights = dict[str, torch.Tensor]


def trained(recipe: Recipe, work: Path, said: list[str] | None = None, **options: Any) -> Weights:
    work.mkdir(exist_ok=True)
    model = run_stages(recipe, work, say=(said if said is not None else []).append, **options).model
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def same(a: Weights, b: Weights) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def at_step(monkeypatch: pytest.MonkeyPatch, step: int, act: Callable[[], object], stage: int = 0) -> None:
    """Calls `act` when the figures of a step of a stage are logged."""
    append = metrics.append_json_line

    def log(path: Path, record: dict[str, Any]) -> None:
        append(path, record)
        if (record["stage"], record["step"]) == (stage, step):
            act()

    monkeypatch.setattr(metrics, "append_json_line", log)


def steps(work: Path) -> list[int]:
    return [json.loads(line)["step"] for line in (work / "metrics.jsonl").read_text().splitlines()]


def poison(
    monkeypatch: pytest.MonkeyPatch, wanted: set[int], *, gradient: bool = False, at: str = "o_proj"
) -> list[Weights]:
    """Plants NaN in the forward or backward passes of these steps, in a module of the second layer's attention; returns
    the weights at the start of each step."""
    seen: list[Weights] = []
    step = StageLoop.train_step

    def planted(self: StageLoop) -> dict[str, Any]:
        seen.append({n: p.detach().clone() for n, p in self.model.named_parameters() if p.requires_grad})
        bad = self.progress.step + 1 in wanted
        layer = next(module for name, module in self.model.named_modules() if name.endswith(f"layers.1.self_attn.{at}"))
        if gradient:
            hook: Any = layer.register_full_backward_hook(lambda _, given, __: (given[0] * (torch.nan if bad else 1),))
        else:
            hook = layer.register_forward_hook(lambda _, __, y: y * torch.nan if bad else y)
        try:
            return step(self)
        finally:
            hook.remove()

    monkeypatch.setattr(StageLoop, "train_step", planted)
    return seen
