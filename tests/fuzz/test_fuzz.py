"""The fuzzers, short: `python -m evals.fuzz` is the long way."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

import pytest

from evals.fuzz import __main__ as fuzzing
from evals.fuzz.readers import Reader, Slipped, readers
from linearize.errors import DataError

if TYPE_CHECKING:
    from pathlib import Path

READERS = readers()


@pytest.mark.parametrize("name", READERS)
def test_no_file_does_harm(name):
    found = fuzzing.fuzz(READERS[name], 150, number=1)
    assert found["inputs"] >= 100
    assert (found["crashes"], found["hangs"], found["leaks"]) == (0, 0, 0), found["wrong"]


@pytest.mark.parametrize("name", READERS)
def test_sound_files_are_taken(name, tmp_path):
    reader = READERS[name]
    told = [reader.takes(tmp_path, content) for content in reader.seeds]
    # Two of the recipes to begin from are refused: aliases and tags.
    assert told.count(False) == (2 if name == "recipe" else 0)


def test_faults_of_a_reader_are_counted(monkeypatch):
    kept: list[object] = []

    def read(path: Path) -> None:
        content = path.read_bytes()
        if content[:1] == b"\xff":
            raise KeyError("crash")
        if content[:1] == b"G":
            kept.append(path.open("rb"))
        if len(content) < 3:
            raise DataError("two\nlines")
        if content == b"Good":
            return
        while content[1:2] == b"\xff":
            time.sleep(0)

    monkeypatch.setattr(fuzzing, "SECONDS", 0.05)
    found = fuzzing.fuzz(Reader("x", [b"Good"], read), 400, number=0)
    for file in kept:
        file.close()
    assert found["crashes"] > 0 and found["hangs"] > 0 and found["leaks"] > 100
    assert any("KeyError" in words for words in found["wrong"]) and any(Slipped.__name__ in w for w in found["wrong"])
