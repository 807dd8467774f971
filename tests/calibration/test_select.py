"""Tests of the layers that `keep.budget` keeps, and of the landmarks that each layer gets."""

from __future__ import annotations

import copy
import gc
import json

import pytest
import torch

from linearize.calibration.select import select
from linearize.calibration.shares import Curve, _exact, curves, share_landmarks
from linearize.calibration.weights import output_projection
from linearize.errors import RecipeError
from linearize.jobs.convert import convert_into
from linearize.model import LinearizedForCausalLM
from linearize.probe.damage import Part
from linearize.probe.needles import Needle, answer_log_probability
from linearize.recipe import CalibrateSpec, KeepSpec, MixerSpec, SourceSpec, load_recipe
from linearize.sources.source import find_source, load_model, load_tokenizer
from tests.model.test_families import build


def curve(*costs: float, recall: float = 0.0) -> Curve:
    return Curve([16, 64, 256], costs, [recall, recall / 2, 0.0])


def test_landmarks_go_where_they_take_away_most():
    shares = share_landmarks({0: curve(0.1, 0.01, 0.0), 1: curve(1e-4, 1e-5, 0.0)}, 64, recall=False)
    assert shares[0] > 64 > shares[1] >= 16 and sum(shares.values()) <= 128


def test_landmarks_by_recall_count_recall():
    found = {0: curve(0.01, 0.001, 0.0), 1: curve(1e-5, 1e-6, 0.0, recall=5.0)}
    alone, with_recall = (share_landmarks(found, 64, recall=recall) for recall in (False, True))
    assert with_recall[1] > alone[1] and sum(with_recall.values()) <= 128


def test_a_curve_that_falls_late_is_seen():
    # Nothing is gained by a few slots more, all of it by many.
    found = {0: Curve([16, 95, 96, 256], [0.5, 0.5, 0.0, 0.0], [0.0] * 4), 1: curve(1e-4, 1e-5, 0.0)}
    assert share_landmarks(found, 64, recall=False)[0] >= 96


@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt2", "falcon, multi-query", "gpt_neox", "cohere2", "olmo2"])
def test_what_a_layer_loses_is_its_change_times_the_gradient(family):
    """Beside it, the plain way: the objective's derivative along the layer's change, by two forward passes."""
    model = LinearizedForCausalLM.from_teacher(build(family), []).double().eval()
    spec = MixerSpec(window=4, sinks=1, landmarks=32, landmarks_by="loss")
    layers = [index for index, one in enumerate(model.attention_layers) if one.layer.window is None]
    ids = torch.randint(5, 97, (100,), generator=torch.Generator().manual_seed(0))
    needle = Needle(ids.tolist(), range(20, 23), range(90, 93))
    trained = [parameter.requires_grad for parameter in model.parameters()]
    found = curves(model, spec, layers, [ids], [needle])
    assert set(found) == set(layers) and all(curve.numbers == [4, 16, 48, 128] for curve in found.values())
    # As many landmarks as tokens leave nothing unread, and fewer do.
    assert all(curve.loss[-1] < 1e-9 * curve.loss[0] for curve in found.values())
    assert [parameter.requires_grad for parameter in model.parameters()] == trained
    assert not any(parameter.grad is not None for parameter in model.parameters())
    last = layers[-1]
    layer = model.attention_layers[last]
    mixer, seen = _exact(layer, spec, last, 16), []
    layer.observer = lambda new, lengths: seen.append(mixer(new, lengths, None))

    def objective(step: float) -> float:
        seen.clear()

        def move(_, arguments):
            return (arguments[0] + step * (seen[0].flatten(2) - arguments[0]),)

        handle = output_projection(layer).register_forward_pre_hook(move)
        with torch.no_grad():
            value = -answer_log_probability(model, needle)
        handle.remove()
        return value

    slope = (objective(1e-4) - objective(-1e-4)) / 2e-4
    # A number of landmarks that does better than a smaller one is never said to lose more.
    assert found[last].recall[1] == pytest.approx(min(max(slope, 0), found[last].recall[0]), rel=1e-3, abs=1e-9)


def test_a_pass_back_leaves_nothing_behind():
    """Not one of a text's tensors: of a real model those of a few texts would fill the memory."""
    model = LinearizedForCausalLM.from_teacher(build("llama"), []).eval()
    ids = torch.randint(5, 97, (100,), generator=torch.Generator().manual_seed(0))

    def held() -> int:
        gc.collect()
        return sum(type(x) is torch.Tensor for x in gc.get_objects())

    before = held()
    curves(model, MixerSpec(window=4, sinks=1, landmarks=32, landmarks_by="loss"), [0, 1], [ids, ids], [])
    assert held() == before


@pytest.fixture
def four_layers(tiny_folder):
    """The tiny model's two layers twice."""

    def make():
        model = load_model(find_source(str(tiny_folder)))
        for layer in copy.deepcopy(list(model.model.layers)):
            layer.self_attn.layer_idx = len(model.model.layers)
            model.model.layers.append(layer)
        model.config.num_hidden_layers = len(model.model.layers)
        return model

    return make


@pytest.fixture
def chosen(tiny_folder, four_layers, data_folder):
    """What a recipe with these changes chooses in that model: the mixer, the probe, and why."""

    play = SourceSpec(source=str(data_folder / "books" / "tinyshakespeare.txt"))

    def choose(*changes, text=play):
        source, settings = find_source(str(tiny_folder)), load_recipe("window-gla", ["mixer.window=16", *changes])
        settings = settings.model_copy(update={"calibrate": CalibrateSpec(source=text.source, field=text.field)})
        found, probe, why, _ = select(source, settings, four_layers(), load_tokenizer(source), say=lambda line: None)
        return found.mixer, probe, why

    return choose


@pytest.mark.public  # rests on a model that was trained well
def test_a_budget_is_spent_beside_what_is_named(chosen):
    (free, probe, _), wanted = chosen("mixer.keep={budget: 25%, by: loss}"), "mixer.keep={%s, budget: 25%%, by: loss}"
    (best,) = free.keep.layers
    named, beside, why = chosen(wanted % f"layers: [{best}]")
    assert {part.layer for part in beside.parts} == {0, 1, 2, 3} - {best}
    (more,) = {*named.keep.layers} - {best}
    assert len(named.keep.layers) == 2 and beside.kept.parts == [Part(more)]
    assert beside.kept.nbytes <= beside.kept.budget == probe.kept.budget
    # What is windowed for comparison leaves what is named alone.
    assert beside.windowed.loss.mean < probe.windowed.loss.mean
    assert beside.windowed.loss.mean > beside.kept.damage.loss.mean
    assert f"mixer.keep={{layers: {named.keep.layers}}}" in why[-1] and "beside those in the recipe" in why[0]
    assert named.keep == KeepSpec(layers=sorted([best, more]))


@pytest.mark.check
def test_heads_that_are_kept_are_no_candidates_and_take_nothing_of_the_budget(chosen):
    mixer, probe, _ = chosen("mixer.keep={every: 4, heads: {0: [0, 1, 2]}, budget: 6.25%, by: loss, unit: heads}")
    heads = probe.layers[0].key_value_heads
    assert set(probe.parts) == {Part(i, h) for i in range(3) for h in range(heads)} - {Part(0, h) for h in range(3)}
    (part,) = probe.kept.parts
    assert probe.sizes[part] == probe.kept.budget and mixer.keep.every == 4
    # All heads of a layer are the whole of it.
    assert mixer.keep.layers == ([0] if part == Part(0, 3) else [])
    assert mixer.keep.layers or (mixer.keep.heads[0][:3] == [0, 1, 2] and part.head in mixer.keep.heads[part.layer])
    # A layer that has lost some of its heads to `keep` is a candidate of the others' bytes.
    mixer, probe, _ = chosen("mixer.keep={layers: [1, 2], heads: {0: [0, 1, 2]}, budget: 10%, by: loss}")
    assert probe.sizes[Part(3)] * (heads - 3) == probe.sizes[Part(0)] * heads and set(probe.parts) == {Part(0), Part(3)}


def test_a_window_of_a_layer_that_is_chosen_is_dropped(chosen):
    mixer, _, why = chosen("mixer.keep={layers: [1, 2], budget: 50%, by: loss}", "mixer.windows={0: 32, 3: 8}")
    (kept,) = {0, 3} & {*mixer.keep.layers}
    assert set(mixer.windows) == {0, 3} - {kept}
    assert f"mixer.windows for layers {kept} are dropped" in why[-1]


def test_with_one_layer_left_there_is_nothing_to_choose(chosen):
    with pytest.raises(RecipeError, match=r"mixer.keep.budget: layer 0 is all that is left to convert"):
        chosen("mixer.keep={layers: [2], every: 2, budget: 50%}")
    with pytest.raises(RecipeError, match=r"mixer.keep: nothing is left to convert"):
        chosen("mixer.keep={layers: [0, 2], every: 2, budget: 50%}")


@pytest.mark.check
def test_the_text_is_that_of_the_field_that_is_named(chosen, tmp_path, data_folder):
    """And not that of `text`, where a record has it too."""
    story = (data_folder / "books" / "tinyshakespeare.txt").read_text()[:60_000]
    parts = [story[at : at + 2000] for at in range(0, len(story), 2000)]
    plain, field = tmp_path / "plain.jsonl", tmp_path / "field.jsonl"
    plain.write_text("".join(json.dumps({"text": part}) + "\n" for part in parts))
    field.write_text("".join(json.dumps({"text": "Aa. " * 200, "story": part}) + "\n" for part in parts))
    wanted = "mixer.keep={layers: [1, 2], budget: 50%, by: loss}"
    expected, found = (
        chosen(wanted, text=text)[1]
        for text in (SourceSpec(source=str(plain)), SourceSpec(source=str(field), field="story"))
    )
    assert torch.equal(found.teacher.loss, expected.teacher.loss) and found.kept == expected.kept


@pytest.mark.check
def test_convert_shares_landmarks_out_and_the_recipe_names_them(tiny_folder, tmp_path):
    text = tmp_path / "text.txt"
    text.write_text(" ".join(f"The {number}th word of this story is {number * 7919 % 977}." for number in range(900)))
    changes = ["mixer.window=16", "mixer.landmarks=64", "mixer.landmarks_by=recall", f"calibrate.source={text}"]
    wanted = load_recipe("window-gla", [*changes, "calibrate={tokens: 1024, length: 256, held_out: 2, steps: 0}"])
    wanted = wanted.model_copy(update={"calibrate": wanted.calibrate.model_copy(update={"source": str(text)})})
    folder = tmp_path / "out"
    folder.mkdir()
    start = convert_into(find_source(str(tiny_folder)), wanted, folder)
    mixer = start.recipe.mixer
    assert mixer.landmarks_by is None and sum(mixer.landmark_layers.values()) <= 2 * 64
    assert len(set(mixer.landmark_layers.values())) == 2
    told = json.loads((folder / "linearize.json").read_text())["start"]["selection"]
    assert len(told) == 1 and told[0].startswith("Landmarks: layer ")
    saved = {index: start.model.config.mixer_of(index).landmarks for index in (0, 1)}
    assert saved == mixer.landmark_layers


def test_nothing_to_share(tiny_folder):
    with pytest.raises(RecipeError, match="there are no landmarks to share out"):
        load_recipe("window-gla", ["mixer.landmarks_by=loss"])
    source = find_source(str(tiny_folder))
    wide = load_recipe("window-gla", ["mixer.landmarks=2048", "mixer.landmarks_by=loss"])
    with pytest.raises(RecipeError, match="read exactly, so there is nothing to share out"):
        select(source, wide, load_model(source), load_tokenizer(source), say=lambda line: None)
