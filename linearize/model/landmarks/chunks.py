"""Attention with landmarks for any number of tokens; see `slots.py` for the definition.

Queries are computed block by block, because all queries between two merges read the same sinks, the same slots and the
same state.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from linearize_kernels.decay import computing_dtype
from torch import Tensor

from linearize.model.configuration import BLOCK, room
from linearize.model.landmarks.exact import Exact, Rows
from linearize.model.landmarks.slots import (
    arriving_of,
    join,
    kept_names,
    merges,
    rows_of,
    static_scores,
    stored,
)
from linearize.model.landmarks.step import landmark_step
from linearize.model.landmarks.training import whole_rows
from linearize.model.memory import store
from linearize.model.precision import decoded, encoded

if TYPE_CHECKING:
    from linearize.families.base import Projections
    from linearize.model.memory import LayerMemory, Part
    from linearize.model.mixer.base import MixerBase


@torch.compiler.disable(reason="which tokens are kept depends on what they are")  # type: ignore[untyped-decorator]
def landmark_attention(
    mixer: MixerBase, new: Projections, lengths: Tensor | None, memory: LayerMemory | None
) -> Tensor:
    """`Mixer.forward` with landmarks."""
    if memory is not None and new.q.shape[1] == 1 and not torch.is_grad_enabled():
        return landmark_step(mixer, new, lengths, memory)
    if memory is None and torch.is_grad_enabled() and any(x.requires_grad for x in new):
        return whole_rows(mixer, new)
    return _chunk(mixer, new, lengths, memory)


def _lay_out(
    mixer: MixerBase, new: Projections, arriving: Part, window: Part, lengths: Tensor | None, memory: LayerMemory | None
) -> Rows:
    tokens, sinks, width = new.q.shape[1], mixer.config.sinks, room(mixer.window)
    q_state = new.q_rotated if mixer.config.rope else new.q
    count: Tensor | int = 0
    if memory is not None:
        count = memory.counts.clone() if memory.uniform is None else memory.uniform
    merged = merges(mixer, count)
    offset = count - sinks - merged * BLOCK
    if isinstance(offset, int):
        total = None if memory is None or lengths is None else offset + lengths
        past, later = max(offset, 0), max(-offset, 0)
        held = {name: torch.cat([x[:, :past], arriving[name][:, later:]], 1) for name, x in window.items()}
        return Rows(merged, offset, total, offset, new.q_rotated, q_state, held)
    total = offset + (tokens if lengths is None else lengths)
    place = torch.arange(max(int(total.max()), 1), device=total.device)
    at = torch.where(place < offset[:, None], place, width + place - offset[:, None]).clamp(max=width + tokens - 1)
    held = {name: rows_of(torch.cat([x, arriving[name].to(x.dtype)], 1), at) for name, x in window.items()}
    query = torch.arange(-sinks, len(place), device=total.device) - offset[:, None]
    query = query.clamp(0, tokens - 1)
    return Rows(merged, offset, total, -sinks, rows_of(new.q_rotated, query), rows_of(q_state, query), held)


def _chunk(mixer: MixerBase, new: Projections, lengths: Tensor | None, memory: LayerMemory | None) -> Tensor:
    """`Mixer.forward` with landmarks, for any number of tokens, with or without a memory."""
    config, window, dtype = mixer.config, mixer.window, computing_dtype(new.q)
    parts = memory.parts if memory is not None else mixer.parts(new.v.shape[0], new.v.dtype, new.v.device)
    fresh, sums = static_scores(mixer, new, parts)
    rows = _lay_out(mixer, new, arriving_of(mixer, new, fresh), decoded(parts["window"], dtype), lengths, memory)
    sinks = _sinks_of(mixer, new, lengths, memory)
    names = kept_names(mixer)
    exact = Exact(mixer, rows, sinks, decoded(parts["landmarks"], dtype), names)
    recall = _Recall(mixer, rows)
    start, stop, block = rows.first, rows.first + rows.q.shape[1], 0
    while start < stop:
        end = min(window - 1 + (block + 1) * BLOCK, stop)
        if block:
            goes = None if rows.total is None else rows.total > window - 1 + block * BLOCK
            recall.write(exact.merge(block - 1, goes, tell=recall.on), goes)
        if end > start:
            exact.attend(start, end, block)
            recall.read(start, end, (rows.merged + block) * BLOCK - config.landmarks)
        start, block = end, block + 1
    if memory is not None:
        done = block - 1 if rows.total is None else (rows.total - window).clamp_min(0) // BLOCK
        rows.held["received"] = exact.received.transpose(1, 2)
        _keep(memory, rows, done, {"landmarks": exact.slots.part(names), "sinks": sinks}, sums, lengths)
    return rows.back(recall.join(*exact.outputs(), memory), new.q.shape[1])


class _Recall:
    """The reads of a chunk's queries from the state, interleaved with the writes of its merges.

    Writes and reads are queued and then run as one sequence, in which the tokens at query places do not write.
    """

    def __init__(self, mixer: MixerBase, rows: Rows) -> None:
        self.mixer, self.q, self.first = mixer, rows.q_state, rows.first
        self.on = mixer.recurrence is not None and "recurrence" not in mixer.branches_off
        self.waiting: list[tuple[Tensor, ...]] = []  # written after the last read
        self.sequence: list[tuple[Tensor, ...]] = []  # q, k, v, source, writes
        self.reads: list[Tensor] = []  # places in the sequence
        self.empty: list[Tensor] = []
        self.start, self.length = 0, 0

    def write(self, lost: Part | None, goes: Tensor | None) -> None:
        """Queue the tokens that a merge evicts, in the rows that `goes` selects; None: it evicts no token."""
        if lost is None:
            return
        writes = lost["number"][:, :, 0] > 0
        k, v, source = stored(self.mixer, lost)
        q = self.q.new_zeros(*k.shape[:2], *self.q.shape[2:])
        self.waiting.append((q, k, v, source, writes if goes is None else writes & goes[:, None]))

    def read(self, start: int, end: int, written: Tensor | int) -> None:
        """Queue the queries at places `start` to `end`. `written` is the number of tokens in the state; 0 or less means
        an empty state."""
        if not self.on or (isinstance(written, int) and written <= 0):
            self.waiting = []  # no merge has evicted a token in any row
            return
        q = self.q[:, start - self.first : end - self.first]
        if not self.reads:
            self.start = start - self.first
        self.sequence += self.waiting
        self.length += BLOCK * len(self.waiting)
        self.waiting = []
        layer, shape = self.mixer.layer, (*q.shape[:2], self.mixer.layer.key_value_heads)
        k, v = q.new_zeros(*shape, layer.key_width), q.new_zeros(*shape, layer.value_width)
        source = v if self.mixer.config.gate_source == "v" else k
        self.sequence.append((q, k, v, source, torch.zeros(shape[:2], dtype=torch.bool, device=q.device)))
        self.reads.append(torch.arange(self.length, self.length + shape[1], device=q.device))
        self.length += shape[1]
        if isinstance(written, Tensor):
            self.empty.append((written <= 0)[:, None].expand(-1, shape[1]))

    def join(self, y: Tensor, logs: Tensor | None, memory: LayerMemory | None) -> Tensor:
        """Run the sequence and mix its outputs with the exact branch's `y` `[R, L, H, V]`; `logs` `[R, L, H]` are the
        logs of the softmax's denominators, for `mix: softmax`."""
        if "window" in self.mixer.branches_off:
            y = torch.zeros_like(y)
        recurrence = self.mixer.recurrence
        if recurrence is None or not self.reads:
            return y
        q, k, v, source, writes = (torch.cat(x, 1) for x in zip(*self.sequence, strict=True))
        state = memory.parts["state"] if memory is not None else None
        answers, mass = recurrence.in_segments(q, k, v, source, writes, state)
        at, start = torch.cat(self.reads), self.start
        empty = torch.cat(self.empty, 1) if self.empty else None
        mass = None if mass is None else mass[:, at]
        logs = None if logs is None else logs[:, start:]
        mixed = join(self.mixer, y[:, start:], logs, answers[:, at], mass, empty)
        return torch.cat([y[:, :start], mixed], 1) if start else mixed


def _sinks_of(mixer: MixerBase, new: Projections, lengths: Tensor | None, memory: LayerMemory | None) -> Part:
    """Keys and values of the sinks `[R, M, K, D or V]`, those among the new tokens included."""
    sinks, (rows, tokens) = mixer.config.sinks, new.v.shape[:2]
    if not sinks:
        return {}
    if memory is not None and memory.uniform is not None and memory.uniform >= sinks:
        return decoded(memory.parts["sinks"], computing_dtype(new.q))
    place = torch.arange(sinks, device=new.v.device).expand(rows, -1)
    if memory is not None:
        place = place - memory.counts[:, None]
    taken = {name: rows_of(getattr(new, name), place.clamp(0, tokens - 1)) for name in ("k_rotated", "v")}
    if memory is None:
        return taken
    arrives = (place >= 0) & (place < (tokens if lengths is None else lengths[:, None]))
    here, held = arrives[:, :, None, None], decoded(memory.parts["sinks"], computing_dtype(new.q))
    return {name: torch.where(here, x.to(held[name].dtype), held[name]) for name, x in taken.items()}


def _keep(
    memory: LayerMemory,
    rows: Rows,
    done: Tensor | int,
    exact: dict[str, Part],
    sums: Tensor | None,
    lengths: Tensor | None,
) -> None:
    """Write the tensors at the end of a chunk into the memory; places without a token become 0.

    Args:
        done: the number of blocks of `rows.held` that have been merged.
        exact: landmarks and sinks.
        sums: `[R, L, K, D]` running sums of normalised keys after each new token; None if none is kept.
    """
    latest, width = dict[str, Tensor](), memory.parts["window"]["received"].shape[1]
    for name, held in rows.held.items():
        if isinstance(done, int) or rows.total is None:
            left = held[:, done * BLOCK :]
            latest[name] = F.pad(left, (*[0, 0] * (left.dim() - 2), 0, width - left.shape[1]))
        elif span := held.shape[1]:
            place = torch.arange(width, device=held.device) + done[:, None] * BLOCK
            left = rows_of(held, place.clamp(max=span - 1))
            there = place < rows.total[:, None]
            latest[name] = torch.where(there.view(*there.shape, *[1] * (held.dim() - 2)), left, 0)
    for part, tensors in {"window": latest, **exact}.items():
        into = memory.parts.get(part, {})
        for name, tensor in encoded(tensors, into).items():
            if tensor is not into[name]:
                store(into, name, tensor)
    if sums is None:
        return
    keys = memory.parts["keys"]
    if lengths is not None:
        sums = rows_of(torch.cat([keys["sum"][:, None], sums], 1), lengths[:, None])
    store(keys, "sum", sums[:, -1])
