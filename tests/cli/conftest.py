"""A command line to run, and a converted model to run it on."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from linearize.cli.app import run

if TYPE_CHECKING:
    from pathlib import Path


@pytest.fixture
def outcome(capfd: pytest.CaptureFixture[str]):
    """Runs a command line; gives its status, stdout and stderr."""

    def call(*arguments: object) -> tuple[int, str, str]:
        capfd.readouterr()
        status = run([str(argument) for argument in arguments])
        return status, *capfd.readouterr()

    return call


@pytest.fixture(scope="module")
def converted(tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    target = tmp_path_factory.mktemp("converted") / "model"
    assert run(["convert", str(tiny_folder), "-o", str(target), "-r", "window-gla", "--set", "mixer.window=16"]) == 0
    return target
