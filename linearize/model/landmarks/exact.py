"""Attention to sinks, window and slots over several tokens, block by block: `attend` is the one function that runs all
blocks of a call.

All queries between two merges read the same slots. So a block costs two matrix products and some operators on scores,
and a merge moves no more than the tokens that it replaces.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, NamedTuple

import torch
from linearize_kernels.decay import computing_dtype
from torch import Tensor

from linearize.model.configuration import BLOCK, room
from linearize.model.landmarks.merging import NUMBER, RECEIVED, Slots
from linearize.model.landmarks.slots import leaving_scores, rows_of

if TYPE_CHECKING:
    from collections.abc import Iterator

    from linearize.model.memory import Part
    from linearize.model.mixer.base import MixerBase


class Rows(NamedTuple):
    """Rows aligned by their windows: place 0 is the first token of the oldest block that is not merged yet, so block
    borders are at the same places in all rows.

    Attributes:
        merged: the number of blocks merged so far, one number for all rows or `[R]`.
        offset: the place of the first new token, one number for all rows or `[R]`; negative if it is a sink.
        total: `[R]` the number of filled places; None means all.
        first: the place of the first query in `q` and `q_state`.
        q, q_state: `[R, L, H, D]` the queries of softmax attention and those of the recurrence.
        held: the tensors of the tokens from place 0 on, by name.
    """

    merged: Tensor | int
    offset: Tensor | int
    total: Tensor | None
    first: int
    q: Tensor
    q_state: Tensor
    held: Part

    def real(self, query: Tensor) -> Tensor | None:
        """`[R, L]`, True if the query at a place in `query` `[L]` is a new token; None means all."""
        if self.total is None:
            return None
        real = query < self.total[:, None]
        return real if isinstance(self.offset, int) else real & (query >= self.offset[:, None])

    def back(self, y: Tensor, tokens: int) -> Tensor:
        """`y` `[R, L, ...]` from the order of places to the order of the new tokens."""
        if isinstance(self.offset, int):
            return y
        place = torch.arange(tokens, device=y.device) + self.offset[:, None] - self.first
        return rows_of(y, place.clamp(max=y.shape[1] - 1))


class Attended(NamedTuple):
    """All blocks of a call, with M merges.

    Attributes:
        y: `[R, L, H, V]` the outputs of softmax attention; None without values.
        logs: `[R, L, H]` the logs of the softmax's denominators; None if no mix needs them.
        slots: the slots after the last merge, as in the memory, with codes decoded.
        received: `[R, P, K]` the attention that the tokens of `rows.held` have received in the window.
        kept: `[R, M, N, K]` int32, the numbers of the tokens in the slots after each merge; None with values.
        lost: `[R, M, BLOCK, K]` int64, the tokens that have no slot after a merge, in text order: their indices in the
            slots at the start of the call, followed by `rows.held`. Places that held no token come first and are -1.
            None if not asked for.
    """

    y: Tensor | None
    logs: Tensor | None
    slots: Part
    received: Tensor
    kept: Tensor | None
    lost: Tensor | None


def merges_of(mixer: MixerBase, rows: Rows) -> int:
    """The number of merges until the last query of `rows`."""
    return max((rows.first + rows.q.shape[1] - mixer.window) // BLOCK, 0)


def blocks_of(mixer: MixerBase, rows: Rows) -> Iterator[tuple[int, int, int]]:
    """Yield the number of merges so far, and the places from and to which queries then follow; there may be none."""
    start, stop = rows.first, rows.first + rows.q.shape[1]
    for block in range(merges_of(mixer, rows) + 1):
        end = min(mixer.window - 1 + (block + 1) * BLOCK, stop)
        yield block, start, end
        start = end


def attend(mixer: MixerBase, rows: Rows, sinks: Part, landmarks: Part, leaving: Part, *, tell: bool) -> Attended:
    """Attention of all queries of `rows`, and all merges up to the last one.

    Args:
        sinks, landmarks: both as in the memory, with codes decoded.
        leaving: by the names of the tensors that are kept per token, those of the blocks that will be merged, as the
            slots store them, `[R, M * BLOCK, K, ...]`. Without `v` there are no outputs, only the slots, and queries
            after the last merge are left out.
        tell: return the tokens that lose their slots.
    """
    return Exact(mixer, rows, sinks, landmarks, leaving).run(tell=tell)


class Exact:
    """`attend` in plain torch. Sinks, window and slots lie side by side in one table.

    Attributes:
        slots: their tables are `[R, K, sinks + window + slots, ...]`.
        received: `[R, K, P]` the attention that the tokens of `rows.held` have received in the window.
    """

    def __init__(self, mixer: MixerBase, rows: Rows, sinks: Part, landmarks: Part, leaving: Part) -> None:
        config, layer, held, dtype = mixer.config, mixer.layer, rows.held, computing_dtype(rows.q)
        self.mixer, self.rows, self.sinks = mixer, rows, config.sinks
        self.front, self.groups = config.sinks + room(mixer.window), layer.query_heads // layer.key_value_heads
        # Keys and values head by head, because products read them so.
        self.text = {name: held[name].to(dtype).transpose(1, 2).contiguous() for name in leaving}
        tables: Part = {}
        for name, x in self.text.items():
            shape = (*x.shape[:2], self.front + config.landmarks, x.shape[-1])
            tables[name] = x.new_zeros(shape)
            tables[name][:, :, self.front :] = landmarks[name].transpose(1, 2)
            if name in sinks:
                tables[name][:, :, : self.sinks] = sinks[name].transpose(1, 2)
        filled = min(config.landmarks, rows.merged * BLOCK) if isinstance(rows.merged, int) else None
        self.slots = Slots(mixer, landmarks, tables, merged=rows.merged, filled=filled, front=self.front)
        queries = (rows.q.to(dtype) * layer.scale).unflatten(2, (layer.key_value_heads, -1)).transpose(1, 2)
        self.q = queries.flatten(0, 1).flatten(1, 2)  # [R * K, L * G, D]
        places = held["received"].shape[1]
        self.merges = merges_of(mixer, rows)
        self.leaving = {name: x.to(dtype).transpose(1, 2) for name, x in leaving.items()}
        static = leaving_scores(mixer, held["novelty"], self.merges)
        self.scores = self.slots.of_text(static, config.sinks + 1 + rows.merged * BLOCK, places)
        self.received = self.scores[RECEIVED]
        self.received.copy_(held["received"].transpose(1, 2))
        # Row t is the query at place t - sinks of a block's window. It reads all sinks and tokens up to its own.
        query = torch.arange(self.front, device=self.q.device)[:, None]
        distance = query - query.T
        self.hidden = torch.where(distance >= 0, 0.0, self.q.new_full((), -math.inf))
        self.distant = (distance >= mixer.window // 4).to(self.received.dtype)[:, self.sinks :]
        self.ys, self.logs = list[Tensor](), list[Tensor]()

    def run(self, *, tell: bool) -> Attended:
        rows, slots, chooses = self.rows, self.slots, "v" not in self.text
        kept, lost = list[Tensor](), list[Tensor]()
        for block, start, end in blocks_of(self.mixer, rows):
            if block:
                gone = self.merge(block - 1, tell=tell)
                if gone is not None:
                    lost.append(gone)
                if chooses:
                    kept.append(slots.number[..., : slots.count].clone())
            if end > start and not (chooses and block == self.merges):
                self.attend(start, end, block)
        y, logs = self.outputs()
        return Attended(
            y=y,
            logs=logs,
            slots=slots.part(list(self.text)),
            received=self.received.transpose(1, 2),
            kept=self._by_merge(kept, slots.count) if chooses else None,
            lost=self._by_merge(lost, BLOCK).long() if tell else None,
        )

    def _by_merge(self, found: list[Tensor], width: int) -> Tensor:
        """`[R, M, width, K]` from one `[R, K, width]` per merge."""
        if not found:
            rows, heads = self.slots.number.shape[:2]
            return self.slots.number.new_zeros(rows, 0, width, heads)
        return torch.stack(found, 1).transpose(2, 3)

    def merge(self, block: int, *, tell: bool) -> Tensor | None:
        """Merge block number `block` of `rows.held`. With `tell`, returns `Attended.lost` of it, `[R, K, BLOCK]`."""
        slots, rows = self.slots, self.rows
        own = slice(block * BLOCK, (block + 1) * BLOCK)
        leaving = {name: x[:, :, own] for name, x in self.leaving.items()}
        goes = None if rows.total is None else rows.total > self.mixer.window - 1 + (block + 1) * BLOCK
        lost = slots.merge(leaving, self.scores[..., own], goes, tell=() if tell else None)
        if not tell:
            return None
        if lost is None:
            return slots.number.new_full((*slots.number.shape[:2], BLOCK), -1)
        # A token does not move while it is in the slots, so one from before the text is where it was at the start.
        number, first = lost["number"], self.scores[NUMBER].view(torch.int32)[..., :1]
        origin = torch.where(number >= first, number - first + slots.count, lost["place"])
        there = number > 0 if goes is None else (number > 0) & goes[:, None, None]
        return torch.where(there, origin, -1)

    def attend(self, start: int, end: int, block: int) -> None:
        """Compute the queries at the places `start` to `end`, after `block` blocks of `rows.held` have been merged."""
        slots, first, width = self.slots, block * BLOCK, max(end - block * BLOCK, 0)
        slots.own()
        read: Part = {}
        for name in self.text.keys() & {"k_rotated", "v"}:
            slots.tables[name][:, :, self.sinks : self.sinks + width] = self.text[name][:, :, first : first + width]
            read[name] = slots.tables[name][:, :, : self.front + slots.filled].flatten(0, 1)
        places = slice((start - self.rows.first) * self.groups, (end - self.rows.first) * self.groups)
        scores = torch.bmm(self.q[:, places], read["k_rotated"].transpose(1, 2))
        if (softcap := self.mixer.layer.softcap) is not None:
            scores = softcap * torch.tanh(scores / softcap)
        by_query = scores.view(*slots.number.shape[:2], end - start, self.groups, -1)
        own = slice(start - first + self.sinks, end - first + self.sinks)
        by_query[..., : self.front].add_(self.hidden[own, None])
        if (empty := slots.empty()) is not None:
            by_query[..., self.front :].masked_fill_(empty[:, :, None, None], -math.inf)
        shares = scores.softmax(-1)
        if "v" in read:
            self.ys.append(torch.bmm(shares, read["v"]))
        if self.mixer.recurrence is not None and self.mixer.config.mix == "softmax":
            # The log of the denominator, from the largest weight, which is not 0.
            self.logs.append(scores.amax(-1) - shares.amax(-1).log())
        given = shares.detach().view(by_query.shape)
        if (real := self.rows.real(torch.arange(start, end, device=given.device))) is not None:
            given = given * real[:, None, :, None, None]
        if slots.filled:
            slots.received.add_(given[..., self.front :].sum((2, 3)))
        window = given[..., self.sinks : self.sinks + width].sum(3)
        self.received[..., first : first + width].add_((window * self.distant[own, :width]).sum(2))

    def outputs(self) -> tuple[Tensor | None, Tensor | None]:
        """`[R, L, H, V]`, and the logs of the softmax's denominators `[R, L, H]` if a mix needs them."""
        y = self._by_token(torch.cat(self.ys, 1)) if self.ys else None
        return y, self._by_token(torch.cat(self.logs, 1)[..., None])[..., 0] if self.logs else None

    def _by_token(self, x: Tensor) -> Tensor:
        rows, heads = self.slots.number.shape[:2]
        by_head: Tensor = x.view(rows, heads, -1, self.groups, x.shape[-1])
        return by_head.transpose(1, 2).flatten(2, 3)
