"""Attention to sinks, window and slots over several tokens, block by block: `attend` is the one function that runs all
blocks of a call.

All queries between two merges read the same slots. So a block costs two matrix products and some operators on scores,
and a merge moves no more than the tokens that it replaces.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
from linearize_kernels.decay import computing_dtype
from torch import Tensor

from linearize.model.configuration import BLOCK, room
from linearize.model.landmarks.merging import NUMBER, RECEIVED, Slots
from linearize.model.landmarks.native import attend_native, native
from linearize.model.landmarks.rows import Attended, Rows, blocks_of, merges_of
from linearize.model.landmarks.slots import leaving_scores
from linearize.model.landmarks.text import fused_attend

if TYPE_CHECKING:
    from linearize.model.memory import Part
    from linearize.model.mixer.base import MixerBase


def attend(
    mixer: MixerBase, rows: Rows, sinks: Part, landmarks: Part, leaving: Part, *, tell: bool, fused: bool
) -> Attended:
    """Attention of all queries of `rows`, and all merges up to the last one.

    Args:
        sinks, landmarks: both as in the memory, with codes decoded.
        leaving: by the names of the tensors that are kept per token, those of the blocks that will be merged, as the
            slots store them, `[R, M * BLOCK, K, ...]`. Without `v` there are no outputs, only the slots, and queries
            after the last merge are left out.
        tell: return the tokens that lose their slots.
        fused: run the fused kernels, without gradients.
    """
    if fused:
        return fused_attend(mixer, rows, sinks, landmarks, leaving, tell=tell)
    if not torch.is_grad_enabled() and native(rows.q):
        return attend_native(mixer, rows, sinks, landmarks, leaving, tell=tell)
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
