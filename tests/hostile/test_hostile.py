"""Hostile and broken input: one line each, no traceback, bounded time and memory, and nothing left behind."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

import pytest
import torch

from linearize.cli.app import run
from linearize.runtime.memory import PeakMemory
from tests.conftest import random_llama
from tests.hostile.kit import Kit
from tests.hostile.rows import ROWS
from tests.tables import some

if TYPE_CHECKING:
    from pathlib import Path

SECONDS = 10.0
"""Of one process's own time; the longest row, a million tokens, takes a second or two."""
BYTES = 600_000_000
"""On top of what the process has already; the largest input has 100 MB."""


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, Path]:
    """A tiny model, the same converted, and a state of that."""
    folder = tmp_path_factory.mktemp("models")
    plain, converted, state = random_llama(folder / "plain"), folder / "converted", folder / "a.state"
    assert run(["convert", str(plain), "-o", str(converted), "-r", "window-gla", "--set", "mixer.window=16"]) == 0
    assert run(["generate", str(converted), "Once upon", "-n", "0", "--save-state", str(state)]) == 0
    return plain, converted, state


@pytest.fixture
def kit(models: tuple[Path, Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Kit:
    monkeypatch.setenv("LINEARIZE_CACHE", str(tmp_path / "cache"))
    (tmp_path / "row").mkdir()
    monkeypatch.chdir(tmp_path / "row")
    return Kit(tmp_path / "row", *models)


# `make test` runs every sixth row, so that each reader of files has some.
@pytest.mark.parametrize("row", some(ROWS, ROWS[::6]), ids=[f"{row[0]}: {row[1]}" for row in ROWS])
def test_hostile_input_is_one_line(kit, capfd, row):
    _, _, make, told = row
    arguments = [str(argument) for argument in make(kit)]
    before = sorted(kit.folder.rglob("*"))
    capfd.readouterr()
    started = time.process_time()
    with PeakMemory(torch.device("cpu")) as peak:
        status = run(arguments)
    seconds = time.process_time() - started
    text, words = capfd.readouterr()
    assert status == 1, (status, text, words)
    assert text == ""
    errors = [line for line in words.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1 and words.endswith(errors[0] + "\n"), words
    assert told in errors[0], errors[0]
    assert "unexpected" not in errors[0] and "Traceback" not in words and len(errors[0]) < 700
    assert sorted(kit.folder.rglob("*")) == before
    assert seconds < SECONDS and (peak.bytes or 0) < BYTES, (seconds, peak.bytes)


def test_the_table_is_long_enough():
    assert len(ROWS) >= 40 and len({row[:2] for row in ROWS}) == len(ROWS)
