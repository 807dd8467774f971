"""Trouble for runs that train, and what became of them."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import torch

from linearize.jobs.finetune import run_stages
from linearize.training import metrics as module
from linearize.training import trainer
from linearize.training.guarded import GuardedTrainer

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

    def log(path: Path, record: dict[str, Any]) -> None:
        trainer.append_json_line(path, record)
        if (record["stage"], record["step"]) == (stage, step):
            act()

    monkeypatch.setattr(module, "append_json_line", log)


def steps(work: Path) -> list[int]:
    return [json.loads(line)["step"] for line in (work / "metrics.jsonl").read_text().splitlines()]


def poison(
    monkeypatch: pytest.MonkeyPatch, wanted: set[int], *, gradient: bool = False, at: str = "o_proj"
) -> list[Weights]:
    """Plants NaN in a forward or backward pass of these steps, in a module of the second layer's attention; gives the
    weights seen at the start of each pass."""
    seen: list[Weights] = []
    step = GuardedTrainer._in_parts

    def planted(self: Any, model: Any, inputs: Any, counted: Any) -> Any:
        seen.append({n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad})
        bad = self.state.global_step + 1 in wanted
        layer = next(module for name, module in model.named_modules() if name.endswith(f"layers.1.self_attn.{at}"))
        if gradient:
            hook: Any = layer.register_full_backward_hook(lambda _, given, __: (given[0] * (torch.nan if bad else 1),))
        else:
            hook = layer.register_forward_hook(lambda _, __, y: y * torch.nan if bad else y)
        try:
            return step(self, model, inputs, counted)
        finally:
            hook.remove()

    monkeypatch.setattr(GuardedTrainer, "_in_parts", planted)
    return seen
