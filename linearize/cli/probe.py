"""`linearize probe`: the attention of each head, the damage of windowing it, and the choice of softmax layers."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from linearize.cli.console import (
    JsonOption,
    ModelArgument,
    OverwriteOption,
    RecipeOption,
    SetOption,
    TrustOption,
    begin,
    command_line,
    examples,
    print_json,
    status,
)

EPILOG = examples(
    "linearize probe HuggingFaceTB/SmolLM2-135M-Instruct -o probe",
    "linearize probe ./model.gguf --text book.txt --length 2048 --set mixer.window=128",
    "linearize probe ./model.gguf --damage heads --budget 2MB --context 8192 -o probe",
    "linearize convert ./model.gguf -o out --recipe probe/keep.yaml",
)
_ROWS = 10


def probe(
    model: ModelArgument,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", metavar="DIR", help="The folder to write figures and report into.")
    ] = None,
    text: Annotated[
        str,
        typer.Option("--text", metavar="FILE", help="A file, a Hub data set, builtin, or self (by the teacher)."),
    ] = "self",
    tokens: Annotated[int, typer.Option("--tokens", min=1, help="Tokens of text; as many again with needles.")] = 4096,
    length: Annotated[int, typer.Option("--length", min=2, help="Tokens of a row of text.")] = 512,
    damage: Annotated[
        str,
        typer.Option(
            "--damage",
            metavar="KIND",
            help="Parts to window one at a time: layers, heads (key/value heads; slower), or none.",
        ),
    ] = "layers",
    budget: Annotated[
        str | None,
        typer.Option(
            "--budget",
            metavar="SIZE",
            help="Limit of the kept caches, as a share of the teacher's or in bytes: 10%, 2MB. A tenth if left out, "
            "or one layer (or head) if that is larger.",
        ),
    ] = None,
    context: Annotated[
        int | None,
        typer.Option(
            "--context",
            min=1,
            help="Tokens of a sequence at which the budget holds; the model's length if left out.",
        ),
    ] = None,
    seed: Annotated[int, typer.Option("--seed", min=0, help="Seed of the text and the needles.")] = 0,
    recipe: RecipeOption = "default",
    overrides: SetOption = None,
    overwrite: OverwriteOption = False,
    trust_remote_code: TrustOption = False,
    as_json: JsonOption = False,
) -> None:
    """Measure a pretrained model before conversion: the attention of each head, and the damage of a window.

    One layer (or key/value head) at a time attends to its window and sinks only, while the rest does not change. Those
    with the largest damage per byte of cache are printed as a recipe's mixer.keep. Nothing is trained.
    """
    if damage not in ("layers", "heads", "none"):
        raise typer.BadParameter(f"--damage {damage}: expected layers, heads or none")
    settings = begin(recipe, overrides, output, overwrite=overwrite)
    from linearize.evaluation.progress import ProgressLine
    from linearize.jobs.probe import probe as run_probe
    from linearize.probe import Budget, ProbeOptions
    from linearize.probe.report import probe_data, recipe_text
    from linearize.probe.telling import basis, far_heads, hardest
    from linearize.recipe import SourceSpec

    options = ProbeOptions(
        text=SourceSpec(source=text),
        tokens=tokens,
        length=length,
        damage=damage,  # type: ignore[arg-type]
        budget=None if budget is None else Budget.parse(budget),
        context=context,
        seed=seed,
    )
    progress = ProgressLine()
    try:
        found = run_probe(
            model,
            settings,
            options,
            output=output,
            overwrite=overwrite,
            trust_remote_code=trust_remote_code,
            progress=progress,
            say=status,
            command=command_line(),
        )
    finally:
        progress.clear()
    if as_json:
        print_json(probe_data(found))
        return
    rows = hardest(found, _ROWS) if found.parts else far_heads(found, _ROWS)
    table = Table(*rows[0])
    for column in table.columns:
        column.justify = "right"
    for row in rows:
        table.add_row(*row.values())
    Console(width=None if sys.stdout.isatty() else 160, highlight=False).print(table)
    fragment = recipe_text(found)
    print("".join(f"# {line}\n" for line in basis(found)) if fragment is None else fragment, end="")
