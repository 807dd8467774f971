"""Options and tensors of Liger attention, for the composed form and the Triton kernels."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor


class Gate(NamedTuple):
    """A gate computed from the recurrence's key: log g = logsigmoid(scale * k + bias) / divisor.

    Attributes:
        scale, bias: `[K, F]`.
    """

    scale: Tensor
    bias: Tensor
    divisor: float = 1.0


class Columns(NamedTuple):
    """Keys and values beside the window that are read exactly.

    Attributes:
        k, v: `[R, M, K, D]` with positions, and `[R, M, K, V]`.
        sinks: the number of sinks, which come first among the columns. Sink j is token j of its row; a query reads it
            once token j has left the query's window. With `covers: evicted` sinks are not written into the state.
        exists: `[R, M - sinks]`, True for the other columns that the row's queries read; None means all.
    """

    k: Tensor
    v: Tensor
    sinks: int
    exists: Tensor | None = None


@dataclass(frozen=True)
class LigerOptions:
    """Options of a call, equal for all tokens.

    Attributes:
        window: W, tokens in the window, the query's own included.
        scale: multiplies the window's scores.
        softcap: scores become `softcap * tanh(scores / softcap)`.
        mix: `fixed` is 0.5/0.5; `learned` has a weight per head and channel; `softmax` has one normaliser and a weight
            per head.
        covers: query t reads the state after `all` tokens up to t, or after those `evicted` from its window, up to
            t - W.
        normalize: divide the recurrence's output by its mass; always on for `mix: softmax`.
        feature_map: φ: `softmax` over the channels of a head, or `identity` for given features.
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
    """Upper bound of a row's tokens."""
    if isinstance(rows, int):
        return tokens // rows
    return int(rows.diff().max()) if longest is None else longest
