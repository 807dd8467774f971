"""The fused step of landmarks against plain torch, with full slots and a merge on the way. See `test_step.py`."""

from __future__ import annotations

import pytest
import torch

from linearize.families.base import Projections
from linearize.model.memory import LayerMemory
from linearize.model.mixer.fused import refusal
from tests.kernels.test_step import (
    DEVICE,
    assert_no_worse_than_twice_plain_torch,
    make_layer,
    make_mixer,
    pytestmark,
    tokens_of,
)

__all__ = ["pytestmark"]

KINDS = {
    "model's dtype, novelty": {},
    "some slots are empty": {"landmarks": 90},
    "8 bits, novelty": {"memory_dtype": "int8", "sinks": 0},
    "8 bits, learned": {"memory_dtype": "int8", "landmark_score": "learned"},
    "4 bits, learned": {"memory_dtype": "int4", "landmark_score": "learned"},
}
# The merge is due at 103 tokens: 5 of the window, 2 sinks, and blocks of 32.
PROMPT, STEPS = 101, 3


def mixer_of(options: dict, softcap: float | None = None):
    width = 64 if options.get("memory_dtype") == "int4" else 12
    layer = make_layer(width=width, values=width if width == 64 else 10, softcap=softcap)
    return layer, make_mixer(layer, **{"recurrence": "none", "window": 5, "landmarks": 40, **options})


@torch.no_grad()
def written(mixer, new: Projections, *, fused: bool, joins: bool) -> dict[str, torch.Tensor]:
    """Outputs and memory after a prompt in plain torch and some steps, in which row 1 misses a token."""
    memory = LayerMemory(mixer.parts(2, new.q.dtype, DEVICE), 2, DEVICE)
    mixer(Projections(*(x[:, :PROMPT] for x in new)), None, memory)
    memory.advance(PROMPT, None)
    if joins:  # as before a step is recorded
        memory.stay()
    outputs = []
    for step in range(STEPS):
        real = torch.tensor([1, step != 1], device=DEVICE).long()
        token = Projections(*(x[:, PROMPT + step :][:, :1] for x in new))
        mixed = mixer(token, real, memory, fused=fused)
        memory.advance(1, real)
        outputs.append(mixed[:, 0][real > 0])
    return {"outputs": torch.cat(outputs).double(), **{name: x.double().clone() for name, x in memory.tensors()}}


@pytest.mark.parametrize(("kind", "softcap"), [*((kind, None) for kind in KINDS), ("model's dtype, novelty", 2.0)])
def test_steps_equal_plain_torch(kind, softcap):
    layer, mixer = mixer_of(KINDS[kind], softcap)
    new = tokens_of(layer, 2, PROMPT + STEPS, torch.float32)
    exact = Projections(*(x.double() for x in new))
    ways = (exact, False), (new, False), (new, True)
    found = [written(mixer, given, fused=fused, joins=fused) for given, fused in ways]
    assert_no_worse_than_twice_plain_torch(found)


def test_rows_of_one_length_without_a_mask():
    layer, mixer = mixer_of({})
    new = tokens_of(layer, 2, PROMPT + STEPS, torch.float32)
    found = []
    for fused in (False, True):
        memory = LayerMemory(mixer.parts(2, torch.float32, DEVICE), 2, DEVICE)
        with torch.no_grad():
            mixer(Projections(*(x[:, :PROMPT] for x in new)), None, memory)
            memory.advance(PROMPT, None)
            for step in range(STEPS):
                mixed = mixer(Projections(*(x[:, PROMPT + step :][:, :1] for x in new)), None, memory, fused=fused)
                memory.advance(1, None)
        found.append({"outputs": mixed, **{name: x.clone() for name, x in memory.tensors()}})
    for name, plain in found[0].items():
        torch.testing.assert_close(found[1][name], plain, rtol=1e-5, atol=1e-5, msg=name)


def test_what_the_kernel_does_not_know_is_refused():
    layer, mixer = mixer_of({})
    assert refusal("step", mixer.config, layer) is None
    _, gated = mixer_of({"recurrence": "gla"})
    assert "beside gla" in str(refusal("step", gated.config, layer))
    odd = make_layer(width=96, values=96)
    assert "width 96" in str(
        refusal("step", make_mixer(odd, recurrence="none", landmarks=8, memory_dtype="int4").config, odd)
    )
