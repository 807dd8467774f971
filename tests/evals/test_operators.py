"""Bounds on operators per layer. Each is a launch on a GPU and some microseconds on a CPU."""

from __future__ import annotations

import pytest

from evals.speed.operators import STEPS, of_a_layer, reading, writing
from linearize.model.configuration import BLOCK

SHORT, LONG = 1100, 1100 + 8 * BLOCK


@pytest.mark.parametrize(
    ("recipe", "per_block", "per_step", "recorded", "merging"),
    [("slots", 46, 58, 71, 190), ("landmarks", 73, 82, 92, 250)],
)
def test_operators_of_slots(recipe, per_block, per_step, recorded, merging):
    """A block of a prompt costs as many operators as any other, and a step that merges none does no work for it."""
    short, long = (sum(of_a_layer(recipe, reading(tokens)).values()) for tokens in (SHORT, LONG))
    assert (long - short) / 8 <= per_block
    assert sum(of_a_layer(recipe, writing(SHORT)).values()) / STEPS <= per_step
    assert sum(of_a_layer(recipe, writing(SHORT, merges=False)).values()) / STEPS <= recorded
    assert sum(of_a_layer(recipe, writing(SHORT, merges=True)).values()) / STEPS <= merging
