"""kvpress's presses as systems: a process in the environment that has kvpress answers, one request at a time."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Sequence

PRESSES = {
    "KeyDiff": "keys unlike the mean key",
    "Knorm": "keys of small norm",
    "LagKV": "tokens unlike the next ones",
    "StreamingLLM": "sinks and the latest tokens",
    "SnapKV": "attention of the last 64 queries",
    "TOVA": "attention of the last query",
    "ExpectedAttention": "attention of queries to come, from their distribution",
    "KVzip": "attention while the text is repeated: two more passes, the ceiling",
}
"""Name -> the tokens that stay."""
WORKER = Path(__file__).with_name("press_worker.py")


class Presses:
    """The worker process; it starts with the first request.

    Args:
        python: the interpreter of the environment that has kvpress.
        model: the folder of the pretrained model.
    """

    def __init__(self, python: str, model: Path, dtype: str) -> None:
        self._command = [python, str(WORKER), str(model), dtype]
        self._process: subprocess.Popen[str] | None = None

    def ask(
        self, press: str | None, budget: int, context: Sequence[int], question: Sequence[int], **more: Any
    ) -> dict[str, Any]:
        """The worker's reply; see `press_worker.py`.

        Raises:
            RuntimeError: the worker ended, or the press failed.
        """
        if self._process is None:
            pipe = subprocess.PIPE
            self._process = subprocess.Popen(self._command, stdin=pipe, stdout=pipe, text=True)  # noqa: S603
        assert self._process.stdin is not None and self._process.stdout is not None  # noqa: S101 - both are pipes
        request = {"press": press, "budget": budget, "context": list(context), "question": list(question), **more}
        self._process.stdin.write(json.dumps(request) + "\n")
        self._process.stdin.flush()
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError(f"{' '.join(self._command)}: ended; its output is above")
        found: dict[str, Any] = json.loads(line)
        if "error" in found:
            raise RuntimeError(f"{press}: {found['error']}")
        return found

    def close(self) -> None:
        if self._process is not None:
            assert self._process.stdin is not None and self._process.stdout is not None  # noqa: S101
            self._process.stdin.close()
            self._process.stdout.close()
            self._process.wait()
            self._process = None
