"""The jobs to disturb: their inputs, and the checks that nothing was lost."""

from __future__ import annotations

import json
import os
import shutil
import signal
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from safetensors.torch import load_file

from linearize.cli.app import run
from linearize.runtime.files import sha256

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

OURS = ("error: ", "interrupted: ")


@dataclass
class Outcome:
    """The end of a job.

    Attributes:
        status: exit status of its process; minus the signal's number if a signal ended it.
        told: its last line, if that reports an error or an interruption.
        clean: True if it printed no traceback and no unexpected error.
        seconds: its duration.
        struck: True if it was still running when it was disturbed.
    """

    status: int
    told: str
    clean: bool
    seconds: float
    struck: bool = True


@dataclass
class Job:
    """A command, its folder, and its expected result.

    Attributes:
        name: the command.
        arguments: its command line; it writes `out` below `folder`.
        again: the command line after an interruption.
        before: creates the input files.
        share: its share of the trials.
        seconds: the duration of the last undisturbed run.
        earlier: True if a result existed before it.
    """

    name: str
    folder: Path
    arguments: list[str]
    again: Callable[[], list[str]]
    before: Callable[[], None] = lambda: None
    share: float = 1.0
    seconds: float = 0.0
    earlier: bool = False
    reference: dict[str, Any] = field(default_factory=dict)

    def start(self, act: Callable[[], None] = lambda: None) -> int:
        """Run the command in a child process, after `act` there; returns the process id."""
        return self._fork(self.arguments, act)

    def _fork(self, arguments: list[str], act: Callable[[], None]) -> int:
        # A fork has the libraries imported, so that a job takes one second instead of ten.
        child = os.fork()
        if child:
            return child
        status = 99
        try:
            log = os.open(self._log(os.getpid()), os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
            os.dup2(log, 1)
            os.dup2(log, 2)
            act()
            status = run(arguments)
        finally:
            os._exit(status)

    def _log(self, process: int) -> Path:
        return self.folder.parent / f"log-{process}"

    def wait(self, child: int, started: float, ended: int | None = None) -> Outcome:
        """Wait for the process; `ended` is its exit status if that is already known."""
        struck = ended is None
        if ended is None:
            _, ended = os.waitpid(child, 0)
        seconds = time.monotonic() - started
        log = self._log(child)  # missing if the process was killed before its first line
        lines = log.read_text(encoding="utf-8", errors="replace").splitlines() if log.exists() else []
        log.unlink(missing_ok=True)
        told = lines[-1] if lines and lines[-1].startswith(OURS) else ""
        clean = not any("Traceback" in line or "unexpected" in line for line in lines)
        return Outcome(os.waitstatus_to_exitcode(ended), told, clean, seconds, struck)

    def disturbed(
        self, after: float, disturb: Callable[[int], None], act: Callable[[], None] = lambda: None
    ) -> Outcome:
        """Run the command in a fresh folder and call `disturb` on its process after `after` seconds, if it still
        runs."""
        self.prepare()
        started = time.monotonic()
        child = self.start(act)
        while (left := started + after - time.monotonic()) > 0:
            time.sleep(min(left, 0.005))
            ended, status = os.waitpid(child, os.WNOHANG)
            if ended:
                return self.wait(child, started, status)
        disturb(child)
        return self.wait(child, started)

    def whole(self, arguments: list[str], act: Callable[[], None] = lambda: None) -> Outcome:
        started = time.monotonic()
        return self.wait(self._fork(arguments, act), started)

    def prepare(self) -> None:
        for path in self.folder.iterdir():
            shutil.rmtree(path) if path.is_dir() else path.unlink()
        self.before()
        self.earlier = (self.folder / "out").exists()

    def measure(self) -> None:
        """Time an undisturbed run; the first run also sets the expected result.

        Raises:
            RuntimeError: the command fails here.
        """
        self.prepare()
        done = self.whole(self.arguments)
        if done.status:
            raise RuntimeError(f"{self.name} does not run here: {done.told}")
        self.seconds = done.seconds
        self.reference = self.reference or self.result()

    def phase(self) -> str:
        """The progress of an interrupted training; empty for other jobs."""
        if self.name != "finetune":
            return ""
        metrics = self.folder / "out.training" / "metrics.jsonl"
        lines = metrics.read_text(encoding="utf-8").splitlines() if metrics.is_file() else []
        stages = [json.loads(line)["stage"] for line in lines if line.endswith("}")]
        return f"in stage {stages[-1] + 1}" if stages else "before the first step"

    def lost(self) -> list[str]:
        """The losses after the job was interrupted and run again, in its earlier and its new result."""
        wrong = [] if whole_or_absent(self.folder / "out") else ["a result that is not whole"]
        if self.earlier and not (self.folder / "out").exists():
            wrong.append("the earlier result")
        outcome = self.whole(self.again())
        if outcome.status != 0:
            return [*wrong, f"it cannot be done again: {outcome.told}"]
        if self.result() != self.reference:
            wrong.append("another result than without the fault")
        left = {path.name for path in self.folder.iterdir()} - {"out"}
        return [*wrong, *(f"{name} is left behind" for name in sorted(left))]

    def result(self) -> dict[str, Any]:
        """The job's result: digests of weights, or scores."""
        out = self.folder / "out"
        if (out / "results.json").is_file():
            told = json.loads((out / "results.json").read_text(encoding="utf-8"))
            return {task["task"]: task["systems"] for task in told["tasks"]}
        return {name: tensor.tolist() for name, tensor in load_file(out / "model.safetensors").items()}


def whole_or_absent(out: Path) -> bool:
    """True if `out` does not exist, or is a result whose files all match its provenance."""
    if not out.exists() or (out / "results.json").is_file():
        return True
    try:
        files = json.loads((out / "linearize.json").read_text(encoding="utf-8"))["files"]
        return all(sha256(out / name) == digest for name, digest in files.items())
    except (OSError, ValueError, KeyError):
        return False


def kill(child: int) -> None:
    os.kill(child, signal.SIGKILL)


def terminate(child: int) -> None:
    os.kill(child, signal.SIGTERM)
