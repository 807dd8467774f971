"""Operations of a decoder block on one token, beside products: residuals with norms, heads with positions, activation.

Each function is one launch with `fused` (`block_triton.py`), and otherwise the same in plain torch.

Dimensions: B rows, N the model's width, I the width of the feed-forward layer, R <= D the channels with positions.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, NamedTuple

import torch
import torch.nn.functional as F

from linearize_kernels.decay import computing_dtype

if TYPE_CHECKING:
    from torch import Tensor

Activation = Literal["silu", "gelu", "gelu_tanh", "relu"]
Turn = Literal["halves", "pairs", "pairs of halves"]
"""The channels that a rotary table turns together: i and i + R / 2, or 2i and 2i + 1; and in the last case the table
has the layout for halves."""


@dataclass(frozen=True, eq=False)
class Norm:
    """A norm over the last axis.

    Attributes:
        kind: `rms`, or `layer`, which subtracts the mean first.
        weight, bias: None if it has none. offset: is added to the weight.
    """

    kind: Literal["rms", "layer"]
    weight: Tensor | None
    eps: float
    bias: Tensor | None = None
    offset: float = 0.0

    def __call__(self, x: Tensor) -> Tensor:
        """The norm in the computing dtype."""
        x = x.to(computing_dtype(x))
        if self.kind == "layer":
            x = x - x.mean(-1, keepdim=True)
        x = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + self.eps)
        if self.weight is not None:
            x = x * (self.weight.to(x.dtype) + self.offset)
        return x if self.bias is None else x + self.bias.to(x.dtype)


class HeadNorms(NamedTuple):
    """The norms of queries and keys, equal in kind; `wide` if each is over all heads together. A weight has the shape
    `[D]`, or `[heads * D]`."""

    q: Norm
    k: Norm
    wide: bool


class Heads(NamedTuple):
    """Queries, keys and values of one token `[B, 1, heads, width]`, and the counts before it."""

    q: Tensor
    k: Tensor
    v: Tensor
    q_rotated: Tensor
    k_rotated: Tensor
    before: Tensor | None


def residual_norm(
    x: Tensor,
    delta: Tensor | None,
    *,
    after: Norm | None = None,
    before: Norm | None = None,
    factor: float = 1.0,
    copies: bool = False,
    fused: bool,
) -> tuple[Tensor, Tensor]:
    """h = x + factor * after(delta), and before(h).

    Args:
        x, delta: `[B, N]`; without `delta`, h is `x` itself.
        after, before: None leaves the tensor as it is.
        copies: h is a new tensor also without `delta`.
    """
    if fused:
        from linearize_kernels.block_triton import launch_residual_norm

        return launch_residual_norm(x, delta, after, before, factor, copies)
    h = x.clone() if copies and delta is None else x
    if delta is not None:
        whole = computing_dtype(x)
        h = (x.to(whole) + factor * (delta.to(whole) if after is None else after(delta))).to(x.dtype)
    return h, h if before is None else before(h).to(x.dtype)


def turned_heads(
    projected: tuple[Tensor, Tensor, Tensor],
    biases: tuple[Tensor, Tensor, Tensor] | None,
    norms: HeadNorms | None,
    table: tuple[Tensor, Tensor] | None,
    turn: Turn,
    counts: Tensor | None,
    lengths: Tensor | None,
    *,
    fused: bool,
) -> Heads:
    """Add biases, norm queries and keys, turn them by their positions, and count the token.

    Args:
        projected: q `[B, H, D]`, k `[B, K, D]`, v `[B, K, V]`.
        biases: `[H * D]`, `[K * D]`, `[K * V]`.
        table: cos and sin `[B or 1, 1, R]`; None without positions.
        counts: `[B]`, to which `lengths` is added in place (None: 1); `before` holds what they were. None counts
            nothing.
    """
    if fused:
        from linearize_kernels.block_triton import launch_turned_heads

        return launch_turned_heads(projected, biases, norms, table, turn, counts, lengths)
    before = None
    if counts is not None:
        before = counts.clone()
        counts.add_(1 if lengths is None else lengths)
    dtype, whole = projected[0].dtype, computing_dtype(projected[0])
    q, k, v = (x.to(whole) for x in projected)
    if biases is not None:
        q, k, v = (x + b.to(whole).view(x.shape[1:]) for x, b in zip((q, k, v), biases, strict=True))
    if norms is not None:
        q, k = (_head_norm(x, norm, norms.wide) for x, norm in zip((q, k), norms[:2], strict=True))
    turned = [q, k]
    if table is not None:
        cos, sin = (x.to(whole) for x in table)
        turned = [_turned(x, cos, sin, turn) for x in turned]
    return Heads._make([*(x.to(dtype).unsqueeze(1) for x in (q, k, v, *turned)), before])


def _head_norm(x: Tensor, norm: Norm, wide: bool) -> Tensor:
    if wide:
        return norm(x.flatten(1)).view(x.shape)
    plain = Norm(norm.kind, None, norm.eps)(x)
    return plain if norm.weight is None else plain * (norm.weight.to(x.dtype).view(-1, x.shape[-1]) + norm.offset)


def _turned(x: Tensor, cos: Tensor, sin: Tensor, turn: Turn) -> Tensor:
    width = cos.shape[-1]
    turning, rest = x[..., :width], x[..., width:]
    if turn == "halves":
        first, second = turning.chunk(2, -1)
        partner = torch.cat([-second, first], -1)
    else:
        first, second = turning.unflatten(-1, (-1, 2)).unbind(-1)
        partner = torch.stack([-second, first], -1).flatten(-2)
        if turn == "pairs of halves":
            cos, sin = (table[..., : width // 2].repeat_interleave(2, -1) for table in (cos, sin))
    turning = turning * cos + partner * sin
    return torch.cat([turning, rest], -1) if rest.shape[-1] else turning


def activated(x: Tensor, activation: Activation, *, gated: bool, fused: bool) -> Tensor:
    """The activation of `x` `[B, I]`; if `gated`, of the first half of `[B, 2 I]`, times the second."""
    if fused:
        from linearize_kernels.block_triton import launch_activated

        return launch_activated(x, activation, gated)
    whole = x.to(computing_dtype(x))
    gate, up = whole.chunk(2, -1) if gated else (whole, None)
    if activation == "silu":
        y = F.silu(gate)
    elif activation == "relu":
        y = F.relu(gate)
    else:
        y = F.gelu(gate, approximate="tanh" if activation == "gelu_tanh" else "none")
    return (y if up is None else y * up).to(x.dtype)
