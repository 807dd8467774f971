"""One token of decoding, where all rows have seen the same number of tokens.

What `Mixer.forward` works out with masks and indices is then known as plain numbers: which slot of the window is
written over, how many slots are filled, and whether what leaves is a sink or goes into the state. So nothing is masked,
nothing of the window is moved, and the memory is updated where it lies.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from linearize_kernels import step_attention

if TYPE_CHECKING:
    from collections.abc import Container

    from torch import Tensor

    from linearize.families.base import Projections
    from linearize.model.memory import LayerMemory, Part
    from linearize.model.mixer import Mixer


def steps(mixer: Mixer, new: Projections, lengths: Tensor | None, memory: LayerMemory | None) -> bool:
    """Whether `step` answers this call: one real token in every row, rows of one length, and no gradient."""
    alone = new.q.shape[1] == 1 and lengths is None and not mixer.branches_off
    return alone and memory is not None and memory.uniform is not None and not torch.is_grad_enabled()


def step(mixer: Mixer, new: Projections, memory: LayerMemory) -> Tensor:
    """As `Mixer.forward`, for the calls that `steps` names."""
    config, window, count = mixer.config, mixer.window, memory.uniform
    assert count is not None  # noqa: S101 - for the type checker; `steps` has looked
    leaving = count - window  # the number of the token that the new one pushes out; below 0 there is none
    ring = memory.parts["window"]
    wanted = ring if 0 <= leaving < config.sinks or config.rope or "k" not in ring else ring.keys() - {"k_rotated"}
    held = _exchange(mixer, new, ring, count % window, wanted if leaving >= 0 else ())
    keys = {name: ring[name] if leaving >= -1 else ring[name][:, : count + 1] for name in ("k_rotated", "v")}
    if config.sinks and leaving >= 0:
        sinks = memory.parts["sinks"]
        if leaving < config.sinks:
            for name, tensor in sinks.items():
                tensor[:, leaving] = held[name][:, 0]
        visible = min(leaving + 1, config.sinks)
        keys = {name: torch.cat([tensor, sinks[name][:, :visible]], 1) for name, tensor in keys.items()}
    y, normaliser = step_attention(
        new.q_rotated[:, 0],
        keys["k_rotated"],
        keys["v"],
        scale=mixer.layer.scale,
        softcap=mixer.layer.softcap,
        normaliser=config.mix == "softmax",
    )
    y = y.unsqueeze(1)
    evicts = config.covers == "evicted"
    if mixer.recurrence is None or (evicts and leaving < config.sinks):
        return y
    if evicts:
        k, v = held["k_rotated" if config.rope or "k" not in held else "k"], held["v"]
        source = held.get("source", v if config.gate_source == "v" else held.get("k", k))
    else:
        k, v, source = new.k_rotated if config.rope else new.k, new.v, mixer.source(new)
    q = new.q_rotated if config.rope else new.q
    read, mass = mixer.recurrence(q, k, v, source, None, memory.parts["state"])
    logs = None if normaliser is None else normaliser.unsqueeze(1)
    return mixer.mix(y, logs, read, None if mass is None else mass.unsqueeze(-1))


def _exchange(mixer: Mixer, new: Projections, ring: Part, slot: int, wanted: Container[str]) -> Part:
    """Puts the new token into a slot of the window; what the slot held, `[B, 1, K, D or V]`, of the tensors wanted."""
    held: Part = {}
    for name, tensor in ring.items():
        place = tensor[:, slot : slot + 1]
        if name in wanted:
            held[name] = place.clone()
        place.copy_(mixer.source(new) if name == "source" else getattr(new, name))
    return held
