"""One token of decoding with landmarks in one launch, and a merge, when it is due, in another."""

from __future__ import annotations

from typing import TYPE_CHECKING

from linearize.model.configuration import BLOCK
from linearize.model.landmarks.slots import (
    BESIDE_LEARNED,
    FADING,
    LEAST_ATTENTION,
    LEAST_SPREAD,
    MOST_AGAINST,
    REACH,
    merges,
)
from linearize.model.precision import exact_bits, slot_bits

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from linearize.families.base import Projections
    from linearize.model.memory import LayerMemory
    from linearize.model.mixer.base import MixerBase


def fused_landmark_step(
    mixer: MixerBase,
    new: Projections,
    lengths: Tensor | None,
    memory: LayerMemory,
    counts: Tensor | None,
    dtype: torch.dtype,
) -> Tensor:
    """`landmark_step` with the fused kernel; arguments as in `fused_step`. The kernel codes the token itself."""
    from linearize_kernels.landmark_triton import LandmarkStep, launch_landmark_merge, launch_landmark_step

    before = memory.counts if counts is None else counts
    uniform = memory.uniform if lengths is None and counts is None else None
    due = memory.merges is not False if uniform is None else merges(mixer, uniform + 1) > merges(mixer, uniform)
    config, own = mixer.config, mixer._parameters
    step = LandmarkStep(
        window=mixer.window,
        sinks=config.sinks,
        slots=config.landmarks,
        block=BLOCK,
        scale=mixer.layer.scale,
        softcap=mixer.layer.softcap,
        near_bits=exact_bits(config),
        slot_bits=slot_bits(config),
    )
    learned = config.landmark_score == "learned"
    if due:
        launch_landmark_merge(
            step,
            memory.parts,
            before,
            lengths,
            width=mixer.layer.key_width,
            values=mixer.layer.value_width,
            reach=0 if learned else REACH,
            weight=BESIDE_LEARNED if learned else 1.0,
            fading=FADING,
            least_attention=LEAST_ATTENTION,
            least_spread=LEAST_SPREAD,
            most_against=MOST_AGAINST,
        )
    return launch_landmark_step(
        step,
        new,
        memory.parts,
        before,
        lengths,
        score_weight=own.get("score_weight"),
        key_scale=own.get("key_scale"),
        key_shift=own.get("key_shift"),
        dtype=dtype,
    )
