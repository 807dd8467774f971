"""The optimizer of a stage, its learning rates, and float32 copies of parameters in half precision.

A bfloat16 weight has eight bits: an update a few hundred times smaller than the weight is rounded away. So parameters
in half precision have float32 copies; the optimizer updates the copy, and the model gets the rounded value.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from linearize.errors import RecipeError
from linearize.training.adapters import is_own_parameter

if TYPE_CHECKING:
    from linearize.recipe import Stage

# The shape and share of the decay with the lowest loss in Hägele et al. 2024 (arXiv 2405.18392).
_WSD_DECAY = 0.2

Groups = list[dict[str, Any]]
Build = Callable[[Groups], torch.optim.Optimizer]


def build_optimizer(stage: Stage, pretrained: list[nn.Parameter], own: list[nn.Parameter]) -> torch.optim.Optimizer:
    """The optimizer that `stage` names.

    Args:
        pretrained: adapters or pretrained weights, with `lr` and `weight_decay`.
        own: the mixers' own parameters, with `mixer_lr`.

    Raises:
        RecipeError: it is not available on this machine.
    """
    groups: Groups = [
        {"params": pretrained, "lr": stage.lr, "weight_decay": stage.weight_decay},
        {"params": own, "lr": stage.mixer_lr, "weight_decay": 0.0},
    ]
    groups = [group for group in groups if group["params"]]
    builders: dict[str, Build] = {"adamw": torch.optim.AdamW, "adafactor": _adafactor, "adamw8bit": _adamw8bit}
    build = builders[stage.optimizer]
    if all(p.dtype in (torch.float32, torch.float64) for group in groups for p in group["params"]):
        return build(groups)
    return MasterWeights(groups, build)


def stage_optimizer(model: nn.Module, stage: Stage) -> torch.optim.Optimizer:
    """The optimizer that `stage` names, over the parameters of `model` that require gradients."""
    own: list[nn.Parameter] = []
    pretrained: list[nn.Parameter] = []
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            (own if is_own_parameter(name) else pretrained).append(parameter)
    return build_optimizer(stage, pretrained, own)


def rate_at(step: int, *, schedule: str, steps: int, warmup: float) -> float:
    """The share of the peak learning rate in optimizer step `step`, counted from 0; always above 0.

    With w = ceil(warmup * steps) steps of warm-up, n = steps - w steps after it, and d = min(ceil(steps / 5), n):

        step < w                (step + 1) / w
        constant                1
        linear                  1 - i / n                       i = step - w, from 0 to n - 1
        cosine                  (1 + cos(pi i / n)) / 2
        wsd                     1, and 1 - sqrt(j / d) in the last d steps, j from 0 to d - 1

    These are transformers' schedules with another warm-up: theirs starts at 0, and its last step is at 0 if no step
    follows the warm-up.
    """
    first = math.ceil(warmup * steps)
    if step < first:
        return (step + 1) / first
    after = max(1, steps - first)
    progress = (step - first) / after
    if schedule == "linear":
        return max(0.0, 1 - progress)
    if schedule == "cosine":
        return max(0.0, (1 + math.cos(math.pi * min(progress, 1.0))) / 2)
    if schedule == "wsd":
        decay = min(math.ceil(_WSD_DECAY * steps), after)
        return 1 - math.sqrt(min(max(0, step - steps + decay) / decay, 1.0))
    return 1.0


def _adafactor(groups: Groups) -> torch.optim.Optimizer:
    from transformers.optimization import Adafactor

    # Adafactor's relative steps scale with the weights, so adapters that start at 0 would never change.
    optimizer: torch.optim.Optimizer = Adafactor(groups, scale_parameter=False, relative_step=False, warmup_init=False)
    return optimizer


def _adamw8bit(groups: Groups) -> torch.optim.Optimizer:
    if not torch.cuda.is_available():
        raise RecipeError("optimizer adamw8bit: needs a GPU, and there is none; use adamw or adafactor")
    try:
        from bitsandbytes.optim import AdamW8bit  # type: ignore[import-not-found]
    except ImportError as error:
        raise RecipeError("optimizer adamw8bit: needs bitsandbytes; pip install bitsandbytes, or use adamw") from error
    optimizer: torch.optim.Optimizer = AdamW8bit(groups)
    return optimizer


class MasterWeights(torch.optim.Optimizer):
    """An optimizer of parameters in half precision that updates float32 copies.

    Args:
        groups: parameter groups, as for any optimizer.
        build: makes the optimizer of the copies.
    """

    def __init__(self, groups: Groups, build: Build) -> None:
        super().__init__([{"params": group["params"]} for group in groups], {})
        self.trained: list[Tensor] = [p for group in groups for p in group["params"]]
        self.masters = [nn.Parameter(p.detach().to(_wide(p.dtype), copy=True)) for p in self.trained]
        copies = iter(self.masters)
        self.inner = build([{**group, "params": [next(copies) for _ in group["params"]]} for group in groups])
        # Schedules and checkpoints read and write the inner optimizer's groups and state.
        self.param_groups, self.state = self.inner.param_groups, self.inner.state

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for parameter, master in zip(self.trained, self.masters, strict=True):
            master.grad = None if parameter.grad is None else parameter.grad.to(master.dtype)
        self.inner.step(closure)
        for parameter, master in zip(self.trained, self.masters, strict=True):
            parameter.copy_(master)
            master.grad = None

    def zero_grad(self, set_to_none: bool = True) -> None:
        for parameter in self.trained:
            if set_to_none or parameter.grad is None:
                parameter.grad = None
            else:
                parameter.grad.zero_()

    def state_dict(self) -> dict[str, Any]:
        return {**self.inner.state_dict(), "masters": [master.detach() for master in self.masters]}

    @torch.no_grad()
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        state = dict(state_dict)
        for master, saved in zip(self.masters, state.pop("masters"), strict=True):
            master.copy_(saved)
        self.inner.load_state_dict(state)
        self.param_groups, self.state = self.inner.param_groups, self.inner.state


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.float32 if dtype.itemsize < torch.float32.itemsize else dtype
