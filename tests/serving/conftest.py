"""A converted model with a chat template, and a server of it."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from linearize.cli.app import run

if TYPE_CHECKING:
    from collections.abc import Iterator

TEMPLATE = (
    "{% for m in messages %}{% if m['content'] == 'refuse' %}{{ raise_exception('no system prompts') }}{% endif %}"
    "{{ m['role'] }} : {{ m['content'] }} {% endfor %}{% if add_generation_prompt %}assistant : {% endif %}"
)


def chatting(folder: Path, source: Path) -> Path:
    """`source` converted into `folder`, with a chat template."""
    assert run(["convert", str(source), "-o", str(folder), "-r", "window-gla", "--set", "mixer.window=16"]) == 0
    path = folder / "tokenizer_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "chat_template": TEMPLATE}))
    path = folder / "generation_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "eos_token_id": 1023}))  # it writes on
    return folder


@pytest.fixture(scope="session")
def chatty(tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return chatting(tmp_path_factory.mktemp("chatty") / "model", tiny_folder)


@dataclass(frozen=True)
class Server:
    process: subprocess.Popen[str]
    facts: dict[str, Any]

    @property
    def url(self) -> str:
        return self.facts["url"]

    @property
    def resident(self) -> int:
        status = Path(f"/proc/{self.process.pid}/status").read_text()
        return next(int(line.split()[1]) for line in status.splitlines() if line.startswith("VmRSS")) * 1024


def started(model: Path, *options: str) -> Server:
    command = [sys.executable, "-m", "linearize", "serve", str(model), "--port", "0", "--json", *options]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    assert process.stdout is not None
    line = process.stdout.readline()
    assert line, "the server has ended"
    return Server(process, json.loads(line))


@pytest.fixture(scope="module")
def server(chatty: Path) -> Iterator[Server]:
    pytest.importorskip("starlette")
    pytest.importorskip("uvicorn")
    one = started(chatty, "--served-name", "tiny", "--at-once", "8")
    yield one
    one.process.terminate()
    assert one.process.wait(timeout=120) == 143
