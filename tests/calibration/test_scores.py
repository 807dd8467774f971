"""Tests of the learned score of landmarks: what losing a token costs, the fit, and the shares that follow from it."""

from __future__ import annotations

import json

import pytest
import torch

from linearize.calibration import scores
from linearize.calibration.backward import Watched, pass_back, watched
from linearize.calibration.scores import Layer, costs, lessons, shares
from linearize.calibration.select import _told, put_fitted
from linearize.conversion import choices
from linearize.errors import RecipeError
from linearize.jobs.convert import convert
from linearize.jobs.inspect import plan_convert
from linearize.model import LinearizedForCausalLM, MixerConfig
from linearize.recipe import load_recipe
from linearize.sources.source import find_source, load_model, load_tokenizer
from linearize.training.adapters import choose_trained
from tests.made import LANDMARKS
from tests.model.test_families import build

WINDOW, TOLD, TOKENS = 4, 30, 48


@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt2", "falcon, multi-query"])
def test_the_cost_is_the_change_of_the_output_without_the_token_times_the_gradient(family, monkeypatch):
    monkeypatch.setattr(scores, "_LEAST_REST", 1e-9)  # a bound for weights of almost 1
    model = LinearizedForCausalLM.from_teacher(build(family), []).double().eval()
    layers = [index for index, one in enumerate(model.attention_layers) if one.layer.window is None]
    ids = torch.randint(5, 97, (TOKENS,), generator=torch.Generator().manual_seed(0))
    found: dict[int, Watched] = {}
    with watched(model, layers, found.__setitem__):
        pass_back(model, ids, torch.arange(TOKENS) > 20)
    for index, seen in found.items():
        layer = model.attention_layers[index].layer
        group = layer.query_heads // layer.key_value_heads
        q, k, v = (x[0].double() for x in (seen.new.q_rotated, seen.new.k_rotated, seen.new.v))
        gradient = seen.gradient.view(TOKENS, layer.query_heads, layer.value_width)
        wanted = torch.zeros(layer.key_value_heads, TOLD, dtype=torch.float64)
        for head in range(layer.key_value_heads):
            for query in range(WINDOW, TOKENS):
                rise = torch.zeros(query + 1 - WINDOW, dtype=torch.float64)
                for own in range(head * group, (head + 1) * group):
                    logits = q[query, own] @ k[: query + 1, head].T * layer.scale
                    if layer.softcap is not None:
                        logits = layer.softcap * torch.tanh(logits / layer.softcap)
                    whole = logits.softmax(0) @ v[: query + 1, head]
                    for lost in range(len(rise)):
                        less = logits.index_fill(0, torch.tensor(lost), -torch.inf).softmax(0) @ v[: query + 1, head]
                        rise[lost] += (less - whole) @ gradient[query, own]
                last = min(len(rise), TOLD)
                wanted[head, :last] += rise[:last].abs()
        torch.testing.assert_close(costs(seen, layer, TOLD, WINDOW).double(), wanted, rtol=1e-3, atol=1e-6)


def test_the_score_finds_what_costs():
    """Tokens of one direction of the key cost much; a ridge regression finds the direction."""
    generator = torch.Generator().manual_seed(0)
    known = Layer()
    for _ in range(3):
        inputs = torch.randn(200, 8, generator=generator)
        known.inputs.append(inputs.bfloat16())
        known.costs.append(torch.stack([(2 * inputs[:, 1]).exp(), (-inputs[:, 5]).exp()]))
        known.recall.append(False)
    weight = known.weight()
    assert weight.shape == (2, 9)
    assert weight[0, :-1].abs().argmax() == 1 and weight[1, :-1].abs().argmax() == 5
    assert weight[0, 1] > 1 and weight[1, 5] < -0.5


def test_shares_go_where_tokens_cost_more():
    def layer(cost: float) -> Layer:
        one = torch.arange(100.0)
        return Layer([one[:, None].bfloat16()], [cost * torch.ones(1, 100)], [False])

    weight = torch.tensor([[1.0, 0.0]])
    found = shares({0: layer(1.0), 2: layer(3.0)}, {0: weight, 2: weight}, 512, recall=False)
    assert found[2] > 512 > found[0] and sum(found.values()) <= 1024
    # Nothing is left over, also where a part of a text is less than one slot.
    for landmarks in (1, 3, 5):
        costs = {0: layer(1.0), 2: layer(3.0), 5: layer(2.0)}
        few = shares(costs, dict.fromkeys(costs, weight), landmarks, recall=False)
        assert sum(few.values()) == 3 * landmarks and few[2] == max(few.values())
    # No layer has more than the model's context fills.
    short = shares({0: layer(1.0), 2: layer(99.0)}, {0: weight, 2: weight}, 512, recall=False, most=600)
    assert short[2] == 600 and short[0] > 400 and sum(short.values()) <= 1024


def test_the_line_about_shares_has_their_sum():
    assert (
        _told({0: 3, 1: 1}, 2)
        == "Landmarks: layer 0 has 3, layer 1 has 1, the fewest are 1; all together as many as 2 each."
    )
    assert _told({0: 3, 1: 0}, 2).endswith("the fewest are 0; all together 3, where 2 each are 4.")


def test_a_layer_without_a_landmark_gets_no_score():
    sections = [MixerConfig([0], landmarks=1, landmark_score="learned"), MixerConfig([1], landmark_score="learned")]
    model = LinearizedForCausalLM.from_teacher(build("llama"), sections)
    found = {key: x for key, x in model.named_parameters() if key.endswith("score_weight")}
    assert len(found) == 1
    weight = torch.ones_like(next(iter(found.values())))
    put_fitted(model, {layer: {"score_weight": weight} for layer in (0, 1)})
    assert torch.equal(next(iter(found.values())), weight)


def test_lessons_ask_for_what_they_hide(tiny_folder):
    tokenizer = load_tokenizer(find_source(str(tiny_folder)))
    rows = list(torch.randint(5, 500, (2, 400), generator=torch.Generator().manual_seed(0)))
    found = lessons(tokenizer, rows, seed=0, window=16)
    assert [one.recall for one in found] == [True, False, True]
    for one in found:
        assert len(one.ids) == len(one.counted) <= 400 and bool(one.counted.any())
    asking = found[0]
    assert not bool(asking.counted[: asking.told].any())
    assert torch.equal(found[0].ids, lessons(tokenizer, rows, seed=0, window=16)[0].ids)
    # Too short for a fact and its question.
    assert all(not one.recall for one in lessons(tokenizer, [row[:20] for row in rows], seed=0, window=16))


def test_convert_fits_the_score(tiny_folder, data_folder, tmp_path):
    play = data_folder / "books" / "tinyshakespeare.txt"
    settings = load_recipe(
        LANDMARKS,
        ["mixer.landmarks=64", "mixer.landmark_score=learned", "mixer.window=16", f"calibrate={{source: {play}}}",
         "calibrate.tokens=1024", "calibrate.length=512", "calibrate.held_out=2", "calibrate.steps=0"],
    )  # fmt: skip
    said: list[str] = []
    model = convert(str(tiny_folder), tmp_path / "out", settings, say=said.append)
    assert any("scores are fitted to what losing a token costs" in line for line in said)
    weights = {name: x for name, x in model.named_parameters() if name.endswith("score_weight")}
    assert weights and all(bool(x.any()) for x in weights.values())
    written = load_model(find_source(str(tmp_path / "out")))
    for name, weight in weights.items():
        assert torch.equal(written.get_parameter(name), weight)
    mixers = json.loads((tmp_path / "out" / "config.json").read_text())["mixers"]
    numbers = {layer: one["landmarks"] for one in mixers for layer in one["layers"]}
    assert 0 < sum(numbers.values()) <= 64 * len(numbers)


def test_texts_are_longer_than_a_wide_window(tiny_folder, tmp_path, monkeypatch):
    """Only queries beyond the window tell what a token's loss costs."""
    monkeypatch.setattr(choices, "SCORE_LENGTH", 64)
    monkeypatch.setattr(scores, "ROWS", 2)
    few = ["mixer.landmarks=8", "mixer.landmarks_by=null"]
    said: list[str] = []
    model = convert(str(tiny_folder), tmp_path / "out", "default", overrides=[*few, "mixer.window=80"], say=said.append)
    assert any("texts of up to 240 tokens" in line for line in said)
    weights = [x for name, x in model.named_parameters() if name.endswith("score_weight")]
    assert weights and all(bool(x.isfinite().all()) and bool(x.any()) for x in weights)
    wide = load_recipe("default", [*few, "mixer.window=300"])
    monkeypatch.setattr("linearize.jobs.convert.load_model", lambda *_, **__: pytest.fail("it was loaded"))
    for refused in (convert, plan_convert):
        with pytest.raises(RecipeError, match="a window of 300 leaves too little of texts of 512 tokens"):
            refused(str(tiny_folder), tmp_path / "wide", wide)


def test_a_learned_score_needs_landmarks():
    with pytest.raises(RecipeError, match="there are no landmarks to choose"):
        load_recipe("window-gla", ["mixer.landmark_score=learned"])


def test_training_leaves_the_score_alone():
    section = MixerConfig([0, 1], landmarks=8, landmark_score="learned")
    model = LinearizedForCausalLM.from_teacher(build("llama"), [section])
    choose_trained(model, "full")
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    scored = {name for name, _ in model.named_parameters() if name.endswith("score_weight")}
    assert scored and trained and not scored & trained
