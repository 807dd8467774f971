"""Closed-form fits of a layer's parameters.

    mix     the weight of the recurrence's output, by least squares
    gate    the decay of the state, from the distances that the teacher attends to
    output  the output projection, by ridge regression

Dimensions: N tokens, H query heads, V a value's width, X inputs and Y outputs of a projection.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
from linearize_kernels.window import mix_outputs
from torch import Tensor

if TYPE_CHECKING:
    from collections.abc import Callable

_TINY = torch.finfo(torch.float32).tiny
# Factors to try, around the weight that matches the teacher's mass on average.
_FACTORS = tuple(math.exp(x / 2) for x in range(-6, 5))
_MOST_LOG_WEIGHT = 40.0


def channel_weights(y: Tensor, read: Tensor, target: Tensor) -> Tensor:
    """The weights β `[H, V]` that minimise the squared error of y + β (read - y) to `target` in every channel, all
    `[N, H, V]`; 0 where `read` always equals y."""
    step = (read - y).double()
    squares = step.square().sum(0)
    along = (step * (target - y).double()).sum(0)
    return torch.where(squares > 0, along / squares.clamp_min(_TINY), 0).to(y.dtype)


def mass_weights(
    y: Tensor, normaliser: Tensor, read: Tensor, mass: Tensor, target: Tensor, log_beyond: Tensor
) -> Tensor:
    """The weights `[H]` of the recurrence's mass under one shared normaliser.

    The first candidate matches the recurrence's mass, on average over queries, to the teacher's mass beyond window and
    sinks. Of some multiples of it, the one with the least error is returned.

    Args:
        y, read, target: `[N, H, V]`.
        normaliser: `[N, H]`, the log of the window's denominator.
        mass: `[N, H]`, the recurrence's.
        log_beyond: `[N, H]`, the log of the teacher's denominator beyond window and sinks.
    """
    usable = (mass > 0) & torch.isfinite(log_beyond)
    # Queries weigh by the teacher's share of mass beyond the window, because the mass matters most for these.
    share = torch.where(usable, torch.sigmoid(log_beyond - normaliser), 0).double()
    gap = torch.where(usable, log_beyond - mass.clamp_min(_TINY).log(), 0).double()
    start = (share * gap).sum(0) / share.sum(0).clamp_min(_TINY)
    start = start.clamp(-_MOST_LOG_WEIGHT, _MOST_LOG_WEIGHT).exp().to(y.dtype)
    best, least = torch.zeros_like(start), (y - target).double().square().sum((0, 2))
    for factor in _FACTORS:
        weight = start * factor
        mixed = mix_outputs(y, normaliser, read, mass[..., None], mix="softmax", normalize=True, weight=weight)
        error = (mixed - target).double().square().sum((0, 2))
        best, least = torch.where(error < least, weight, best), torch.minimum(error, least)
    return best


def decay_of(mass: Tensor, available: Tensor) -> Tensor:
    """The log of the decay per token whose mean look-back distance equals that of attention, `[heads]` (<= 0).

    Args:
        mass: `[heads, distances]`, the attention mass at each distance beyond the window.
        available: `[distances]`, the number of queries that have a token at this distance.

    Returns:
        log g such that the weights available * g^d have the same mean distance as `mass`.
    """
    distance = torch.arange(mass.shape[1], dtype=torch.float64, device=mass.device)
    mass, available = mass.double(), available.double()
    wanted = (mass * distance).sum(1) / mass.sum(1).clamp_min(_TINY)

    def mean(log_decay: Tensor) -> Tensor:
        weights = available * (log_decay[:, None] * distance).exp()
        return (weights * distance).sum(1) / weights.sum(1).clamp_min(_TINY)

    low, high = torch.full_like(wanted, -20.0), torch.zeros_like(wanted)
    return bisect(mean, wanted, low, high)


def bisect(function: Callable[[Tensor], Tensor], wanted: Tensor, low: Tensor, high: Tensor, steps: int = 60) -> Tensor:
    """Solve function(x) = wanted for x between `low` and `high`, per entry; `function` must be increasing."""
    for _ in range(steps):
        middle = (low + high) / 2
        below = function(middle) < wanted
        low, high = torch.where(below, middle, low), torch.where(below, high, middle)
    return (low + high) / 2


class Ridge:
    """Least squares of Y = X Wᵀ for an update of an existing W; sums accumulate row by row in float64.

    Args:
        inputs, outputs: widths of X and Y.
    """

    def __init__(self, inputs: int, outputs: int, device: torch.device) -> None:
        self.squares = torch.zeros(inputs, inputs, dtype=torch.float64, device=device)
        self.along = torch.zeros(inputs, outputs, dtype=torch.float64, device=device)

    def add(self, x: Tensor, rest: Tensor) -> None:
        """Add inputs `[N, X]`, and the residuals of their targets under the present weight, `[N, Y]`."""
        x = x.double()
        self.squares += x.T @ x
        self.along += x.T @ rest.double()

    def step(self, strength: float) -> Tensor:
        """The update of the weight, `[Y, X]` float64: (XᵀX + λ I)⁻¹ Xᵀ rest, transposed; λ is `strength` times the
        mean diagonal entry of XᵀX."""
        penalised = self.squares.clone()
        penalised.diagonal().add_(strength * self.squares.diagonal().mean().clamp_min(_TINY))
        return torch.cholesky_solve(self.along, torch.linalg.cholesky(penalised)).T
