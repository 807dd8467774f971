"""Core-seconds of one pretrained model converted by several recipes, beside the pretrained model in transformers and,
if that is faster, with oneDNN products. All run in turns on one thread, and the process's own CPU time is counted, so
other load on the machine changes little. Medians count. With more threads a clock counts, on a quiet machine.

    python -m evals.speed.recipes slots=FOLDER default=FOLDER    # converted checkpoints of one pretrained model
    python -m evals.speed.recipes slots=FOLDER --threads 2 --tokens 8192 -o FILE
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

import torch
from linearize_kernels.products import onednn_is_faster, take_products

from evals.recurrences.toy import markdown, surroundings, write
from linearize.benchmark.running import _Decoding, _Engine, _Reading
from linearize.benchmark.subjects import Subject, sharing, teacher_beside
from linearize.sources.source import find_source, load_model

if TYPE_CHECKING:
    from linearize.benchmark.running import Run

FIGURES = Path(__file__).with_name("recipes.json")
WORK = (("write", 2048), ("read", 2048), ("write", 8192), ("write", 32768), ("read", 512), ("write", 512))
# Of the recipe `slots`: at least so many times the speed of the faster teacher.
ASKED = {("read", 2048): 1.0, ("write", 2048): 1.0, ("write", 8192): 2.4, ("write", 32768): 6.0}


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m evals.speed.recipes", description=__doc__.split("\n\n")[0])
    parser.add_argument("models", nargs="*", metavar="RECIPE=FOLDER", help="converted checkpoints")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--steps", type=int, default=32, help="tokens per run; one in 32 merges a block into the slots")
    parser.add_argument("--threads", type=int, default=1, help="with more than one, of a clock instead of CPU time")
    parser.add_argument("--tokens", type=int, help="only what is measured at so many")
    parser.add_argument("-o", "--output", type=Path, default=FIGURES)
    parser.add_argument("--table", action="store_true", help="print the table of the figures that are there")
    arguments = parser.parse_args()
    if not arguments.table:
        torch.set_num_threads(arguments.threads)
        subjects = _subjects(arguments.models)
        around = {**surroundings(), "command": "python -m evals.speed.recipes", "steps": arguments.steps}
        rows: list[dict[str, Any]] = []
        for kind, tokens in WORK:
            if arguments.tokens not in (None, tokens):
                continue
            with torch.no_grad():
                rows.append(_measured(subjects, kind, tokens, arguments.repeats, arguments.steps))
            write(arguments.output, {**around, "rows": rows})  # so that a run may be stopped
            print(table(rows[-1:], arguments.threads), flush=True)
    else:
        import json

        figures = json.loads(arguments.output.read_text(encoding="utf-8"))
        print(table(figures["rows"], figures["threads"]))


def _subjects(models: list[str]) -> list[Subject]:
    subjects: list[Subject] = []
    for given in models:
        name, _, folder = given.partition("=")
        model: Any = load_model(find_source(folder), dtype="float32", device="cpu")
        if not subjects:
            teacher = teacher_beside(model)
            subjects.append(Subject.of("teacher", teacher))
            if onednn_is_faster():
                fast = sharing(teacher)
                take_products(fast)
                subjects.append(Subject.of("teacher, oneDNN", fast))
        subjects.append(Subject.of(name, model))
    return subjects


def _measured(subjects: list[Subject], kind: str, tokens: int, repeats: int, steps: int) -> dict[str, Any]:
    """Tokens per core-second of every subject, reading `tokens` or writing after them."""
    runs: dict[str, Run] = {}
    for subject in subjects:
        if kind == "read":
            runs[subject.name] = _Reading(subject, 1, tokens)
        else:
            decoding = (_Engine if subject.converted else _Decoding)(subject, subject.filled_cache(1, tokens), 1, steps)
            decoding.warm_up()
            decoding.steps = steps
            runs[subject.name] = decoding
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    clock = time.process_time if torch.get_num_threads() == 1 else time.perf_counter
    for turn in range(repeats + (kind == "read")):  # the first reading is a warm-up
        for name, run in runs.items():
            began = clock()
            count = run()
            if turn or kind == "write":
                seconds[name].append((clock() - began) / count)
    speeds = {name: 1 / median(times) for name, times in seconds.items()}
    faster = max(speed for name, speed in speeds.items() if name.startswith("teacher"))
    row: dict[str, Any] = {"kind": kind, "tokens": tokens, "core_seconds_per_token": seconds, "per_core_second": speeds}
    row["times_the_faster_teacher"] = {name: speed / faster for name, speed in speeds.items()}
    if (kind, tokens) in ASKED and "slots" in speeds:
        row |= {"asked_of_slots": ASKED[kind, tokens], "met": speeds["slots"] / faster >= ASKED[kind, tokens]}
    return row


def table(rows: list[dict[str, Any]], threads: int = 1) -> str:
    unit = "tokens per core-second" if threads == 1 else f"tokens per second, {threads} threads"
    found = []
    for row in rows:
        ratios = row["times_the_faster_teacher"]
        cells = {name: f"{speed:.1f} ({ratios[name]:.2f})" for name, speed in row["per_core_second"].items()}
        found.append({unit: f"{row['kind']} {row['tokens']:,}", **cells})
    return markdown(found)


if __name__ == "__main__":
    main()
