"""Held-out scores against plain float64 arithmetic, and what packing must not change."""

from __future__ import annotations

import json
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.nn.functional import log_softmax
from transformers import AutoTokenizer, FalconConfig, FalconForCausalLM, LlamaConfig, LlamaForCausalLM, PreTrainedModel

from linearize.errors import DataError, ModelError
from linearize.evaluation import heldout
from linearize.evaluation.heldout import HeldOut, paired_difference, row_scores, score_rows
from linearize.evaluation.results.results import SystemScores
from linearize.evaluation.runner import run
from linearize.evaluation.store import Store
from linearize.evaluation.tasks import hidden
from linearize.evaluation.tasks.task import draw

from . import tiny_model_folder


def random_model(seed: int, vocab_size: int = 97) -> PreTrainedModel:
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=vocab_size,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        initializer_range=0.3,
    )
    return LlamaForCausalLM(config).train()


@pytest.fixture
def rows() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    input_ids = torch.randint(0, 97, (5, 63), generator=generator)
    labels = input_ids.masked_fill(torch.rand(5, 63, generator=generator) < 0.3, heldout.IGNORE)
    return {"input_ids": input_ids, "labels": labels}


def test_scores_equal_plain_arithmetic(rows: dict[str, torch.Tensor], monkeypatch: pytest.MonkeyPatch) -> None:
    model, teacher = random_model(0), random_model(1)
    monkeypatch.setattr(hidden, "LOGITS", 37 * 97)  # so that slices end inside rows
    scores = score_rows(model, rows, teacher=teacher, batch_size=2)
    assert model.training
    assert teacher.training
    assert scores.kl is not None
    assert scores.agreement is not None

    model.eval(), teacher.eval()
    total = 0.0
    with torch.no_grad():
        for row, (ids, labels) in enumerate(zip(rows["input_ids"], rows["labels"], strict=True)):
            log_q = log_softmax(model(ids[None]).logits[0].double(), -1)
            log_p = log_softmax(teacher(ids[None]).logits[0].double(), -1)
            counted = [step for step in range(62) if labels[step + 1] != heldout.IGNORE]
            losses = [-log_q[step, labels[step + 1]].item() for step in counted]
            divergences = [(log_p[step].exp() * (log_p[step] - log_q[step])).sum().item() for step in counted]
            equal = [float(log_p[step].argmax() == log_q[step].argmax()) for step in counted]
            assert scores.tokens[row] == len(counted)
            assert scores.loss[row].item() == pytest.approx(sum(losses) / len(counted), rel=1e-6)
            assert scores.kl[row].item() == pytest.approx(sum(divergences) / len(counted), rel=1e-5)
            assert scores.agreement[row].item() == pytest.approx(sum(equal) / len(counted))
            total += sum(losses)
    assert scores.perplexity == pytest.approx(math.exp(total / int(scores.tokens.sum())), rel=1e-6)


def test_a_model_beside_itself(rows: dict[str, torch.Tensor]) -> None:
    model = random_model(0)
    scores = score_rows(model, rows, teacher=model)
    assert scores.kl is not None
    assert scores.kl.abs().max() == 0
    assert scores.agreement is not None
    assert scores.agreement.min() == 1
    assert scores.mean_kl == (0.0, 0.0)


def test_without_a_teacher(rows: dict[str, torch.Tensor]) -> None:
    scores = score_rows(random_model(0), SimpleNamespace(**rows, position_ids=None))
    assert scores.kl is None
    assert scores.agreement is None
    assert scores.mean_kl is None
    assert torch.equal(scores.loss, score_rows(random_model(0), rows).loss)


def random_falcon() -> FalconForCausalLM:
    """Of an architecture that does not tell documents apart by their positions."""
    torch.manual_seed(0)
    config = FalconConfig(vocab_size=2000, hidden_size=32, num_hidden_layers=2, num_attention_heads=4)
    return FalconForCausalLM(config).eval()


def test_rows_are_a_task_whose_results_are_kept(rows: dict[str, torch.Tensor], tmp_path: Path) -> None:
    model, teacher, tokenizer = random_model(0), random_model(1), AutoTokenizer.from_pretrained(tiny_model_folder())
    task = HeldOut(rows, teacher)

    def scored(**options: Any) -> heldout.RowScores:
        return row_scores(run({"it": lambda: model}, [task], tokenizer, store=Store(tmp_path), **options)["it"])

    few, whole = scored(limit=2), score_rows(model, rows, teacher=teacher)
    chosen = draw("held_out", 5, 2, 0)
    assert torch.equal(few.tokens, whole.tokens[chosen])
    assert (few.drawn, few.total, few.seed) == (chosen, 5, 0)
    for one in SystemScores(rows=few).all_tasks():
        assert [tag["item"] for tag in one.tags] == chosen and (one.total, one.seed) == (5, 0)
    assert scored().drawn is None and scored().seed is None
    found = scored()
    for name in ("loss", "kl", "agreement", "tokens"):
        assert torch.allclose(getattr(found, name), getattr(whole, name), rtol=1e-6)
        assert torch.equal(getattr(found, name)[chosen], getattr(few, name))
    lines = [json.loads(line) for path in tmp_path.rglob("*.jsonl") for line in path.read_text().splitlines() if line]
    assert sorted(line["item"] for line in lines if "item" in line) == list(range(5))  # two of them from the first call
    assert task.digest != HeldOut(rows, None).digest
    alone = run({"it": lambda: model}, [HeldOut(rows, None)], tokenizer)["it"]
    assert row_scores(alone).kl is None and torch.allclose(row_scores(alone).loss, whole.loss)


@pytest.mark.parametrize("falcon", [False, True])
def test_packed_rows_equal_separate_rows(falcon: bool) -> None:
    model = random_falcon() if falcon else LlamaForCausalLM.from_pretrained(tiny_model_folder(), dtype=torch.float32)
    if falcon:
        for parameter in model.parameters():  # attention that tells
            parameter.data.mul_(10 if parameter.dim() > 1 else 1)
    generator = torch.Generator().manual_seed(5)
    documents = [torch.randint(3, 1000, (length,), generator=generator) for length in (40, 17, 71)]
    packed = torch.cat(documents)[None]
    positions = torch.cat([torch.arange(len(document)) for document in documents])[None]
    together = score_rows(model, {"input_ids": packed, "labels": packed, "position_ids": positions})
    alone = [score_rows(model, {"input_ids": d[None], "labels": d[None]}) for d in documents]
    tokens = torch.cat([scores.tokens for scores in alone])
    loss = torch.cat([scores.loss for scores in alone])
    assert together.tokens.tolist() == [int(tokens.sum())] == [40 + 17 + 71 - 3]
    assert together.perplexity == pytest.approx(math.exp(float((loss * tokens).sum() / tokens.sum())), rel=1e-5)
    # Without the position ids the documents would see each other.
    mixed = score_rows(model, {"input_ids": packed, "labels": packed})
    assert mixed.perplexity != pytest.approx(together.perplexity, rel=1e-3)


def test_the_scores_can_be_used_in_training_code(rows: dict[str, torch.Tensor]) -> None:
    scores = score_rows(random_model(0), rows)
    weight = torch.ones(5, dtype=torch.float64, requires_grad=True)
    (weight * scores.loss).sum().backward()
    assert weight.grad is not None


def test_paired_difference(rows: dict[str, torch.Tensor]) -> None:
    teacher = random_model(2)
    a, b = (score_rows(random_model(seed), rows, teacher=teacher) for seed in (0, 1))
    difference = paired_difference(a, b)
    expected = a.loss - b.loss
    assert difference.loss.mean == pytest.approx(a.mean_loss.mean - b.mean_loss.mean)
    assert difference.loss.stderr == pytest.approx(expected.std().item() / math.sqrt(5))
    assert difference.kl is not None
    assert paired_difference(a, score_rows(teacher, rows)).kl is None
    assert paired_difference(a, a) == ((0.0, 0.0), (0.0, 0.0))
    fewer = {name: column[:4] for name, column in rows.items()}
    with pytest.raises(DataError, match="different rows"):
        paired_difference(a, score_rows(teacher, fewer))


def test_one_row_has_no_standard_error(rows: dict[str, torch.Tensor]) -> None:
    one = {name: column[:1] for name, column in rows.items()}
    assert score_rows(random_model(0), one).mean_loss.stderr is None


@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
@pytest.mark.parametrize("whose", ["model", "teacher"])
def test_logits_that_are_not_finite(rows: dict[str, torch.Tensor], poison: float, whose: str) -> None:
    models = {"model": random_model(0), "teacher": random_model(1)}
    with torch.no_grad():
        models[whose].lm_head.weight[5] = poison
    with pytest.raises(ModelError, match=f"the {whose} gives logits that are not finite"):
        score_rows(models["model"], rows, teacher=models["teacher"])


def test_vocabularies_of_different_size(rows: dict[str, torch.Tensor]) -> None:
    with pytest.raises(ModelError, match="97 entries and the teacher's 101"):
        score_rows(random_model(0), rows, teacher=random_model(1, vocab_size=101))


def test_rows_without_anything_to_count(rows: dict[str, torch.Tensor]) -> None:
    rows["labels"][3, 1:] = heldout.IGNORE
    with pytest.raises(DataError, match="row 3 has no position"):
        score_rows(random_model(0), rows)
    with pytest.raises(DataError, match="no rows"):
        score_rows(random_model(0), {name: column[:0] for name, column in rows.items()})
