"""Loss by position against one forward pass, its buckets, and texts that do not fit."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn.functional import cross_entropy
from transformers import GPT2Config, GPT2LMHeadModel

from linearize.conversion.swap import convert_model
from linearize.errors import DataError, ModelError
from linearize.evaluation.baselines import silence
from linearize.evaluation.tasks import hidden
from linearize.evaluation.tasks.excerpts import BOOK, book_rows
from linearize.evaluation.tasks.length import bucket_edges, length_tasks
from linearize.recipe import MixerSpec

NAMES = ["loss_by_position", "loss_rise"]
TOKENS = 200


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder: Path = tmp_path_factory.mktemp("data")
    paragraphs = [
        "\n".join(f"In chapter {number} a man named Tom saw bird {number * line} and went home." for line in range(6))
        for number in range(60)
    ]
    (folder / BOOK).parent.mkdir()
    text = "A licence.\n\n*** START OF THIS BOOK ***\n\nCHAPTER I\n\n" + "\n\n".join(paragraphs)
    (folder / BOOK).write_text(f"{text}\n\n*** END OF THIS BOOK ***\n\nA licence.", encoding="utf-8")
    return folder


def build(tokenizer: Any, data: Path, **options: Any) -> list[Any]:
    return length_tasks(tokenizer, NAMES, data=data, **{"length": TOKENS, "documents": 3, **options})


def test_pieces_equal_one_forward_pass(tokenizer: Any, data: Path, tiny: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hidden, "TOKENS", 1)
    monkeypatch.setattr(hidden, "_SHORTEST", 33)
    for model in (tiny, convert_model(copy.deepcopy(tiny), MixerSpec(window=8)).eval()):
        by_position, rise = build(tokenizer, data)
        items, rises = (task.score(model, tokenizer, [2, 0], 4) for task in (by_position, rise))
        for row, item, late in zip((2, 0), items, rises, strict=True):
            ids = torch.tensor(by_position.texts.rows[row])
            assert len(ids) == TOKENS + 1
            with torch.no_grad():
                nats = cross_entropy(model(ids[None, :-1]).logits[0], ids[1:], reduction="none").double()
            curve = [nats[:64].mean(), nats[64:128].mean(), nats[128:].mean()]
            assert item.value == pytest.approx(float(nats.mean()), rel=1e-5)
            assert item.curve == pytest.approx([float(value) for value in curve], rel=1e-4)
            assert late.value == pytest.approx(float(nats[175:].mean() - nats[12:25].mean()), abs=1e-4)
            counts = [64, 64, 72]
            weighted = sum(count * value for count, value in zip(counts, item.curve, strict=True)) / TOKENS
            assert item.value == pytest.approx(weighted, rel=1e-9)
        assert list(by_position.axis) == [64, 128, TOKENS]


def test_buckets() -> None:
    assert bucket_edges(8192) == [64, 128, 256, 512, 1024, 2048, 4096, 8192]
    assert bucket_edges(100) == [64, 100]
    assert bucket_edges(64) == [64]
    assert bucket_edges(65) == [64, 65]


def test_each_text_is_read_once_per_model(tokenizer: Any, data: Path, tiny: Any) -> None:
    model, calls = copy.deepcopy(tiny), []
    model.get_input_embeddings().register_forward_hook(lambda *_: calls.append(1))
    tasks = build(tokenizer, data)
    for task in tasks:
        task.score(model, tokenizer, [0, 1, 2], 1)
    assert len(calls) == 3
    before = tasks[0].score(model, tokenizer, [0], 1)
    with torch.no_grad():
        model.lm_head.weight.mul_(2.0)
    assert tasks[0].score(model, tokenizer, [0], 1) != before


def test_a_branch_that_is_off_makes_another_model(tokenizer: Any, data: Path, tiny: Any) -> None:
    """Of the same weights, and loaded one after the other by an evaluation with `--baseline no_recurrence`."""
    model = convert_model(copy.deepcopy(tiny), MixerSpec(window=16))
    for attention in model.attention_layers:
        torch.nn.init.constant_(attention.mixer.mix_weight, 0.5)  # type: ignore[union-attr]
    task = build(tokenizer, data)[0]
    whole = task.score(model, tokenizer, [0], 1)
    assert task.score(silence(model, ["recurrence"]), tokenizer, [0], 1) != whole
    assert task.score(silence(model, []), tokenizer, [0], 1) == whole


def test_texts_and_digests(tokenizer: Any, data: Path) -> None:
    first = build(tokenizer, data)
    assert [task.digest for task in first] == [task.digest for task in build(tokenizer, data)]
    assert first[0].digest != first[1].digest
    for options in ({"length": 150}, {"documents": 2}, {"seed": 1}):
        assert first[0].digest != build(tokenizer, data, **options)[0].digest
    texts = [tokenizer.decode(row, skip_special_tokens=True) for row in first[0].texts.rows]
    assert all(text.strip().startswith("In chapter") for text in texts)
    assert not any("licence" in text for text in texts)
    assert book_rows(tokenizer, data, rows=3, tokens=TOKENS + 1, seed=0) == first[0].texts.rows


def test_a_model_that_has_learned_fewer_positions(tokenizer: Any, data: Path, tiny: Any) -> None:
    config = GPT2Config(vocab_size=tiny.config.vocab_size, n_positions=128, n_embd=16, n_layer=1, n_head=2)
    task = build(tokenizer, data)[0]
    with pytest.warns(UserWarning, match="learned 128 positions"):
        item = task.score(GPT2LMHeadModel(config).eval(), tokenizer, [0], 1)[0]
    assert len(item.curve) == 2
    assert item.value == pytest.approx(sum(item.curve) / 2)


def test_what_memory_does_not_hold(tokenizer: Any, data: Path, tiny: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hidden, "TOKENS", 1)
    model = copy.deepcopy(tiny)
    forward = model.forward
    for error, fits in ((MemoryError(), 128), (RuntimeError("DefaultCPUAllocator: can't allocate memory"), 0)):
        reads: list[int] = []

        def limited(*, reads: list[int] = reads, fits: int = fits, error: Exception = error, **inputs: Any) -> Any:
            if inputs["input_ids"].shape[1] == 1:  # the logits of what was read
                return forward(**inputs)
            if len(reads) * 64 >= fits:
                raise error
            reads.append(1)
            return forward(**inputs)

        monkeypatch.setattr(model, "forward", limited)
        advice = "128 fit: choose a length up to that" if fits else "choose a shorter one"
        with pytest.raises(ModelError, match=f"^task loss_rise: memory does not hold a text of 200 tokens; {advice}$"):
            build(tokenizer, data)[1].score(model, tokenizer, [0], 1)
    monkeypatch.setattr(model, "forward", lambda **_: (_ for _ in ()).throw(RuntimeError("a bug")))
    with pytest.raises(RuntimeError, match="a bug"):
        build(tokenizer, data)[0].score(model, tokenizer, [0], 1)


def test_a_loss_that_is_not_finite(tokenizer: Any, data: Path, tiny: Any) -> None:
    model = copy.deepcopy(tiny)

    def spoil(_: Any, __: Any, output: Any) -> None:
        output.logits[:, 70:] = torch.nan

    model.register_forward_hook(spoil)
    with pytest.raises(ModelError, match=r"^task loss_by_position, item 2: .* after 71 tokens is not finite"):
        build(tokenizer, data)[0].score(model, tokenizer, [1], 1)


def test_what_a_user_can_get_wrong(tokenizer: Any, data: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="did you mean loss_rise"):
        length_tasks(tokenizer, ["loss_rises"], data=data)
    with pytest.raises(DataError, match="length is 10"):
        build(tokenizer, data, length=10)
    with pytest.raises(DataError, match="documents is 0"):
        build(tokenizer, data, documents=0)
    with pytest.raises(DataError, match="too short for 3 rows of 100,001 tokens"):
        build(tokenizer, data, length=100_000)
    with pytest.raises(DataError, match=r"cannot be read from .*pg2600"):
        build(tokenizer, tmp_path)
    with pytest.raises(DataError, match="--data DIR"):
        length_tasks(tokenizer, NAMES, data=None)
