"""Shared prefixes against reading every continuation by itself."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from linearize.evaluation.tasks import hidden, prefix
from linearize.evaluation.tasks.loading import lm_eval_tasks
from linearize.evaluation.tasks.prefix import Query, common_length, log_likelihoods, plan
from linearize.model import LinearizedForCausalLM, MixerConfig

from . import data_folder, tiny_model_folder

VOCABULARY = 61
MAX_LENGTH = 128


def teacher(model_type: str, **more: Any) -> Any:
    torch.manual_seed(1)
    sizes = {
        "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": MAX_LENGTH, "n_positions": MAX_LENGTH,
        "initializer_range": 0.3, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "vocab_size": VOCABULARY,
    }  # fmt: skip
    known = CONFIG_MAPPING[model_type]()
    chosen = {name: value for name, value in {**sizes, **more}.items() if hasattr(known, name)}
    return AutoModelForCausalLM.from_config(CONFIG_MAPPING[model_type](**chosen)).eval()


def converted(**options: Any) -> Any:
    model = LinearizedForCausalLM.from_teacher(
        teacher("llama"), [MixerConfig(layers=[0], window=7, sinks=2, **options), MixerConfig(layers=[1], window=5)]
    )
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "mix_weight" in name:
                parameter.fill_(0.4)
    return model


MODELS = {
    "llama": lambda: teacher("llama"),
    "gpt2": lambda: teacher("gpt2", n_embd=32, n_layer=2, n_head=4),
    "mistral, window 9": lambda: teacher("mistral", sliding_window=9),
    "gemma3, window 9": lambda: teacher(
        "gemma3_text", sliding_window=9, layer_types=["sliding_attention", "full_attention"]
    ),
    "converted": converted,
    "converted, a head kept": lambda: converted(softmax_heads=[1]),
    "converted, covers all": lambda: converted(covers="all", mix="fixed"),
}  # fmt: skip


def questions(seed: int) -> list[Query]:
    """Two few-shot beginnings with questions of several choices, and texts that share nothing."""
    draw = random.Random(seed)  # noqa: S311

    def tokens(count: int) -> tuple[int, ...]:
        return tuple(draw.randrange(3, VOCABULARY) for _ in range(count))

    pairs = []
    for shots in (70, 66):
        beginning = tokens(shots)
        for _ in range(3):
            context = beginning + tokens(draw.randint(1, 20))
            pairs += [(context, tokens(1)) for _ in range(4)]
        pairs.append((beginning, tokens(3)))
    for _ in range(5):
        context = tokens(draw.randint(1, 30))
        pairs += [(context, tokens(draw.randint(1, 9))) for _ in range(draw.randint(1, 4))]
    draw.shuffle(pairs)
    return [Query((context + targets)[:-1], targets) for context, targets in pairs]


def one_by_one(model: Any, queries: list[Query]) -> list[tuple[float, bool]]:
    answers = []
    for query in queries:
        logits = model(input_ids=torch.tensor([query.tokens])).logits[0, -len(query.targets) :]
        wanted = torch.tensor(query.targets)
        nats = logits.double().log_softmax(-1).gather(1, wanted[:, None]).sum()
        answers.append((float(nats), bool((logits.argmax(-1) == wanted).all())))
    return answers


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("batch_size", [1, 3, 16])
@torch.inference_mode()
def test_shared_equals_one_by_one(name: str, batch_size: int) -> None:
    model, queries = MODELS[name](), questions(5)
    found = log_likelihoods(model, queries, batch_size=batch_size, max_length=MAX_LENGTH)
    for (nats, greedy), (expected, is_greedy) in zip(found, one_by_one(model, queries), strict=True):
        assert nats == pytest.approx(expected, rel=2e-5)
        assert greedy == is_greedy


@torch.inference_mode()
def test_few_tokens_and_few_logits_at_one_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hidden, "TOKENS", 24)
    monkeypatch.setattr(hidden, "_SHORTEST", 5)
    monkeypatch.setattr(hidden, "LOGITS", 3 * VOCABULARY)
    draw = random.Random(1)  # noqa: S311
    texts = [tuple(draw.randrange(3, VOCABULARY) for _ in range(length)) for length in (100, 40, 12, 11, 10, 5, 4)]
    queries = [Query(text[:-1], text[1:]) for text in texts] + questions(3)
    for name in ("llama", "mistral, window 9", "converted"):
        model, read, made = MODELS[name](), list[int](), list[int]()
        model.model.embed_tokens.register_forward_hook(lambda _, __, out, to=read: to.append(out[..., 0].numel()))
        model.lm_head.register_forward_hook(lambda _, __, logits, to=made: to.append(logits[..., 0].numel()))
        found = log_likelihoods(model, queries, batch_size=4, max_length=MAX_LENGTH)
        assert max(read) <= 24 and max(made) <= 4
        for (nats, greedy), (expected, is_greedy) in zip(found, one_by_one(model, queries), strict=True):
            assert nats == pytest.approx(expected, rel=2e-5)
            assert greedy == is_greedy


def test_the_plan_reads_what_is_shared_once() -> None:
    queries = questions(5)
    groups = plan(queries)
    assert sorted(number for group in groups for members in group.rests.values() for number in members) == list(
        range(len(queries))
    )
    for group in groups:
        for rest, members in group.rests.items():
            assert all(queries[number].tokens == group.prefix + rest for number in members)
            assert all(len(queries[number].targets) <= len(rest) + len(group.prefix) for number in members)
    assert {66, 70} <= {len(group.prefix) for group in groups}
    read = sum(group.cost for group in groups)
    assert read < sum(len(query.tokens) for query in queries) / 3


def test_a_single_continuation_takes_one_pass() -> None:
    (group,) = plan([Query((5, 6, 7, 8), (7, 8, 9))])
    assert group.prefix == (5, 6, 7, 8)
    assert list(group.rests) == [()]


def test_common_length() -> None:
    assert common_length([(1, 2, 3), (1, 2), (1, 2, 9)]) == 2
    assert common_length([(1, 2, 3), (0, 2, 3)]) == 0
    assert common_length([(4, 5)]) == 2


@torch.inference_mode()
def test_a_cache_that_cannot_be_copied_shares_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prefix, "_COPYABLE", ())
    model, queries = teacher("llama"), questions(5)
    found = log_likelihoods(model, queries, batch_size=4, max_length=MAX_LENGTH)
    for (nats, greedy), (expected, is_greedy) in zip(found, one_by_one(model, queries), strict=True):
        assert nats == pytest.approx(expected, rel=2e-5)
        assert greedy == is_greedy


@pytest.mark.parametrize("copyable", [True, False])
@torch.inference_mode()
def test_tasks_have_the_answers_of_the_plain_way(copyable: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if not copyable:
        monkeypatch.setattr(prefix, "_COPYABLE", ())
    model = AutoModelForCausalLM.from_pretrained(tiny_model_folder()).eval()
    tokenizer = AutoTokenizer.from_pretrained(tiny_model_folder())
    names = ["hellaswag", "winogrande", "lambada", "mmlu"]
    shared, plain = (lm_eval_tasks(names, data_folder(), plain=way) for way in (False, True))
    for ours, theirs in zip(shared, plain, strict=True):
        indices = [*range(6), 40]
        for a, b in zip(
            ours.answers(model, tokenizer, indices, 4), theirs.answers(model, tokenizer, indices, 4), strict=True
        ):
            assert a.arguments == b.arguments
            for (nats, greedy), (expected, is_greedy) in zip(a.responses, b.responses, strict=True):
                assert nats == pytest.approx(expected, rel=2e-5)
                assert greedy == is_greedy
            assert a.metrics[ours.metric] == b.metrics[ours.metric]


@torch.inference_mode()
def test_a_token_that_spans_context_and_continuation() -> None:
    # The tokenizer has tokens of several words, so that the last word alone may take no token of its own, which it does
    # in every tenth text.
    model = AutoModelForCausalLM.from_pretrained(tiny_model_folder()).eval()
    tokenizer = AutoTokenizer.from_pretrained(tiny_model_folder())
    (task,) = lm_eval_tasks(["lambada"], data_folder())
    spanned = 0
    for answer in task.answers(model, tokenizer, range(60), 1):
        (context, continuation) = answer.arguments[0]
        if len(tokenizer.encode(context + continuation)) <= len(tokenizer.encode(context)):
            spanned += 1
            assert answer.responses[0][0] < -1
    assert spanned
