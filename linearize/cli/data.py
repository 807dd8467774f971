"""`linearize data`: show the rows that a recipe trains on."""

from __future__ import annotations

import sys
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.text import Text

from linearize.cli.console import (
    JsonOption,
    RecipeArgument,
    SetOption,
    TrustOption,
    examples,
    print_json,
    status,
)
from linearize.cli.libraries import quiet_libraries

app = typer.Typer(
    help="Show the rows that a recipe trains on.",
    no_args_is_help=True,
    epilog=examples(
        "linearize data preview mine.yaml --set model=./model",
        "linearize data preview mine.yaml --stage 2 --rows 5",
    ),
)


@app.callback()
def _group() -> None:
    """Makes `preview` a subcommand, because Typer turns a group with one command into that command."""


@app.command(
    "preview",
    epilog=examples(
        "linearize data preview mine.yaml --set model=HuggingFaceTB/SmolLM2-135M-Instruct",
        "linearize data preview mine.yaml --set model=./model.gguf --set stages.0.data.source=chats.jsonl",
        "linearize data preview mine.yaml --stage 2 --rows 5 --json",
    ),
)
def preview(
    recipe: RecipeArgument,
    rows: Annotated[int, typer.Option("--rows", min=1, help="Rows of each source to show.")] = 2,
    stage: Annotated[int | None, typer.Option("--stage", min=1, help="Show only this stage, counted from 1.")] = None,
    overrides: SetOption = None,
    trust_remote_code: TrustOption = False,
    as_json: JsonOption = False,
) -> None:
    """Print training rows: their text, the part with loss, and the borders of documents.

    Only the model's tokenizer is loaded. Text with loss is coloured on a terminal, and between ⟦ and ⟧ elsewhere. A
    line of dashes marks the start of a document: positions restart at 0, and tokens do not attend across it.
    """
    quiet_libraries()
    from linearize.jobs.data import preview_stages

    shown = preview_stages(
        recipe, overrides or (), rows=rows, stage=stage, trust_remote_code=trust_remote_code, say=status
    )
    if as_json:
        print_json(shown)
        return
    out = Console(highlight=False, soft_wrap=True)
    for one in shown:
        _show(one, out)


def _show(stage: dict[str, Any], out: Console) -> None:
    for row in stage["rows"]:
        head = f"stage {stage['stage']}, {stage['objective']}: row {row['row']} of {row['source']}"
        loss = f"{row['tokens_with_loss']:,} of {len(row['input_ids']):,} tokens carry loss"
        out.print(Text(f"=== {head}, {loss} ===", style="bold"))
        for segment in row["segments"]:
            first, last = segment["start"], segment["start"] + segment["tokens"] - 1
            out.print(Text(f"--- tokens {first} to {last}, positions 0 to {segment['tokens'] - 1} ---", style="dim"))
            text = Text()
            for piece in segment["pieces"]:
                said = "".join(c if c.isprintable() or c in "\n\t" else "\ufffd" for c in piece["text"])
                marked = said if out.is_terminal or not piece["loss"] else f"⟦{said}⟧"
                text.append(marked, style="green" if piece["loss"] else "")
            out.print(text)
    sys.stdout.flush()
