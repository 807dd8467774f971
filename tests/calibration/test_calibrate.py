"""Calibration of tiny models: what it gains, what it takes back, and that no family breaks."""

from __future__ import annotations

import copy
import json
import re

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from linearize.calibration import calibrate as module
from linearize.calibration import select as selecting
from linearize.calibration.blocks import Blocks, texts_of
from linearize.calibration.calibrate import calibrate, calibration_text
from linearize.calibration.layer import LayerFit, LayerResult
from linearize.calibration.telling import calibration_data, calibration_lines
from linearize.calibration.weights import Weights
from linearize.conversion.swap import convert_model
from linearize.data.load import Document, TrainingData, load_data, pack, reserved_tokens
from linearize.errors import DataError
from linearize.evaluation.heldout import paired_difference, score_rows
from linearize.evaluation.systems import find_systems
from linearize.jobs.convert import convert_into, make_start
from linearize.jobs.stages import run_stages
from linearize.probe import probing
from linearize.probe.damage import Reading
from linearize.probe.needles import Needle, answer_log_probability
from linearize.recipe import load_recipe
from linearize.sources.source import find_source, load_model
from tests.made import LANDMARKS_EXACT
from tests.model.test_families import build
from tests.tables import some

FAMILIES = [
    "llama", "gemma2", "gemma3_text", "mistral, sliding", "gpt2", "falcon, multi-query", "gpt_neox", "cohere2", "olmo2",
    "phi3", "smollm3", "stablelm, all options",
]  # fmt: skip
SHORT = "calibrate={tokens: 3072, length: 256, held_out: 4, steps: 24}"
TEACHER, CONVERTED = Reading(torch.zeros(4), torch.zeros(4)), Reading(torch.ones(4), -torch.ones(4))


def recipe(story, *changes, name="train"):
    return load_recipe(name, ["mixer.window=16", SHORT, f"calibrate.source={story}", *changes])


def drawn(seed: int, count: int, length: int = 72):
    generator = torch.Generator().manual_seed(seed)
    # What was said comes again far away, so that there is something to remember.
    ids = torch.randint(5, 97, (count, length // 4), generator=generator).repeat(1, 4)
    return pack([Document(row.tolist(), [True] * length) for row in ids], length)


def drawn_text() -> TrainingData:
    return TrainingData(drawn(0, 3), drawn(1, 2), "drawn tokens", 5, 0.0)


@pytest.fixture(scope="module")
def story(data_folder):
    return data_folder / "books" / "tinyshakespeare.txt"


@pytest.fixture(scope="module")
def calibrated(tiny_folder, story, tmp_path_factory):
    folder = tmp_path_factory.mktemp("calibrated")
    return folder, convert_into(find_source(str(tiny_folder)), recipe(story), folder)


@pytest.mark.public  # rests on a model that was trained well
def test_it_beats_a_window_of_equal_bytes_and_lives_on_its_recurrence(calibrated, tiny_folder, story):
    folder, start = calibrated
    teacher, tokenizer = AutoModelForCausalLM.from_pretrained(tiny_folder), AutoTokenizer.from_pretrained(tiny_folder)
    # Other documents than those that it was fitted to and that decided.
    fresh = calibration_text(start.recipe.calibrate, tokenizer, teacher, seed=1, say=lambda line: None).train
    names = ["window", "window_bytes", "no_recurrence"]
    systems = find_systems(find_source(str(folder)), find_source(str(tiny_folder)), names)
    scores = {one.info.name: score_rows(one.load(), fresh) for one in systems}
    wider = paired_difference(scores["window_bytes"], scores["model"]).loss
    silent = paired_difference(scores["no_recurrence"], scores["model"]).loss
    assert wider.mean > 2 * wider.stderr > 0
    assert silent.mean > 2 * silent.stderr > 0


def test_what_it_says_is_what_it_did(calibrated):
    folder, start = calibrated
    found = start.calibration
    figures = json.loads((folder / "calibration.json").read_text())
    assert [one["name"] for one in figures["ingredients"] if one["kept"]] == [
        one.name for one in found.ingredients if one.kept
    ]
    loss = float(found.readings["calibrated"].loss.mean())
    # Torch adds the rows up in another order on some CPUs, and the last bit differs.
    assert figures["readings"]["calibrated"]["loss"]["value"] == pytest.approx(loss, rel=1e-12)
    assert found.readings["calibrated"].loss.mean() < found.readings["converted"].loss.mean()
    told = json.loads((folder / "linearize.json").read_text())["start"]["calibration"]
    card, page = (folder / "README.md").read_text(), (folder / "calibration.md").read_text()
    assert all(line in card and line in page for line in told)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    rows = calibration_text(start.recipe.calibrate, tokenizer, None, seed=start.recipe.seed, say=told.append).held_out
    written = score_rows(AutoModelForCausalLM.from_pretrained(folder), rows).loss
    torch.testing.assert_close(written, found.readings["calibrated"].loss, rtol=1e-5, atol=1e-5)


def test_the_same_seed_gives_the_same_model(calibrated, tiny_folder, story, tmp_path):
    folder, _ = calibrated
    convert_into(find_source(str(tiny_folder)), recipe(story), tmp_path)
    assert (tmp_path / "model.safetensors").read_bytes() == (folder / "model.safetensors").read_bytes()


@pytest.mark.parametrize("row", some(FAMILIES, ["gemma3_text", "gpt2", "phi3", "smollm3"]))
def test_no_family_breaks(row):
    model = convert_model(copy.deepcopy(build(row)), load_recipe("train", ["mixer.window=8"]).mixer)
    spec = load_recipe("train", ["calibrate={tokens: 216, length: 72, held_out: 2, steps: 4}"]).calibrate
    found = calibrate(Weights(model), drawn_text(), spec)
    assert all(layer.errors[layer.kept] <= 1 for layer in found.layers) and found.layers
    assert found.readings["calibrated"].loss.mean() <= found.readings["converted"].loss.mean()
    assert all(bool(torch.isfinite(x).all()) for x in model.parameters())


@pytest.mark.parametrize("name", ["kda", "gated_deltanet", "hgrn2", "gsa", "lightnet", "rwkv7", "liger-gla", "mlstm"])
def test_no_recurrence_breaks(name):
    spec = load_recipe("train", ["calibrate={tokens: 216, length: 72, held_out: 2, steps: 4}"]).calibrate
    model = convert_model(copy.deepcopy(build("llama")), load_recipe(name, ["mixer.window=8"]).mixer)
    found = calibrate(Weights(model), drawn_text(), spec)
    if name != "liger-gla":  # as converted it is a destroyed model, and its mix cannot be silenced
        assert all(layer.error <= 1 for layer in found.layers)
    assert found.readings["calibrated"].loss.mean() <= found.readings["converted"].loss.mean()


def test_landmarks_are_calibrated_on_what_they_leave():
    teacher = build("llama")
    spec = recipe("story", "mixer.window=8", "mixer.landmarks=20", "calibrate.steps=4")
    model = convert_model(copy.deepcopy(teacher), spec.mixer)
    assert model.config.mixer_of(0).exact_tokens == 8 + 4 + 31
    found = calibrate(Weights(model), drawn_text(), spec.calibrate)
    assert all(one.errors[one.kept] < 1 for one in found.layers)
    with pytest.raises(DataError, match="the first 75 are all read exactly"):
        wide = convert_model(teacher, recipe("story", "mixer.window=8", "mixer.landmarks=32").mixer)
        calibrate(Weights(wide), drawn_text(), spec.calibrate)


def test_the_blocks_by_hand_are_the_model():
    model = convert_model(copy.deepcopy(build("gemma3_text")), load_recipe("window-gla", ["mixer.window=8"]).mixer)
    blocks, rows = Blocks(Weights(model)), drawn(0, 2)
    hidden, calls = blocks.enter(texts_of(rows))
    with torch.no_grad():
        for index in range(len(blocks)):
            with blocks.as_teacher(index):
                hidden = [blocks.run(index, x, call[index]) for x, call in zip(hidden, calls, strict=True)]
        logits = model.lm_head(model.model.norm(torch.cat(hidden)))
        expected = build("gemma3_text")(rows.input_ids).logits
    torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4)


def fresh_model():
    return convert_model(copy.deepcopy(build("llama")), load_recipe("train", ["mixer.window=8"]).mixer)


def test_steps_that_harm_are_not_kept(monkeypatch):
    def harm(self, *_):
        self.mixer.mix_weight.data.fill_(1e6)

    monkeypatch.setattr(LayerFit, "_steps", harm)
    spec = load_recipe("train", ["calibrate={tokens: 216, length: 72, held_out: 2, ridge: false}"]).calibrate
    found = calibrate(Weights(fresh_model()), drawn_text(), spec)
    assert all(layer.kept != "fitted" and layer.errors["fitted"] > layer.error for layer in found.layers)


def test_a_calibration_that_harms_the_whole_is_taken_back(monkeypatch):
    def harm(self, layer, **_):
        self.mixer.mix_weight.data.fill_(1e6)
        return LayerResult(layer, {"silent": 1.0, "fitted": 0.5}, "fitted")

    monkeypatch.setattr(LayerFit, "run", harm)
    model = fresh_model()
    before = {name: x.clone() for name, x in model.state_dict().items()}
    spec = load_recipe("train", ["calibrate={tokens: 216, length: 72, held_out: 2, ridge: false}"]).calibrate
    found = calibrate(Weights(model), drawn_text(), spec)
    assert not found.ingredients[0].kept
    assert all(torch.equal(x, before[name]) for name, x in model.state_dict().items())


def test_projections_that_harm_a_model_without_a_recurrence_are_taken_back(monkeypatch):
    monkeypatch.setattr(module, "_judge", lambda *_: False)
    slots = ["mixer.window=8", "mixer.landmarks=20", "mixer.landmarks_by=null"]
    settings = load_recipe(LANDMARKS_EXACT, [*slots, "calibrate={tokens: 216, length: 72, held_out: 2}"])
    model = convert_model(copy.deepcopy(build("llama")), settings.mixer)
    before = {name: x.clone() for name, x in model.state_dict().items()}
    found = calibrate(Weights(model), drawn_text(), settings.calibrate)
    assert min(found.ridge.values()) < 1 and found.readings.keys() == {"converted", "teacher", "output", "calibrated"}
    assert all(torch.equal(x, before[name]) for name, x in model.state_dict().items())
    assert calibration_data(found)["recurrence"] is None and "silent" not in " ".join(calibration_lines(found))


def test_what_the_pass_that_fits_reads_is_what_the_model_reads(monkeypatch):
    monkeypatch.setattr(module, "_judge", lambda *_: True)
    spec = load_recipe("train", ["calibrate={tokens: 216, length: 72, held_out: 2, steps: 2}"]).calibrate
    model, needles = fresh_model(), [Needle(list(range(5, 65)), range(20, 24), range(56, 60))] * 2
    found = calibrate(Weights(model), drawn_text(), spec, needles=needles)
    held, teacher = drawn_text().held_out, build("llama").eval()
    for one, name in ((model.eval(), "calibrated"), (teacher, "teacher")):
        torch.testing.assert_close(found.readings[name].loss, score_rows(one, held).loss, rtol=1e-5, atol=1e-5)
        with torch.no_grad():
            recall = answer_log_probability(one, needles[0])
        assert found.readings[name].recall.tolist() == pytest.approx([recall] * 2, abs=1e-5)


@pytest.mark.parametrize(
    ("loss", "recall", "kept"),
    [
        ([0.9, 0.8, 0.9, 0.8], [-1, -1, -1, -1], True),  # lower loss
        ([1, 1, 1, 1], [-0.5, -0.6, -0.5, -0.6], True),  # better recall
        ([1, 1, 1, 1], [-1, -1, -1, -1], False),  # nothing
        ([0.8, 1.3, 0.7, 1.1], [-1, -1, -1, -1], False),  # no more than chance
        ([0.9, 0.8, 0.9, 0.8], [-1.5, -1.6, -1.5, -1.6], False),  # lower loss, but recall suffers more
        ([0.5, 0.6, 0.5, 0.6], [-1.1, -1.2, -1.1, -1.2], True),  # recall suffers less
        ([1.7, 1.8, 1.7, 1.8], [-0.5, -0.6, -0.5, -0.6], False),  # better recall, but the loss suffers more
    ],
)
def test_what_is_kept(loss, recall, kept):
    found = module.Calibration("a text", 100, 10, 4, 4, "student", 0)
    found.readings |= {"teacher": TEACHER, "converted": CONVERTED}
    after = Reading(torch.tensor(loss, dtype=torch.float64), torch.tensor(recall, dtype=torch.float64))
    assert module._judge(found, "mixer", CONVERTED, after) is kept
    assert found.ingredients[0].kept is kept


def test_ridge_that_does_not_carry_over_changes_nothing(monkeypatch):
    model, spec = fresh_model(), load_recipe("train", ["calibrate.steps=0"]).calibrate
    monkeypatch.setattr(module.Ridge, "step", lambda self, strength: torch.ones_like(self.along.T))
    found = calibrate(Weights(model), drawn_text(), spec)
    assert set(found.ridge.values()) == {1.0} and [one.name for one in found.ingredients] == ["mixer"]


def test_documents_that_end_within_the_window_are_refused():
    rows = pack([Document([5] * 8, [True] * 8)] * 20, 80)
    spec = load_recipe("train").calibrate
    with pytest.raises(DataError, match=r"longest document .* has 8 tokens .* first 12"):
        calibrate(Weights(fresh_model()), TrainingData(rows, rows, "a text", 20, 0.0), spec)


def test_rows_as_short_as_the_window_are_refused_before_anything_is_written(tiny_folder, story):
    teacher = AutoModelForCausalLM.from_pretrained(tiny_folder)
    settings = load_recipe("train", ["calibrate.length=60", f"calibrate.source={story}"])
    with pytest.raises(DataError, match=r"calibrate.length 60: the first 68 tokens are all read exactly"):
        make_start(find_source(str(tiny_folder)), settings, teacher, None, say=lambda line: None)


def test_training_starts_from_there(calibrated, tiny_folder, story, tmp_path):
    stage = f"stages=[{{objective: sft, data: {{source: {story}, tokens: 256, held_out: 0}}, length: 128, "
    still = stage + "batch_tokens: 128, lr: 0, mixer_lr: 0, epochs: 0.5}]"
    found = run_stages(recipe(story, still, f"model={tiny_folder}"), tmp_path, say=lambda line: None)
    folder, start = calibrated
    ids = torch.arange(5, 205)[None]
    expected = AutoModelForCausalLM.from_pretrained(folder)(ids).logits
    torch.testing.assert_close(found.model(ids).logits, expected, rtol=1e-4, atol=1e-4)
    assert found.start == {"calibration": [found.start["calibration"][0], *start.record["calibration"][1:]]}


def test_nothing_that_stages_hold_out_is_chosen_by_or_fitted_to(tiny_folder, tmp_path, monkeypatch):
    words, path = ("cat", "dog", "tree", "cloud", "red", "blue", "river"), tmp_path / "stories.jsonl"
    lines = [f"Story {n} begins. " + " ".join(words[(n + k * k) % 7] for k in range(60)) for n in range(400)]
    path.write_text("".join(json.dumps({"text": line}) + "\n" for line in lines))
    held = f"data: {{source: {path}, held_out: 8}}, batch_tokens: 256"
    settings = load_recipe(
        "window-gla",
        ["mixer={window: 16, landmarks: 16, landmarks_by: loss, keep: {budget: 50%, by: loss}}",
         f"calibrate={{tokens: 1024, length: 128, held_out: 2, steps: 1, ridge: false, source: {path}}}",
         f"stages=[{{objective: sft, length: 64, {held}}}, {{objective: sft, length: 256, {held}}}]"],
    )  # fmt: skip
    source, tokenizer = find_source(str(tiny_folder)), AutoTokenizer.from_pretrained(tiny_folder)

    def stories(*sides):
        told = " ".join(tokenizer.decode(row) for rows in sides for row in rows.input_ids)
        return {*re.findall(r"Story (\d+) begins", told)}

    read = []

    def watched(*arguments, **options):
        read.append(load_data(*arguments, **options))
        return read[-1]

    for one in (module, probing, selecting):
        monkeypatch.setattr(one, "load_data", watched)
    make_start(source, settings, load_model(source), tokenizer, say=lambda line: None)
    assert len(read) == 3 and [len(text.held_out) for text in read] == [2, 0, 0]
    for stage in settings.stages:
        data = load_data(stage.data, tokenizer=tokenizer, length=stage.length, seed=settings.seed, teacher=None)
        judged = stories(data.held_out)
        assert len(judged) > 3
        for text in read:
            assert stories(text.train, text.held_out) and not judged & stories(text.train, text.held_out)
    # As they would be without these stages.
    free = calibration_text(settings.calibrate, tokenizer, None, seed=settings.seed, say=read.append)
    assert judged & stories(free.train) and judged & stories(free.held_out)
    with pytest.raises(DataError, match=r"beside 30,\d{3} tokens that stages hold out, are too few"):
        reserved = dict.fromkeys(reserved_tokens(settings.stages), 30_000)
        spec = settings.calibrate.model_copy(update={"length": 100_000})
        calibration_text(spec, tokenizer, None, seed=0, say=read.append, reserved=reserved)


def test_a_budget_is_resolved_into_names(tiny_folder, story, tmp_path):
    settings = load_recipe(
        "window-gla",
        ["mixer.window=16", "mixer.keep={budget: 50%, by: loss}", f"calibrate={{source: {story}, steps: 0}}",
         "calibrate={tokens: 2048, length: 256, held_out: 2, steps: 0}"]
    )  # fmt: skip
    start = convert_into(find_source(str(tiny_folder)), settings, tmp_path)
    kept = start.recipe.mixer.keep
    assert kept.budget is None and len(kept.layers) == 1
    assert start.model.config.mixer_of(kept.layers[0]).window is None
    saved = load_recipe(str(tmp_path / "recipe.yaml"))
    assert saved.mixer.keep == kept
    told = json.loads((tmp_path / "linearize.json").read_text())["start"]["selection"]
    assert any("by damage per byte of cache" in line for line in told)
    assert told[0] in (tmp_path / "README.md").read_text()
    assert (tmp_path / "selection.json").is_file()
