"""`metrics.jsonl`: one line per step, and the progress line on the terminal."""

from __future__ import annotations

import json
import math
import sys
import time
from typing import TYPE_CHECKING, Any

from linearize.runtime import processes
from linearize.runtime.files import staged_file

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

METRICS = "metrics.jsonl"


def forget_metrics(path: Path, stage: int, step: int) -> None:
    """Remove the steps after the checkpoint from a killed run's metrics, because they will be trained again."""
    if not path.is_file():
        return
    kept = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            record = json.loads(line)
        except ValueError:  # an incomplete line
            continue
        if (record["stage"], record["step"]) <= (stage, step):
            kept.append(line + "\n")
    with staged_file(path) as staging:
        staging.write_text("".join(kept), encoding="utf-8")


def log_to(path: Path, stage: int, stages: int) -> Callable[[dict[str, Any]], None]:
    """A callback for a stage's figures of each step; only the first process writes them."""
    line, held_out = ProgressLine(), ""
    if not processes.is_first():
        return lambda _: None

    def log(figures: dict[str, Any]) -> None:
        nonlocal held_out
        append_json_line(path, {"stage": stage, **figures})
        if "held_out_loss" in figures:
            # The objective is comparable to the training loss; the cross-entropy is not, so it is named.
            objective = figures.get("held_out_objective")
            name, value = ("", objective) if objective is not None else ("cross-entropy ", figures["held_out_loss"])
            held_out = f"held out {name}{value:.4f}  "
        left = figures["seconds_left"]
        of = f"stage {stage + 1} of {stages}, " if stages > 1 else ""
        line.show(
            f"{of}step {figures['step']} of {figures['steps']}  loss {figures['loss']:.4f}  {held_out}"
            f"{figures['tokens_per_second']:,.0f} tok/s  {int(left // 60)}:{int(left % 60):02d} left",
            final=left == 0,
        )

    return log


def append_json_line(path: Path, record: dict[str, Any]) -> None:
    """Append a line to a JSONL file."""
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(record) + "\n")


class ProgressLine:
    """A line that is rewritten on a terminal; without a terminal, a new line every `every_seconds`."""

    def __init__(self, every_seconds: float = 60.0) -> None:
        self.terminal, self.every, self.last = sys.stderr.isatty(), every_seconds, -math.inf

    def show(self, text: str, *, final: bool = False) -> None:
        """Show `text`; `final` ends the line."""
        now = time.monotonic()
        if self.terminal:
            sys.stderr.write(f"\r\x1b[2K{text}" + ("\n" if final else ""))
        elif final or now - self.last >= self.every:
            self.last = now
            sys.stderr.write(text + "\n")
        sys.stderr.flush()
