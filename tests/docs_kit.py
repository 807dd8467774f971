"""Runs the blocks of a page: commands in this process, Python in one namespace, in the order in which they stand.

A comment above a block says more of it: `<!-- slow -->` runs by `make test-docs` alone, `<!-- slow, NAME -->` is
written to the file NAME instead, and `<!-- elsewhere -->` needs other machines, so that only its options and syntax are
checked.
"""

from __future__ import annotations

import itertools
import os
import re
import shlex
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import typer

from linearize.cli.app import build_app, run

DOCS = Path(__file__).resolve().parents[1] / "docs"
_BLOCK = re.compile(
    r"^(?:<!-- (?P<note>[^\n]*) -->\n)?```(?P<language>\w+)\n(?P<code>.*?)^```$", re.MULTILINE | re.DOTALL
)
# The commands are those of the page; what they are given on top makes them short.
_STAGE = ["data.tokens=512", "data.held_out=2", "length=64", "batch_tokens=128"]
_SMALL = {
    "convert": ["mixer.window=16"],
    "finetune": ["mixer.window=16", *(f"stages.0.{one}" for one in _STAGE)],
    "run": ["mixer.window=16", *(f"stages.0.{one}" for one in _STAGE), "evaluate.tasks=[]"],
}
_SMALL_CALIBRATION = ["mixer.window=16", "calibrate.tokens=512", "calibrate.length=128", "calibrate.held_out=2"]


@dataclass(frozen=True)
class Block:
    """A block of code: its language, what the comment above it says, and the page's line where its code begins."""

    language: str
    note: str
    code: str
    line: int


def blocks_of(page: str) -> list[Block]:
    text = (DOCS / page).read_text(encoding="utf-8")
    return [
        Block(found["language"], found["note"] or "", found["code"], text[: found.start("code")].count("\n") + 1)
        for found in _BLOCK.finditer(text)
    ]


def run_page(page: str, *, slow: bool = False) -> dict[str, Any]:
    """Runs a page where the process stands; gives what its Python has defined."""
    namespace: dict[str, Any] = {"__name__": "page"}
    for block in blocks_of(page):
        note, _, name = block.note.partition(", ")
        if block.language not in ("sh", "python") or note == "elsewhere" or (note == "slow" and not slow):
            continue
        if name:
            Path(name).write_text(block.code, encoding="utf-8")
        elif block.language == "python":
            code = "\n" * (block.line - 1) + block.code
            exec(compile(code, str(DOCS / page), "exec"), namespace)  # noqa: S102
        elif all(line.startswith("linearize ") for line in block.code.splitlines()):
            for line in block.code.splitlines():
                command = shortened(line)
                assert run(command[1:]) == 0, f"{page}: {line}"
        else:
            path = f"{Path(sys.executable).parent}:/usr/bin:/bin"
            subprocess.run(["bash", "-ec", block.code], check=True, env={**_environment(), "PATH": path})
    return namespace


def _environment() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": ":".join(path for path in sys.path if path)}


def shortened(line: str) -> list[str]:
    """The words of a command, with small sizes set."""
    words = shlex.split(line, comments=True)
    changes = list(_SMALL.get(words[1], ()))
    if words[1] == "convert" and not {"--recipe", "-r"} & {*words}:
        changes.append("mixer.landmarks=64")
    if words[1] == "convert" and "train" in words:
        changes = _SMALL_CALIBRATION
    given = {word.partition("=")[0] for before, word in itertools.pairwise(words) if before == "--set"}
    return words + [part for change in changes if change.partition("=")[0] not in given for part in ("--set", change)]


def options_of(words: list[str]) -> set[str]:
    """The options that a command line's command has."""
    command: Any = typer.main.get_command(build_app())
    for word in words[1:]:
        if word not in getattr(command, "commands", {}):
            break
        command = command.commands[word]
    return {option for parameter in command.params for option in parameter.opts}
