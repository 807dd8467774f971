"""Softmax attention of blocks of queries, where each block reads its own selection of tokens.

y_t = Σ_j p_tj v_at(j) ,   p_t = softmax over the seen j of  scale · q_t·k_at(j)

Only inputs, outputs and the softmax's denominators are saved for the backward pass, which recomputes the scores (as
FlashAttention does, arXiv 2205.14135). It sums a token's gradients from all blocks in one table.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from linearize_kernels.decay import computing_dtype
from linearize_kernels.window import _cap

if TYPE_CHECKING:
    from collections.abc import Iterator

# Maximum number of scores in memory at a time, 4 bytes each.
_SCORES_AT_ONCE = 2**22


def gathered_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    at: Tensor,
    seen: Tensor,
    *,
    widths: list[int],
    scale: float,
    softcap: float | None = None,
) -> tuple[Tensor, Tensor]:
    """Attention of N blocks of C queries, each block to S of T tokens.

    Args:
        q: `[B, N, C, H, D]`, positions already encoded.
        k, v: `[B, T, K, D]` and `[B, T, K, V]`.
        at: `[B, N, K, S]` int64, indices of the tokens that a block's queries read.
        seen: `[N, C, S]`, True for the tokens that a query reads; at least one per query.
        widths: per block the number of used entries of S, ascending; `seen` is False after them.
        scale: multiplies the scores.
        softcap: scores become `softcap * tanh(scores / softcap)`.

    Returns:
        outputs `[B, N, C, H, V]` and the log of the softmax's denominator `[B, N, C, H]`, both float32 (or float64).
    """
    found: tuple[Tensor, Tensor] = _Gathered.apply(q, k, v, at, seen, widths, scale, softcap)  # type: ignore[no-untyped-call]
    return found


class _Gathered(torch.autograd.Function):
    """Internally the query heads of a group are rows of one matrix: `[B, n, K, G * C, D]`."""

    @staticmethod
    def forward(ctx: Any, *given: Any) -> tuple[Tensor, Tensor]:
        q, k, v, at, seen, *ctx.settings = given
        work = _Work(*given)
        y = q.new_empty(*q.shape[:4], v.shape[-1], dtype=work.dtype)
        logs = q.new_empty(q.shape[:4], dtype=work.dtype)
        for blocks, width in work.parts():
            places = work.places(blocks, width)
            scores = work.scores(work.queries(q[:, blocks]), work.rows(work.k, places), blocks)
            log = scores.logsumexp(-1, keepdim=True)
            shares = scores.sub_(log).exp_()
            y[:, blocks] = work.tokens(shares @ work.rows(work.v, places))
            logs[:, blocks] = work.tokens(log)[..., 0]
        ctx.save_for_backward(q, k, v, at, seen, y, logs)
        return y, logs

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor, dlogs: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, at, seen, y, logs = ctx.saved_tensors
        _, scale, softcap = ctx.settings
        work = _Work(q, k, v, at, seen, *ctx.settings)
        dq = torch.empty_like(q)
        dk, dv = torch.zeros_like(work.k), torch.zeros_like(work.v)
        for blocks, width in work.parts():
            places = work.places(blocks, width)
            own, keys, values = work.queries(q[:, blocks]), work.rows(work.k, places), work.rows(work.v, places)
            scores = work.scores(own, keys, blocks)
            slope = None if softcap is None else 1 - (scores / softcap).square().nan_to_num(posinf=1.0)
            shares = scores.sub_(work.queries(logs[:, blocks, ..., None])).exp_()
            pulled = work.queries(dy[:, blocks])
            _add(dv, places, shares.transpose(-1, -2) @ pulled)
            # Gradient of the softmax: p (dp - Σ p dp), with Σ p dp = dy · y; the log of the denominator adds p dlog.
            level = (dy[:, blocks] * y[:, blocks]).sum(-1) - dlogs[:, blocks]
            dscores = (pulled @ values.transpose(-1, -2)).sub_(work.queries(level[..., None])).mul_(shares)
            dscores = dscores if slope is None else dscores * slope
            dq[:, blocks] = work.tokens(dscores @ keys * scale).to(dq.dtype)
            _add(dk, places, dscores.transpose(-1, -2) @ own * scale)
        return dq, dk.view(k.shape).to(k.dtype), dv.view(v.shape).to(v.dtype), *[None] * 5


class _Work:
    """Keys and values as tables of rows `[B * T * K, D or V]`, and operations shared by forward and backward."""

    def __init__(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        at: Tensor,
        seen: Tensor,
        widths: list[int],
        scale: float,
        softcap: float | None,
    ) -> None:
        self.dtype, self.groups = computing_dtype(q), k.shape[2]
        self.at, self.seen, self.widths, self.scale, self.softcap = at, seen, widths, scale, softcap
        self.k, self.v = (x.to(self.dtype).reshape(-1, x.shape[-1]) for x in (k, v))
        self.tokens_of_a_row, self.row_scores = k.shape[1], q.shape[0] * q.shape[2] * q.shape[3]

    def parts(self) -> Iterator[tuple[slice, int]]:
        """Yield slices of blocks to process at once, and the widest block's width."""
        start, blocks = 0, len(self.widths)
        while start < blocks:
            stop = start + 1
            while stop < blocks and (stop + 1 - start) * self.widths[stop] * self.row_scores <= _SCORES_AT_ONCE:
                stop += 1
            yield slice(start, stop), self.widths[stop - 1]
            start = stop

    def places(self, blocks: slice, width: int) -> Tensor:
        """Row indices in the tables, `[B, n, K, width]`."""
        at = self.at[:, blocks, :, :width]
        row = torch.arange(at.shape[0], device=at.device).view(-1, 1, 1, 1) * self.tokens_of_a_row
        return (row + at) * self.groups + torch.arange(self.groups, device=at.device).view(1, 1, -1, 1)

    def rows(self, table: Tensor, places: Tensor) -> Tensor:
        return table.index_select(0, places.flatten()).view(*places.shape, -1)

    def queries(self, x: Tensor) -> Tensor:
        """Convert `[B, n, C, H, D]` to `[B, n, K, G * C, D]`."""
        grouped: Tensor = x.to(self.dtype).unflatten(3, (self.groups, -1))
        return grouped.permute(0, 1, 3, 4, 2, 5).flatten(3, 4)

    def tokens(self, x: Tensor) -> Tensor:
        """The inverse of `queries`."""
        grouped: Tensor = x.unflatten(3, (-1, self.seen.shape[1]))
        return grouped.permute(0, 1, 4, 2, 3, 5).flatten(3, 4)

    def scores(self, q: Tensor, k: Tensor, blocks: slice) -> Tensor:
        """`[B, n, K, G * C, width]`, minus infinity for tokens that a query does not read."""
        scores = _cap((q @ k.transpose(-1, -2)).mul_(self.scale), self.softcap)
        seen = self.seen[blocks, :, : k.shape[-2]]
        bias = torch.where(seen, 0.0, scores.new_full((), -math.inf))[:, None, None]
        scores.unflatten(3, (-1, seen.shape[1])).add_(bias)
        return scores


def _add(table: Tensor, places: Tensor, rows: Tensor) -> None:
    table.index_add_(0, places.flatten(), rows.flatten(0, -2))
