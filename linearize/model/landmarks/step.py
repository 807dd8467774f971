"""One token of decoding with landmarks. It updates the memory in place and merges once per block."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch
from linearize_kernels import joint_attention
from linearize_kernels.decay import computing_dtype
from linearize_kernels.products import on_one_thread
from torch import Tensor

from linearize.model.configuration import BLOCK, room
from linearize.model.landmarks.merging import RECEIVED, Slots
from linearize.model.landmarks.native import native, step_native
from linearize.model.landmarks.slots import (
    join,
    joint_parts,
    kept_names,
    leaving_scores,
    merges,
    static_scores,
    stored,
    where,
)
from linearize.model.precision import as_read, decoded, encoded, slot_bits

if TYPE_CHECKING:
    from linearize.families.base import Projections
    from linearize.model.memory import LayerMemory, Part
    from linearize.model.mixer.base import MixerBase


class _Seen(NamedTuple):
    """The tokens that the new one attends to, once it is written.

    Attributes:
        filled: the number of leading slots to read.
        hidden: the first place of sinks and window that is not read, or a mask `[R, 1, 1, places]`.
        empty: `[R, K, 1, slots]` True for empty slots; None if the leading ones are filled.
        distant: the places of the window whose `received` score the token's attention adds to: a mask `[R, places, 1]`,
            or the number of leading places.
        counts: `[R, 1, 1]` True for rows with a new token; None means all.
        written: the number of tokens in the state; 0 or less if it is empty.
    """

    filled: int
    hidden: int | Tensor
    empty: Tensor | None
    distant: Tensor | int
    counts: Tensor | None
    written: Tensor | int


def landmark_step(mixer: MixerBase, new: Projections, lengths: Tensor | None, memory: LayerMemory) -> Tensor:
    """`landmark_attention` for one token per row, without a gradient."""
    config, parts, dtype = mixer.config, memory.parts, computing_dtype(new.q)
    fast = memory.counts_on_host and native(new.q)
    if fast and mixer.recurrence is None and (found := step_native(mixer, new, lengths, memory, written=False)):
        return torch.zeros_like(found[0]) if "window" in mixer.branches_off else found[0]
    new = mixer.in_code(new)
    memory.joints = memory.joints or joint_parts(mixer)
    names = kept_names(mixer)
    values = {name: mixer.source(new) if name == "source" else getattr(new, name) for name in names}
    arriving = encoded(values, parts["window"])
    if config.memory_dtype != "auto":
        # Scores and gates read what is stored; attention reads it from the memory.
        held = {name: x for name, x in arriving.items() if mixer.recurrence is not None or name.startswith("v")}
        values |= decoded(held, dtype)
        new = new._replace(**{name: x for name, x in values.items() if name != "source"})
    fresh, sums = static_scores(mixer, new, parts)
    arriving |= {"novelty": fresh} | ({} if sums is None else {"sum": sums[:, 0]})
    count = memory.uniform if lengths is None else None
    if count is None:
        seen = _apart(mixer, memory, arriving, dtype, lengths)
    else:
        seen = _alike(mixer, memory, arriving, dtype, count)
    found = step_native(mixer, new, lengths, memory, written=True) if fast else None
    y, log = found or _read_exact(mixer, memory, new.q_rotated, seen)
    if "window" in mixer.branches_off:
        y = torch.zeros_like(y)
    if mixer.recurrence is None or "recurrence" in mixer.branches_off:
        return y
    if isinstance(seen.written, int) and seen.written <= 0:
        return y
    k, v, source = stored(mixer, values)
    writes = torch.zeros(y.shape[0], 1, dtype=torch.bool, device=y.device)
    with on_one_thread(new.q):
        read, mass = mixer.recurrence(new.q_rotated if config.rope else new.q, k, v, source, writes, parts["state"])
    empty = seen.written[:, None] <= 0 if isinstance(seen.written, Tensor) else None
    return join(mixer, y, log, read, mass, empty)


def _read_exact(mixer: MixerBase, memory: LayerMemory, q: Tensor, seen: _Seen) -> tuple[Tensor, Tensor | None]:
    """Outputs and logs of `joint_attention`; window and slots receive its weights."""
    sinks = mixer.config.sinks
    front = sinks + room(mixer.window)
    whole, hidden = memory.joined(memory.joints[0]), list[slice | Tensor | None]()
    apart = "landmarks" not in memory.joints[0].parts
    if isinstance(seen.hidden, int):
        # The places behind it are not read, unless slots lie there.
        hidden = [None, None] if apart else [slice(seen.hidden, front)]
        front = seen.hidden if apart else front
    elif apart or seen.empty is None:
        hidden = [seen.hidden, seen.empty]
    else:
        hidden = [torch.cat([seen.hidden.expand(-1, seen.empty.shape[1], -1, -1), seen.empty], -1)]
    read = [(whole, front), (memory.parts["landmarks"], seen.filled)] if apart else [(whole, front + seen.filled)]
    if apart and not seen.filled:
        read.pop()
    y, log, weights = joint_attention(
        q,
        [as_read(part, "k_rotated", count) for part, count in read],
        [as_read(part, "v", count) for part, count in read],
        hidden[: len(read)],
        scale=mixer.layer.scale,
        softcap=mixer.layer.softcap,
        normaliser=mixer.recurrence is not None and mixer.config.mix == "softmax",
    )
    of_window, of_slots = weights[0][..., sinks:front], weights[1] if len(weights) > 1 else weights[0][..., front:]
    of_window, of_slots = of_window.transpose(1, 2), of_slots.transpose(1, 2)
    window, landmarks = memory.parts["window"]["received"], memory.parts["landmarks"]["received"]
    if isinstance(seen.distant, Tensor):
        window.add_(of_window * seen.distant)
    elif seen.distant > 0:
        window[:, : seen.distant].add_(of_window[:, : seen.distant])
    if seen.filled:
        landmarks[:, : seen.filled].add_(of_slots if seen.counts is None else of_slots * seen.counts)
    return y, log


def _alike(mixer: MixerBase, memory: LayerMemory, arriving: Part, dtype: torch.dtype, count: int) -> _Seen:
    """Write a token into rows that have all seen `count` tokens, so that masks are plain slices."""
    config, parts = mixer.config, memory.parts
    merged = merges(mixer, count + 1)
    if merged > merges(mixer, count):
        _merge(mixer, memory, dtype, merged - 1, None)
    place = count - config.sinks - merged * BLOCK
    part, slot = ("window", place) if place >= 0 else ("sinks", count)
    for name, held in parts[part].items():
        if name != "received":  # it is 0 there
            held[:, slot] = arriving[name][:, 0]
    if "keys" in parts:
        parts["keys"]["sum"].copy_(arriving["sum"])
    local = max(place + 1, 0)
    return _Seen(
        filled=min(config.landmarks, merged * BLOCK),
        hidden=min(count + 1, config.sinks + local),
        empty=None,
        distant=max(local - mixer.window // 4, 0),
        counts=None,
        written=merged * BLOCK - config.landmarks,
    )


class _Places(NamedTuple):
    """Places and masks that follow from the rows' counts, equal in all layers with one window and number of sinks.

    Attributes:
        real: `[R]` True for rows with a new token.
        before, merged: `[R]` the number of blocks merged before and with the new token.
        goes: `[R]` True for rows whose token merges a block.
        window, in_window: `[R]` the new token's place in the window, and True for rows where it is no sink.
        front: `[R]` its place in sinks and window, side by side.
        hidden, distant: see `_Seen`.
    """

    real: Tensor
    before: Tensor
    merged: Tensor
    goes: Tensor
    window: Tensor
    in_window: Tensor
    front: Tensor
    hidden: Tensor
    distant: Tensor


def _places(mixer: MixerBase, counts: Tensor, lengths: Tensor | None) -> _Places:
    sinks, kind = mixer.config.sinks, (mixer.window, mixer.config.sinks)
    known: dict[tuple[int, int], _Places] = {} if lengths is None else lengths.__dict__.setdefault("_places", {})
    if kind in known:
        return known[kind]
    real = torch.ones_like(counts, dtype=torch.bool) if lengths is None else lengths > 0
    before, merged = merges(mixer, counts), merges(mixer, counts + 1)
    place = counts - sinks - torch.where(real, merged, before) * BLOCK
    each = torch.arange(-sinks, room(mixer.window), device=counts.device)
    distance = place[:, None] - each
    # A row without a new token may have no free place, so its place is any that there is.
    at = place.clamp(-sinks, room(mixer.window) - 1)
    known[kind] = _Places(
        real=real,
        before=before,
        merged=merged,
        goes=real & (merged > before),
        window=at.clamp_min(0),
        in_window=real & (place >= 0),
        front=at + sinks,
        hidden=(distance < 0)[:, None, None],
        distant=((distance[:, sinks:] >= mixer.window // 4) & real[:, None])[:, :, None],
    )
    return known[kind]


def _apart(mixer: MixerBase, memory: LayerMemory, arriving: Part, dtype: torch.dtype, lengths: Tensor | None) -> _Seen:
    """Write a token into rows of different lengths; rows with length 0 in `lengths` do not change."""
    config, parts = mixer.config, memory.parts
    places = _places(mixer, memory.counts, lengths)
    # `any` syncs a GPU, and a CUDA graph must not depend on a host value. Merging no row is a no-op.
    due = memory.merges
    if due is None:
        due = places.goes.device.type != "cpu" or not memory.counts_on_host or bool(places.goes.any())
    if due:
        _merge(mixer, memory, dtype, places.before, places.goes)
    exact = memory.joined(memory.joints[0])
    alone = {name: x for name, x in parts["window"].items() if name not in exact and name != "received"}
    for tensors, at, writes in (
        (exact, places.front, places.real),
        (alone, places.window, places.in_window),
    ):
        for name, held in tensors.items():
            place = at.view(-1, *[1] * (held.dim() - 1)).expand(-1, 1, *held.shape[2:])
            comes = writes.view(-1, *[1] * (held.dim() - 1))
            held.scatter_(1, place, torch.where(comes, arriving[name].to(held.dtype), held.gather(1, place)))
    memory.keep(memory.joints[0], exact)
    if "keys" in parts:
        total = parts["keys"]["sum"]
        total.copy_(torch.where(places.real[:, None, None], arriving["sum"], total))
    return _Seen(
        filled=config.landmarks,
        hidden=places.hidden,
        empty=(parts["landmarks"]["number"] == 0).transpose(1, 2)[:, :, None],
        distant=places.distant,
        counts=places.real[:, None, None],
        written=places.merged * BLOCK - config.landmarks,
    )


def _merge(
    mixer: MixerBase, memory: LayerMemory, dtype: torch.dtype, merged: Tensor | int, goes: Tensor | None
) -> None:
    """Merge the window's oldest block into the landmarks and shift the window by one block, in the rows that `goes`
    selects (None: all). So far `merged` blocks have been merged, and `dtype` is that of decoded tensors."""
    window, landmarks = memory.parts["window"], memory.parts["landmarks"]
    block = {name: tensor[:, :BLOCK] for name, tensor in window.items()}
    if slot_bits(mixer.config) == 4:
        block = encoded(decoded(block, dtype), landmarks)
    filled = min(mixer.config.landmarks, merged * BLOCK) if isinstance(merged, int) else None
    tables = {name: x.transpose(1, 2) for name, x in landmarks.items() if name not in ("novelty", "received", "number")}
    slots = Slots(mixer, landmarks, tables, merged=merged, filled=filled)
    first = mixer.config.sinks + 1 + merged * BLOCK
    scores = slots.of_text(leaving_scores(mixer, window["novelty"], 1), first, BLOCK)
    scores[RECEIVED] = window["received"][:, :BLOCK].transpose(1, 2)
    tells = mixer.recurrence is not None and "recurrence" not in mixer.branches_off
    leaving = {name: block[name].transpose(1, 2) for name in tables}
    lost = slots.merge(leaving, scores, goes, tell=list(tables) if tells else None)
    for name, x in slots.part([]).items():  # the tables are the memory's own
        landmarks[name].copy_(x)
    moved = {name: torch.cat([x[:, BLOCK:], torch.zeros_like(x[:, :BLOCK])], 1) for name, x in window.items()}
    for name, tensor in where(goes, moved, window).items():
        window[name].copy_(tensor)
    if lost is not None:
        lost_tokens = decoded({name: x.transpose(1, 2) for name, x in lost.items()}, dtype)
        assert mixer.recurrence is not None  # noqa: S101 - for the type checker
        writes = lost_tokens["number"][:, :, 0] > 0
        writes = writes if goes is None else writes & goes[:, None]
        k, v, source = stored(mixer, lost_tokens)
        q = k.repeat_interleave(mixer.layer.query_heads // mixer.layer.key_value_heads, 2)
        pinned = mixer.recurrence.form
        if not memory.counts_on_host:
            mixer.recurrence.form = "parallel"  # the choice between the other forms reads gate values, which syncs
        try:
            mixer.recurrence(q, k, v, source, writes, memory.parts["state"])
        finally:
            mixer.recurrence.form = pinned
