"""Merges of blocks into the slots. Ranks need scores alone, so keys and values are touched only where they move.

The block's tokens are candidates behind the slots. As many candidates of lowest rank go, empty slots before all others,
and the block's kept tokens take their places in text order; no other token moves. So the order in the slots does not
depend on how a text is split into calls.

Dimensions: R rows, K key/value heads, N slots, P places. Places are those of sinks and window, which a merge does not
touch, then the slots: P = front + N.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from linearize.model.configuration import BLOCK
from linearize.model.landmarks.slots import (
    BESIDE_LEARNED,
    FADING,
    LEAST_ATTENTION,
    LEAST_SPREAD,
    MOST_AGAINST,
)

if TYPE_CHECKING:
    from collections.abc import Sequence

    from linearize.model.memory import Part
    from linearize.model.mixer.base import MixerBase

NOVELTY, RECEIVED, QUERIES, NUMBER = range(4)
_EMPTY_RANK = -1e6


class Slots:
    """The slots of R rows, while blocks are merged into them.

    Args:
        held: `novelty`, `received` and `number` of the slots, each `[R, N, K]`.
        tables: tensors of the tokens `[R, K, P, ...]`, which merges change in place.
        merged: the number of blocks merged so far, `[R]` if rows differ.
        filled: the number of slots with a token, the first ones; None if rows differ.

    Attributes:
        scores: `[4, R, K, N + BLOCK]`: novelty, received attention, the expected number of queries, and the token's
            number, whose bits are those of an int32.
    """

    def __init__(
        self, mixer: MixerBase, held: Part, tables: Part, *, merged: Tensor | int, filled: int | None, front: int = 0
    ) -> None:
        self.tables, self.front, self.window = tables, front, mixer.window
        self.weight = BESIDE_LEARNED if mixer.config.landmark_score == "learned" else 1.0
        number = held["number"].transpose(1, 2)
        self.count = number.shape[-1]
        self.ragged, self.filled = filled is None, self.count if filled is None else filled
        self.scores = held["received"].new_zeros(4, *number.shape[:2], self.count + BLOCK)
        # A token of the next block has age 0 at its merge, one of the block before it age 1.
        newest = mixer.config.sinks + BLOCK * (merged + 1)
        age = ((newest if isinstance(newest, int) else newest[:, None, None]) - number) // BLOCK
        for kind, x in (
            (NOVELTY, held["novelty"].transpose(1, 2)),
            (RECEIVED, held["received"].transpose(1, 2)),
            (QUERIES, self._queries(age)),
        ):
            self.scores[kind, ..., : self.count] = x
        self.number[..., : self.count] = number

    @property
    def number(self) -> Tensor:
        """`[R, K, N + BLOCK]` int32; 0 marks an empty slot."""
        return self.scores[NUMBER].view(torch.int32)

    @property
    def received(self) -> Tensor:
        """`[R, K, filled]` the attention that filled slots have received."""
        return self.scores[RECEIVED, ..., : self.filled]

    def empty(self) -> Tensor | None:
        """`[R, K, N]` True for empty slots; None if the filled ones are the first ones in all rows."""
        return self.number[..., : self.count] == 0 if self.ragged else None

    def part(self, names: Sequence[str]) -> Part:
        """The slots' tensors as in the memory, `[R, N, K, ...]`."""
        tokens = {name: self.tables[name][:, :, self.front : self.front + self.count] for name in names}
        scores = {"novelty": self.scores[NOVELTY], "received": self.scores[RECEIVED], "number": self.number}
        return {
            name: x.transpose(1, 2)
            for name, x in (tokens | {n: x[..., : self.count] for n, x in scores.items()}).items()
        }

    def of_text(self, leaving: Tensor, first: Tensor | int, tokens: int) -> Tensor:
        """The scores of a text's tokens, `[4, R, K, T]`; those received are 0.

        Args:
            leaving: `[R, K, L]` the static scores of the first L tokens, which are merged.
            first: the number of the first token, `[R]` if rows differ.
        """
        scores = leaving.new_zeros(4, *leaving.shape[:2], tokens)
        scores[NOVELTY, ..., : leaving.shape[-1]] = leaving
        scores[QUERIES] = self.window - self.window // 4 + BLOCK // 2
        number = torch.arange(tokens, device=leaving.device, dtype=torch.int32)
        scores[NUMBER].view(torch.int32)[:] = number + (first if isinstance(first, int) else first[:, None, None].int())
        return scores

    def merge(
        self, block: Part, scores: Tensor, goes: Tensor | None = None, *, tell: Sequence[str] | None = None
    ) -> Part | None:
        """Merge a block, in the rows that `goes` selects (None: all).

        Args:
            block: the block's tokens `[R, K, BLOCK, ...]`, by the names of the tables.
            scores: `[4, R, K, BLOCK]`, see `of_text`.
            tell: return the `BLOCK` tokens that have no slot afterwards, `[R, K, BLOCK, ...]`, in text order: their
                `number`, their `place` among the slots and, behind these, the block, and the tensors of these names.
                Empty slots (number 0) come first. None if all tokens have a slot.
        """
        fits = self.filled + BLOCK <= self.count and not self.ragged
        first = self.filled if fits else self.count
        end = first + BLOCK
        self.own()
        place = self.scores[..., first:end]
        place[:] = scores if goes is None else torch.where(goes[:, None, None], scores, place)
        lost: Part | None = None
        if fits:
            for name, x in block.items():
                slot = self.tables[name][:, :, self.front + first : self.front + end]
                slot[:] = x if goes is None else torch.where(goes.view(-1, *[1] * (x.dim() - 1)), x, slot)
        else:
            lost = self._fit(block, end, goes, tell)
        self.filled = min(self.filled + BLOCK, self.count)
        fading = self.scores[RECEIVED : QUERIES + 1]
        if goes is None:
            fading.mul_(FADING)
            self.scores[QUERIES].add_(BLOCK)
        else:
            went = goes[:, None, None].to(fading.dtype)
            fading.mul_(1 - (1 - FADING) * went)
            self.scores[QUERIES].add_(BLOCK * went)
        return lost

    def own(self) -> None:
        """Copy the tables if autograd may have saved them."""
        if torch.is_grad_enabled():
            self.tables = {name: x.clone() for name, x in self.tables.items()}

    @torch.no_grad()
    def _goes(self, end: int) -> tuple[Tensor, Tensor]:
        """The places, ascending, of the tokens of lowest rank, and the places whose tokens take theirs."""
        lost = self._ranks(end).topk(BLOCK, dim=-1, largest=False, sorted=False).indices.sort(-1).values
        is_lost = torch.zeros_like(self.scores[0, ..., :end], dtype=torch.uint8).scatter_(-1, lost, 1)
        # Of the tokens behind the last slot, the kept ones come first. The others are lost themselves and stay.
        return lost, is_lost[..., self.count :].sort(dim=-1, stable=True).indices + self.count

    def _fit(self, block: Part, end: int, goes: Tensor | None, tell: Sequence[str] | None) -> Part | None:
        to, source = self._goes(end)
        lost: Part | None = None
        if tell is not None:
            number = self.number.gather(-1, to)
            order = number.argsort(dim=-1, stable=True)
            at = to.gather(-1, order)
            lost = self._candidates({name: block[name] for name in tell}, at)
            lost |= {"number": number.gather(-1, order), "place": at}
        if goes is not None:
            to = torch.where(goes[:, None, None], to, source)
        every = to.expand(4, *to.shape)
        self.scores.scatter_(-1, every, self.scores.gather(-1, source.expand_as(every)))
        if goes is None and to.device.type == "cpu" and not torch.is_grad_enabled():
            row, head, place = (to < self.count).nonzero(as_tuple=True)
            at, token = to[row, head, place] + self.front, source[row, head, place] - self.count
            for name, x in block.items():
                self.tables[name][row, head, at] = x[row, head, token]
            return lost
        # No shape may depend on how many tokens are kept. They come first, so the last of them is written again in
        # place of the others; if there is none, a slot is written with its own token.
        last = (to < self.count).sum(-1, keepdim=True).sub_(1).clamp_min_(0)
        place = torch.arange(BLOCK, device=to.device)
        order = place.minimum(last)
        to, source = to.gather(-1, order), source.gather(-1, order)
        source = torch.where(to < self.count, source, self.count - 1)
        to = to.clamp(max=self.count - 1) + self.front
        for name, x in self._candidates(block, source).items():
            table = self.tables[name]
            if torch.is_grad_enabled():
                # Autograd saves the tensor that `gather` reads, so it must not change, and a token has one gradient.
                own = (place <= last).view(*to.shape, *[1] * (x.dim() - 3))
                self.tables[name] = table.scatter(2, _index(to, table), torch.where(own, x, x.detach()))
            else:
                table.scatter_(2, _index(to, table), x)
        return lost

    def _candidates(self, block: Part, at: Tensor) -> Part:
        """The candidates `at` `[R, K, BLOCK]`, in the slots or behind them."""
        behind, held, new = at >= self.count, at.clamp(max=self.count - 1) + self.front, (at - self.count).clamp_min(0)
        found: Part = {}
        for name, x in block.items():
            table, here = self.tables[name], behind.view(*behind.shape, *[1] * (x.dim() - 3))
            found[name] = torch.where(here, x.gather(2, _index(new, x)), table.gather(2, _index(held, table)))
        return found

    def _queries(self, age: Tensor) -> Tensor:
        """The number of queries that could attend to a token, faded as their attention is."""
        faded = FADING ** age.float()
        return faded * (self.window - self.window // 4 + BLOCK // 2) + BLOCK * (1 - faded) / (1 - FADING)

    def _ranks(self, end: int) -> Tensor:
        """The rank of the first `end` candidates, `[R, K, end]`."""
        novelty, received, queries = self.scores[:NUMBER, ..., :end]
        both = torch.stack([novelty, (received / queries).add_(LEAST_ATTENTION).log_()])
        if not self.ragged and self.filled == self.count:
            apart = both - both.mean(-1, keepdim=True)
            spread = torch.linalg.vector_norm(apart, dim=-1, keepdim=True).div_(end**0.5).clamp_min_(LEAST_SPREAD)
            return self._joint(apart.div_(spread))
        exists = self.number[..., :end] > 0
        count = exists.sum(-1, keepdim=True).clamp_min(1)
        apart = (both - both.masked_fill(~exists, 0).sum(-1, keepdim=True) / count).masked_fill(~exists, 0)
        spread = (apart.square().sum(-1, keepdim=True) / count).sqrt().clamp_min(LEAST_SPREAD)
        # The first of the empty slots are taken first, so that filled slots stay side by side.
        place = torch.arange(end, device=both.device, dtype=both.dtype)
        return torch.where(exists, self._joint(apart / spread), place + _EMPTY_RANK)

    def _joint(self, standardised: Tensor) -> Tensor:
        return torch.add(standardised[0], standardised[1].clamp_min(-MOST_AGAINST), alpha=self.weight)


def _index(at: Tensor, x: Tensor) -> Tensor:
    return at.view(*at.shape, *[1] * (x.dim() - 3)).expand(*at.shape, *x.shape[3:])
