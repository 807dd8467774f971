"""Options and tensors of Liger attention, shared by its composed form and its Triton kernels."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor


class Gate(NamedTuple):
    """A gate built from the recurrence's key: log g = logsigmoid(scale * k + bias) / divisor.

    Attributes:
        scale, bias: `[K, F]`.
    """

    scale: Tensor
    bias: Tensor
    divisor: float = 1.0


class Columns(NamedTuple):
    """Keys and values that are read exactly beside the window.

    Attributes:
        k, v: `[R, M, K, D]` with positions, and `[R, M, K, V]`.
        sinks: how many of them, from the first on, are sinks: number j is token j of its row, which a query sees once
            token j has left its window. With `covers: evicted` sinks are not written into the state.
        exists: `[R, M - sinks]`, which of the others every query of the row sees; None means all.
    """

    k: Tensor
    v: Tensor
    sinks: int
    exists: Tensor | None = None


@dataclass(frozen=True)
class LigerOptions:
    """Options that do not vary by token.

    Attributes:
        window: W, tokens in the window, the query's own included.
        scale: multiplies the window's scores.
        softcap: scores become `softcap * tanh(scores / softcap)`.
        mix: `fixed` 0.5/0.5, `learned` a weight per head and channel, `softmax` one normaliser with a weight per head.
        covers: whether query t reads the recurrence after `all` tokens to its own, or after those `evicted` from its
            window, to t - W.
        normalize: divide what is read by its mass; `mix: softmax` always does.
        feature_map: φ, the softmax over the channels of a head, or nothing (features are given).
    """

    window: int
    scale: float
    softcap: float | None = None
    mix: Literal["fixed", "learned", "softmax"] = "learned"
    covers: Literal["all", "evicted"] = "evicted"
    normalize: bool = True
    feature_map: Literal["softmax", "identity"] = "softmax"


def row_starts(rows: Tensor | int, tokens: int, device: torch.device) -> Tensor:
    """`cu_seqlens`, int64 `[R + 1]`."""
    if isinstance(rows, Tensor):
        return rows.long()
    return torch.arange(rows + 1, device=device) * (tokens // rows)


def longest_row(rows: Tensor | int, tokens: int, longest: int | None) -> int:
    """Tokens of the longest row or more."""
    if isinstance(rows, int):
        return tokens // rows
    return int(rows.diff().max()) if longest is None else longest
