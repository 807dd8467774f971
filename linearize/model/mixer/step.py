"""One token of decoding, for rows that have seen the same number of tokens.

`slide` computes masks and indices per row. Here the same values are plain numbers: the slot of the window that is
overwritten, the number of filled slots, and the use of the token that leaves (a sink, or a write to the state). So
nothing is masked, the window does not move, and the memory is updated in place. Sinks and window lie side by side, so
that one product reads both.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from linearize_kernels import step_attention
from linearize_kernels.decay import computing_dtype
from linearize_kernels.products import on_one_thread

from linearize.model.memory import Joint
from linearize.model.precision import as_read, decoded, encoded

if TYPE_CHECKING:
    from torch import Tensor

    from linearize.families.base import Projections
    from linearize.model.memory import LayerMemory, Part
    from linearize.model.mixer.base import MixerBase


def steps(mixer: MixerBase, new: Projections, lengths: Tensor | None, memory: LayerMemory | None) -> bool:
    """True if `step` computes this call: one real token in every row, rows of one length, and no gradient."""
    alone = new.q.shape[1] == 1 and lengths is None and not mixer.branches_off
    return alone and memory is not None and memory.uniform is not None and not torch.is_grad_enabled()


def step(mixer: MixerBase, new: Projections, memory: LayerMemory) -> Tensor:
    """`Mixer.forward` for the calls that `steps` accepts."""
    with on_one_thread(new.q):
        return _step(mixer, new, memory)


def _step(mixer: MixerBase, new: Projections, memory: LayerMemory) -> Tensor:
    config, window, count, recurrence = mixer.config, mixer.window, memory.uniform, mixer.recurrence
    assert count is not None  # noqa: S101 - for the type checker; `steps` has looked
    leaving = count - window  # the number of the token that the new one evicts; negative: none
    slot = count % window
    ring, dtype = memory.parts["window"], computing_dtype(new.q)
    place = {name: tensor[:, slot : slot + 1] for name, tensor in ring.items()}  # the evicted token, then the new one
    q = new.q_rotated if config.rope else new.q
    read = mass = None
    if recurrence is None or (config.covers == "evicted" and leaving < config.sinks):
        recurrence = None  # nothing has been written yet
    elif config.covers == "evicted":
        # Before the window is written, because `place` still holds the token that leaves.
        leaves = decoded(place, dtype)
        v, k = leaves["v"], leaves["k_rotated" if config.rope or "k" not in leaves else "k"]
        source = leaves.get("source", v if config.gate_source == "v" else leaves.get("k", k))
        read, mass = recurrence(q, k, v, source, None, memory.parts["state"])
    else:
        k = new.k_rotated if config.rope else new.k
        read, mass = recurrence(q, k, new.v, mixer.source(new), None, memory.parts["state"])
    if 0 <= leaving < config.sinks:
        for name, tensor in memory.parts["sinks"].items():
            tensor[:, leaving : leaving + 1].copy_(place[name])
    arriving = {n: mixer.source(new) if n == "source" else getattr(new, n) for n in ARRIVING if n in place}
    for name, x in encoded(arriving, ring).items():
        place[name].copy_(x)
    keys = _visible(memory, count, window, config.sinks)
    y, normaliser = step_attention(
        new.q_rotated,
        as_read(keys, "k_rotated"),
        as_read(keys, "v"),
        scale=mixer.layer.scale,
        softcap=mixer.layer.softcap,
        normaliser=config.mix == "softmax",
    )
    if recurrence is None or read is None:
        return y
    return mixer.mix(y, normaliser, read, None if mass is None else mass.unsqueeze(-1))


def _visible(memory: LayerMemory, count: int, window: int, sinks: int) -> Part:
    """The keys and values that token number `count` attends to, in any order."""
    ring, leaving = memory.parts["window"], count - window
    if leaving < -1:
        return {name: x[:, : count + 1] for name, x in ring.items()}
    exact = min(leaving + 1, sinks)
    if exact == 0:
        return ring
    if exact == sinks:
        return memory.joined(Joint(("sinks", "window"), tuple(memory.parts["sinks"])))
    return {name: torch.cat([x[:, :exact], ring[name]], 1) for name, x in memory.parts["sinks"].items()}


ARRIVING = ("k_rotated", "k", "source", "v")
