"""Attention with landmarks over whole rows, with gradients.

Ranks are not differentiated, so the first pass finds the tokens in the slots from the keys alone, without gradients.
The second pass computes all blocks at once from the row's own keys and values. The result equals
`landmark_attention`, which copies keys and values from block to block; a backward pass through these copies would cost
more than the rest of the layer.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from linearize_kernels import gathered_attention
from torch import Tensor

from linearize.model.configuration import BLOCK, room
from linearize.model.landmarks.exact import attend
from linearize.model.landmarks.recall import Evictions, recalled
from linearize.model.landmarks.rows import Rows, merges_of
from linearize.model.landmarks.slots import (
    arriving_of,
    in_slots,
    kept_names,
    static_scores,
    stored,
    take_by_head,
)

if TYPE_CHECKING:
    from linearize.families.base import Projections
    from linearize.model.mixer.base import MixerBase


def whole_rows(mixer: MixerBase, new: Projections, *, fused: bool = False) -> Tensor:
    """`landmark_attention` for rows without a memory, `[R, L, H, V]`; `fused` runs the kernel that chooses."""
    sinks, slots, tokens = mixer.config.sinks, mixer.config.landmarks, new.q.shape[1]
    first = min(sinks + mixer.window - 1 + BLOCK, tokens)  # the number of queries before the first merge
    with torch.no_grad():
        kept, lost = _choose(mixer, new, fused=fused)
    blocks = kept.shape[1]

    causal = torch.ones(first, first, dtype=torch.bool, device=new.v.device).tril()[None]
    at = torch.arange(first, device=new.v.device).expand(len(new.q), 1, new.k.shape[2], -1)
    k, v = new.k_rotated, new.v
    parts = [_attend(mixer, new.q_rotated[:, :first], k, v, first, at, causal, [first])]
    if blocks:
        at, seen = _read_by_blocks(mixer, new, kept)
        slots_hold = in_slots(mixer, {"k_rotated": k, "v": v})
        if slots_hold["v"] is not v:
            # A slot stores other values than the window, so a token is there twice.
            k, v = (torch.cat([x, y], 1) for x, y in zip((k, v), slots_hold.values(), strict=True))
            at = torch.cat([at[..., :-slots], at[..., -slots:] + tokens], -1)
        widths = [sinks + room(mixer.window) + min(slots, (block + 1) * BLOCK) for block in range(blocks)]
        parts.append(_attend(mixer, new.q_rotated[:, first:], k, v, BLOCK, at, seen, widths))
    y, logs = (torch.cat(x, 1) for x in zip(*parts, strict=True))
    return _with_state(mixer, new, y, logs, lost, first)


def _choose(mixer: MixerBase, new: Projections, *, fused: bool) -> tuple[Tensor, Tensor]:
    """Token numbers, from 1 (0: none): those in the slots after each merge, `[R, B, N, K]`, and those that each merge
    evicts, `[R, B, BLOCK, K]`."""
    sinks, keys = mixer.config.sinks, new.k_rotated.detach()
    before = keys.new_zeros(len(keys), *keys.shape[2:], dtype=torch.float32)
    fresh, _ = static_scores(mixer, new, {"keys": {"sum": before}})
    scores = {"novelty": fresh[:, sinks:], "received": torch.zeros_like(fresh[:, sinks:])}
    rows = Rows(0, -sinks, None, -sinks, new.q_rotated.detach(), new.q, {"k_rotated": keys[:, sinks:]} | scores)
    empty = fresh.new_zeros(len(keys), mixer.config.landmarks, keys.shape[2])
    slots = dict.fromkeys(scores, empty) | {"number": empty.int()}
    slots["k_rotated"] = keys.new_zeros(1, 1, 1, 1).expand(*empty.shape, keys.shape[-1])
    leaving = in_slots(mixer, {"k_rotated": keys[:, sinks:][:, : merges_of(mixer, rows) * BLOCK]})
    found = attend(mixer, rows, {"k_rotated": keys[:, :sinks]}, slots, leaving, tell=True, fused=fused)
    assert found.kept is not None and found.lost is not None  # noqa: S101 - for the type checker
    number = found.lost + (sinks + 1 - mixer.config.landmarks)
    return found.kept.long(), number.masked_fill_(found.lost < 0, 0)


def _attend(
    mixer: MixerBase, q: Tensor, k: Tensor, v: Tensor, size: int, at: Tensor, seen: Tensor, widths: list[int]
) -> tuple[Tensor, Tensor]:
    """Attention of the queries `q`, in blocks of `size`, to the tokens `at`; see `gathered_attention`."""
    blocks = F.pad(q, (0, 0, 0, 0, 0, -q.shape[1] % size)).unflatten(1, (-1, size))
    scale, softcap = mixer.layer.scale, mixer.layer.softcap
    found = gathered_attention(blocks, k, v, at, seen, widths=widths, scale=scale, softcap=softcap)
    y, logs = (x.flatten(1, 2)[:, : q.shape[1]] for x in found)
    return y, logs


def _read_by_blocks(mixer: MixerBase, new: Projections, kept: Tensor) -> tuple[Tensor, Tensor]:
    """The tokens that each block's queries attend to (sinks, window, slots), as arguments of `gathered_attention`."""
    sinks, width, (rows, blocks, slots, heads) = mixer.config.sinks, room(mixer.window), kept.shape
    device = kept.device
    merged = BLOCK * torch.arange(1, blocks + 1, device=device)[:, None]
    window = torch.arange(sinks, sinks + width, device=device) + merged
    always = torch.arange(sinks, device=device).expand(blocks, -1)
    exact = torch.cat([always, window.clamp(max=new.q.shape[1] - 1)], 1)
    at = torch.cat([exact[None, :, None].expand(rows, -1, heads, -1), (kept - 1).clamp_min(0).transpose(2, 3)], -1)
    query = torch.arange(BLOCK, device=device)[:, None]
    recent = torch.arange(-sinks, width, device=device) < mixer.window + query
    filled = torch.arange(slots, device=device) < merged
    seen = [recent.expand(blocks, -1, -1), filled[:, None].expand(-1, BLOCK, -1)]
    return at, torch.cat(seen, -1)


def _with_state(mixer: MixerBase, new: Projections, y: Tensor, logs: Tensor, lost: Tensor, first: int) -> Tensor:
    """Mix in the outputs of the state.

    Args:
        first: the first query after a merge.
    """
    if "window" in mixer.branches_off:
        y = torch.zeros_like(y)
    empty = mixer.config.landmarks // BLOCK  # merges that evict no token, because slots are free
    lost = lost[:, empty:]
    if mixer.recurrence is None or "recurrence" in mixer.branches_off or not lost.shape[1]:
        return y
    given = in_slots(mixer, arriving_of(mixer, new, new.k))
    at = (lost - 1).clamp_min(0).flatten(1, 2)
    tokens = stored(mixer, {name: take_by_head(given[name], at) for name in kept_names(mixer)})
    evicted = Evictions(*tokens, lost[..., 0].flatten(1) > 0)
    q, start = new.q_rotated if mixer.config.rope else new.q, first + empty * BLOCK
    return recalled(mixer, y, logs, q, evicted, start=start, before=0, state=None, empty=None)
