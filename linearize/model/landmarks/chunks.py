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
from linearize.model.landmarks.exact import Rows, attend, blocks_of, merges_of
from linearize.model.landmarks.slots import (
    arriving_of,
    in_slots,
    join,
    kept_names,
    merges,
    rows_of,
    static_scores,
    stored,
    take_by_head,
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
    window, dtype = mixer.window, computing_dtype(new.q)
    parts = memory.parts if memory is not None else mixer.parts(new.v.shape[0], new.v.dtype, new.v.device)
    fresh, sums = static_scores(mixer, new, parts)
    rows = _lay_out(mixer, new, arriving_of(mixer, new, fresh), decoded(parts["window"], dtype), lengths, memory)
    sinks = _sinks_of(mixer, new, lengths, memory)
    held = {name: rows.held[name][:, : merges_of(mixer, rows) * BLOCK].to(dtype) for name in kept_names(mixer)}
    leaving, landmarks = in_slots(mixer, held), decoded(parts["landmarks"], dtype)
    recall = _Recall(mixer, rows)
    exact = attend(mixer, rows, sinks, landmarks, leaving, tell=recall.on)
    assert exact.y is not None  # noqa: S101 - for the type checker
    if exact.lost is not None:
        recall.follow(landmarks, leaving, exact.lost)
    if memory is not None:
        done = merges_of(mixer, rows) if rows.total is None else (rows.total - window).clamp_min(0) // BLOCK
        rows.held["received"] = exact.received
        _keep(memory, rows, done, {"landmarks": exact.slots, "sinks": sinks}, sums, lengths)
    return rows.back(recall.join(exact.y, exact.logs, memory), new.q.shape[1])


class _Recall:
    """The reads of a chunk's queries from the state, interleaved with the writes of its merges.

    Writes and reads are queued and then run as one sequence, in which the tokens at query places do not write.
    """

    def __init__(self, mixer: MixerBase, rows: Rows) -> None:
        self.mixer, self.rows = mixer, rows
        self.on = mixer.recurrence is not None and "recurrence" not in mixer.branches_off
        self.waiting: list[tuple[Tensor, ...]] = []  # written after the last read
        self.sequence: list[tuple[Tensor, ...]] = []  # q, k, v, source, writes
        self.reads: list[Tensor] = []  # places in the sequence
        self.empty: list[Tensor] = []
        self.start, self.length = 0, 0

    def follow(self, landmarks: Part, leaving: Part, lost: Tensor) -> None:
        """Queue the writes and the reads of all blocks. The arguments are those of `attend`, and its `lost`."""
        merged, slots = self.rows.merged, self.mixer.config.landmarks
        at = lost.clamp_min(0).flatten(1, 2)
        tokens = {name: take_by_head(torch.cat([landmarks[name], x], 1), at) for name, x in leaving.items()}
        k, v, source = stored(self.mixer, tokens)
        writes = (lost[..., 0] >= 0).flatten(1)
        q = self.rows.q_state.new_zeros(*k.shape[:2], *self.rows.q_state.shape[2:])
        for block, start, end in blocks_of(self.mixer, self.rows):
            # The first merges evict no token, because slots are empty.
            if block and not (isinstance(merged, int) and (merged + block) * BLOCK <= slots):
                own = slice((block - 1) * BLOCK, block * BLOCK)
                self.waiting.append((q[:, own], k[:, own], v[:, own], source[:, own], writes[:, own]))
            if end > start:
                self.read(start, end, (merged + block) * BLOCK - slots)

    def read(self, start: int, end: int, written: Tensor | int) -> None:
        """Queue the queries at places `start` to `end`. `written` is the number of tokens in the state; 0 or less means
        an empty state."""
        if isinstance(written, int) and written <= 0:
            self.waiting = []  # no merge has evicted a token in any row
            return
        first = self.rows.first
        q = self.rows.q_state[:, start - first : end - first]
        if not self.reads:
            self.start = start - first
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
