"""The fuzzers, short: `python -m evals.fuzz` is the long way."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest

from evals.fuzz import __main__ as fuzzing
from evals.fuzz.readers import Reader, Slipped, readers
from linearize.errors import DataError

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

READERS = readers()


@pytest.mark.parametrize("name", READERS)
@pytest.mark.check
def test_no_file_does_harm(name):
    found = fuzzing.fuzz(READERS[name], 100, number=1)
    assert found["inputs"] >= 90
    assert (found["crashes"], found["hangs"], found["leaks"]) == (0, 0, 0), found["wrong"]


@pytest.mark.parametrize("name", READERS)
def test_sound_files_are_taken(name, tmp_path):
    reader = READERS[name]
    told = [reader.takes(tmp_path, content) for content in reader.seeds]
    # Two of the recipes to begin from are refused: aliases and tags.
    assert told.count(False) == (2 if name == "recipe" else 0)


@pytest.mark.check
def test_faults_of_a_reader_are_counted(monkeypatch):
    kept: list[object] = []

    def crash(_: Path) -> None:
        raise KeyError

    def hang(_: Path) -> None:
        while True:
            pass

    def mumble(_: Path) -> None:
        raise DataError("two\nlines")

    def counted(read: Callable[[Path], object]) -> dict[str, Any]:
        calls = iter(range(1000))
        # The first one warms up, outside the count.
        return fuzzing.fuzz(Reader("x", [b"Good"], lambda path: read(path) if next(calls) else None), 10)

    monkeypatch.setattr(fuzzing, "SECONDS", 0.02)
    found = counted(crash)
    assert found["crashes"] == found["inputs"] > 5 and "KeyError" in found["wrong"][0]
    found = counted(mumble)
    assert found["crashes"] == found["inputs"] and Slipped.__name__ in found["wrong"][0]
    found = counted(hang)
    assert found["hangs"] == found["inputs"] and found["crashes"] == 0
    assert counted(lambda path: kept.append(path.open("rb")))["leaks"] >= 6
