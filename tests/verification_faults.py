"""Ways to break a model's code on purpose, and the checks of `linearize verify` that have to see each."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from linearize.generation.state import State
from linearize.model import LayerMemory, modeling
from linearize.model.mixer import mixer as mixing
from linearize.model.mixer.mixer import Mixer


def without_effect(*_: object, **__: object) -> None:
    return None


def no_pads(patch: pytest.MonkeyPatch) -> None:
    own = modeling.segments_of
    patch.setattr(modeling, "segments_of", lambda mask, *rest: None if mask is not None else own(None, *rest))


def no_packing(patch: pytest.MonkeyPatch) -> None:
    own = modeling.segments_of
    patch.setattr(modeling, "segments_of", lambda mask, _, *rest: own(mask, None, *rest))


def ring_off_by_one(patch: pytest.MonkeyPatch) -> None:
    """After more than one token at once."""

    def rolled(own):
        def written(mixer, new, *rest):
            result = own(mixer, new, *rest)
            if new.q.shape[1] > 1:
                for tensor in rest[-1].parts["window"].values():
                    tensor.copy_(tensor.roll(1, 1))
            return result

        return written

    for name in ("fill", "slide"):
        patch.setattr(mixing, name, rolled(getattr(mixing, name)))


def nothing_counted(patch: pytest.MonkeyPatch) -> None:
    own = LayerMemory.advance
    patch.setattr(
        LayerMemory, "advance", lambda self, tokens, lengths: own(self, tokens, torch.zeros_like(self.counts))
    )


def state_not_updated(patch: pytest.MonkeyPatch) -> None:
    """By single tokens."""
    own = Mixer.forward

    def forward(self, new, lengths, memory):
        state = memory.parts["state"] if memory and new.q.shape[1] == 1 else {}
        before = {name: tensor.clone() for name, tensor in state.items()}
        heads = own(self, new, lengths, memory)
        for name, tensor in before.items():
            state[name].copy_(tensor)
        return heads

    patch.setattr(Mixer, "forward", forward)


def sinks_that_drift(patch: pytest.MonkeyPatch) -> None:
    """A little with each single token: nothing in a short text."""
    own = Mixer.forward

    def forward(self, new, lengths, memory):
        if memory and new.q.shape[1] == 1:
            memory.parts["sinks"]["v"] *= 1 + 3e-6
        return own(self, new, lengths, memory)

    patch.setattr(Mixer, "forward", forward)


def rows_that_leak(patch: pytest.MonkeyPatch) -> None:
    """A tenth of what the recurrence adds."""
    own = Mixer.mix

    def mix(self, y, *rest):
        mixed = own(self, y, *rest)
        return mixed + 0.1 * (mixed - y).roll(1, 0)

    patch.setattr(Mixer, "mix", mix)


def memory_that_grows(patch: pytest.MonkeyPatch) -> None:
    """Where `LayerMemory.nbytes` does not look."""
    own = LayerMemory.advance

    def advance(self, tokens: int, lengths: Tensor | None) -> None:
        own(self, tokens, lengths)
        self.log = [*getattr(self, "log", []), torch.zeros(tokens)]

    patch.setattr(LayerMemory, "advance", advance)


def state_file_loses_the_sinks(patch: pytest.MonkeyPatch) -> None:
    own = State.load.__func__

    def load(cls, *arguments):
        state = own(cls, *arguments)
        for layer in state.layers:
            for tensor in layer.parts["sinks"].values():
                tensor.zero_()
        return state

    patch.setattr(State, "load", classmethod(load))


def beams_that_raise(patch: pytest.MonkeyPatch) -> None:
    def reorder(*_: object) -> None:
        raise RuntimeError("no beams\nhere")

    patch.setattr(LayerMemory, "reorder_cache", reorder)


def values_not_finite(patch: pytest.MonkeyPatch) -> None:
    """Once a row has been continued token by token for 30 tokens."""
    own = Mixer.forward

    def forward(self, new, lengths, memory):
        heads = own(self, new, lengths, memory)
        return heads * math.nan if memory and new.q.shape[1] == 1 and int(memory.counts.max()) > 90 else heads

    patch.setattr(Mixer, "forward", forward)


def parameter_lost(patch: pytest.MonkeyPatch) -> None:
    """At every load, so that two loads agree."""
    own = PreTrainedModel.from_pretrained.__func__

    def from_pretrained(cls, *arguments, **keywords):
        result = own(cls, *arguments, **keywords)
        model = result[0] if isinstance(result, tuple) else result
        model.model.layers[1].self_attn.mixer.recurrence.gate_bias.data.fill_(1.0)
        return result

    patch.setattr(PreTrainedModel, "from_pretrained", classmethod(from_pretrained))


FAULTS: dict[Callable[[pytest.MonkeyPatch], None], set[str]] = {
    lambda patch: patch.setattr(LayerMemory, "reorder_cache", without_effect): {"reorder"},
    lambda patch: patch.setattr(LayerMemory, "batch_select_indices", without_effect): {"reorder"},
    beams_that_raise: {"reorder"},
    no_pads: {"pads", "reorder"},  # whose prompts are padded
    no_packing: {"packing"},
    ring_off_by_one: {"chunks", "pads", "batch", "reorder", "state"},  # a short drift run never goes on from a chunk
    nothing_counted: {"decode", "chunks", "pads", "batch", "reorder", "state", "drift"},
    state_not_updated: {"decode", "chunks", "batch", "reorder", "state", "drift"},
    rows_that_leak: {"pads", "packing", "batch", "reorder", "state"},  # two rows are read
    memory_that_grows: {"memory"},
    state_file_loses_the_sinks: {"state"},
    values_not_finite: {"drift"},
    parameter_lost: {"reload"},
}
