"""The cache's size limit: least recently used entries go first, none that is used, and nothing that is not ours."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from linearize.data.rows import Rows
from linearize.data.selftext import self_written_documents
from linearize.errors import OutputError
from linearize.evaluation.store import Store
from linearize.evaluation.tasks.task import Item
from linearize.runtime import cache
from linearize.runtime.claims import claimed
from linearize.training.teachers import keep_logits
from tests.cli.conftest import outcome as outcome
from tests.conftest import random_llama

KB = 1000
_ELSEWHERE = """
import sys
from pathlib import Path
from linearize.runtime import cache
from linearize.runtime.claims import claimed
path = Path(sys.argv[1])
with claimed(path):
    held = cache.hold(path.parent) if path.parent.parent.name == "teacher-logits" else None
    print("held", flush=True)
    sys.stdin.read()
"""


@pytest.fixture(autouse=True)
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("LINEARIZE_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def text(root: Path, digit: str, age: float, size: int = KB) -> Path:
    """An entry that is a file, last used `age` seconds ago."""
    return _aged(root / "self-text" / f"{digit * 32}.safetensors", age, size)


def logits(root: Path, digit: str, age: float, size: int = KB) -> Path:
    """An entry that is a folder of two files."""
    folder = root / "teacher-logits" / (digit * 32)
    for number in (0, 1):
        _aged(folder / f"{number:06d}.safetensors", age, size // 2)
    os.utime(folder, 2 * (folder.stat().st_mtime - age,))
    return folder


def _aged(path: Path, age: float, size: int) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(bytes(size))
    os.utime(path, 2 * (path.stat().st_mtime - age,))
    return path


def left() -> list[str]:
    return [f"{entry.kind}/{entry.path.name[0]}" for entry in cache.entries()]


def test_the_least_recently_used_go_first(root, monkeypatch):
    text(root, "a", 30), logits(root, "b", 20), text(root, "c", 10), logits(root, "d", 40)
    assert left() == ["teacher-logits/d", "self-text/a", "teacher-logits/b", "self-text/c"]
    assert {entry.nbytes for entry in cache.entries()} == {KB}
    said: list[str] = []
    monkeypatch.setenv("LINEARIZE_CACHE_LIMIT", "4kB")
    assert cache.make_room(root, said.append) == [] and said == []
    monkeypatch.setenv("LINEARIZE_CACHE_LIMIT", "2.5kb")
    assert len(cache.make_room(root, said.append)) == 2
    assert left() == ["teacher-logits/b", "self-text/c"]
    assert len(said) == 1 and said[0].startswith("cache: removed 2 least recently used entries")
    cache.used(root / "teacher-logits" / ("b" * 32))
    monkeypatch.setenv("LINEARIZE_CACHE_LIMIT", "1kB")
    cache.make_room(root)
    assert left() == ["teacher-logits/b"]
    monkeypatch.setenv("LINEARIZE_CACHE_LIMIT", "0")
    cache.make_room(root / "teacher-logits" / ("b" * 32))  # which was just written
    assert left() == ["teacher-logits/b"]


def test_the_limit(monkeypatch):
    assert cache.limit() == 10 * KB**3
    monkeypatch.setenv("LINEARIZE_CACHE_LIMIT", "20GB")
    assert cache.limit() == 20 * KB**3
    for wrong in ("much", "-1GB", "1PB"):
        monkeypatch.setenv("LINEARIZE_CACHE_LIMIT", wrong)
        with pytest.raises(OutputError, match=f"^LINEARIZE_CACHE_LIMIT={wrong}: expected a size, such as"):
            Store()


def test_what_this_process_uses_stays(root, monkeypatch):
    monkeypatch.setenv("LINEARIZE_CACHE_LIMIT", "0")
    folder, path = logits(root, "b", 20), text(root, "a", 10)
    held = cache.hold(folder)
    with claimed(path.with_name("c" * 32 + ".safetensors")):
        cache.make_room(root)
    assert left() == ["teacher-logits/b"] and cache.in_use(cache.entries()[0])
    del held
    assert not cache.in_use(cache.entries()[0])
    cache.make_room(root)
    assert left() == [] and not folder.exists()


@pytest.mark.parametrize("kind", ["self-text", "teacher-logits"])
def test_what_another_process_uses_or_writes_stays(root, monkeypatch, kind):
    entry = text(root, "a", 20) if kind == "self-text" else logits(root, "a", 20)
    monkeypatch.setenv("LINEARIZE_CACHE_LIMIT", "0")
    path = entry if kind == "self-text" else entry / "000002.safetensors"
    command = [sys.executable, "-c", _ELSEWHERE, str(path)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as job:
        assert job.stdout is not None and job.stdout.readline() == "held\n"
        cache.make_room(root)
        assert left() == [f"{kind}/a"] and cache.in_use(cache.entries()[0])
        job.kill()
    cache.make_room(root)
    assert left() == [] and list((root / kind).iterdir()) == []


def test_what_a_killed_process_left_counts_and_goes(root, monkeypatch):
    partial = _aged(root / "self-text" / f".{'a' * 32}.safetensors.partial-999999", 20, KB)
    shard = _aged(root / "teacher-logits" / ("b" * 32) / ".000000.safetensors.partial-999999", 10, KB)
    assert left() == ["self-text/a", "teacher-logits/b"] and {entry.nbytes for entry in cache.entries()} == {KB}
    monkeypatch.setenv("LINEARIZE_CACHE_LIMIT", "0")
    cache.make_room(root)
    assert not partial.exists() and not shard.parent.exists()


def test_nothing_else_is_removed(root, tmp_path, monkeypatch, outcome):
    outside = _aged(tmp_path / "mine" / "000000.safetensors", 50, KB)
    logits(root, "a", 20)
    strangers = [
        _aged(root / "teacher-logits" / "notes.txt", 50, KB),
        _aged(root / "teacher-logits" / ("a" * 32) / "notes.txt", 50, KB),
        _aged(root / "self-text" / "book.safetensors", 50, KB),
        _aged(root / "models" / "model.safetensors", 50, KB),
    ]
    (root / "teacher-logits" / ("b" * 32)).symlink_to(outside.parent)
    (root / "self-text" / f"{'c' * 32}.safetensors").symlink_to(outside)
    (root / "evaluation").symlink_to(outside.parent)
    monkeypatch.setenv("LINEARIZE_CACHE_LIMIT", "0")
    cache.make_room(root)
    assert outcome("cache", "rm", "--all")[0] == 0
    assert outside.is_file() and all(path.is_file() for path in strangers)
    for name in ("../mine", str(outside), "self-text/../../mine", "teacher-logits/b", ".", "/"):
        status, printed, words = outcome("cache", "rm", name)
        assert (status, printed) == (1, "") and "no such entry of the cache" in words, name
    assert outside.is_file()


def test_writers_keep_to_it(tmp_path, monkeypatch):
    model_folder = random_llama(tmp_path / "tiny")
    model, tokenizer = AutoModelForCausalLM.from_pretrained(model_folder), AutoTokenizer.from_pretrained(model_folder)
    ids = torch.arange(1, 65).view(2, 32)
    rows = Rows(ids, ids.clone(), torch.arange(32).repeat(2, 1))
    said: list[str] = []

    def write() -> object:
        self_written_documents(
            model, tokenizer, tokens=40, seed=0, sample_length=16, batch_size=4, progress=said.append
        )
        kept = keep_logits(model, rows, top_k=2, temperature=1.0, batch=2, progress=said.append)
        store = Store()
        store.write("e" * 64, "f" * 64, {0: Item(1.0)})
        return kept, store

    held = write()
    assert {name.partition("/")[0] for name in left()} == set(cache.KINDS) - {"task-names"}  # `eval --list` writes it
    monkeypatch.setenv("LINEARIZE_CACHE_LIMIT", "1")
    said.clear()
    write()  # what exists is read; the store's entry is written again
    assert {name.partition("/")[0] for name in left()} == {"teacher-logits", "evaluation"}  # both held
    del held
    Store().write("d" * 64, "f" * 64, {0: Item(1.0)})
    assert left() == ["evaluation/d"]
    keep_logits(model, rows, top_k=2, temperature=1.0, batch=2, progress=said.append)
    assert any("GB of logits are more than the" in line and "LINEARIZE_CACHE_LIMIT" in line for line in said)
    assert any(line.startswith("cache: removed 1 least") for line in said)
    assert [name.partition("/")[0] for name in left()] == ["teacher-logits"]


def test_reading_is_a_use(root, tmp_path):
    Store().write("e" * 64, "f" * 64, {0: Item(1.0)})
    os.utime(next((root / "evaluation").rglob("*.jsonl")), (0, 0))
    os.utime(root / "evaluation" / ("e" * 32), (0, 0))
    assert cache.entries()[0].used < 10
    assert Store().read("e" * 64, "f" * 64)[0].value == 1.0
    assert cache.entries()[0].used > 1e9


def test_ls_and_rm(root, outcome, monkeypatch):
    status, printed, words = outcome("cache", "ls")
    assert (status, printed) == (0, "") and f"{root}: 0 B of at most 10.0 GB (LINEARIZE_CACHE_LIMIT)" in words
    text(root, "a", 30), text(root, "b", 20)
    folder = logits(root, "c", 10)
    held = cache.hold(folder)
    status, printed, words = outcome("cache", "ls")
    lines = printed.splitlines()
    assert status == 0 and [line.split()[0] for line in lines] == [entry.name for entry in cache.entries()]
    assert [line.endswith("in use") for line in lines] == [False, False, True]
    assert "self-text (text that a model wrote): 2.0 kB in 2 entries" in words
    facts = json.loads(outcome("cache", "ls", "--json")[1])
    assert (facts["folder"], facts["bytes"], facts["limit_bytes"]) == (str(root), 3 * KB, 10 * KB**3)
    assert facts["kinds"]["self-text"] == {"entries": 2, "bytes": 2 * KB}
    assert facts["entries"][0] | {"last_used": ""} == {
        "name": f"self-text/{'a' * 32}.safetensors", "kind": "self-text", "bytes": KB, "last_used": "",
    }  # fmt: skip

    assert outcome("cache", "rm")[0] == outcome("cache", "rm", "--all", "self-text")[0] == 2
    status, _, words = outcome("cache", "rm", "self-tex")
    assert status == 1 and "self-tex: 2 entries of the cache begin so; write more of the name" in words
    status, _, words = outcome("cache", "rm", "self-text/b", "")
    assert status == 1 and "'': no such entry of the cache" in words and len(cache.entries()) == 3
    status, printed, words = outcome("cache", "rm", "self-text/a")
    assert (status, printed) == (0, f"self-text/{'a' * 32}.safetensors\n") and "removed 1 entry, 1.0 kB" in words
    status, _, words = outcome("cache", "rm", "teacher-logits")
    assert status == 1 and "not removed, because a job uses it" in words
    found = json.loads(outcome("cache", "rm", "--all", "--json")[1])
    assert [entry["name"][:11] for entry in found["removed"]] == ["self-text/b"]
    assert found["kept"] == [f"teacher-logits/{'c' * 32}"]
    del held
    assert outcome("cache", "rm", "teacher-logits")[0] == 0 and left() == []
    assert outcome("cache", "rm", "teacher-logits")[0] == 0  # there are none
