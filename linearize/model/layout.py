"""Rows of real tokens only: pads and packed documents leave before mixing and come back after it.

Inside a layer every row starts with its first real token and is followed by nothing but filling, so no part of the
layer has to know about pads: what comes after the last real token of a row cannot reach anything before it.
"""

from __future__ import annotations

import torch
from torch import Tensor


class Layout:
    """Which tokens of a batch are real, and where each one goes.

    Args:
        segments: `[B, T]` integers: 0 for a pad, otherwise the number of the document within its row.
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
        self.lengths = torch.zeros(rows, dtype=torch.long, device=segments.device)
        self.lengths.index_add_(0, document, flat.long())
        longest = max(int(self.lengths.max()), 1)
        rank = flat.long().cumsum(0).sub_(1)  # among all real tokens, rows one after the other
        place = rank - (self.lengths.cumsum(0) - self.lengths)[document]
        self._target = torch.where(flat, document * longest + place, 0)
        source = torch.zeros(rows * longest, dtype=torch.long, device=segments.device)
        positions = torch.arange(batch * tokens, device=segments.device)
        source.index_add_(0, self._target, torch.where(flat, positions, 0))
        self._source = source.unflatten(0, (rows, longest))
        self.filled = torch.arange(longest, device=segments.device)[None] < self.lengths[:, None]

    def gather(self, x: Tensor) -> Tensor:
        """`[B, T, ...]` as rows of real tokens `[R, L, ...]`, zero where a row has ended."""
        rows = x.flatten(0, 1)[self._source]
        return rows.masked_fill(~_like(self.filled, rows), 0)

    def scatter(self, rows: Tensor) -> Tensor:
        """The way back: `[R, L, ...]` to `[B, T, ...]`, zero at pads."""
        x: Tensor = rows.flatten(0, 1)[self._target].unflatten(0, (self.batch, self.tokens))
        return x.masked_fill(~_like(self.real, x), 0)


def segments_of(
    attention_mask: Tensor | None, position_ids: Tensor | None, batch: int, tokens: int, continued: bool
) -> Tensor | None:
    """`[B, T]` document numbers with 0 at pads, or None where every row is one whole document.

    Args:
        attention_mask: `[B, tokens so far]`, 0 at pads; only its last T columns concern the tokens at hand. Or
            `[B, 1, 1, T]`, of these alone.
        position_ids: `[B or 1, T]`; where they stop counting up by one a new document begins (packed rows). Read
            only where no mask is given and no cache is continued, as transformers itself does.
    """
    if attention_mask is not None:
        ours = attention_mask.dim() == 4  # made for recorded or compiled steps, which have nobody to ask
        if ours:
            attention_mask = attention_mask[:, 0, 0]
        real = attention_mask[:, -tokens:] != 0
        # Waiting for the device to tell is worth it before a prompt, and not before every token.
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
    """What `LinearizedAttention` takes as its mask: `segments` as `[B, 1, 1, T]`, or `[1, 1, 1, 0]` for None."""
    return torch.ones(1, 1, 1, 0, dtype=torch.long, device=device) if segments is None else segments[:, None, None, :]


def _like(mask: Tensor, x: Tensor) -> Tensor:
    return mask.reshape(*mask.shape, *([1] * (x.dim() - 2)))
