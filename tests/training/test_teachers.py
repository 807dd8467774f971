"""A teacher whose logits are on disk, or whose weights are not on the device."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from transformers import AutoModelForCausalLM

from linearize.data.rows import Document, pack
from linearize.errors import OutputError
from linearize.sources.documents import documents_apart
from linearize.training import teachers
from linearize.training.objective import counted, token_losses, top_k_of
from linearize.training.teachers import keep_logits, offloaded
from tests.model import test_families as families


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("LINEARIZE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(teachers, "_SHARD_ROWS", 4)
    return tmp_path / "cache"


@pytest.fixture
def teacher(tiny_folder):
    return AutoModelForCausalLM.from_pretrained(tiny_folder).eval().requires_grad_(False)


@pytest.fixture
def rows():
    generator = torch.Generator().manual_seed(0)
    documents = []
    for _ in range(30):
        ids = torch.randint(5, 97, (int(torch.randint(3, 30, (1,), generator=generator)),), generator=generator)
        documents.append(Document(ids.tolist(), (torch.rand(len(ids), generator=generator) < 0.7).tolist()))
    return pack(documents, 32)[:10]


def keep(teacher, rows, **options):
    said = []
    settings = {"top_k": 6, "temperature": 2.0, "batch": 3, **options}
    return keep_logits(teacher, rows, progress=said.append, **settings), said


def test_what_is_kept_is_what_the_teacher_says(teacher, rows):
    kept, _ = keep(teacher, rows)
    for chosen in ([0], [9, 3, 4], [7, 8]):
        part = rows[torch.tensor(chosen)]
        logits = teacher(input_ids=part.input_ids, position_ids=part.position_ids, use_cache=False).logits
        at = counted(part.labels)
        expected = top_k_of(logits[at.rows, at.columns], 6, 2.0)
        found = kept.of(torch.tensor(chosen), torch.device("cpu"))
        assert torch.equal(found.tokens, expected.tokens)
        torch.testing.assert_close(found.log.float(), expected.log, rtol=2**-10, atol=1e-6)
        student = torch.randn(len(at.targets), logits.shape[-1], generator=torch.Generator().manual_seed(1))
        losses = [token_losses(student, at.targets, top, {"distill": 1.0}, 2.0) for top in (expected, found)]
        torch.testing.assert_close(*losses, rtol=1e-3, atol=0)


def test_only_what_is_missing_is_written(teacher, rows, cache):
    _, said = keep(teacher, rows)
    shards = sorted((cache / "teacher-logits").glob("*/*.safetensors"))
    assert [shard.name for shard in shards] == [f"00000{n}.safetensors" for n in range(3)]
    assert "shard 3 of 3" in said[-1]
    before = shards[1].read_bytes()
    shards[1].unlink()  # as an interrupted run leaves it
    _, said = keep(teacher, rows)
    assert "shard 1 of 1" in said[-1] and shards[1].read_bytes() == before
    _, said = keep(teacher, rows)
    assert said == [f"teacher: top 6 of {int((rows.labels[:, 1:] != -100).sum())} tokens, written before"]
    with torch.no_grad():
        teacher.lm_head.weight.mul_(1.01)
    for changed in ({}, {"top_k": 5}, {"temperature": 1.0}):
        _, said = keep(teacher, rows, **changed)
        assert "shard 3 of 3" in said[-1]
    assert not list(cache.rglob("*.partial-*"))


def test_a_full_disk_is_told_before_anything_is_written(teacher, rows, cache, monkeypatch):
    monkeypatch.setattr(teachers.shutil, "disk_usage", lambda _: SimpleNamespace(free=10))
    with pytest.raises(OutputError, match=r"do not fit into 0\.0 GB; lower top_k"):
        keep(teacher, rows)
    assert not list(cache.rglob("*.safetensors"))


@pytest.mark.parametrize("row", ["llama, biases", "falcon, grouped", "falcon, multi-head", "gemma2", "gpt2", "mixtral"])
def test_documents_in_a_row_do_not_see_each_other(row):
    model = families.build(row)
    ids = torch.randint(2, 97, (2, 24), generator=torch.Generator().manual_seed(0))
    positions = torch.tensor([[*range(9), *range(15)], [*range(24)]])
    apart = documents_apart(model, positions)
    assert bool(apart) == ("falcon" in row)
    with torch.no_grad():
        packed = model(ids, position_ids=positions, use_cache=False, **apart).logits
        alone = model(ids[:1, 9:], use_cache=False).logits
        whole = model(ids[1:], use_cache=False).logits
    torch.testing.assert_close(packed[:1, 9:], alone, rtol=0, atol=1e-4)
    torch.testing.assert_close(packed[1:], whole, rtol=0, atol=1e-4)


def test_an_offloaded_teacher_says_the_same(teacher):
    ids = torch.randint(5, 97, (2, 16), generator=torch.Generator().manual_seed(0))
    expected = teacher(ids).logits
    with offloaded(teacher, torch.device("cpu")):
        assert any(p.is_meta for p in teacher.parameters())
        assert torch.equal(teacher(ids).logits, expected)
    assert not any(p.is_meta for p in teacher.parameters())
    assert torch.equal(teacher(ids).logits, expected)
