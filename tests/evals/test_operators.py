"""Bounds on operators per layer. Each is a launch on a GPU and some microseconds on a CPU."""

from __future__ import annotations

import pytest
from linearize_kernels.native import native_refusal

from evals.speed.operators import PROMPTS, STEPS, of_a_layer, reading, training, writing
from linearize.model.configuration import BLOCK
from linearize.recipe import load_recipe

SHORT, LONG = 1200, 1200 + 8 * BLOCK


@pytest.mark.parametrize(
    "bits, per_block, per_step, recorded, merging", [("int8", 46, 60, 74, 203), ("int4", 48, 86, 99, 272)]
)
def test_operators_of_slots(bits, per_block, per_step, recorded, merging, monkeypatch):
    """A block of a prompt costs as many operators as any other, and a step that merges none does no work for it."""
    monkeypatch.setenv("LINEARIZE_KERNELS", "torch")
    mixer = load_recipe("default").mixer.model_copy(update={"memory_dtype": bits})
    short, long = (sum(of_a_layer(mixer, reading(tokens)).values()) for tokens in (SHORT, LONG))
    assert (long - short) / 8 <= per_block
    assert sum(of_a_layer(mixer, writing(SHORT)).values()) / STEPS <= per_step
    assert sum(of_a_layer(mixer, writing(SHORT, merges=False)).values()) / STEPS <= recorded
    assert sum(of_a_layer(mixer, writing(SHORT, merges=True)).values()) / STEPS <= merging


@pytest.mark.skipif(native_refusal() is not None, reason=str(native_refusal()))
@pytest.mark.parametrize("bits, prompt, per_step", [("int8", 200, 25), ("int4", 280, 25)])
def test_operators_of_slots_in_c(bits, prompt, per_step, monkeypatch):
    """All blocks of a prompt are one call, and so is a step."""
    monkeypatch.setenv("LINEARIZE_KERNELS", "native")
    mixer = load_recipe("default").mixer.model_copy(update={"memory_dtype": bits})
    short, long = (of_a_layer(mixer, reading(tokens)) for tokens in (SHORT, LONG))
    assert sum(short.values()) == sum(long.values()) <= prompt and short["native prompt"] == 1
    assert sum(of_a_layer(mixer, writing(SHORT)).values()) / STEPS <= per_step


@pytest.mark.skipif(native_refusal() is not None, reason=str(native_refusal()))
def test_operators_of_training_do_not_grow_with_the_text(monkeypatch):
    """All blocks choose their slots in one call, and read and are differentiated in at most eight slices."""
    monkeypatch.setenv("LINEARIZE_KERNELS", "native")
    mixer = load_recipe("default").mixer
    short, middle, long, longest = (of_a_layer(mixer, training(tokens)) for tokens in (*PROMPTS, 2 * PROMPTS[-1]))
    assert sum(short.values()) <= sum(middle.values()) <= sum(long.values()) <= 610 >= sum(longest.values())
    assert long["native prompt"] == 1
