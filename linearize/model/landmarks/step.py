"""One token of decoding with landmarks. It updates the memory in place and merges once per block."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch
from linearize_kernels import joint_attention
from linearize_kernels.decay import computing_dtype
from torch import Tensor

from linearize.model.configuration import BLOCK, room
from linearize.model.landmarks.slots import (
    arriving_of,
    join,
    leaving_scores,
    merge,
    merges,
    numbers,
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
    """The slots that the new token attends to, once it is written.

    Attributes:
        sinks, landmarks, window: the number of leading slots of each.
        masks: for each of the three, True for visible slots, broadcastable to `[R, K, 1, slots]`; None means all.
        counts: for landmarks and window, the slots whose `received` score the token's attention adds to: a mask
            `[R, slots, 1]`, or the number of leading slots.
        written: the number of tokens in the state; 0 or less if it is empty.
    """

    sinks: int
    landmarks: int
    window: int
    masks: tuple[Tensor | None, Tensor | None, Tensor | None]
    counts: tuple[Tensor | int, Tensor | int]
    written: Tensor | int


def landmark_step(mixer: MixerBase, new: Projections, lengths: Tensor | None, memory: LayerMemory) -> Tensor:
    """`landmark_attention` for one token per row, without a gradient."""
    config, parts = mixer.config, memory.parts
    fresh, sums = static_scores(mixer, new, parts)
    values, dtype = arriving_of(mixer, new, fresh), computing_dtype(new.q)
    arriving = encoded(values, parts["window"]) | ({} if sums is None else {"sum": sums[:, 0]})
    count = memory.uniform if lengths is None else None
    if count is None:
        seen = _apart(mixer, memory, arriving, dtype, lengths)
    else:
        seen = _alike(mixer, memory, arriving, dtype, count)
    sizes = {"sinks": seen.sinks, "landmarks": seen.landmarks, "window": seen.window}
    # Only the sinks may be missing from the memory; landmarks and window are always there, possibly empty.
    names = [name for name, size in sizes.items() if size or name != "sinks"]
    y, log, received = joint_attention(
        new.q_rotated,
        [as_read(parts[name], "k_rotated", sizes[name]) for name in names],
        [as_read(parts[name], "v", sizes[name]) for name in names],
        [mask for name, mask in zip(sizes, seen.masks, strict=True) if name in names],
        scale=mixer.layer.scale,
        softcap=mixer.layer.softcap,
    )
    for name, share, counts in zip(("landmarks", "window"), received[-2:], seen.counts, strict=True):
        share = share[:, :, 0].transpose(1, 2)
        if isinstance(counts, Tensor):
            parts[name]["received"] += share * counts
        else:
            parts[name]["received"][:, :counts] += share[:, :counts]
    if "window" in mixer.branches_off:
        y = torch.zeros_like(y)
    if mixer.recurrence is None or "recurrence" in mixer.branches_off:
        return y
    if isinstance(seen.written, int) and seen.written <= 0:
        return y
    k, v, source = stored(mixer, values)
    writes = torch.zeros(y.shape[0], 1, dtype=torch.bool, device=y.device)
    read, mass = mixer.recurrence(new.q_rotated if config.rope else new.q, k, v, source, writes, parts["state"])
    empty = seen.written[:, None] <= 0 if isinstance(seen.written, Tensor) else None
    return join(mixer, y, log, read, mass, empty)


def _alike(mixer: MixerBase, memory: LayerMemory, arriving: Part, dtype: torch.dtype, count: int) -> _Seen:
    """Write a token into rows that have all seen `count` tokens, so that masks are plain slices."""
    config, parts = mixer.config, memory.parts
    merged = merges(mixer, count + 1)
    if merged > merges(mixer, count):
        _merge(mixer, memory, dtype, config.sinks + 1 + (merged - 1) * BLOCK, None)
    place = count - config.sinks - merged * BLOCK
    part, slot = ("window", place) if place >= 0 else ("sinks", count)
    for name, held in parts[part].items():
        held[:, slot] = arriving[name][:, 0]
    if "keys" in parts:
        parts["keys"]["sum"].copy_(arriving["sum"])
    filled, local = min(config.landmarks, merged * BLOCK), max(place + 1, 0)
    return _Seen(
        sinks=min(count + 1, config.sinks),
        landmarks=filled,
        window=local,
        masks=(None, None, None),
        counts=(filled, max(local - mixer.window // 4, 0)),
        written=merged * BLOCK - config.landmarks,
    )


def _apart(mixer: MixerBase, memory: LayerMemory, arriving: Part, dtype: torch.dtype, lengths: Tensor | None) -> _Seen:
    """Write a token into rows of different lengths; rows with length 0 in `lengths` do not change."""
    config, parts, counts = mixer.config, memory.parts, memory.counts
    real = torch.ones_like(counts, dtype=torch.bool) if lengths is None else lengths > 0
    before, merged = merges(mixer, counts), merges(mixer, counts + 1)
    goes = real & (merged > before)
    # `any` syncs a GPU, and a CUDA graph must not depend on a host value. Merging no row is a no-op.
    if goes.device.type != "cpu" or not memory.counts_on_host or bool(goes.any()):
        _merge(mixer, memory, dtype, config.sinks + 1 + (merged - 1) * BLOCK, goes)
    place = counts - config.sinks - torch.where(real, merged, before) * BLOCK
    slot = torch.arange(room(mixer.window), device=counts.device)
    number = torch.arange(config.sinks, device=counts.device)
    for part, comes in (("window", slot == place[:, None]), ("sinks", number == counts[:, None])):
        comes = comes & real[:, None]
        for name, held in parts.get(part, {}).items():
            here = comes.view(*comes.shape, *[1] * (held.dim() - 2))
            held.copy_(torch.where(here, arriving[name].to(held.dtype), held))
    if "keys" in parts:
        total = parts["keys"]["sum"]
        total.copy_(torch.where(real[:, None, None], arriving["sum"], total))
    distant = place[:, None] - slot >= mixer.window // 4
    return _Seen(
        sinks=config.sinks,
        landmarks=config.landmarks,
        window=room(mixer.window),
        masks=(
            (number <= counts[:, None])[:, None, None],
            (parts["landmarks"]["number"] > 0).transpose(1, 2)[:, :, None],
            (slot <= place[:, None])[:, None, None],
        ),
        counts=(real[:, None, None], (distant & real[:, None])[:, :, None]),
        written=merged * BLOCK - config.landmarks,
    )


def _merge(mixer: MixerBase, memory: LayerMemory, dtype: torch.dtype, first: Tensor | int, goes: Tensor | None) -> None:
    """Merge the window's oldest block into the landmarks and shift the window by one block, in the rows that `goes`
    selects (None: all); `first` is the number of the block's first token, and `dtype` that of decoded tensors."""
    window, landmarks = memory.parts["window"], memory.parts["landmarks"]
    block = {name: tensor[:, :BLOCK] for name, tensor in window.items()}
    if slot_bits(mixer.config) == 4:
        block = encoded(decoded(block, dtype), landmarks)
    block |= {
        "novelty": leaving_scores(mixer, window["novelty"]),
        "number": numbers(first, block["received"]),
    }
    kept, lost = merge(mixer, landmarks, block)
    moved = {name: torch.cat([x[:, BLOCK:], torch.zeros_like(x[:, :BLOCK])], 1) for name, x in window.items()}
    for held, now in ((landmarks, kept), (window, moved)):
        for name, tensor in where(goes, now, held).items():
            held[name].copy_(tensor)
    if mixer.recurrence is not None and "recurrence" not in mixer.branches_off:
        writes = lost["number"][:, :, 0] > 0
        writes = writes if goes is None else writes & goes[:, None]
        k, v, source = stored(mixer, decoded(lost, dtype))
        q = k.repeat_interleave(mixer.layer.query_heads // mixer.layer.key_value_heads, 2)
        pinned = mixer.recurrence.form
        if not memory.counts_on_host:
            mixer.recurrence.form = "parallel"  # the choice between the other forms reads gate values, which syncs
        try:
            mixer.recurrence(q, k, v, source, writes, memory.parts["state"])
        finally:
            mixer.recurrence.form = pinned
