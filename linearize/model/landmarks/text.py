"""All blocks of a call in two launches of fused kernels: one chooses the tokens in the slots, the other reads."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from linearize.model.configuration import BLOCK
from linearize.model.landmarks.rows import Attended, merges_of
from linearize.model.landmarks.slots import (
    BESIDE_LEARNED,
    FADING,
    LEAST_ATTENTION,
    LEAST_SPREAD,
    MOST_AGAINST,
    leaving_scores,
    take_by_head,
)
from linearize.model.precision import slot_bits

if TYPE_CHECKING:
    from linearize_kernels.landmark_text_triton import Chosen, LandmarkText

    from linearize.model.landmarks.rows import Rows
    from linearize.model.memory import Part
    from linearize.model.mixer.base import MixerBase


def fused_attend(mixer: MixerBase, rows: Rows, sinks: Part, landmarks: Part, leaving: Part, *, tell: bool) -> Attended:
    """`attend` with the fused kernels, without gradients."""
    from linearize_kernels.landmark_text_triton import launch_landmark_read, pooled

    config, held = mixer.config, rows.held
    slots, text = config.landmarks, text_of(mixer, rows, held["received"].shape[1])

    def pool(name: str) -> Tensor:
        parts = [landmarks[name], held[name], *([leaving[name]] if text.ahead else [])]
        return pooled([sinks[name], *parts] if sinks else parts, rows.q)

    keys = pool("k_rotated")
    chosen = choose_slots(mixer, text, rows, keys, landmarks, tells=tell, last="v" in leaving)
    lost = None if chosen.lost is None else chosen.lost.transpose(2, 3).permute(0, 3, 2, 1).long()
    scores = {"novelty": chosen.novelty[..., :slots], "received": chosen.received[..., :slots], "number": chosen.number}
    part = {name: x.transpose(1, 2) for name, x in scores.items()}
    received = chosen.received[..., slots:].transpose(1, 2)
    if "v" not in leaving:
        table = chosen.table[:, :, 1:]
        first = config.sinks + 1 + rows.merged * BLOCK - slots
        kept = torch.where(table >= slots, table + first, 0).permute(0, 2, 3, 1)
        return Attended(None, None, part, received, kept, lost)
    logs = mixer.recurrence is not None and config.mix == "softmax"
    y, log = launch_landmark_read(text, keys, pool("v"), chosen.table, logs=logs)
    # Empty slots keep what they hold.
    last = chosen.table[:, :, -1]
    own = torch.arange(slots, dtype=last.dtype, device=last.device)
    at = torch.where(last < 0, own, last).transpose(1, 2).long()
    part = {name: take_by_head(torch.cat([landmarks[name], x], 1), at) for name, x in leaving.items()} | part
    return Attended(y, log, part, received, None, lost)


def text_of(mixer: MixerBase, rows: Rows, places: int) -> LandmarkText:
    """The numbers of a call whose text has `places` places."""
    from linearize_kernels.landmark_text_triton import LandmarkText

    config = mixer.config
    apart = merges_of(mixer, rows) > 0 and slot_bits(config) == 4  # slots store other keys than the window
    return LandmarkText(
        window=mixer.window,
        sinks=config.sinks,
        slots=config.landmarks,
        block=BLOCK,
        scale=mixer.layer.scale,
        softcap=mixer.layer.softcap,
        q=rows.q,
        first=rows.first,
        places=places,
        before=rows.merged,
        offset=rows.offset,
        total=rows.total,
        ahead=places if apart else 0,
    )


def choose_slots(
    mixer: MixerBase, text: LandmarkText, rows: Rows, keys: Tensor, landmarks: Part, *, tells: bool, last: bool
) -> Chosen:
    """Choose the tokens in the slots from the pool `keys`; `tells` and `last` as in `launch_landmark_choose`."""
    from linearize_kernels.landmark_text_triton import launch_landmark_choose

    held, number = rows.held, landmarks["number"].transpose(1, 2)
    static = leaving_scores(mixer, held["novelty"], text.merges)
    return launch_landmark_choose(
        text,
        keys,
        torch.cat([x.transpose(1, 2) for x in (landmarks["received"], held["received"])], -1),
        torch.cat([landmarks["novelty"].transpose(1, 2), static], -1),
        number.clone(memory_format=torch.contiguous_format),
        weight=BESIDE_LEARNED if mixer.config.landmark_score == "learned" else 1.0,
        fading=FADING,
        least_attention=LEAST_ATTENTION,
        least_spread=LEAST_SPREAD,
        most_against=MOST_AGAINST,
        tells=tells,
        last=last,
    )
