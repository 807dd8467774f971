"""Fingerprints: every bit of every tensor counts, hashing happens once, and every cache is keyed by them."""

from __future__ import annotations

import copy
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from linearize.data.rows import Rows
from linearize.data.selftext import self_written_documents
from linearize.evaluation.store import model_key
from linearize.evaluation.tasks.reading import Kept
from linearize.sources import fingerprint as module
from linearize.sources.fingerprint import fingerprint, tokenizer_fingerprint
from linearize.training.teachers import keep_logits
from tests.conftest import random_llama


@pytest.fixture(autouse=True)
def _cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LINEARIZE_CACHE", str(tmp_path / "cache"))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return random_llama(tmp_path_factory.mktemp("tiny"))


@pytest.fixture
def model(folder: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder).eval()


@pytest.fixture
def tokenizer(folder: Path) -> Any:
    return AutoTokenizer.from_pretrained(folder)


@pytest.fixture
def hashed(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, ...]]:
    """The shapes of the tensors that are hashed."""
    shapes: list[tuple[int, ...]] = []
    digest = module.digest_of

    def noted(tensor: torch.Tensor) -> bytes:
        shapes.append(tuple(tensor.shape))
        return digest(tensor)

    monkeypatch.setattr(module, "digest_of", noted)
    return shapes


@torch.no_grad()
def replace_a_row(model: Any) -> None:
    """Puts one embedding row in the place of another, at a token that no even sample of 1,024 values touches."""
    embedding = model.get_input_embeddings().weight
    embedding[101, 1:4] = embedding[7, 1:4]


@torch.no_grad()
def swap_rows(model: Any) -> None:
    """Leaves the sum of all bits as it is."""
    embedding = model.get_input_embeddings().weight
    embedding[[101, 7]] = embedding[[7, 101]]


CHANGES = [replace_a_row, swap_rows]


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_changed_row_is_another_model(model, change, dtype):
    model = model.to(dtype)
    before = fingerprint(model)
    other = copy.deepcopy(model)
    assert fingerprint(other) == before
    change(model)
    for changed in (model, copy.deepcopy(model)):  # hashed before, and for the first time
        found = fingerprint(changed)
        assert {name for name in before if found[name] != before[name]} == {"weights"}
    assert fingerprint(other) == before


def test_every_bit_counts(model):
    found = {fingerprint(model)["weights"]}
    generator = torch.Generator().manual_seed(0)
    tensors = model.state_dict()
    for tensor in tensors.values():
        octets = tensor.view(torch.uint8).flatten()
        octets[int(torch.randint(len(octets), (), generator=generator))] ^= 1
        found.add(fingerprint(model)["weights"])
    different = {tensor.data_ptr() for tensor in tensors.values()}
    assert len(found) == 1 + len(different)


def test_names_and_shapes_count(model):
    before = fingerprint(model)["weights"]
    first, second = model.model.layers
    first.self_attn.k_proj.weight, first.self_attn.v_proj.weight = (
        first.self_attn.v_proj.weight,
        first.self_attn.k_proj.weight,
    )
    swapped = fingerprint(model)["weights"]
    second.mlp.down_proj.weight = torch.nn.Parameter(second.mlp.down_proj.weight.view(48, 192))
    assert len({before, swapped, fingerprint(model)["weights"]}) == 3


def test_tensors_are_hashed_once_and_again_when_they_change(model, hashed):
    first = fingerprint(model)
    tensors = {tensor.data_ptr(): tensor for tensor in model.state_dict().values()}
    assert len(hashed) == len(tensors)
    hashed.clear()
    assert fingerprint(model) == first and hashed == []
    weight = model.model.layers[0].mlp.down_proj.weight
    found = {first["weights"]}
    optimizer = torch.optim.AdamW([weight], lr=0.1, fused=True)  # which leaves the tensor's version as it was
    weight.grad = torch.ones_like(weight)
    changes = [
        optimizer.step,
        lambda: weight.data.add_(1.0),
        lambda: weight.data.copy_(weight.data.flip(0)),  # whose sum stays
        lambda: setattr(weight, "data", weight.data * 2),
        lambda: replace_a_row(model),
    ]
    for change in changes:
        change()
        found.add(fingerprint(model)["weights"])
        assert len(hashed) == 1, change
        hashed.clear()
    assert len(found) == 1 + len(changes)


def test_a_model_of_inference_tensors(folder):
    with torch.inference_mode():
        model = AutoModelForCausalLM.from_pretrained(folder)
        before = fingerprint(model)
        replace_a_row(model)
        assert fingerprint(model)["weights"] != before["weights"]


@pytest.mark.parametrize("change", CHANGES)
def test_caches_are_of_one_model(model, tokenizer, change):
    """Self-written text, teacher logits, kept results, and texts that tasks share."""
    ids = torch.arange(1, 65).view(2, 32)
    rows = Rows(ids, ids.clone(), torch.arange(32).repeat(2, 1))
    kept, made = Kept(), list[int]()

    def use() -> tuple[int, int, str]:
        self_written_documents(model, tokenizer, tokens=40, seed=0, sample_length=16, batch_size=4)
        keep_logits(model, rows, top_k=2, temperature=1.0, batch=2, progress=lambda _: None)
        kept.get(model, [0, 1], 2, lambda batch: [made.append(item) or torch.zeros(1) for item in batch])
        cache = Path(os.environ["LINEARIZE_CACHE"])
        texts, logits = (len(list((cache / name).iterdir())) for name in ("self-text", "teacher-logits"))
        return texts, logits, model_key(model, tokenizer)

    first = use()
    assert first[:2] == (1, 1) and use() == first and made == [0, 1]
    change(model)
    second = use()
    assert second[:2] == (2, 2) and second[2] != first[2] and made == [0, 1, 0, 1]


def test_text_depends_on_where_the_teacher_ends_it(model, tokenizer):
    settings = {"tokens": 200, "seed": 0, "sample_length": 32, "batch_size": 4}
    before = self_written_documents(model, tokenizer, **settings)
    model.generation_config.eos_token_id = [0, before[0][2]]
    assert self_written_documents(model, tokenizer, **settings) != before


def test_rules_of_a_tokenizer_count(tokenizer):
    from tokenizers import normalizers

    before = tokenizer_fingerprint(tokenizer)
    tokenizer(["a", "longer"], padding=False, truncation=True, max_length=3)
    assert tokenizer_fingerprint(tokenizer) == before
    tokenizer.backend_tokenizer.normalizer = normalizers.Lowercase()
    rules = tokenizer_fingerprint(tokenizer)
    tokenizer.chat_template = "{{ messages[0].content }}"
    assert len({before, rules, tokenizer_fingerprint(tokenizer)}) == 3
