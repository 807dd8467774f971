"""A Hub on loopback, a user who is logged in, and a checkpoint that is fit to be shared."""

from __future__ import annotations

import json
import shutil
from typing import TYPE_CHECKING

import pytest
from huggingface_hub import constants
from huggingface_hub.utils import _http

from linearize.api import export, verify
from linearize.cli.app import run
from linearize.hub import upload
from linearize.jobs.convert import convert_into
from linearize.recipe import load_recipe
from linearize.runtime.files import sha256
from linearize.sources.source import find_source
from tests.hub.local_hub import TOKEN, LocalHub

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from linearize.verification import Verification


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[LocalHub]:
    """The client in this process speaks to it, by HTTP and LFS, and does not wait between its tries."""
    local = LocalHub()
    monkeypatch.setattr(constants, "ENDPOINT", local.endpoint)
    monkeypatch.setattr(
        constants, "HUGGINGFACE_CO_URL_TEMPLATE", f"{local.endpoint}/{{repo_id}}/resolve/{{revision}}/{{filename}}"
    )
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "no-token"))
    monkeypatch.setattr(_http.time, "sleep", lambda _: None)
    monkeypatch.setattr(upload.time, "sleep", lambda _: None)
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    monkeypatch.setenv("LINEARIZE_CACHE", str(tmp_path / "linearize"))
    _http.close_session()
    yield local
    _http.close_session()
    local.close()


@pytest.fixture(scope="session")
def converted(tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("converted") / "tiny"
    folder.mkdir()
    convert_into(
        find_source(str(tiny_folder)), load_recipe("window-gla", ["mixer.window=16", f"model={tiny_folder}"]), folder
    )
    return folder


@pytest.fixture(scope="session")
def _shareable(converted: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("shareable") / "smol"
    assert not export(converted, folder, base="acme/tiny").findings
    return folder


@pytest.fixture
def checkpoint(_shareable: Path, tmp_path: Path) -> Path:
    """A copy of its own for each test."""
    return shutil.copytree(_shareable, tmp_path / "smol")


@pytest.fixture(scope="session")
def _verification(_shareable: Path) -> Verification:
    return verify(_shareable, steps=8)


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch, _verification: Verification) -> None:
    """The checkpoint was verified before: for tests of what comes after that."""
    monkeypatch.setattr("linearize.jobs.push.verify", lambda *_, **__: _verification)


@pytest.fixture
def outcome(capfd: pytest.CaptureFixture[str]):
    """Runs a command line; gives its status, stdout and stderr."""

    def call(*arguments: object) -> tuple[int, str, str]:
        capfd.readouterr()
        status = run([str(argument) for argument in arguments])
        return status, *capfd.readouterr()

    return call


def rewrite(folder: Path, name: str, text: str) -> None:
    """Changes a file, and what `linearize.json` says of it."""
    (folder / name).write_text(text, encoding="utf-8")
    if name != "linearize.json":
        provenance = json.loads((folder / "linearize.json").read_text())
        provenance["files"][name] = sha256(folder / name)
        (folder / "linearize.json").write_text(json.dumps(provenance))
