"""The claims of the README, on the real SmolLM2-135M-Instruct."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

import linearize
from linearize.checkpoint.sizes import state_nbytes
from linearize.cli.app import run
from linearize.conversion.swap import convert_model
from linearize.evaluation.tasks.recall import recall_tasks
from linearize.jobs.convert import convert_into
from linearize.model import LinearizedForCausalLM
from linearize.recipe import load_recipe
from linearize.sources.source import find_source, load_model
from tests.made import LANDMARKS

pytestmark = pytest.mark.real

# Sizes at which the real model takes seconds: rows of 48 tokens, windows of 8, one step of training.
SMALL = (
    "mixer.window=8", "stages.0.data.tokens=96", "stages.0.data.held_out=1", "stages.0.length=48",
    "stages.0.batch_tokens=96",
)  # fmt: skip
WINDOW, SINKS, ROW = 64, 4, 1024


def test_the_real_model_is_converted_verified_trained_and_scored(smollm2_path, tmp_path, monkeypatch):
    """`make test` runs this test of the real model, and no other."""
    monkeypatch.setenv("LINEARIZE_CACHE", str(tmp_path / "cache"))
    text = tmp_path / "text.txt"
    text.write_text("The history of the steam engine begins with a kettle, and with a boy who looked at it. " * 40)
    changes = [f"model={smollm2_path}", *SMALL, f"stages.0.data.source={text}"]
    linearize.convert(smollm2_path, tmp_path / "converted", "window-gla", overrides=changes)
    monkeypatch.setattr(
        "linearize.verification.checks._NEXT_1000", (64, 1, 35)
    )  # the memory of a long text is as large
    found = linearize.verify(tmp_path / "converted", tokens=28, steps=2)
    assert found.failed == [] and found.woken == 30, found
    result = linearize.finetune("window-gla", tmp_path / "tuned", model=tmp_path / "converted", overrides=changes)
    assert [stage["tokens"] for stage in result.stages] == [96]
    (task,) = linearize.evaluate(tmp_path / "tuned", tasks=["held_out"]).to_json()["tasks"][:1]
    assert set(task["systems"]) == {"teacher", "window_bytes", "no_recurrence", "model"}


@pytest.fixture(scope="module")
def teacher(smollm2_path: Path) -> PreTrainedModel:
    return load_model(find_source(str(smollm2_path)))


@pytest.fixture(scope="module")
def converted(smollm2_gguf: Path, tmp_path_factory: pytest.TempPathFactory) -> LinearizedForCausalLM:
    """Converted from the GGUF with the recipe window-gla, written, and loaded again."""
    folder = tmp_path_factory.mktemp("converted")
    convert_into(find_source(str(smollm2_gguf)), load_recipe("window-gla"), folder)
    return AutoModelForCausalLM.from_pretrained(folder).eval()


def awake(model: LinearizedForCausalLM) -> LinearizedForCausalLM:
    """The model with a recurrence that has a say, as after training."""
    for name, parameter in model.named_parameters():
        if name.endswith("mix_weight"):
            parameter.data.fill_(0.05)
    return model


def wikitext_rows(data_folder: Path, tokenizer, rows: int) -> Tensor:
    text = (data_folder / "wikitext2" / "wiki.test.raw").read_text(encoding="utf-8")
    return torch.tensor(tokenizer(text[: rows * ROW * 8]).input_ids[: rows * ROW]).view(rows, ROW)


@torch.inference_mode()
def perplexity(model: PreTrainedModel, rows: Tensor, mask: Tensor | None = None) -> float:
    losses = []
    for row in rows:
        logits = model(row[None], attention_mask=mask, use_cache=False).logits[0, :-1]
        losses.append(float(torch.nn.functional.cross_entropy(logits, row[1:])))
    return math.exp(sum(losses) / len(losses))


def check_perplexity(teacher: PreTrainedModel, converted: LinearizedForCausalLM, rows: Tensor) -> None:
    token = torch.arange(ROW)
    seen = (token <= token[:, None]) & ((token > token[:, None] - WINDOW) | (token < SINKS))
    expected = perplexity(teacher, rows, seen[None, None])
    assert perplexity(converted, rows) == pytest.approx(expected, rel=1e-3)
    assert expected > 1.2 * perplexity(teacher, rows)  # the mask matters, so the comparison says something


@pytest.mark.check
def test_perplexity_equals_the_masked_teachers(teacher, converted, smollm2_path, data_folder):
    tokenizer = AutoTokenizer.from_pretrained(smollm2_path)
    check_perplexity(teacher, converted, wikitext_rows(data_folder, tokenizer, 4))


@pytest.mark.slow
@pytest.mark.public
def test_perplexity_equals_the_masked_teachers_on_all_of_wikitext2(teacher, converted, smollm2_path, public_folder):
    tokenizer = AutoTokenizer.from_pretrained(smollm2_path)
    check_perplexity(teacher, converted, wikitext_rows(public_folder, tokenizer, 280))


@torch.inference_mode()
@pytest.mark.check
def test_a_window_over_everything_is_the_teacher(teacher, smollm2_path):
    model = convert_model(
        load_model(find_source(str(smollm2_path))), load_recipe("window-gla", ["mixer.window=300"]).mixer
    )
    ids = torch.randint(0, teacher.config.vocab_size, (2, 300), generator=torch.Generator().manual_seed(0))
    expected = teacher(ids, use_cache=False).logits
    error = (awake(model)(ids, use_cache=False).logits - expected).abs().max() / expected.abs().max()
    assert float(error) < 1e-4


@torch.inference_mode()
@pytest.mark.parametrize("batch", ["one", "padded"])
@pytest.mark.check
def test_512_greedy_tokens_equal_one_parallel_forward(converted, smollm2_path, batch):
    model, tokenizer = awake(converted), AutoTokenizer.from_pretrained(smollm2_path)
    prompts = ["The history of the steam engine begins", "Dear Sir, I am writing to you because of the noise that " * 4]
    rows = [tokenizer(prompt).input_ids for prompt in (prompts if batch == "padded" else prompts[:1])]
    width = max(map(len, rows))
    ids = torch.tensor([[0] * (width - len(row)) + row for row in rows])
    mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows])
    result = model.generate(
        ids,
        attention_mask=mask,
        do_sample=False,
        max_new_tokens=512,
        min_new_tokens=512,
        pad_token_id=0,
        output_logits=True,
        return_dict_in_generate=True,
    )
    stepped = torch.stack(result.logits, 1)
    suppressed = {model.generation_config.eos_token_id}
    for row, prompt in enumerate(rows):
        sequence = result.sequences[row, width - len(prompt) :]
        whole = model(sequence[None], use_cache=False).logits[0, len(prompt) - 1 : -1]
        error = (stepped[row] - whole).abs().max() / whole.abs().max()
        assert float(error) < 1e-4
        whole[:, list(suppressed)] = -math.inf  # min_new_tokens keeps generate from ending early
        assert torch.equal(whole.argmax(-1), sequence[len(prompt) :])


@torch.inference_mode()
@pytest.mark.check
def test_landmarks_find_a_needle_that_a_window_of_as_many_bytes_does_not(smollm2_path):
    tokenizer = AutoTokenizer.from_pretrained(smollm2_path)
    (task,) = recall_tasks(tokenizer, ["niah_single_1"], lengths=[ROW], depths=5, samples=1, seed=5)
    found, sizes = [], []
    for recipe, changes in ((LANDMARKS, []), ("window-gla", ["mixer.window=512", "mixer.recurrence=none"])):
        model = convert_model(load_model(find_source(str(smollm2_path))), load_recipe(recipe, changes).mixer).eval()
        found.append(task.score(model, tokenizer, [1], 1)[0].value)
        sizes.append([state_nbytes(model, dtype) for dtype in (torch.float32, torch.bfloat16)])
    assert found == [1.0, 0.0]
    assert all(landmarks <= window for landmarks, window in zip(*sizes, strict=True))


@pytest.mark.parametrize("share", [0.5, 0.999, 0.001])
@pytest.mark.check
def test_a_gguf_that_is_cut_off_is_told_in_one_line(smollm2_gguf, tmp_path, capfd, share):
    cut = tmp_path / "cut.gguf"
    cut.write_bytes(smollm2_gguf.read_bytes()[: int(share * smollm2_gguf.stat().st_size)])
    assert run(["convert", str(cut), "-o", str(tmp_path / "out")]) == 1
    error = capfd.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("error: ") and "cut off" in error
    assert sorted(path.name for path in tmp_path.iterdir()) == ["cut.gguf"]
