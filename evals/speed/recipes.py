"""CPU speed of one pretrained model converted by several recipes, beside the pretrained model in transformers and, if
that is faster, with oneDNN products. All run in turns, so other load affects all of them; medians count.

    python -m evals.speed.recipes slots=FOLDER default=FOLDER    # converted checkpoints of one pretrained model
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch
from linearize_kernels.products import onednn_is_faster, take_products

from evals.recurrences.toy import markdown, surroundings, write
from linearize.benchmark.running import decode, prefill
from linearize.benchmark.subjects import Subject, sharing, teacher_beside
from linearize.sources.source import find_source, load_model

FIGURES = Path(__file__).with_name("recipes.json")
READ, WRITTEN_AFTER = (512, 2048), (512, 2048, 8192)
STEPS, REPEATS = 32, 5  # a block of tokens is merged into the slots once in 32 steps
# Of the recipe `slots`, divided by the faster teacher.
BARS = (("prefill", 2048, 1.0), ("decode", 2048, 1.0), ("decode", 8192, 2.4), ("decode", 32_768, 6.0))


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m evals.speed.recipes", description=__doc__.split("\n\n")[0])
    parser.add_argument("models", nargs="+", metavar="RECIPE=FOLDER", help="converted checkpoints")
    parser.add_argument("--read", type=_lengths, default=READ, help="tokens of prompts")
    parser.add_argument("--write-after", type=_lengths, default=WRITTEN_AFTER, help="tokens of contexts")
    parser.add_argument("--repeats", type=int, default=REPEATS)
    parser.add_argument("-o", "--output", type=Path, help="write the figures to this file")
    arguments = parser.parse_args()
    with torch.no_grad():
        rows = measured(arguments)
    names = list(dict.fromkeys(row["system"] for row in rows))
    table = [
        {"": f"{kind} at {tokens:,}", **{name: _ratio(rows, kind, tokens, name) for name in names}}
        for kind, tokens in dict.fromkeys((row["kind"], row["tokens"]) for row in rows)
    ]
    print(markdown(table))
    if arguments.output:
        bars = [
            {"kind": kind, "tokens": tokens, "asked": asked, "seen": _against(rows, kind, tokens, "slots")}
            for kind, tokens, asked in BARS
            if any(row["kind"] == kind and row["tokens"] == tokens for row in rows)
        ]
        around = {**surroundings(), "command": "python -m evals.speed.recipes"}
        write(arguments.output, {**around, "repeats": arguments.repeats, "steps": STEPS, "bars": bars, "rows": rows})


def measured(arguments: argparse.Namespace) -> list[dict[str, Any]]:
    subjects: list[Subject] = []
    for given in arguments.models:
        name, _, folder = given.partition("=")
        model: Any = load_model(find_source(folder), dtype="float32", device="cpu")
        if not subjects:
            teacher = teacher_beside(model)
            subjects.append(Subject.of("teacher", teacher))
            if onednn_is_faster():
                fast = sharing(teacher)
                take_products(fast)
                subjects.append(Subject.of("teacher-onednn", fast))
        subjects.append(Subject.of(name, model))
    rows: list[dict[str, Any]] = []
    for tokens in arguments.write_after:
        rows += decode(subjects, 1, tokens, steps=STEPS, repeats=arguments.repeats, say=print)
    for tokens in arguments.read:
        rows += prefill(subjects, 1, tokens, repeats=arguments.repeats, say=print)
    return rows


def _lengths(given: str) -> tuple[int, ...]:
    return tuple(int(number) for number in given.split(",") if number)


def _against(rows: list[dict[str, Any]], kind: str, tokens: int, system: str) -> float:
    """The system's speed divided by the faster teacher's."""
    speeds = {
        row["system"]: row["tokens_per_second"] for row in rows if row["kind"] == kind and row["tokens"] == tokens
    }
    faster = max(speed for name, speed in speeds.items() if name.startswith("teacher"))
    ratio: float = speeds[system] / faster
    return ratio


def _ratio(rows: list[dict[str, Any]], kind: str, tokens: int, system: str) -> str:
    speed = next(
        row["tokens_per_second"]
        for row in rows
        if (row["kind"], row["tokens"], row["system"]) == (kind, tokens, system)
    )
    return f"{speed:.1f} ({_against(rows, kind, tokens, system):.2f})"


if __name__ == "__main__":
    main()
