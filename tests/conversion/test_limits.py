"""Embedding tables end: positions that were learned, and tokens that have no row."""

from __future__ import annotations

import json
import shutil
from typing import TYPE_CHECKING

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel

import linearize
from linearize.cli import app
from linearize.errors import DataError, ModelError
from linearize.generation.state import State
from linearize.jobs.convert import convert_into
from linearize.recipe import load_recipe
from linearize.sources.source import find_source, load_config, load_model, load_tokenizer
from tests.conftest import random_llama

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

POSITIONS = 128


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return random_llama(tmp_path_factory.mktemp("llama"))


@pytest.fixture(scope="module")
def gpt2(llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A converted GPT-2 with `POSITIONS` positions, beside its base."""
    folder = tmp_path_factory.mktemp("gpt2")
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=257, n_positions=POSITIONS, n_embd=32, n_layer=2, n_head=2, bos_token_id=0, eos_token_id=None
    )
    GPT2LMHeadModel(config).save_pretrained(folder / "base")
    load_tokenizer(find_source(str(llama))).save_pretrained(folder / "base")
    linearize.convert(folder / "base", folder / "converted", "window-gla", overrides=["mixer.window=16"])
    return folder


@pytest.fixture(scope="module")
def extended(llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model whose tokenizer and chat template have `[PAD]`, for which its embedding has no row."""
    folder = tmp_path_factory.mktemp("extended")
    tokenizer = load_tokenizer(find_source(str(llama)))
    tokenizer.add_special_tokens({"pad_token": "[PAD]"})
    tokenizer.chat_template = "{% for m in messages %}[PAD]{{ m.content }}{% endfor %}"
    load_model(find_source(str(llama))).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def run(capfd: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str]]:
    """Runs a command line; gives its status and all output."""

    def call(*arguments: object) -> tuple[int, str]:
        capfd.readouterr()
        status = app.run([str(argument) for argument in arguments])
        return status, " ".join("".join(capfd.readouterr()).split())

    return call


@pytest.mark.parametrize("kind", ["base", "converted"])
def test_generation_stops_at_the_last_position_and_says_so(gpt2, kind, run):
    code, told = run("generate", gpt2 / kind, "abcd", "-n", 300)
    assert (code, "stopped at position 128, the last" in told) == (0, True), told
    assert f"{POSITIONS - 4} written" in told
    code, told = run("generate", gpt2 / kind, "abcd", "-n", 20, "--json")
    assert json.loads(told)["last_position"] is None
    code, told = run("generate", gpt2 / kind, "a" * 129, "-n", 1)
    assert (code, "129 tokens, and the model reads 128; shorten it" in told) == (1, True), told
    code, told = run("generate", gpt2 / kind, "a" * 128, "-n", 1)
    assert (code, "fills all 128 positions" in told) == (1, True), told


def test_a_state_goes_on_to_the_last_position(gpt2):
    model = load_model(find_source(str(gpt2 / "converted")))
    state = State.read(model, torch.arange(1, 101)[None])
    written = state.generate(model, max_new_tokens=300, do_sample=False)
    assert written.shape == (1, POSITIONS - 100)
    with pytest.raises(DataError, match="129 tokens and the model has learned 128 positions"):
        state.generate(model, torch.arange(1, 30)[None], max_new_tokens=2, do_sample=False)


def test_a_benchmark_beyond_the_last_position_is_refused(gpt2, run):
    code, told = run("bench", gpt2 / "converted", "--lengths", "64,128")
    assert (code, told.endswith("the model has learned 128 positions; choose up to that")) == (1, True), told
    assert "--lengths, measured steps included, " in told


def test_what_to_keep_is_measured_on_as_many_tokens_as_there_are_positions(gpt2, tmp_path, run):
    config = GPT2Config.from_pretrained(gpt2 / "base", n_positions=448)  # a question takes 374 of these bytes
    GPT2LMHeadModel(config).save_pretrained(tmp_path / "base")
    load_tokenizer(find_source(str(gpt2 / "base"))).save_pretrained(tmp_path / "base")
    changes = ("--set", "mixer.window=16", "--set", "mixer.keep={budget: 60%, by: loss}")
    code, told = run("convert", tmp_path / "base", "-o", tmp_path / "out", "-r", "window-gla", *changes)
    assert (code, "of 2 layers" in told) == (0, True), told


def test_rows_of_more_tokens_than_positions_are_refused_before_training(gpt2, tmp_path, run):
    (tmp_path / "text.txt").write_text("some text " * 200)
    sets = [f"stages.0.data.source={tmp_path / 'text.txt'}", "stages.0.length=256"]
    for kind in ("base", "converted"):
        options = [word for change in [f"model={gpt2 / kind}", *sets] for word in ("--set", change)]
        code, told = run("finetune", "window-gla", "-o", tmp_path / "out", *options)
        assert (code, "stages.0.length 256: the model has learned 128 positions" in told) == (1, True), told
    options = ["--recipe", "train", "--set", f"calibrate.source={tmp_path / 'text.txt'}"]
    code, told = run("convert", gpt2 / "base", "-o", tmp_path / "out", *options, "--set", "calibrate.length=256")
    assert (code, "calibrate.length 256: the model has learned 128 positions" in told) == (1, True), told


def test_calibration_reads_no_more_than_the_context(llama, tmp_path):
    settings = ["mixer.window=16", "calibrate.source=builtin", "calibrate.tokens=600", "calibrate.held_out=2"]
    lines: list[str] = []
    source = find_source(str(llama))
    context = load_config(source).max_position_embeddings
    start = convert_into(
        source, load_recipe("train", [*settings, f"calibrate.length={context + 1}"]), tmp_path, say=lines.append
    )
    assert start.recipe.calibrate.length == context
    told = (
        f"calibrate: rows of {context:,} tokens, the model's context, for calibrate.length {context + 1:,} exceeds it"
    )
    assert told in lines


@pytest.mark.parametrize("kind", ["base", "converted"])
def test_whatever_reads_too_far_says_so_in_one_line(gpt2, kind):
    model = load_model(find_source(str(gpt2 / kind)))
    with pytest.raises(DataError, match="the text needs 140 positions and the model has learned 128"):
        model(torch.arange(140)[None])
    with pytest.raises(DataError, match="token 300 has no row in the model's embedding, which has 257"):
        model(torch.tensor([[1, 300]]))


def test_a_tokenizer_with_more_tokens_than_the_embedding_is_told(extended, tmp_path, run):
    told = "its tokenizer has 258 tokens and its embedding 257 rows, so text with '[PAD]' (257) or above cannot be read"
    for options in (["--dry-run"], []):
        code, words = run("convert", extended, "-o", tmp_path / "out", "-r", "window-gla", *options)
        assert (code, told in words) == (0, True), words
    code, words = run("run", "window-gla", "-o", tmp_path / "run", "--set", f"model={extended}", "--set", "stages=[]")
    assert words.count(told) == 1, words
    assert run("generate", tmp_path / "out", "hello", "-n", 2)[0] == 0
    code, words = run("generate", tmp_path / "out", "hello", "-n", 2, "--chat")
    assert (code, "the prompt: has '[PAD]', token 257, and the model's embedding has 257" in words) == (1, True), words
    (tmp_path / "text.txt").write_text("some [PAD] text " * 200)
    sets = [f"model={tmp_path / 'out'}", f"stages.0.data.source={tmp_path / 'text.txt'}", "stages.0.data.held_out=1"]
    options = [word for change in [*sets, "stages.0.length=128"] for word in ("--set", change)]
    code, words = run("finetune", "window-gla", "-o", tmp_path / "tuned", *options)
    assert (code, "stages.0.data: has '[PAD]', token 257, and" in words) == (1, True), words
    assert told in words


@pytest.mark.check
def test_a_model_without_a_tokenizer_converts(llama, tmp_path, run):
    bare = tmp_path / "bare"
    load_model(find_source(str(llama))).save_pretrained(bare)
    for options in (["--dry-run"], []):
        code, told = run("convert", bare, "-o", tmp_path / "out", "-r", "window-gla", *options)
        assert (code, "bare: has no tokenizer, so the result has none" in told) == (0, True), told
    model = load_model(find_source(str(tmp_path / "out")))
    assert torch.isfinite(model(torch.arange(20)[None]).logits).all()
    assert not linearize.verify(tmp_path / "out", steps=4).failed
    linearize.export(tmp_path / "out", tmp_path / "exported")
    for command in (
        ["generate", tmp_path / "out", "text"],
        ["eval", tmp_path / "out"],
        ["finetune", "window-gla", "-o", tmp_path / "tuned", "--set", f"model={tmp_path / 'out'}"],
        ["convert", bare, "-o", tmp_path / "calibrated", "--recipe", "train"],
    ):
        code, told = run(*command)
        assert (code, "has no tokenizer (no tokenizer.json)" in told) == (1, True), told
    with pytest.raises(ModelError, match="has no tokenizer"):
        load_tokenizer(find_source(str(bare)))


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ("landmark_layers={5: 9}", "mixer.landmark_layers: there is no layer 5; the model has 0 to 1"),
        ("windows={7: 32}", "mixer.windows: there is no layer 7; the model has 0 to 1"),
        ("keep.layers=[9]", "mixer.keep: there is no layer 9; the model has 0 to 1"),
        ("keep.heads={1: [7]}", "mixer.keep.heads.1: there is no key/value head 7; the layer has 0 to 3"),
    ],
)
def test_a_recipe_of_a_larger_model_is_refused_before_anything_is_loaded(changes, told, llama, tmp_path, run):
    (tmp_path / "model").mkdir()
    shutil.copy(llama / "config.json", tmp_path / "model")
    for file in llama.glob("tokenizer*"):
        shutil.copy(file, tmp_path / "model")
    model, change = tmp_path / "model", ["--set", f"mixer.{changes}"]
    for command in (
        ["convert", model, "-o", tmp_path / "out", "-r", "window-gla", "--dry-run"],
        ["convert", model, "-o", tmp_path / "out", "-r", "window-gla"],
        ["inspect", model, "-r", "window-gla"],
        ["finetune", "window-gla", "-o", tmp_path / "tuned", "--set", f"model={model}"],
        ["run", "window-gla", "-o", tmp_path / "run", "--set", f"model={model}"],
    ):
        assert run(*command, *change) == (1, f"error: {told}")
