"""The quality of converted SmolLM2-135M-Instruct: `python -m evals.smollm2 DIR` measures it, `--table` prints it.

DIR has the checkpoints `default`, `window-gla` and `liger-gla` (`linearize convert`, before any training) and
`finetuned` (from `linearize demo --train`); `--data` names the folder of the data. Results are cached item by item, so
an interrupted run continues, and the teacher is measured once.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from linearize.evaluation.results.comparison import FIVE, compare_systems
from linearize.evaluation.results.pairing import contributions
from linearize.evaluation.results.results import Results, read_results
from linearize.evaluation.tasks.task import mean_and_error
from linearize.report.formatting import number, readable_bytes, with_error

if TYPE_CHECKING:
    from collections.abc import Iterator

HERE = Path(__file__).parent
BASELINES = "none,teacher,window,window_bytes"
# Model -> its baselines.
MODELS = {
    "default": "none",
    "window-gla": BASELINES,
    "liger-gla": BASELINES,
    "finetuned": f"{BASELINES},no_recurrence",
}
NEEDLES = ("niah_single_1", "niah_single_2")
SUITES = {
    "": f"--tasks {','.join(FIVE)},lambada,{','.join(NEEDLES)} --lengths 512,1024,2048 --samples 1 --limit 60",
    "-long": "--suite length --tasks wikitext2 --lengths 8192 --samples 1 --limit 4",
}
# Heading, the report of the column, and the system in it.
COLUMNS = (
    ("teacher", "window-gla", "teacher"),
    ("`default`", "default", "model"),
    ("window 64 + 4 sinks", "window-gla", "window"),
    ("window of the bytes of `window-gla`", "window-gla", "window_bytes"),
    ("`window-gla`, as converted", "window-gla", "model"),
    ("`liger-gla`, as converted", "liger-gla", "model"),
    ("demo, fine-tuned", "finetuned", "model"),
    ("… without recurrence", "finetuned", "no_recurrence"),
)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m evals.smollm2", description=__doc__)
    parser.add_argument("models", type=Path, nargs="?", help="the folder with the checkpoints")
    parser.add_argument("--data", type=Path, help="the folder of the evaluation tasks' files")
    parser.add_argument("--table", action="store_true", help="print the table of the results that are here")
    arguments = parser.parse_args()
    if not arguments.table:
        if arguments.models is None or arguments.data is None:
            parser.error("name the folder of the checkpoints and --data, or --table")
        measure(arguments.models, arguments.data.resolve())
    print(table())


def measure(models: Path, data: Path) -> None:
    """Write a report for each model and suite beside this file."""
    for model, baselines in MODELS.items():
        for suffix, options in SUITES.items():
            command = [
                sys.executable,
                "-m",
                "linearize",
                "eval",
                model,
                *options.split(),
                "--baseline",
                baselines,
            ]
            report = ["--data", str(data), "--report", str(HERE.resolve() / f"{model}{suffix}")]
            subprocess.run([*command, *report], cwd=models, check=True)  # noqa: S603


def table() -> str:
    """The figures as Markdown, computed from the `results.json` files beside this module."""
    folders = [HERE / f"{model}{suffix}" for model in MODELS for suffix in SUITES]
    found = {folder.name: read_results(folder) for folder in folders if folder.is_dir()}
    lines = ["| | " + " | ".join(heading for heading, _, _ in COLUMNS) + " |", "|---" * (len(COLUMNS) + 1) + "|"]
    columns = [dict(figures(found[model], found.get(f"{model}-long"), system)) for _, model, system in COLUMNS]
    lines += [f"| {row} | " + " | ".join(column.get(row, "not run") for column in columns) + " |" for row in columns[0]]
    return "\n".join(lines)


def core(results: Results, system: str) -> str:
    """The mean of the five core accuracies in percent, with its standard error."""
    mean = next(row for table in compare_systems(results) if table.suite == "core" for row in table.rows if row.mean_of)
    return with_error(mean.cells[system].value, mean.cells[system].stderr, "acc")


def figures(short: Results, long: Results | None, system: str) -> Iterator[tuple[str, str]]:
    """The rows of one system's column."""
    info = next(one for one in short.systems if one.name == system)
    growth = f"{readable_bytes(info.growth_bytes_per_token)} a token" if info.growth_bytes_per_token else ""
    yield "memory of one sequence", growth or readable_bytes(info.state_bytes or 0)
    yield "mean of the five core accuracies, %", core(short, system)
    lambada = next(score for score in short.scores[system].tasks if score.task == "lambada")
    yield "LAMBADA, %", with_error(lambada.value, lambada.stderr, "acc")
    items = [
        (tag["length"], item)
        for score in short.scores[system].tasks
        if score.suite == "recall"
        for tag, item in zip(score.tags, score.items, strict=True)
    ]
    for length in sorted({length for length, _ in items}):
        value, error = mean_and_error([item for at, item in items if at == length])
        yield f"needles found in {length:,} tokens, %", with_error(value, error, "acc")
    if long is None:
        return
    wikitext = next(score for score in long.scores[system].tasks if score.task == "wikitext2")
    assert contributions(wikitext) is not None  # noqa: S101 - the value follows from its items
    yield "WikiText-2, word perplexity", number(wikitext.value, wikitext.metric)
    curve = next(score for score in long.scores[system].tasks if score.task == "loss_by_position")
    for first, last in ((256, 512), (4096, 8192)):
        values = [one[list(curve.axis).index(last)] for one in curve.curves]
        yield f"loss of a book's tokens {first:,} to {last:,}", number(statistics.fmean(values), "loss")


if __name__ == "__main__":
    main()
