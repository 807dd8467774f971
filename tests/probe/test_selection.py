"""What to keep: the budget, the choice, and a recipe that says it."""

from __future__ import annotations

import random

import pytest

from linearize.conversion.swap import mixers_for
from linearize.errors import RecipeError
from linearize.evaluation.heldout import Estimate
from linearize.families import AttentionLayer
from linearize.probe.damage import Part, convertible_layers, parts_of
from linearize.probe.selection import (
    Budget,
    budget_bytes,
    choose,
    fragment,
    keep_section,
    part_bytes,
    set_option,
)
from linearize.recipe import MixerSpec, load_recipe, parse_recipe

LAYERS = [AttentionLayer(6, 2, 8, 8, 1.0), AttentionLayer(6, 3, 8, 16, 1.0), AttentionLayer(6, 2, 8, 8, 1.0, window=32)]


@pytest.mark.parametrize(
    ("text", "share", "nbytes"),
    [("10%", 0.1, None), (" 2.5 % ", 0.025, None), ("500000", None, 500_000), ("1.5MB", None, 1_500_000),
     ("2 GiB", None, 2**31), ("64kb", None, 64_000), ("7 B", None, 7)],
)  # fmt: skip
def test_budgets_are_read(text, share, nbytes):
    found = Budget.parse(text)
    assert found.nbytes == nbytes and found.share == (share and pytest.approx(share))
    assert found.at(1000) == (nbytes or int(share * 1000))


@pytest.mark.parametrize("text", ["", "0", "0%", "101%", "-1", "ten", "1 TB", "1e3", "5%%"])
def test_other_budgets_are_refused(text):
    with pytest.raises(RecipeError, match="such as 10% or 2MB"):
        Budget.parse(text)


def test_bytes_of_parts():
    assert part_bytes(Part(0), LAYERS, 2, 100) == 100 * 2 * 16 * 2
    assert part_bytes(Part(1, 0), LAYERS, 4, 100) == 100 * 24 * 4
    assert part_bytes(Part(2), LAYERS, 2, 100) == 32 * 2 * 16 * 2  # its own window holds no more


def test_a_budget_has_room_for_something():
    sizes = {Part(0): 600, Part(1): 900}
    assert budget_bytes(None, sizes, 10_000, 8) == 1000
    assert budget_bytes(None, sizes, 1500, 8) == 600
    assert budget_bytes(Budget(nbytes=700), sizes, 1500, 8) == 700
    with pytest.raises(RecipeError, match="a budget of 599 B keeps nothing: at 8 tokens a layer takes 600 B"):
        budget_bytes(Budget(nbytes=599), sizes, 1500, 8)


def test_the_best_per_byte_go_first_and_fit():
    totals = {Part(0): Estimate(1.0, 0.1), Part(1): Estimate(1.5, 0.1), Part(2): Estimate(0.9, None)}
    sizes = {Part(0): 10, Part(1): 30, Part(2): 10}
    assert choose(totals, sizes, 30) == [Part(0), Part(2)]
    assert choose(totals, sizes, 45) == [Part(0), Part(2)]
    assert choose(totals, sizes, 100) == [Part(0), Part(2)]  # something has to be converted
    unsure = {**totals, Part(0): Estimate(1.0, 0.51), Part(2): Estimate(-0.9, None)}
    assert choose(unsure, sizes, 29) == [] and choose(unsure, sizes, 30) == [Part(1)]


@pytest.mark.parametrize("kind", ["layers", "heads"])
def test_a_fragment_is_a_recipe_within_its_budget(kind):
    convertible = convertible_layers(LAYERS, MixerSpec())
    assert convertible == [0, 1]
    parts = parts_of(LAYERS, convertible, kind)
    rng = random.Random(0)  # noqa: S311
    seen = set()
    for _ in range(50):
        totals = {part: Estimate(rng.random(), 0.1) for part in parts}
        sizes = {part: part_bytes(part, LAYERS, 2, 1000) for part in parts}
        budget = rng.randrange(min(sizes.values()), 2 * sum(sizes.values()))
        chosen = choose(totals, sizes, budget)
        if not chosen:
            continue
        assert sum(sizes[part] for part in chosen) <= budget
        keep = keep_section(chosen, LAYERS)
        recipe = parse_recipe(fragment(keep, ["Why. " * 40, "And how."]), "keep.yaml")
        assert recipe.mixer.keep == load_recipe("window-gla", [set_option(keep)]).mixer.keep
        kept = {(index, head) for head_ in [recipe.mixer.keep.heads] for index in head_ for head in head_[index]}
        kept |= {(index, head) for index in recipe.mixer.keep.layers for head in range(LAYERS[index].key_value_heads)}
        assert kept == {
            (part.layer, head)
            for part in chosen
            for head in (range(LAYERS[part.layer].key_value_heads) if part.head is None else [part.head])
        }
        assert any(s.converts(LAYERS[i]) for s in mixers_for(recipe.mixer, LAYERS) for i in s.layers)
        seen.add(tuple(sorted(keep)))
    assert seen == ({("layers",)} if kind == "layers" else {("heads",), ("layers",), ("heads", "layers")})


def test_windows_that_leave_nothing_are_refused():
    with pytest.raises(RecipeError, match="nothing to probe"):
        convertible_layers(LAYERS[2:], MixerSpec(window=32))
    sliding = convertible_layers(LAYERS[2:], MixerSpec(window=8))
    # What a probe leaves out of account does not stop it.
    assert sliding == convertible_layers(LAYERS[2:], MixerSpec(window=8, landmarks=16))
    assert sliding == [0] and parts_of(LAYERS[2:], sliding, "layers") == [Part(0)]
    with pytest.raises(RecipeError, match="single heads cannot be kept"):
        parts_of(LAYERS[2:], sliding, "heads")
