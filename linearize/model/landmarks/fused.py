"""One token of decoding with landmarks in one launch, but for merges, which plain torch makes when they are due."""

from __future__ import annotations

from typing import TYPE_CHECKING

from linearize_kernels.decay import computing_dtype

from linearize.model.configuration import BLOCK
from linearize.model.landmarks.slots import merges
from linearize.model.landmarks.step import _merge, _places
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
    from linearize_kernels.landmark_triton import LandmarkStep, launch_landmark_step

    before = memory.counts if counts is None else counts
    uniform = memory.uniform if lengths is None and counts is None else None
    if uniform is not None:
        if merges(mixer, uniform + 1) > merges(mixer, uniform):
            _merge(mixer, memory, computing_dtype(new.q), merges(mixer, uniform), None)
    elif memory.merges is not False:
        places = _places(mixer, before, lengths)
        _merge(mixer, memory, computing_dtype(new.q), places.before, places.goes)
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
