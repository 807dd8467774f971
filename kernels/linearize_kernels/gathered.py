"""Softmax attention of blocks of queries, where each block reads its own selection of tokens.

y_t = Σ_j p_tj v_at(j) ,   p_t = softmax over the seen j of  scale · q_t·k_at(j)

Only inputs, outputs and the softmax's denominators are saved for the backward pass, which recomputes the scores (as
FlashAttention does, arXiv 2205.14135). It sums a token's gradients from all blocks in one table. Both passes take
slices of blocks whose size grows with the text, so their number, and that of launches, is bounded.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from linearize_kernels.decay import computing_dtype

if TYPE_CHECKING:
    from collections.abc import Iterator

# The largest tensor of a slice (scores, or gathered keys or values) has at most `_AT_ONCE` numbers of 4 bytes, or as
# many as an eighth of the blocks have scores, if these are more. That is in proportion to the text, as all activations
# of a layer are. A slice holds some five such tensors, and at least one block.
_AT_ONCE, _SLICES = 2**22, 8


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
    """Internally the query heads of a group are rows of one matrix, block by block: `[N, B, K, G * C, D]`."""

    @staticmethod
    def forward(ctx: Any, *given: Any) -> tuple[Tensor, Tensor]:
        q, k, v, at, seen, *ctx.settings = given
        work = _Work(*given)
        y, most = (work.q.new_empty(*work.q.shape[:-1], width) for width in (v.shape[-1], 1))
        total = torch.empty_like(most)
        for blocks, places, shape in work.slices():
            scores, _ = work.scores(blocks, work.rows("tokens", work.k, places, shape), slope=False)
            # Less memory than `logsumexp`, which copies the scores, and one exponential per score instead of two.
            torch.amax(scores, -1, keepdim=True, out=most[blocks])
            weights = scores.sub_(most[blocks]).exp_()
            torch.sum(weights, -1, keepdim=True, out=total[blocks])
            _multiply(weights, work.rows("tokens", work.v, places, shape), y[blocks])
        y, logs = work.tokens(y.div_(total)), work.tokens(most.add_(total.log_()))[..., 0]
        ctx.save_for_backward(q, k, v, at, seen, y, logs)
        return y, logs

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor, dlogs: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, at, seen, y, logs = ctx.saved_tensors
        work = _Work(q, k, v, at, seen, *ctx.settings)
        dq, dk, dv = torch.empty_like(work.q), torch.zeros_like(work.k), torch.zeros_like(work.v)
        # Gradient of the softmax: p (dp - Σ p dp), with Σ p dp = dy · y; the log of the denominator adds p dlog.
        level = work.queries(((dy * y).sum(-1) - dlogs)[..., None])
        pulled, logs = work.queries(dy), work.queries(logs[..., None])
        for blocks, places, shape in work.slices():
            keys, values = work.rows("keys", work.k, places, shape), work.rows("values", work.v, places, shape)
            scores, slope = work.scores(blocks, keys, slope=True)
            shares = scores.sub_(logs[blocks]).exp_()
            dv.index_add_(0, places, work.product("sums", shares.transpose(-1, -2), pulled[blocks]).flatten(0, -2))
            dscores = work.product("slopes", pulled[blocks], values.transpose(-1, -2))
            dscores.sub_(level[blocks]).mul_(shares)
            if slope is not None:
                dscores.mul_(slope)
            _multiply(dscores, keys, dq[blocks])
            dk.index_add_(0, places, work.product("sums", dscores.transpose(-1, -2), work.q[blocks]).flatten(0, -2))
        dq = work.tokens(dq.mul_(work.scale)).to(q.dtype)
        return dq, dk.view(k.shape).to(k.dtype), dv.view(v.shape).to(v.dtype), *[None] * 5


class _Work:
    """Operations shared by forward and backward.

    Attributes:
        q: the queries times the scale.
        k, v: keys and values as tables of rows `[B * T * K, D or V]`.
        at: row indices in the tables, `[N, B, K, S]`.
    """

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
        dtype, self.groups = computing_dtype(q), k.shape[2]
        self.seen, self.widths, self.scale, self.softcap = seen, widths, scale, softcap
        self.q = self.queries(q.to(dtype) * scale)
        self.k, self.v = (x.to(dtype).reshape(-1, x.shape[-1]) for x in (k, v))
        row = torch.arange(len(q), device=at.device).view(-1, 1, 1, 1) * k.shape[1]
        head = torch.arange(self.groups, device=at.device).view(-1, 1)
        self.at = ((row + at) * self.groups + head).transpose(0, 1)
        self.biases = self.k.new_zeros(()), self.k.new_full((), -math.inf)
        self.held = dict[str, Tensor]()

    def slices(self) -> Iterator[tuple[slice, Tensor, torch.Size]]:
        """Yield slices of blocks to process at once; the indices of the rows that the widest of them reads, for each
        block, and their shape `[n, B, K, width]`. There are at most `_SLICES` if G * C is at least D and V, and else
        more by about that ratio."""
        start, blocks, (rows, heads, queries, _) = 0, len(self.widths), self.q.shape[1:]
        at_once = max(_AT_ONCE, -(-blocks // _SLICES) * self.widths[-1] * rows * heads * queries)
        largest = rows * heads * max(queries, self.k.shape[-1], self.v.shape[-1])  # for each token that a block reads
        while start < blocks:
            stop = start + 1
            while stop < blocks and (stop + 1 - start) * self.widths[stop] * largest <= at_once:
                stop += 1
            places = self.at[start:stop, ..., : self.widths[stop - 1]]
            yield slice(start, stop), places.flatten(), places.shape
            start = stop

    def space(self, name: str, *shape: int) -> Tensor:
        """A tensor in memory that all slices use, because a CPU would clear new pages for each."""
        count, held = math.prod(shape), self.held.get(name)
        if held is None or held.numel() < count:
            held = self.held[name] = self.k.new_empty(count)
        return held[:count].view(shape)

    def rows(self, name: str, table: Tensor, places: Tensor, shape: torch.Size) -> Tensor:
        found = self.space(name, len(places), table.shape[-1])
        return torch.index_select(table, 0, places, out=found).view(*shape, -1)

    def product(self, name: str, a: Tensor, b: Tensor) -> Tensor:
        return _multiply(a, b, self.space(name, *a.shape[:-1], b.shape[-1]))

    def scores(self, blocks: slice, keys: Tensor, *, slope: bool) -> tuple[Tensor, Tensor | None]:
        """`[n, B, K, G * C, width]`, minus infinity for tokens that a query does not read; and with `slope` that of the
        softcap, if there is one."""
        scores, slopes = self.product("scores", self.q[blocks], keys.transpose(-1, -2)), None
        if self.softcap is not None:
            share = scores.div_(self.softcap).tanh_()
            if slope:
                slopes = torch.square(share, out=self.space("softcap", *share.shape)).neg_().add_(1)
            scores = share.mul_(self.softcap)
        bias = torch.where(self.seen[blocks, :, : keys.shape[-2]], *self.biases)
        scores.unflatten(3, (-1, bias.shape[1])).add_(bias[:, None, None, None])
        return scores, slopes

    def queries(self, x: Tensor) -> Tensor:
        """Convert `[B, N, C, H, D]` to `[N, B, K, G * C, D]`."""
        grouped: Tensor = x.unflatten(3, (self.groups, -1))
        return grouped.permute(1, 0, 3, 4, 2, 5).flatten(3, 4).contiguous()

    def tokens(self, x: Tensor) -> Tensor:
        """The inverse of `queries`."""
        grouped: Tensor = x.unflatten(3, (-1, self.seen.shape[1]))
        return grouped.permute(1, 0, 4, 2, 3, 5).flatten(3, 4).contiguous()


def _multiply(a: Tensor, b: Tensor, into: Tensor) -> Tensor:
    torch.bmm(a.flatten(0, 2), b.flatten(0, 2), out=into.view(-1, *into.shape[-2:]))
    return into
