"""The sequences of one step of a server, as batches for the mixer.

A step holds some new tokens of each sequence: one of those that decode, and a prompt or a chunk of it of the others.
Tokens of all sequences lie one after the other, `[T, ...]`. The mixer takes rows `[R, L, ...]`, so sequences with one
new token form one batch, and the others form batches of similar lengths. On a CPU a batch that decodes reads at most
`MOST_SLOTS` slots, because numbers that plain torch decodes from more codes do not stay in the processor's cache.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from linearize.families.base import Projections
from linearize.model.memory import LayerMemory

if TYPE_CHECKING:
    from collections.abc import Sequence

    from linearize.model.memory import Part
    from linearize.model.mixer.base import MixerBase

MOST_SLOTS = 8192
_MOST_PADDING = 0.25
"""The share of padding up to which prompts of different lengths run in one call; more would cost more than a call."""


@dataclass(frozen=True)
class Batch:
    """Sequences whose new tokens are mixed in one call.

    Attributes:
        at: `[R, L]` the places of the rows' tokens in the step, past a row's end that of its last token; a slice if
            these are neighbours.
        length: L, the most tokens of a row.
        lengths: `[R]` tokens per row; None if all have L.
        counts: `[R]` the tokens that each sequence has seen before.
        uniform: that number if it is one for all rows.
        pages: `[R]` the sequences' pages; a slice if there is one, because its tensors can be updated in the page.
    """

    at: Tensor | slice
    length: int
    lengths: Tensor | None
    counts: Tensor
    uniform: int | None
    pages: Tensor | slice

    def rows(self, tokens: Tensor) -> Tensor:
        """`[R, L, ...]` of `tokens` `[T, ...]`."""
        if isinstance(self.at, slice):
            rows: Tensor = tokens[self.at].unflatten(0, (-1, self.length))
            return rows
        return tokens[self.at]

    def put(self, rows: Tensor, tokens: Tensor) -> None:
        """Write `rows` `[R, L, ...]` to their places in `tokens` `[T, ...]`."""
        if isinstance(self.at, slice):
            tokens[self.at] = rows.flatten(0, 1).to(tokens.dtype)
        elif self.lengths is None:
            tokens[self.at] = rows.to(tokens.dtype)
        else:
            real = torch.arange(self.length, device=rows.device) < self.lengths[:, None]
            tokens[self.at[real]] = rows[real].to(tokens.dtype)


def batches(
    lengths: Sequence[int], seen: Sequence[int], pages: Sequence[int], device: torch.device, *, most: int = 1 << 30
) -> list[Batch]:
    """Divide the sequences of a step.

    Args:
        lengths: the number of new tokens of each sequence; their tokens lie in this order.
        seen: the number of tokens of each before this step.
        pages: the number of each one's page.
        most: the maximum number of sequences with one new token in a batch.
    """
    starts = [0]
    for length in lengths:
        starts.append(starts[-1] + length)

    def place(i: int) -> tuple[bool, bool, int, int]:
        return lengths[i] > 1, lengths[i] > 1 and seen[i] > 0, lengths[i], i

    order = sorted((i for i, n in enumerate(lengths) if n), key=place)
    groups: list[list[int]] = []
    for i in order:
        if groups and _joins(groups[-1], i, lengths, seen, most):
            groups[-1].append(i)
        else:
            groups.append([i])
    return [_batch(group, starts, lengths, seen, pages, device) for group in groups]


def _joins(group: list[int], i: int, lengths: Sequence[int], seen: Sequence[int], most: int) -> bool:
    longest = lengths[i]
    if longest == 1 or lengths[group[0]] == 1:
        return lengths[group[0]] == longest and len(group) < most
    real = sum(lengths[j] for j in group) + longest
    # Rows that start have a path of their own in the mixer.
    alike = (seen[i] > 0) == (seen[group[0]] > 0)
    return alike and longest * (len(group) + 1) - real <= _MOST_PADDING * real


def _batch(
    group: list[int],
    starts: Sequence[int],
    lengths: Sequence[int],
    seen: Sequence[int],
    pages: Sequence[int],
    device: torch.device,
) -> Batch:
    own, counts, held = ([given[i] for i in group] for given in (lengths, seen, pages))
    first, length, apart = [starts[i] for i in group], own[-1], own[0] != own[-1]
    sizes = torch.tensor(own, device=device)
    at: Tensor | slice = slice(first[0], first[0] + len(group) * length)
    if apart or first != list(range(first[0], first[0] + len(group) * length, length)):
        place = torch.arange(length, device=device).minimum(sizes[:, None] - 1)
        at = torch.tensor(first, device=device)[:, None] + place
    return Batch(
        at=at,
        length=length,
        lengths=sizes if apart else None,
        counts=torch.tensor(counts, device=device),
        uniform=counts[0] if len(set(counts)) == 1 else None,
        pages=slice(held[0], held[0] + 1) if len(held) == 1 else torch.tensor(held, device=device),
    )


def mix(mixer: MixerBase, new: Projections, batch: Batch, memory: dict[str, Part], out: Tensor) -> None:
    """Mix the new tokens of a batch.

    Args:
        new: the projections of all tokens of the step, `[T, ...]`.
        memory: the parts of all pages, `[pages, ...]`; those of the batch's sequences are updated.
        out: `[T, H, V]`, whose rows of the batch's tokens are written.
    """
    parts = {
        part: {
            name: x[batch.pages] if isinstance(batch.pages, slice) else x.index_select(0, batch.pages)
            for name, x in tensors.items()
        }
        for part, tensors in memory.items()
    }
    held = LayerMemory(parts, len(batch.counts), batch.counts.device)
    held.counts, held.ragged = batch.counts.clone(), batch.uniform is None
    held.seen = int(batch.uniform or 0)
    held.stays = isinstance(batch.pages, slice)  # views of the pages must not be replaced
    rows = Projections(*(batch.rows(x) for x in new))
    batch.put(mixer(rows, batch.lengths, held), out)
    if isinstance(batch.pages, Tensor):
        for part, tensors in memory.items():
            for name, x in tensors.items():
                x.index_copy_(0, batch.pages, held.parts[part][name])
