"""Which layers and heads a recipe converts, and what stays as it was."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
from transformers import AutoModelForCausalLM

from linearize.checkpoint.sizes import growth_nbytes, state_nbytes
from linearize.conversion.inspection import inspect_model
from linearize.conversion.swap import convert_model, mixers_for, window_baseline
from linearize.errors import RecipeError
from linearize.families import AttentionLayer
from linearize.jobs.convert import convert_into
from linearize.model import LinearizedForCausalLM, cache_nbytes
from linearize.recipe import load_recipe
from linearize.sources.source import find_source, load_model

FULL = AttentionLayer(8, 4, 16, 16, scale=0.25)
SLIDING = AttentionLayer(8, 4, 16, 16, scale=0.25, window=100)


def spec(*changes: str):
    return load_recipe("window-gla", changes).mixer


def kinds(layers, *changes):
    """Layer -> (window, recurrence, softmax heads) as its attention will have them."""
    sections = mixers_for(spec(*changes), layers)
    fitted = {i: section.fitted(layers[i]) for section in sections for i in section.layers}
    assert sorted(fitted) == list(range(len(layers)))
    return [(fitted[i].window, fitted[i].recurrence, fitted[i].softmax_heads) for i in sorted(fitted)]


CONVERTED, KEPT, OWN = (64, "gla", []), (None, "none", []), (100, "none", [])


@pytest.mark.parametrize(
    ("layers", "changes", "expected"),
    [
        ([FULL, FULL], [], [CONVERTED, CONVERTED]),
        ([FULL, FULL, FULL], ["mixer.keep.layers=[1]"], [CONVERTED, KEPT, CONVERTED]),
        ([FULL, FULL], ["mixer.keep.heads={1: [3, 0, 3]}"], [CONVERTED, (64, "gla", [0, 3])]),
        ([FULL] * 7, ["mixer.keep.every=3"], [CONVERTED, CONVERTED, KEPT] * 2 + [CONVERTED]),
        ([FULL] * 4, ["mixer.keep={every: 2, layers: [0, 1]}"], [KEPT, KEPT, CONVERTED, KEPT]),
        ([FULL] * 2, ["mixer.keep.every=8"], [CONVERTED, CONVERTED]),
        ([SLIDING, FULL], [], [OWN, CONVERTED]),
        ([SLIDING, SLIDING], [], [CONVERTED, CONVERTED]),
        ([SLIDING, SLIDING], ["mixer.keep.layers=[0]"], [OWN, CONVERTED]),
        ([SLIDING, SLIDING], ["mixer.window=100"], [OWN, OWN]),
        ([SLIDING, FULL], ["mixer.window=1000"], [OWN, (1000, "gla", [])]),
    ],
)
def test_what_becomes_of_each_layer(layers, changes, expected):
    assert kinds(layers, *changes) == expected


def test_landmarks_of_each_layer():
    sections = mixers_for(spec("mixer.landmarks=24", "mixer.landmark_layers={1: 96, 2: 0}"), [FULL] * 4)
    assert {i: section.landmarks for section in sections for i in section.layers} == {0: 24, 1: 96, 2: 0, 3: 24}
    mixed = mixers_for(spec("mixer.landmarks=24"), [SLIDING, FULL])
    assert {i: section.landmarks for section in mixed for i in section.layers} == {0: 0, 1: 24}


def test_a_layer_that_stays_the_pretrained_one_stores_its_window_as_before():
    converted, kept = mixers_for(spec("mixer.memory_dtype=int8", "mixer.window=1000"), [SLIDING, FULL])
    assert (converted.layers, converted.fitted(FULL).memory_dtype) == ([1], "int8")
    assert (kept.layers, kept.fitted(SLIDING).memory_dtype) == ([0], "auto")
    assert converted.fitted(SLIDING).memory_dtype == "auto"  # its own window is the shorter one


@pytest.mark.parametrize(
    ("layers", "changes", "told"),
    [
        ([FULL, FULL], ["mixer.landmark_layers={2: 9}"], "mixer.landmark_layers: there is no layer 2; the model has 0"),
        ([FULL], ["mixer.landmarks=8", "mixer.covers=all"], "mixer: landmarks need covers: evicted"),
        (
            [replace(FULL, value_width=7)],
            ["mixer.landmarks=8", "mixer.memory_dtype=int4"],
            "mixer: 4 bits need heads of an even width, and this one's is 7",
        ),
        ([SLIDING] * 2, ["mixer.landmarks=8"], "mixer.landmarks: all layers of this model have sliding windows of"),
        ([SLIDING] * 2, ["mixer.landmark_layers={0: 0, 1: 8}"], "mixer.landmark_layers: layer 1 has a sliding window"),
        ([SLIDING, FULL], ["mixer.landmark_layers={0: 8}"], "mixer.landmark_layers: layer 0 has a sliding window"),
        (
            [FULL] * 2,
            ["mixer.landmarks=9", "mixer.landmark_layers={0: 0, 1: 0}"],
            "mixer.landmark_layers: no converted",
        ),
        ([FULL, FULL], ["mixer.keep.layers=[2]"], "there is no layer 2; the model has 0 to 1"),
        ([FULL], ["mixer.keep.heads={0: [4]}"], "there is no key/value head 4; the layer has 0 to 3"),
        ([SLIDING, FULL], ["mixer.keep.heads={0: [4]}"], "mixer.keep.heads.0: there is no key/value head 4"),
        ([FULL], ["mixer.windows={1: 32}"], "mixer.windows: there is no layer 1; the model has 0 to 0"),
        (
            [FULL] * 2,
            ["mixer.windows={0: 32, 1: 32}", "mixer.keep.layers=[1]"],
            "mixer.windows: layer 1 is kept as softmax by mixer.keep, so no other window is used there; leave it out",
        ),
        ([FULL] * 2, ["mixer.windows={1: 32}", "mixer.keep.every=2"], "mixer.windows: layer 1 is kept as softmax"),
        ([SLIDING, FULL], ["mixer.windows={0: 32}"], "mixer.windows: layer 0 has a sliding window of its own, which"),
        ([FULL], ["mixer.keep.layers=[0]"], "nothing is left"),
        ([FULL], ["mixer.keep.heads={0: [0, 1, 2, 3]}"], "nothing is left"),
        ([SLIDING, FULL], ["mixer.keep.layers=[1]"], "nothing is left"),
        ([SLIDING, FULL], ["mixer.keep.every=2"], "nothing is left"),
        ([SLIDING], ["mixer.keep.heads={0: [0]}"], "keep the whole layer"),
    ],
)
def test_what_cannot_be_kept_is_told(layers, changes, told):
    with pytest.raises(RecipeError, match=told):
        mixers_for(spec(*changes), layers)


@torch.no_grad()
def test_a_hybrid_checkpoint(tiny_folder, tmp_path):
    recipe = load_recipe("window-gla", ["mixer.keep={layers: [0], heads: {1: [2]}}", "mixer.window=16"])
    source = find_source(str(tiny_folder))
    model = convert_into(source, recipe, tmp_path, teacher=load_model(source)).model
    ids = torch.arange(5, 105)[None]
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(again(ids).logits, model(ids).logits)
    config = json.loads((tmp_path / "config.json").read_text())
    assert [section["window"] for section in config["mixers"]] == [16, None]
    head = model.config.head_dim * 4 * 2  # key and value of one head and token, float32
    assert growth_nbytes(model) == head * (model.config.num_key_value_heads + 1)
    cache = model(ids, use_cache=True).past_key_values
    assert cache_nbytes(cache) == state_nbytes(model) + ids.shape[1] * growth_nbytes(model)
    facts = inspect_model(find_source(str(tmp_path)), spec())
    assert facts["growth_bytes_per_token"] == growth_nbytes(model)
    assert (facts["converted_layers"], facts["softmax_layers"], facts["softmax_heads"]) == (1, [0], {1: [2]})
    assert f"{growth_nbytes(model):,} per token" in (tmp_path / "README.md").read_text()
    # The baseline differs by its recurrence alone, which is silent in a fresh conversion: what is kept, it keeps too.
    baseline = window_baseline(load_model(source), model.config.mixers)
    torch.testing.assert_close(baseline(ids).logits, model(ids).logits)
    plain = convert_model(load_model(source), spec("mixer.window=16"))
    assert not torch.allclose(plain(ids).logits, model(ids).logits, atol=1e-3)
    assert isinstance(again, LinearizedForCausalLM)


@torch.no_grad()
def test_a_checkpoint_with_a_window_of_its_own_for_each_layer(tiny_folder, tmp_path):
    recipe = load_recipe("window-gla", ["mixer.windows={0: 8, 1: 24}"])
    source = find_source(str(tiny_folder))
    model = convert_into(source, recipe, tmp_path, teacher=load_model(source)).model
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert [again.config.mixer_of(layer).window for layer in (0, 1)] == [8, 24]
    ids = torch.arange(5, 105)[None]
    assert torch.equal(again(ids).logits, model(ids).logits)
