"""Attention to sinks, window and slots over several tokens, block by block.

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
from linearize.model.landmarks.merging import RECEIVED, Slots
from linearize.model.landmarks.slots import in_slots, leaving_scores, rows_of

if TYPE_CHECKING:
    from collections.abc import Sequence

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


class Exact:
    """The exact branch, block by block: attention to sinks, window and slots, which lie side by side in one table.

    Args:
        sinks, landmarks: both as in the memory, with codes decoded.
        names: the tensors that are kept per token. Without `v` there are no outputs, only the slots.

    Attributes:
        slots: their tables are `[R, K, sinks + window + slots, ...]`.
        received: `[R, K, P]` the attention that the tokens of `rows.held` have received in the window.
    """

    def __init__(self, mixer: MixerBase, rows: Rows, sinks: Part, landmarks: Part, names: Sequence[str]) -> None:
        config, layer, held, dtype = mixer.config, mixer.layer, rows.held, computing_dtype(rows.q)
        self.mixer, self.rows, self.sinks = mixer, rows, config.sinks
        self.front, self.groups = config.sinks + room(mixer.window), layer.query_heads // layer.key_value_heads
        # Keys and values head by head, because products read them so.
        self.text = {name: held[name].to(dtype).transpose(1, 2).contiguous() for name in names}
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
        merges = max(-((mixer.window - 1 - rows.first - rows.q.shape[1]) // BLOCK) - 1, 0)
        leaving = leaving_scores(mixer, held["novelty"], merges)
        self.leaving = in_slots(
            mixer, {name: x[:, :, : merges * BLOCK] for name, x in self.text.items()} if merges else {}
        )
        self.scores = self.slots.of_text(leaving, config.sinks + 1 + rows.merged * BLOCK, places)
        self.received = self.scores[RECEIVED]
        self.received.copy_(held["received"].transpose(1, 2))
        # Row t is the query at place t - sinks of a block's window. It reads all sinks and tokens up to its own.
        query = torch.arange(self.front, device=self.q.device)[:, None]
        distance = query - query.T
        self.hidden = torch.where(distance >= 0, 0.0, self.q.new_full((), -math.inf))
        self.distant = (distance >= mixer.window // 4).to(self.received.dtype)[:, self.sinks :]
        self.ys, self.logs = list[Tensor](), list[Tensor]()

    def merge(self, block: int, goes: Tensor | None, *, tell: bool) -> Part | None:
        """Merge block number `block` of `rows.held`. With `tell`, returns the `BLOCK` tokens that have no slot, as
        `Slots.merge` does, in the memory's layout `[R, BLOCK, K, ...]`; None if all have one."""
        own = slice(block * BLOCK, (block + 1) * BLOCK)
        leaving = {name: x[:, :, own] for name, x in self.leaving.items()}
        lost = self.slots.merge(leaving, self.scores[..., own], goes, tell=tell)
        return None if lost is None else {name: x.transpose(1, 2) for name, x in lost.items()}

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

    def outputs(self) -> tuple[Tensor, Tensor | None]:
        """`[R, L, H, V]`, and the logs of the softmax's denominators `[R, L, H]` if a mix needs them."""
        y = self._by_token(torch.cat(self.ys, 1))
        return y, self._by_token(torch.cat(self.logs, 1)[..., None])[..., 0] if self.logs else None

    def _by_token(self, x: Tensor) -> Tensor:
        rows, heads = self.slots.number.shape[:2]
        by_head: Tensor = x.view(rows, heads, -1, self.groups, x.shape[-1])
        return by_head.transpose(1, 2).flatten(2, 3)
