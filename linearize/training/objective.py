"""Objectives over tokens: cross-entropy with the text, divergence from the teacher, or a sum of both."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from linearize_kernels.decay import computing_dtype
from torch import Tensor

from linearize.data.rows import NO_LOSS

if TYPE_CHECKING:
    from collections.abc import Mapping

    from linearize.recipe import Objective


def _chunk(logits: Tensor) -> int:
    """Positions of `logits` `[N, V]` that are taken at once. A whole row would need several tensors of its size; on a
    CPU those of a chunk have four megabytes each, so that caches hold them and no allocation asks the system."""
    return max(8, 2**20 // logits.shape[-1]) if logits.device.type == "cpu" else 64


class TopK(NamedTuple):
    """A teacher's most likely next tokens, N positions of k.

    Attributes:
        tokens: `[N, k]` int64.
        log: `[N, k + 1]` their log-probabilities at the temperature; the last column is that of all other tokens
            together.
    """

    tokens: Tensor
    log: Tensor


def top_k_of(logits: Tensor, k: int, temperature: float) -> TopK:
    """The `k` most likely tokens of `logits` `[N, V]`; all tokens if `k` exceeds V."""
    indices, logs = [], []
    for chunk in logits.split(_chunk(logits)):
        log = torch.log_softmax(chunk.to(computing_dtype(chunk)) / temperature, -1)
        top, index = log.topk(min(k, log.shape[-1]))
        rest = log.scatter(1, index, -math.inf).logsumexp(-1, keepdim=True)
        indices.append(index)
        logs.append(torch.cat([top, rest], 1))
    return TopK(torch.cat(indices), torch.cat(logs))


class Counted(NamedTuple):
    """The N positions of packed rows that predict a token with loss.

    Attributes:
        rows, columns: `[N]` indexes, row by row.
        targets: `[N]` the tokens after them.
    """

    rows: Tensor
    columns: Tensor
    targets: Tensor


def counted(labels: Tensor) -> Counted:
    """The positions before those of `labels` `[B, T]` that are not -100."""
    rows, columns = (labels[:, 1:] != NO_LOSS).nonzero(as_tuple=True)
    return Counted(rows, columns, labels[rows, columns + 1])


def token_losses(
    logits: Tensor,
    targets: Tensor,
    teacher: Tensor | TopK | None,
    weights: Mapping[Objective, float],
    temperature: float = 1.0,
) -> Tensor:
    """The sum over N positions of the weighted objectives, in nats.

    Args:
        logits: `[N, V]` of the student.
        targets: `[N]` the next tokens.
        teacher: the teacher's logits `[N, V]`, or its most likely tokens; used by `distill` only, without gradients.
            With `TopK`, all other tokens are merged into one, which gives a lower bound of the divergence.
        weights: the weights of `sft` (cross-entropy) and `distill` (KL(teacher || student) at `temperature`, scaled by
            its square as in Hinton et al. 2015, arXiv 1503.02531).
    """
    if "distill" in weights and teacher is None:
        raise ValueError("the objective `distill` needs the teacher's logits")
    shares = weights.get("sft", 0.0), weights.get("distill", 0.0)
    total: Tensor = _TokenLosses.apply(logits, teacher, targets, *shares, temperature)  # type: ignore[no-untyped-call]
    return total


class _TokenLosses(torch.autograd.Function):
    """Loss and gradient of the logits in one pass, because the gradient is the difference of both distributions."""

    @staticmethod
    def forward(
        ctx: Any,
        student: Tensor,
        teacher: Tensor | TopK | None,
        targets: Tensor,
        sft: float,
        distill: float,
        temperature: float,
    ) -> Tensor:
        wide = computing_dtype(student)
        gradient = torch.empty_like(student) if ctx.needs_input_grad[0] else None
        total = torch.zeros((), dtype=wide, device=student.device)
        size = _chunk(student)
        for start in range(0, len(targets), size):
            of = slice(start, start + size)
            logits = student[of].to(wide)
            slope = torch.zeros_like(logits)
            if distill:
                assert teacher is not None  # noqa: S101 - for the type checker; `token_losses` has checked it
                q_log = torch.log_softmax(logits / temperature, -1)
                if isinstance(teacher, TopK):
                    divergence, difference = _top_k(q_log, teacher.tokens[of], teacher.log[of].to(wide))
                else:
                    divergence, difference = _whole(q_log, teacher[of].to(wide) / temperature)
                total += distill * temperature**2 * divergence
                slope += difference.mul_(distill * temperature)
            if sft:
                log = torch.log_softmax(logits, -1)
                picked = targets[of, None]
                total -= sft * log.gather(1, picked).sum()
                slope += log.exp_().scatter_add_(1, picked, log.new_full(picked.shape, -1.0)).mul_(sft)
            if gradient is not None:
                gradient[of] = slope
        ctx.save_for_backward(gradient)
        return total

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        (gradient,) = ctx.saved_tensors
        return gradient * gradients[0].to(gradient.dtype), None, None, None, None, None


def _whole(q_log: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
    """KL(p || q) and its gradient for q's logits; `teacher` are p's logits."""
    p_log = torch.log_softmax(teacher, -1)
    p = p_log.exp()
    # 0 log 0 is 0, and a logit of minus infinity would make it NaN.
    divergence = torch.where(p > 0, (p_log - q_log) * p, 0).sum()
    return divergence, q_log.exp().sub_(p)


def _top_k(q_log: Tensor, index: Tensor, p_log: Tensor) -> tuple[Tensor, Tensor]:
    """KL(p || q) and its gradient, with all tokens but k merged into one of probabilities p_r and q_r.

    The gradient is q - p at the k tokens, and q - p_r (q / q_r) at the others. The ratio q / q_r is the exponential
    of a difference of logarithms: q and q_r alone are 0 in float32 once q_r is below e^-103, and p_r / q_r is infinite.
    """
    p_log = torch.log_softmax(p_log, -1)  # the stored values are rounded, and need not sum to one
    p = p_log.exp()
    rest = q_log.scatter(1, index, -math.inf).logsumexp(-1, keepdim=True)
    known = q_log.gather(1, index)
    divergence = torch.where(p > 0, p * (p_log - torch.cat([known, rest], 1)), 0).sum()
    # If p_r is 0 (k covers the vocabulary, or the teacher is certain) `rest` may be minus infinity.
    of_rest = torch.where(p[:, -1:] > 0, (q_log - rest).exp_() * p[:, -1:], 0)
    slope = q_log.exp().sub_(of_rest)
    return divergence, slope.scatter_(1, index, known.exp() - p[:, :-1])
