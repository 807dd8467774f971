"""Disks without room, and a second job on the same output, as a user meets them."""

from __future__ import annotations

import errno
import json
import os
import shutil
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path

import pytest

from linearize import api
from linearize.errors import OutputError
from linearize.evaluation import runner, store
from linearize.evaluation.results import report
from tests.jobs_kit import another_job


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "cache"
    folder.mkdir()
    monkeypatch.setenv("LINEARIZE_CACHE", str(folder))
    return folder


@pytest.fixture
def pages(tmp_path: Path) -> Path:
    """The folder of an evaluation set of 9 items."""
    (tmp_path / "wikitext2").mkdir()
    text = "".join(f" = A dog = \n\n There were {n} small cats and a dog .\n They ran home .\n\n" for n in range(9))
    (tmp_path / "wikitext2" / "wiki.test.raw").write_text(text)
    return tmp_path


@contextmanager
def full(*folders: Path):
    """These folders are on a disk with 1 MB left."""
    usage = shutil.disk_usage

    def left(path: Path):
        below = any(folder in (Path(path), *Path(path).parents) for folder in folders)
        return usage(path)._replace(free=1_000_000) if below else usage(path)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(shutil, "disk_usage", left)
        yield


def error_of(words: str) -> str:
    """The one line of an error."""
    (line,) = (line for line in words.splitlines() if line.startswith("error: "))
    assert words.endswith(f"{line}\n") and "unexpected" not in line
    return line


def never(*_: object, **__: object):
    pytest.fail("a model was loaded")


def kept_items(cache: Path) -> list[int]:
    files = [path for path in cache.rglob("*.jsonl") if path.name != "models.jsonl"]
    lines = [line for path in files for line in path.read_text().splitlines() if line.endswith("}")]
    return [json.loads(line)["item"] for line in lines]


def test_eval_asks_for_room_before_it_loads_a_model(outcome, converted, pages, cache, monkeypatch):
    elsewhere = pages / "elsewhere"
    elsewhere.mkdir()
    line = ("eval", converted, "--tasks", "wikitext2", "--data", pages, "--baseline", "none,no_recurrence")
    reported = (*line, "--report", elsewhere / "report")
    with monkeypatch.context() as patch:
        patch.setattr("linearize.evaluation.systems.load_model", never)
        for disk, place in ((elsewhere, elsewhere / "report"), (cache, cache / "evaluation")):
            with full(disk):
                status, out, words = outcome(*reported)
            assert (status, out) == (1, "")
            told = (
                f"error: {place}: 16 MB are needed, and 1 MB are free on that disk; free some space, or name a folder"
            )
            assert error_of(words).startswith(told)
            assert list(elsewhere.iterdir()) == list(cache.iterdir()) == []
    assert outcome(*reported)[0] == 0 and len(kept_items(cache)) == 2 * 9
    with full(cache):
        assert outcome(*line)[0] == 0  # nothing is to be written
        assert "MB are needed" in error_of(outcome(*line, "--fresh")[2])


def test_the_room_that_results_need_grows_with_them(outcome, converted, pages, cache, monkeypatch):
    asked = []
    monkeypatch.setattr("linearize.evaluation.systems.check_space", lambda place, nbytes: asked.append((place, nbytes)))
    line = ("eval", converted, "--tasks", "wikitext2", "--data", pages, "--report", pages / "report", "--baseline")
    for more in (("none", "--limit", "2"), ("none",), ("none,no_recurrence",)):
        assert outcome(*line, *more)[0] == 0
    reports, kept = (
        [nbytes for place, nbytes in asked if (place == pages / "report") is wanted] for wanted in (True, False)
    )
    item = reports[0] // 2
    assert item > 0 and reports == [2 * item, 9 * item, 18 * item]
    assert kept == [2 * item, 7 * item, 9 * item]  # of the third, those of the model are there
    written = sum(path.stat().st_size for path in cache.rglob("*.jsonl") if path.name != "models.jsonl")
    assert 0.5 * 18 * item < written <= 18 * item


@pytest.mark.parametrize("torn", [False, True])
def test_eval_keeps_what_it_had_when_the_disk_fills_up(outcome, converted, pages, cache, monkeypatch, torn):
    monkeypatch.setattr(runner, "CHUNK", 2)
    line = ("eval", converted, "--tasks", "wikitext2", "--data", pages, "--json", "--baseline", "none")
    write, calls = os.write, []

    def filling(file: int, data: bytes) -> int:
        calls.append(data)
        if len(calls) < 4:  # the model's name, and two chunks
            return write(file, data)
        if torn:
            return write(file, data[: len(data) // 2])
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(store.os, "write", filling)
        status, out, words = outcome(*line)
    told = "results cannot be kept there: No space left on device; free some space, or set LINEARIZE_CACHE; the same "
    assert (status, out) == (1, "") and told in error_of(words) and len(calls) == 4
    before = kept_items(cache)
    assert before[:4] == [0, 1, 2, 3] and len(before) == 4 + torn
    found = json.loads(outcome(*line)[1])
    assert sorted(kept_items(cache)) == list(range(9))  # none twice
    fresh = json.loads(outcome(*line, "--fresh")[1])
    assert found["metrics"] == fresh["metrics"]


def test_a_report_that_does_not_fit_leaves_the_earlier_one(outcome, converted, pages, cache, monkeypatch):
    folder = pages / "report"
    line = ("eval", converted, "--tasks", "wikitext2", "--data", pages, "--report", folder, "--baseline", "none")

    def broken(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    for left in ("nothing was left there", "what was there before is as it was"):
        before = {path.name: path.read_bytes() for path in folder.iterdir()} if folder.exists() else None
        with monkeypatch.context() as patch:
            patch.setattr(report, "write_pages", broken)
            status, out, words = outcome(*line, "--limit", "3")
        assert (status, out) == (1, "")
        assert error_of(words) == f"error: {folder}: cannot be written: no space left on device; {left}"
        after = {path.name: path.read_bytes() for path in folder.iterdir()} if folder.exists() else None
        assert after == before and len(kept_items(cache)) >= 3
        assert outcome(*line)[0] == 0


def test_a_report_is_written_by_one_job(outcome, converted, pages):
    folder = pages / "report"
    with another_job(folder) as process:
        status, out, words = outcome("eval", converted, "--tasks", "wikitext2", "--data", pages, "--report", folder)
        told = f"report: another job is writing there (process {process.pid} on "
        assert (status, out) == (1, "") and told in error_of(words)
        with pytest.raises(OutputError, match=rf"another job is writing there \(process {process.pid} on "):
            api.evaluate(converted, tasks=["wikitext2"], data=pages, report=folder)
    assert not folder.exists()


def test_a_state_needs_room_and_a_place_of_its_own(outcome, converted, tmp_path, monkeypatch):
    folder = tmp_path / "states"
    folder.mkdir()
    line = ("generate", converted, "Once upon a time", "-n", "2", "--save-state", folder / "kept", "--json")
    with monkeypatch.context() as patch:
        patch.setattr("linearize.jobs.generate.continue_text", never)
        with full(folder):
            status, out, words = outcome(*line)
        assert (status, out) == (1, "") and f"error: {folder / 'kept'}: 16 MB are needed" in error_of(words)
        with another_job(folder / "kept") as process:
            status, out, words = outcome(*line)
        assert (status, out) == (1, "")
        assert f"kept: another job is writing there (process {process.pid} on " in error_of(words)
    assert outcome(*line)[0] == 0 and [path.name for path in folder.iterdir()] == ["kept"]


@pytest.mark.parametrize(("command", "module"), [("probe", "probe.probing"), ("bench", "benchmark.bench")])
def test_a_folder_of_figures_needs_room(outcome, tiny_folder, tmp_path, monkeypatch, command, module):
    monkeypatch.setattr(f"linearize.{module}.load_model", never)
    with full(tmp_path):
        status, out, words = outcome(command, tiny_folder, "-o", tmp_path / "out")
    assert (status, out) == (1, "") and f"error: {tmp_path / 'out'}: 16 MB are needed" in error_of(words)
    assert [path.name for path in tmp_path.iterdir()] == ["cache"]


def test_a_recipe_is_copied_whole_or_not(outcome, tmp_path, monkeypatch):
    def broken(self: Path, data: bytes) -> int:
        with self.open("wb") as file:
            file.write(data[:10])
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    target = tmp_path / "mine.yaml"
    with monkeypatch.context() as patch:
        patch.setattr(Path, "write_bytes", broken)
        status, out, words = outcome("recipes", "cp", "default", target)
    assert (status, out) == (1, "") and "mine.yaml: cannot be written: no space left on device" in error_of(words)
    assert [path.name for path in tmp_path.iterdir()] == ["cache"]
    assert outcome("recipes", "cp", "default", target)[0] == 0


@pytest.mark.check
def test_of_several_processes_the_first_says_what_is_wrong(converted, pages, tmp_path):
    (tmp_path / "file").write_text("")
    line = ("eval", converted, "--tasks", "wikitext2", "--data", pages, "--launch", "2")
    done = subprocess.run(
        [sys.executable, "-m", "linearize", *map(str, line)], capture_output=True, text=True,
        env={**os.environ, "LINEARIZE_CACHE": str(tmp_path / "file")},
    )  # fmt: skip
    assert done.returncode == 1 and done.stdout == ""
    assert "results cannot be kept there: Not a directory; set LINEARIZE_CACHE" in error_of(done.stderr)
