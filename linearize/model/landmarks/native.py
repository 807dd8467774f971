"""Landmarks in C functions on a CPU: their arguments, in the order of the structs in `linearize_kernels/native/*.c`."""

from __future__ import annotations

from operator import is_
from typing import TYPE_CHECKING

import torch
from linearize_kernels import choose
from linearize_kernels.native import launch, packed
from torch import Tensor

from linearize.model.configuration import BLOCK, room
from linearize.model.landmarks.rows import Attended, merges_of
from linearize.model.landmarks.slots import (
    BESIDE_LEARNED,
    FADING,
    LEAST_ATTENTION,
    LEAST_SPREAD,
    MOST_AGAINST,
    leaving_scores,
    static_scores,
    take_by_head,
)

if TYPE_CHECKING:
    from linearize.families.base import Projections
    from linearize.model.landmarks.rows import Rows
    from linearize.model.memory import LayerMemory, Part
    from linearize.model.mixer.base import MixerBase

_BITS = {torch.float32: 32, torch.bfloat16: 16, torch.int8: 8, torch.uint8: 4}


def native(x: Tensor) -> bool:
    """True if C functions run landmarks on a tensor's device, in its dtype, without gradients."""
    if x.device.type != "cpu" or x.requires_grad or torch.compiler.is_compiling():
        return False
    return choose("slots", x.device, x.dtype) == "native"


def attend_native(mixer: MixerBase, rows: Rows, sinks: Part, landmarks: Part, leaving: Part, *, tell: bool) -> Attended:
    """`attend` in one call for all blocks."""
    config, layer, held = mixer.config, mixer.layer, rows.held
    (batch, queries), merges, count = rows.q.shape[:2], merges_of(mixer, rows), config.landmarks
    heads, places, has_values = layer.key_value_heads, held["received"].shape[1], "v" in leaving

    def by_row(x: Tensor | int | None) -> Tensor:
        if isinstance(x, Tensor):
            return x.long().contiguous()
        return torch.full((batch,), rows.first + queries if x is None else x)

    score, static = held["received"].new_empty, leaving_scores(mixer, held["novelty"], merges)
    y = score(batch, queries, layer.query_heads, layer.value_width, dtype=torch.float32) if has_values else None
    logs = None
    if y is not None:
        if rows.total is not None:
            y.zero_()  # the queries of pads
        if mixer.recurrence is not None and config.mix == "softmax":
            logs = torch.zeros_like(y[..., 0])
    received, new_score, new_received, number, origin, kept = (
        score(batch, places, heads),
        score(batch, count, heads),
        score(batch, count, heads),
        score(batch, count, heads, dtype=torch.int32),
        score(batch, count, heads, dtype=torch.int64),
        None if has_values else held["received"].new_zeros(batch, merges, heads, count, dtype=torch.int32),
    )
    lost = torch.full((batch, merges, BLOCK, heads), -1) if tell else None
    numbers = (batch, heads, layer.query_heads // heads, layer.key_width, layer.value_width, queries, places, count)
    given = [rows.q, held["k_rotated"], held.get("v") if has_values else None]
    for part in (sinks, landmarks, leaving):
        given += [part.get("k_rotated"), part.get("v") if has_values else None]
    given += [static, held["received"], landmarks["novelty"], landmarks["received"]]
    tensors = [None if x is None else _plain(x) for x in given]  # kept alive until the call returns
    per_row = [landmarks["number"].contiguous(), by_row(rows.merged), by_row(rows.offset), by_row(rows.total)]
    fields = packed(
        *numbers,
        *(config.sinks, mixer.window, merges * BLOCK, rows.first, merges),
        *tensors,
        *per_row,
        *(y, logs, received, new_score, new_received, number, origin, kept, lost),
        *_options(mixer),
    )
    launch("prompt", fields)
    slots: Part = {"novelty": new_score, "received": new_received, "number": number}
    if has_values:
        slots |= {name: take_by_head(torch.cat([landmarks[name], x], 1), origin) for name, x in leaving.items()}
    return Attended(y, logs, slots, received, None if kept is None else kept.transpose(2, 3), lost)


def step_native(
    mixer: MixerBase, new: Projections, lengths: Tensor | None, memory: LayerMemory, *, written: bool
) -> tuple[Tensor, Tensor | None] | None:
    """One token per row: what `landmark_step` does but for the state, or with `written`, if the token is in the memory,
    its attention alone.

    Returns:
        outputs `[R, 1, H, V]`, and for `mix: softmax` the logs of the softmax's denominators `[R, 1, H]`; None if the
        memory lies otherwise than the function reads it.
    """
    layer, parts = mixer.layer, memory.parts
    held = [x for part in ("sinks", "window", "landmarks") if part in parts for x in parts[part].values()]
    kept = memory.native
    if kept is None or len(kept[0]) != len(held) or not all(map(is_, kept[0], held)):
        memory.native = kept = held, *_fixed(mixer, memory, written)
    if not kept[1]:
        return None
    fresh: Tensor | None = None
    if not written and (mixer.config.landmark_score == "novelty" or mixer.sum_of_ranks is not None):
        fresh, sums = static_scores(mixer, new, parts)
        if sums is not None:
            total = parts["keys"]["sum"]
            total.copy_(sums[:, 0] if lengths is None else torch.where((lengths > 0)[:, None, None], sums[:, 0], total))
    given = [None if x is None else _plain(x) for x in (new.q_rotated, new.k, new.v, new.k_rotated, fresh)]
    rows = [memory.counts.contiguous(), None if lengths is None else lengths.long().contiguous()]
    shape = (len(new.q), 1, layer.query_heads, layer.value_width)
    y = torch.empty(shape, dtype=torch.float32) if lengths is None else torch.zeros(shape, dtype=torch.float32)
    log = torch.zeros_like(y[..., 0]) if mixer.recurrence is not None and mixer.config.mix == "softmax" else None
    launch("step", kept[1] + packed(*rows, *given, y, log))
    return y, log


def _fixed(mixer: MixerBase, memory: LayerMemory, written: bool) -> tuple[bytes, list[Tensor]]:
    """The fields that stay from step to step, and tensors that they are addresses of. Without fields, the memory lies
    otherwise than the function reads it."""
    config, layer, parts, own = mixer.config, mixer.layer, memory.parts, mixer._parameters
    window, slots, heads = parts["window"], parts["landmarks"], mixer.layer.key_value_heads
    scores = [window["novelty"], window["received"], slots["novelty"], slots["received"], slots["number"]]
    held = [_held(parts.get(part), name) for part in ("sinks", "window", "landmarks") for name in ("k_rotated", "v")]
    rows = [{x.stride(0) // heads for x in one} for one in (scores[:2], scores[2:])]
    if None in held or any(x.stride()[1:] != (heads, 1) for x in scores) or any(len(x) > 1 for x in rows):
        return b"", []
    given = [own.get(name) for name in ("score_weight", "key_scale", "key_shift")]
    weights = [None if x is None else _plain(x.detach()) for x in given]
    sizes = (len(scores[0]), heads, layer.query_heads // heads, layer.key_width, layer.value_width)
    bits = [_BITS[parts[part]["v"].dtype] for part in ("window", "landmarks")]
    fields = packed(
        *(*sizes, config.sinks, mixer.window, room(mixer.window), config.landmarks, *bits),
        *(int(written), int(config.landmark_score == "learned")),
        *(field for one in held if one is not None for field in one),
        *(*scores, *(row.pop() for row in rows), *weights, *_options(mixer)),
    )
    return fields, [x for x in weights if x is not None]


def _options(mixer: MixerBase) -> tuple[float, ...]:
    weight = BESIDE_LEARNED if mixer.config.landmark_score == "learned" else 1.0
    scales = float(mixer.layer.scale), float(mixer.layer.softcap or 0)
    return *scales, weight, FADING, LEAST_ATTENTION, LEAST_SPREAD, MOST_AGAINST


def _held(part: Part | None, name: str) -> tuple[Tensor | int | None, ...] | None:
    """A tensor of a part with its scales, and the number of tokens between rows; None if they do not lie as
    the C functions read them."""
    if part is None:
        return 0, 0, 0
    codes = part[name]
    found = [codes, part.get(f"{name}_scale")]
    there = [x for x in found if x is not None]
    apart = {x.stride(0) // x.stride(1) for x in there}
    if codes.dtype not in _BITS or len(apart) > 1:
        return None
    if any(x.stride()[1:] != (x.shape[2] * x.shape[3], x.shape[3], 1) for x in there):
        return None
    return (*found, apart.pop())


def _plain(x: Tensor) -> Tensor:
    return (x if x.dtype is torch.float32 else x.float()).contiguous()
