"""Rows of real tokens only: pads and packed documents are removed before mixing and restored after it.

Inside a layer every row starts with its first real token and is padded at the end only. The layer is causal, so
padding after the last real token cannot reach anything before it, and no part of the layer handles pads.
"""

from __future__ import annotations

from functools import cached_property

import torch
import torch.nn.functional as F
from torch import Tensor

# Documents up to this length are one group.
_SHORT = 64


class Layout:
    """The real tokens of a batch and their places in rows without pads.

    Args:
        segments: `[B, T]` integers: 0 for a pad, otherwise the number of the document within its row.
        packed: True if a row may hold several documents, which become rows of their own.
    """

    def __init__(self, segments: Tensor, *, packed: bool) -> None:
        batch, tokens = segments.shape
        real = segments > 0
        flat = real.flatten()
        row = torch.arange(batch, device=segments.device)[:, None].expand(batch, tokens)
        if packed:
            starts = torch.ones_like(real)
            starts[:, 1:] = segments[:, 1:] != segments[:, :-1]
            document = (starts & real).flatten().cumsum(0).sub_(1).clamp_(min=0)
            rows = int(document.max()) + 1
        else:
            document, rows = row.flatten(), batch
        self.batch, self.tokens, self.real = batch, tokens, real
        self.packed, self._segments = packed, segments
        self.lengths = torch.zeros(rows, dtype=torch.long, device=segments.device)
        self.lengths.index_add_(0, document, flat.long())
        longest = max(int(self.lengths.max()), 1)
        rank = flat.long().cumsum(0).sub_(1)  # the index among all real tokens, row after row
        place = rank - (self.lengths.cumsum(0) - self.lengths)[document]
        self._target = torch.where(flat, document * longest + place, 0)
        source = torch.zeros(rows * longest, dtype=torch.long, device=segments.device)
        positions = torch.arange(batch * tokens, device=segments.device)
        source.index_add_(0, self._target, torch.where(flat, positions, 0))
        self._source = source.unflatten(0, (rows, longest))
        self.filled = torch.arange(longest, device=segments.device)[None] < self.lengths[:, None]

    @cached_property
    def runs(self) -> Tensor:
        """`[S + 1]` int32: the starts of documents and of runs of pads in the batch's tokens, row after row, and their
        end. A kernel that takes rows of any length needs no pads between them. Read with a sync."""
        begins = torch.ones_like(self.real)
        begins[:, 1:] = self._segments[:, 1:] != self._segments[:, :-1]
        return F.pad(begins.flatten().nonzero()[:, 0], (0, 1), value=begins.numel()).int()

    @cached_property
    def by_length(self) -> list[tuple[Tensor, int]]:
        """Groups of rows, as indices and the longest row's length. One group of all rows, but for packed documents on a
        CPU, where a sync costs nothing: there lengths within a group differ by less than a factor of two."""
        longest = self._source.shape[1]
        every = torch.arange(len(self.lengths), device=self.lengths.device)
        if not self.packed or self.lengths.device.type != "cpu":
            return [(every, longest)]
        kinds = (self.lengths.clamp_min(_SHORT) - 1).double().log2().floor()  # 2^kind < length <= 2^(kind + 1)
        return [(rows, int(self.lengths[rows].max())) for rows in (every[kinds == kind] for kind in kinds.unique())]

    def gather(self, x: Tensor) -> Tensor:
        """`[B, T, ...]` as rows of real tokens `[R, L, ...]`, zero past the end of a row."""
        rows = x.flatten(0, 1)[self._source]
        return rows.masked_fill(~_like(self.filled, rows), 0)

    def scatter(self, rows: Tensor) -> Tensor:
        """The inverse of `gather`: `[R, L, ...]` to `[B, T, ...]`, zero at pads."""
        return self.masked(rows.flatten(0, 1)[self._target].unflatten(0, (self.batch, self.tokens)))

    def masked(self, x: Tensor) -> Tensor:
        """`[B, T, ...]`, zero at pads."""
        return x.masked_fill(~_like(self.real, x), 0)


def segments_of(
    attention_mask: Tensor | None, position_ids: Tensor | None, batch: int, tokens: int, continued: bool
) -> Tensor | None:
    """`[B, T]` document numbers with 0 at pads, or None if every row is one whole document.

    Args:
        attention_mask: `[B, tokens so far]`, 0 at pads; only its last T columns are used. Or `[B, 1, 1, T]`, for the
            T new tokens alone.
        position_ids: `[B or 1, T]`; a new document begins where they do not increase by one (packed rows). Used only
            without a mask and without a cache to continue, as in transformers.
        continued: True if the call continues a cache.
    """
    if attention_mask is not None:
        ours = attention_mask.dim() == 4  # for captured or compiled steps, which must not sync
        if ours:
            attention_mask = attention_mask[:, 0, 0]
        real = attention_mask[:, -tokens:] != 0
        # `.all()` syncs the device: fine once per prompt, too slow per decoded token.
        asks = tokens > 1 or (real.device.type == "cpu" and not ours)
        if real.numel() == 0 or (asks and not torch.compiler.is_compiling() and bool(real.all())):
            return None
        return real.long()
    if position_ids is None or continued or tokens == 1:
        return None
    restarts = position_ids[:, 1:] != position_ids[:, :-1] + 1
    if not bool(restarts.any()):
        return None
    segments = torch.ones(position_ids.shape, dtype=torch.long, device=position_ids.device)
    segments[:, 1:] += restarts.cumsum(1)
    return segments.expand(batch, tokens)


def layer_mask(segments: Tensor | None, device: torch.device) -> Tensor:
    """The mask of `LinearizedAttention`: `segments` as `[B, 1, 1, T]`, or `[1, 1, 1, 0]` for None."""
    return torch.ones(1, 1, 1, 0, dtype=torch.long, device=device) if segments is None else segments[:, None, None, :]


def _like(mask: Tensor, x: Tensor) -> Tensor:
    return mask.reshape(*mask.shape, *([1] * (x.dim() - 2)))
