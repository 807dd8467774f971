"""A prompt over slots in four launches of fused kernels, without a recurrence: the tokens are laid out and coded, the
slots chosen, all queries read, and the memory is written.

Plain torch, and the kernels of `text.py` beside a recurrence, do the same in `chunks.py`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from linearize.model.landmarks.rows import hold, keep_sums, lay_out
from linearize.model.landmarks.slots import static_scores
from linearize.model.landmarks.text import choose_slots, text_of
from linearize.model.precision import slot_bits

if TYPE_CHECKING:
    from linearize.families.base import Projections
    from linearize.model.memory import LayerMemory
    from linearize.model.mixer.base import MixerBase

# Widths of heads for which these kernels code 4 bits. At 256 they spill registers.
_CODED_WIDTHS = (64, 128)


def codes_prompt(mixer: MixerBase, new: Projections) -> bool:
    """True if kernels code the tokens of a call with slots and a memory themselves."""
    config, layer = mixer.config, mixer.layer
    if mixer.recurrence is not None or mixer.branches_off:
        return False
    if torch.is_grad_enabled() and any(x.requires_grad for x in new):
        return False
    return slot_bits(config) != 4 or {layer.key_width, layer.value_width}.issubset(_CODED_WIDTHS)


def coded_prompt(mixer: MixerBase, new: Projections, lengths: Tensor | None, memory: LayerMemory) -> Tensor:
    """`Mixer.forward` for the calls that `codes_prompt` accepts; keys and values are not rounded yet."""
    from linearize_kernels.landmark_pool_triton import launch_landmark_keep, launch_landmark_pool
    from linearize_kernels.landmark_text_triton import launch_landmark_read

    parts, own = memory.parts, mixer._parameters
    rows = lay_out(mixer, mixer.in_code(new, keys=False), lengths, memory)
    text = text_of(mixer, rows, rows.places)
    learned = "score_weight" in own
    scale, shift = own.get("key_scale"), own.get("key_shift")
    pool = launch_landmark_pool(
        text, parts, new.k_rotated, new.v, new.k, key_scale=scale, key_shift=shift, learned=learned
    )
    fresh, sums = static_scores(mixer, new, parts, pool.inputs)
    scores = {"novelty": fresh, "received": torch.zeros_like(fresh)}
    rows = hold(rows, scores, {name: parts["window"][name] for name in scores})
    chosen = choose_slots(mixer, text, rows, pool.keys, parts["landmarks"], tells=False, last=True)
    y, _ = launch_landmark_read(text, pool.keys, pool.values, chosen.table, logs=False)
    layer = mixer.layer
    launch_landmark_keep(
        text, parts, pool, chosen, rows.held["novelty"], width=layer.key_width, values=layer.value_width
    )
    keep_sums(memory, sums, lengths)
    return rows.back(y, new.q.shape[1])
