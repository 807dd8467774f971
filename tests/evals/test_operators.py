"""Bounds on operators per layer. Each is a launch on a GPU and some microseconds on a CPU."""

from __future__ import annotations

import pytest

from evals.speed.operators import STEPS, of_a_layer, reading, writing
from linearize.model.configuration import BLOCK
from linearize.recipe import load_recipe

SHORT, LONG = 1100, 1100 + 8 * BLOCK


@pytest.mark.parametrize(
    "bits, per_block, per_step, recorded, merging", [("int8", 46, 60, 74, 203), ("int4", 48, 86, 99, 272)]
)
def test_operators_of_slots(bits, per_block, per_step, recorded, merging):
    """A block of a prompt costs as many operators as any other, and a step that merges none does no work for it."""
    mixer = load_recipe("default").mixer.model_copy(update={"memory_dtype": bits})
    short, long = (sum(of_a_layer(mixer, reading(tokens)).values()) for tokens in (SHORT, LONG))
    assert (long - short) / 8 <= per_block
    assert sum(of_a_layer(mixer, writing(SHORT)).values()) / STEPS <= per_step
    assert sum(of_a_layer(mixer, writing(SHORT, merges=False)).values()) / STEPS <= recorded
    assert sum(of_a_layer(mixer, writing(SHORT, merges=True)).values()) / STEPS <= merging
