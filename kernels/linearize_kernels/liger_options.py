"""Options and tensors of Liger attention, for the composed form and the Triton kernels."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
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


def longest_row(rows: Tensor | int, tokens: int) -> int:
    """Tokens of the longest row; of packed rows with a sync."""
    return tokens // rows if isinstance(rows, int) else int(rows.diff().max())


# The number, within its row, of a tile that is none: beyond the end of any row.
_NO_TILE = 2**24


def tile_list(
    rows: Tensor | int, tokens: int, device: torch.device, step: int, *, more: int = 0, before: int = 0
) -> Tensor:
    """The tiles of all rows, int32 `[tiles, 2]`: a row, and the number of a tile within it. Made without a sync, so the
    last of packed rows may be none; kept with `rows`, which all layers share.

    Args:
        tokens: of all rows.
        step: tokens of a tile.
        more: tokens that a row has beside its own, or, if negative, less.
        before: tiles of a row that come before those of its tokens.
    """
    if isinstance(rows, int):
        return _equal_tiles(rows, tokens, device, step, more, before)
    kept = rows.__dict__.setdefault("_tiles", {})
    key = step, more, before
    if key not in kept:
        count = rows.shape[0] - 1
        most = (tokens + max(more, 0) * count) // step + count * (1 + before)
        kept[key] = _listed(rows, step, more, before, most)
    found: Tensor = kept[key]
    return found


@lru_cache(maxsize=64)
def _equal_tiles(rows: int, tokens: int, device: torch.device, step: int, more: int, before: int) -> Tensor:
    of_row = max(-(-(tokens // max(rows, 1) + more) // step), 0) + before
    return _listed(row_starts(rows, tokens, device), step, more, before, rows * of_row)


def _listed(starts: Tensor, step: int, more: int, before: int, most: int) -> Tensor:
    counts = (starts.diff() + (more + step - 1)).clamp_min(0).div(step, rounding_mode="floor") + before
    ends = counts.cumsum(0)
    n = torch.arange(most, device=starts.device)
    row = torch.searchsorted(ends, n, right=True)
    there = row < len(counts)
    row = torch.where(there, row, 0)
    number = torch.where(there, n - (ends - counts)[row], _NO_TILE)
    return torch.stack([row, number], 1).int()
