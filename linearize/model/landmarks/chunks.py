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

from linearize.model.configuration import BLOCK
from linearize.model.landmarks.exact import attend
from linearize.model.landmarks.prompt import coded_prompt, codes_prompt
from linearize.model.landmarks.recall import Evictions, recalled
from linearize.model.landmarks.rows import hold, keep_sums, lay_out, merges_of
from linearize.model.landmarks.slots import (
    SCORES,
    arriving_of,
    in_slots,
    kept_names,
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
    from linearize.model.landmarks.rows import Attended, Rows
    from linearize.model.memory import LayerMemory, Part
    from linearize.model.mixer.base import MixerBase


@torch.compiler.disable(reason="which tokens are kept depends on what they are")  # type: ignore[untyped-decorator]
def landmark_attention(
    mixer: MixerBase,
    new: Projections,
    lengths: Tensor | None,
    memory: LayerMemory | None,
    *,
    fused: bool = False,
) -> Tensor:
    """`Mixer.forward` with landmarks; `fused` runs the fused kernels where nothing takes a gradient."""
    if memory is not None and new.q.shape[1] == 1 and not torch.is_grad_enabled():
        return landmark_step(mixer, new, lengths, memory)
    if memory is not None and fused and codes_prompt(mixer, new):
        return coded_prompt(mixer, new, lengths, memory)
    trains = torch.is_grad_enabled() and any(x.requires_grad for x in new)
    if trains and memory is None:
        return whole_rows(mixer, new, fused=fused)
    return _chunk(mixer, new, lengths, memory, fused=fused and not trains)


def _chunk(
    mixer: MixerBase,
    new: Projections,
    lengths: Tensor | None,
    memory: LayerMemory | None,
    *,
    fused: bool,
) -> Tensor:
    """`Mixer.forward` with landmarks, for any number of tokens, with or without a memory."""
    window, dtype = mixer.window, computing_dtype(new.q)
    parts = memory.parts if memory is not None else mixer.parts(new.v.shape[0], new.v.dtype, new.v.device)
    fresh, sums = static_scores(mixer, new, parts)
    rows = hold(lay_out(mixer, new, lengths, memory), arriving_of(mixer, new, fresh), parts["window"])
    sinks = _sinks_of(mixer, new, lengths, memory)
    held = {name: rows.held[name][:, : merges_of(mixer, rows) * BLOCK].to(dtype) for name in kept_names(mixer)}
    leaving, landmarks = in_slots(mixer, held), _slots_of(mixer, rows, parts["landmarks"], dtype)
    tell = mixer.recurrence is not None and "recurrence" not in mixer.branches_off
    exact = attend(mixer, rows, sinks, landmarks, leaving, tell=tell, fused=fused)
    y = _beside_state(mixer, rows, exact, landmarks, leaving, memory)
    if memory is not None:
        done = merges_of(mixer, rows) if rows.total is None else (rows.total - window).clamp_min(0) // BLOCK
        rows.held["received"] = exact.received
        # Codes of tokens that stay where they are stay as they are.
        changed = exact.slots if leaving["v"].shape[1] else {n: exact.slots[n] for n in SCORES}
        seen = memory.uniform
        arrive = {} if seen is not None and seen >= mixer.config.sinks else {"sinks": sinks}
        _keep(memory, rows, done, {"landmarks": changed, **arrive})
        keep_sums(memory, sums, lengths)
    return rows.back(y, new.q.shape[1])


def _beside_state(
    mixer: MixerBase,
    rows: Rows,
    exact: Attended,
    landmarks: Part,
    leaving: Part,
    memory: LayerMemory | None,
) -> Tensor:
    """Mix the outputs of the state with those of `exact`. The other arguments are those of `attend`."""
    slots, first, lost, y = mixer.config.landmarks, rows.first, exact.lost, exact.y
    assert y is not None  # noqa: S101 - for the type checker
    if "window" in mixer.branches_off:
        y = torch.zeros_like(y)
    if lost is None:
        return y
    stop, merged, whole = first + y.shape[1], rows.merged, mixer.window - 1 + BLOCK
    empty: Tensor | None = None
    if isinstance(merged, int):
        # The first merges evict no token, because slots are empty.
        begin = max(slots // BLOCK + 1 - merged, 0)
    else:
        begin = 0
        merges_before = (torch.arange(first, stop, device=y.device) - whole + BLOCK).clamp_min(0) // BLOCK
        empty = (merged[:, None] + merges_before) * BLOCK <= slots
    start = whole + (begin - 1) * BLOCK if begin else first
    if start >= stop:
        return y
    lost = lost[:, max(begin - 1, 0) :]
    at = lost.clamp_min(0).flatten(1, 2)
    tokens = stored(mixer, {n: take_by_head(torch.cat([landmarks[n], x], 1), at) for n, x in leaving.items()})
    evicted = Evictions(*tokens, (lost[..., 0] >= 0).flatten(1))
    before = 0 if begin else min(whole, stop) - first
    state = memory.parts["state"] if memory is not None else None
    return recalled(
        mixer, y, exact.logs, rows.q_state, evicted, start=start - first, before=before, state=state, empty=empty
    )


def _slots_of(mixer: MixerBase, rows: Rows, landmarks: Part, dtype: torch.dtype) -> Part:
    """The slots before the call, with codes decoded."""
    if not isinstance(rows.merged, int) or rows.merged:
        return decoded(landmarks, dtype)
    # All are empty, so nothing has to be decoded.
    scores = {name: landmarks[name] for name in SCORES}
    shape, zero = landmarks["number"].shape, rows.q.new_zeros(1, 1, 1, 1, dtype=dtype)
    layer = mixer.layer
    widths = {name: layer.value_width if name == "v" else layer.key_width for name in kept_names(mixer)}
    return {name: zero.expand(*shape, width) for name, width in widths.items()} | scores


def _sinks_of(mixer: MixerBase, new: Projections, lengths: Tensor | None, memory: LayerMemory | None) -> Part:
    """Keys and values of the sinks `[R, M, K, D or V]`, those among the new tokens included."""
    sinks, (rows, tokens) = mixer.config.sinks, new.v.shape[:2]
    if not sinks:
        return {}
    if memory is not None and memory.uniform is not None and memory.uniform >= sinks:
        return decoded(memory.parts["sinks"], computing_dtype(new.q))
    if lengths is None and (memory is None or memory.uniform == 0) and tokens >= sinks:
        return {name: getattr(new, name)[:, :sinks] for name in ("k_rotated", "v")}
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
) -> None:
    """Write the tensors at the end of a chunk into the memory; places without a token become 0.

    Args:
        done: the number of blocks of `rows.held` that have been merged.
        exact: landmarks and sinks.
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
