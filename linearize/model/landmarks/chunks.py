"""Attention with landmarks for any number of tokens; see `slots.py` for the definition.

Queries are computed block by block, because all queries between two merges read the same sinks, the same slots and the
same state.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch
import torch.nn.functional as F
from linearize_kernels import joint_attention
from linearize_kernels.decay import computing_dtype
from torch import Tensor

from linearize.model.configuration import BLOCK, room
from linearize.model.landmarks.slots import (
    arriving_of,
    in_slots,
    join,
    leaving_scores,
    merge,
    merges,
    numbers,
    rows_of,
    static_scores,
    stored,
    where,
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


class _Rows(NamedTuple):
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


def _lay_out(
    mixer: MixerBase, new: Projections, arriving: Part, window: Part, lengths: Tensor | None, memory: LayerMemory | None
) -> _Rows:
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
        return _Rows(merged, offset, total, offset, new.q_rotated, q_state, held)
    total = offset + (tokens if lengths is None else lengths)
    place = torch.arange(max(int(total.max()), 1), device=total.device)
    at = torch.where(place < offset[:, None], place, width + place - offset[:, None]).clamp(max=width + tokens - 1)
    held = {name: rows_of(torch.cat([x, arriving[name].to(x.dtype)], 1), at) for name, x in window.items()}
    query = torch.arange(-sinks, len(place), device=total.device) - offset[:, None]
    query = query.clamp(0, tokens - 1)
    return _Rows(merged, offset, total, -sinks, rows_of(new.q_rotated, query), rows_of(q_state, query), held)


def _chunk(mixer: MixerBase, new: Projections, lengths: Tensor | None, memory: LayerMemory | None) -> Tensor:
    """`Mixer.forward` with landmarks, for any number of tokens, with or without a memory."""
    config, window, device, dtype = mixer.config, mixer.window, new.v.device, computing_dtype(new.q)
    parts = memory.parts if memory is not None else mixer.parts(new.v.shape[0], new.v.dtype, device)
    fresh, sums = static_scores(mixer, new, parts)
    rows = _lay_out(mixer, new, arriving_of(mixer, new, fresh), decoded(parts["window"], dtype), lengths, memory)
    held, landmarks, sinks = rows.held, decoded(parts["landmarks"], dtype), _sinks_of(mixer, new, lengths, memory)
    ys, logs, recall = list[Tensor](), list[Tensor](), _Recall(mixer, rows)
    start, stop, block = rows.first, rows.first + rows.q.shape[1], 0
    while start < stop:
        end = min(window - 1 + (block + 1) * BLOCK, stop)
        if block:
            first = (block - 1) * BLOCK
            leaving = in_slots(mixer, {name: x[:, first : first + BLOCK] for name, x in held.items()})
            leaving |= {
                "novelty": leaving_scores(mixer, held["novelty"][:, first:]),
                "number": numbers(config.sinks + 1 + rows.merged * BLOCK + first, leaving["received"]),
            }
            goes = None if rows.total is None else rows.total > window - 1 + block * BLOCK
            kept, lost = merge(mixer, landmarks, leaving)
            landmarks = where(goes, kept, landmarks)
            recall.write(lost, goes)
        if end > start:
            y, log = _block(mixer, rows, slice(start, end), block, sinks, landmarks)
            ys.append(y)
            logs.append(log)
            recall.read(start, end, (rows.merged + block) * BLOCK - config.landmarks)
        start, block = end, block + 1
    if memory is not None:
        done = block - 1 if rows.total is None else (rows.total - window).clamp_min(0) // BLOCK
        _keep(memory, rows, done, {"landmarks": landmarks, "sinks": sinks}, sums, lengths)
    return rows.back(recall.join(torch.cat(ys, 1), torch.cat(logs, 1), memory), new.q.shape[1])


def _block(
    mixer: MixerBase, rows: _Rows, places: slice, block: int, sinks: Part, landmarks: Part
) -> tuple[Tensor, Tensor]:
    """Attention of the queries at `places`; adds each key's attention weights to its `received` score.

    Args:
        block: the number of blocks of `rows.held` merged before these queries.

    Returns:
        outputs and the log of the softmax's denominator, as `joint_attention` returns them.
    """
    held, slots, count = rows.held, mixer.config.landmarks, mixer.config.sinks
    query = torch.arange(places.start, places.stop, device=rows.q.device)
    local = slice(block * BLOCK, max(places.stop, 0))
    distance = query[:, None] - torch.arange(local.start, local.stop, device=query.device)
    read: list[Part] = [{name: x[:, local] for name, x in held.items()}]
    seen: list[Tensor | None] = [(distance >= 0)[None, None]]
    # If all rows have merged the same number of blocks, the same number of slots is filled in each.
    filled = min(slots, (rows.merged + block) * BLOCK) if isinstance(rows.merged, int) else slots
    if filled:
        read.insert(0, {name: x[:, :filled] for name, x in landmarks.items()})
        exists = landmarks["number"].transpose(1, 2)[:, :, None] > 0
        seen.insert(0, None if isinstance(rows.merged, int) else exists)
    if count:
        read.insert(0, sinks)
        visible = torch.arange(count, device=query.device) <= query[:, None] + count
        seen.insert(0, visible[None, None] if places.start < 0 else None)
    y, log, received = joint_attention(
        rows.q[:, places.start - rows.first : places.stop - rows.first],
        [part["k_rotated"] for part in read],
        [part["v"] for part in read],
        seen,
        scale=mixer.layer.scale,
        softcap=mixer.layer.softcap,
    )
    if (real := rows.real(query)) is not None:
        received = [share * real[:, None, :, None] for share in received]
    distant = received[-1] * (distance >= mixer.window // 4)
    held["received"][:, local] += distant.sum(2).transpose(1, 2).to(held["received"].dtype)
    if filled:
        total = F.pad(received[-2].sum(2), (0, slots - filled)).transpose(1, 2)
        landmarks["received"] = landmarks["received"] + total.to(landmarks["received"].dtype)
    return y, log


class _Recall:
    """The reads of a chunk's queries from the state, interleaved with the writes of its merges.

    Writes and reads are queued and then run as one sequence, in which the tokens at query places do not write.
    """

    def __init__(self, mixer: MixerBase, rows: _Rows) -> None:
        self.mixer, self.q, self.first = mixer, rows.q_state, rows.first
        self.on = mixer.recurrence is not None and "recurrence" not in mixer.branches_off
        self.waiting: list[tuple[Tensor, ...]] = []  # written after the last read
        self.sequence: list[tuple[Tensor, ...]] = []  # q, k, v, source, writes
        self.reads: list[Tensor] = []  # places in the sequence
        self.empty: list[Tensor] = []
        self.start, self.length = 0, 0

    def write(self, lost: Part, goes: Tensor | None) -> None:
        """Queue the tokens that a merge evicts, in the rows that `goes` selects."""
        if not self.on:
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

    def join(self, y: Tensor, logs: Tensor, memory: LayerMemory | None) -> Tensor:
        """Run the sequence and mix its outputs with the exact branch's `y` `[R, L, H, V]`; `logs` `[R, L, H]` are the
        logs of the softmax's denominators."""
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
        mixed = join(self.mixer, y[:, start:], logs[:, start:], answers[:, at], mass, empty)
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
    rows: _Rows,
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
