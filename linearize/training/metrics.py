"""`metrics.jsonl`: a line for each step of a run, which the person at the terminal sees as well."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from linearize.runtime import processes
from linearize.runtime.files import staged_file
from linearize.training.trainer import ProgressLine, append_json_line

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

METRICS = "metrics.jsonl"


def forget_metrics(path: Path, stage: int, step: int) -> None:
    """Takes out of a killed run's metrics what is going to be trained again: the steps after the checkpoint."""
    if not path.is_file():
        return
    kept = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            record = json.loads(line)
        except ValueError:  # torn
            continue
        if (record["stage"], record["step"]) <= (stage, step):
            kept.append(line + "\n")
    with staged_file(path) as staging:
        staging.write_text("".join(kept), encoding="utf-8")


def log_to(path: Path, stage: int, stages: int) -> Callable[[dict[str, Any]], None]:
    """Callbacks that receive a stage's figures step by step; only the first process writes them."""
    line = ProgressLine()
    if not processes.is_first():
        return lambda _: None

    def log(figures: dict[str, Any]) -> None:
        append_json_line(path, {"stage": stage, **figures})
        left = figures["seconds_left"]
        of = f"stage {stage + 1} of {stages}, " if stages > 1 else ""
        line.show(
            f"{of}step {figures['step']} of {figures['steps']}  loss {figures['loss']:.4f}  "
            f"{figures['tokens_per_second']:,.0f} tok/s  {int(left // 60)}:{int(left % 60):02d} left",
            final=figures["step"] == figures["steps"],
        )

    return log
