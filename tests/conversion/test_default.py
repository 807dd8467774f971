"""The default recipe on every family: it works, or one line refuses it and names the recipe to take instead."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

import linearize
from linearize.cli.app import run
from linearize.errors import LinearizeError
from linearize.jobs.inspect import plan_convert
from linearize.recipe import load_recipe
from linearize.runtime.interruption import Interrupted
from linearize.sources.source import find_source, load_model, load_tokenizer
from tests.conftest import random_llama
from tests.conversion.gguf_kit import tiny, write_gguf
from tests.model.test_families import ROWS, build
from tests.tables import some

INSTEAD = "take the recipe window-gla"
# What a family's default is refused for: all layers have sliding windows of their own.
SLIDING = {"mistral, sliding", "mixtral, sliding", "qwen3_moe, sliding", "phi3", "starcoder2"}


@pytest.fixture(scope="module")
def bytes_tokenizer(tmp_path_factory: pytest.TempPathFactory):
    return load_tokenizer(find_source(str(random_llama(tmp_path_factory.mktemp("llama")))))


@pytest.fixture(autouse=True)
def few_texts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("linearize.calibration.scores.ROWS", 2)
    monkeypatch.setattr("linearize.conversion.choices.SCORE_LENGTH", 400)


def folder_of(row: str, tokenizer, folder: Path, positions: int = 2048) -> Path:
    """A model of a row with a tokenizer of bytes and a context of `positions` tokens."""
    torch.manual_seed(0)
    config = copy.deepcopy(build(row).config)
    config.vocab_size, config.max_position_embeddings = 257, positions
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("row", some(list(ROWS), ["llama", "mistral, sliding"]))
def test_the_default_works_for_a_family_or_names_another(row, bytes_tokenizer, tmp_path):
    model = folder_of(row, bytes_tokenizer, tmp_path / "model")
    if row in SLIDING:
        with pytest.raises(LinearizeError, match=INSTEAD):
            linearize.convert(model, tmp_path / "out")
        return
    linearize.convert(model, tmp_path / "out")
    written = load_model(find_source(str(tmp_path / "out")))
    mixers = [written.config.mixer_of(index) for index in range(written.config.num_hidden_layers)]
    assert any(mixer.landmarks and mixer.memory_dtype != "auto" for mixer in mixers)
    assert bool(torch.isfinite(written(torch.arange(1, 200)[None]).logits).all())


@pytest.mark.parametrize(("tokens", "told"), [(512, INSTEAD), (2048, None)])
def test_a_short_context_is_refused_and_told_beforehand(bytes_tokenizer, tmp_path, capfd, tokens, told):
    model = folder_of("llama", bytes_tokenizer, tmp_path / "model", positions=tokens)
    capfd.readouterr()  # transformers' progress bar
    status = run(["convert", str(model), "-o", str(tmp_path / "out"), "--dry-run"])
    words = capfd.readouterr()
    if told is None:
        assert status == 0 and "would convert 2 of 2 layers" in words.out
    else:
        (line,) = words.err.splitlines()
        assert status == 1 and told in line and "context is 512 tokens" in line
    assert not (tmp_path / "out").exists()


def test_a_model_without_a_chat_template_is_not_sent_to_a_chat(tiny_folder, tmp_path, capfd):
    few = ["--set", "mixer.landmarks=8", "--set", "mixer.landmarks_by=null", "--set", "mixer.window=16"]
    assert run(["convert", str(tiny_folder), "-o", str(tmp_path / "out"), *few]) == 0
    assert capfd.readouterr().err.endswith(f'next: linearize generate {tmp_path / "out"} "Once upon a time"\n')


def test_a_model_without_a_tokenizer_is_refused_by_default(tmp_path):
    model = folder_of("llama", None, tmp_path / "model")
    for convert in (linearize.convert, lambda *to: plan_convert(*to, load_recipe("default"))):
        with pytest.raises(LinearizeError, match=f"has no tokenizer .* {INSTEAD}"):
            convert(model, tmp_path / "out")


@pytest.mark.parametrize(("stop", "status"), [(KeyboardInterrupt(), 130), (Interrupted(15), 143)])
def test_an_interrupted_conversion_says_so(tiny_folder, tmp_path, capfd, monkeypatch, stop, status):
    def interrupt(*_, **__):
        raise stop

    monkeypatch.setattr("linearize.jobs.convert.convert_into", interrupt)
    out = tmp_path / "out"
    assert run(["convert", str(tiny_folder), "-o", str(out), "-r", "window-gla"]) == status
    assert f"interrupted: {out} was not written; the same command begins anew" in capfd.readouterr().err
    assert not list(tmp_path.iterdir())


@pytest.mark.check
def test_a_vocabulary_of_a_few_tokens_and_a_gguf_file_are_converted(tmp_path):
    path = write_gguf(tmp_path / "m.gguf", tiny("llama", max_position_embeddings=2048))
    linearize.convert(path, tmp_path / "out")
    assert load_model(find_source(str(tmp_path / "out"))).config.mixers[0]["landmark_score"] == "learned"


def test_more_landmarks_than_the_context_has_tokens_are_refused(bytes_tokenizer, tmp_path, capsys):
    model = folder_of("llama", bytes_tokenizer, tmp_path / "model", 512)

    def told(*changes: str) -> str:
        options = [word for change in changes for word in ("--set", change)]
        assert run(["convert", str(model), "-o", str(tmp_path / "out"), *options]) == 1
        return capsys.readouterr().err

    even = "mixer.landmarks_by=null"
    assert "mixer.landmarks: 3,000,000,000 landmarks, and this model's context is 512 tokens: choose fewer" in told(
        "mixer.landmarks=3000000000", even
    )
    uneven = "mixer.landmark_layers={1: 513}"
    assert "mixer.landmark_layers.1: 513 landmarks, and this model's context is 512 tokens: choose fewer" in told(
        "mixer.landmarks=8", uneven, even
    )
    assert not (tmp_path / "out").exists()


def test_a_sliding_window_within_ours_leaves_nothing_to_convert(bytes_tokenizer, tmp_path):
    model = folder_of("mistral, sliding", bytes_tokenizer, tmp_path / "model")
    own = load_model(find_source(str(model))).config.sliding_window
    with pytest.raises(LinearizeError, match=f"recipe window-gla with mixer.window below {own}"):
        linearize.convert(model, tmp_path / "out")
    with pytest.raises(
        LinearizeError, match=f"mixer.window: {own} tokens .* so nothing would be converted: set it below {own}"
    ):
        linearize.convert(model, tmp_path / "out", "window-gla", overrides=[f"mixer.window={own}"])
    linearize.convert(model, tmp_path / "out", "window-gla", overrides=[f"mixer.window={own - 1}"])
