"""Every shipped recipe converts a model, which then generates, and decodes as it prefills."""

from __future__ import annotations

import copy
from typing import get_args

import pytest
import torch

from linearize.conversion.swap import convert_model
from linearize.model.recurrences import RECURRENCES
from linearize.recipe import load_recipe, shipped_recipes
from linearize.recipe.schema import RecurrenceName

NAMES = [recipe.name for recipe in shipped_recipes()]
OWN = {name: name.replace("_", "-") for name in RECURRENCES}
"""Recurrence -> its recipe."""


@torch.no_grad()
@pytest.mark.parametrize("name", NAMES)
def test_a_recipe_converts_generates_and_decodes_as_it_prefills(teacher, ids, name):
    model = convert_model(copy.deepcopy(teacher), load_recipe(name).mixer).eval()
    generator = torch.Generator().manual_seed(1)
    for parameter, value in model.named_parameters():
        if parameter.endswith("mix_weight"):  # awake, as after training
            value.copy_(0.3 + 0.2 * torch.randn(value.shape, generator=generator))
    prompt, new = 96, 8
    generated = model.generate(ids[:, :prompt], max_new_tokens=new, min_new_tokens=new, do_sample=False)
    whole = model(generated, use_cache=False).logits
    assert bool(torch.isfinite(whole).all())
    prefill = model(generated[:, :prompt], use_cache=True)
    steps, cache = [prefill.logits], prefill.past_key_values
    for t in range(prompt, prompt + new):
        steps.append(model(generated[:, t : t + 1], past_key_values=cache, use_cache=True).logits)
    torch.testing.assert_close(torch.cat(steps, 1), whole, rtol=0, atol=1e-5 * float(whole.abs().max()))


def test_each_recurrence_has_a_name_in_recipes_and_a_recipe():
    assert list(get_args(RecurrenceName)) == [*RECURRENCES, "none"]
    assert {*OWN.values(), "window-gla"} <= set(NAMES) and not any("_" in name for name in NAMES)
    for name, recipe in OWN.items():
        assert load_recipe(recipe).mixer.recurrence == load_recipe(name).mixer.recurrence == name  # either spelling


def test_our_start_is_the_same_for_all():
    """Recipes named after a recurrence differ from `window-gla` in the mixer's recurrence-specific keys alone, but for
    `gla` and `gated-deltanet`, which have the stages that they were measured with."""
    start = load_recipe("window-gla")
    specific = {"recurrence", "feature_map", "qk_norm", "slots", "negative_eigenvalues", "gate"}
    told = {"description", "measured", "mixer"}
    for name in OWN.values():
        recipe = load_recipe(name)
        own = told | ({"stages"} if name in ("gla", "gated-deltanet") else set())
        assert recipe.model_dump(exclude=own) == start.model_dump(exclude=own)
        assert recipe.mixer.model_dump(exclude=specific) == start.mixer.model_dump(exclude=specific)
        assert recipe.mixer.gate.learned
