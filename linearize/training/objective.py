"""What a stage minimises: cross-entropy with the text, divergence from the teacher, or a weighted sum of both."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from collections.abc import Mapping

    from linearize.recipe import Objective

IGNORE = -100
# Positions worked on at a time. All of a row's would make several tensors of the logits' size, and leave every cache.
_CHUNK = 64


def token_losses(
    logits: Tensor,
    labels: Tensor,
    teacher_logits: Tensor | None,
    weights: Mapping[Objective, float],
    temperature: float = 1.0,
) -> Tensor:
    """The sum over counted positions of the weighted objectives, in nats.

    Args:
        logits: `[B, T, V]` of the student; position t predicts labels[:, t + 1].
        labels: `[B, T]`, -100 where nothing is counted.
        teacher_logits: `[B, T, V]`, wanted by `distill` only; no gradient reaches them.
        weights: of `sft` (cross-entropy) and `distill` (KL(teacher || student), softened by `temperature` and scaled
            by its square as Hinton et al. 2015 do, arXiv 1503.02531).
    """
    if "distill" in weights and teacher_logits is None:
        raise ValueError("the objective `distill` needs the teacher's logits")
    row, step = (labels[:, 1:] != IGNORE).nonzero(as_tuple=True)
    positions = row * labels.shape[1] + step
    total: Tensor = _TokenLosses.apply(  # type: ignore[no-untyped-call]
        logits.flatten(0, 1),
        None if teacher_logits is None else teacher_logits.flatten(0, 1),
        positions,
        labels[row, step + 1],
        weights.get("sft", 0.0),
        weights.get("distill", 0.0),
        temperature,
    )
    return total


class _TokenLosses(torch.autograd.Function):
    """Loss and gradient of the logits in one pass: with both distributions at hand the gradient is their difference."""

    @staticmethod
    def forward(
        ctx: Any,
        student: Tensor,
        teacher: Tensor | None,
        positions: Tensor,
        targets: Tensor,
        sft: float,
        distill: float,
        temperature: float,
    ) -> Tensor:
        wide = torch.float64 if student.dtype == torch.float64 else torch.float32
        gradient = torch.zeros_like(student) if ctx.needs_input_grad[0] else None
        total = torch.zeros((), dtype=wide, device=student.device)
        for at, target in zip(positions.split(_CHUNK), targets.split(_CHUNK), strict=True):
            logits = student[at].to(wide)
            slope = torch.zeros_like(logits)
            if distill:
                assert teacher is not None  # noqa: S101 - for the type checker; the caller has looked
                q_log = torch.log_softmax(logits / temperature, -1)
                p_log = torch.log_softmax(teacher[at].to(wide) / temperature, -1)
                p = p_log.exp()
                total += distill * temperature**2 * (p_log - q_log).mul_(p).sum()
                slope += q_log.exp_().sub_(p).mul_(distill * temperature)
            if sft:
                log = torch.log_softmax(logits, -1)
                picked = target[:, None]
                total -= sft * log.gather(1, picked).sum()
                slope += log.exp_().scatter_add_(1, picked, log.new_full(picked.shape, -1.0)).mul_(sft)
            if gradient is not None:
                gradient[at] = slope.to(gradient.dtype)
        ctx.save_for_backward(gradient)
        return total

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        (gradient,) = ctx.saved_tensors
        return gradient * gradients[0].to(gradient.dtype), None, None, None, None, None, None
