"""`linearize run`: convert, fine-tune, evaluate and report from one recipe."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from linearize.cli.console import (
    JsonOption,
    OverwriteOption,
    SetOption,
    TrustOption,
    command_line,
    examples,
    print_json,
    recipe_names,
    status,
)
from linearize.cli.libraries import quiet_libraries
from linearize.runtime.files import check_free

EPILOG = examples(
    "linearize run default -o out --set model=HuggingFaceTB/SmolLM2-135M-Instruct",
    "linearize run mine.yaml -o out --set model=./model.gguf",
    "linearize run -o out --resume",
    "linearize run train -o out --set model=meta-llama/Llama-3.2-1B --data ./data",
)


def run(
    output: Annotated[Path, typer.Option("--output", "-o", metavar="DIR", help="The folder to write.")],
    recipe: Annotated[
        str | None,
        typer.Argument(
            metavar="RECIPE",
            help="A shipped recipe or a recipe file; not needed with --resume.",
            autocompletion=recipe_names,
        ),
    ] = None,
    overrides: SetOption = None,
    data: Annotated[
        Path | None,
        typer.Option("--data", metavar="DIR", help="Folder of the evaluation tasks' files; the Hub if left out."),
    ] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Continue an interrupted run.")] = False,
    overwrite: OverwriteOption = False,
    trust_remote_code: TrustOption = False,
    as_json: JsonOption = False,
) -> None:
    """Convert, fine-tune, evaluate and report in one run.

    DIR gets the folders `converted` and `finetuned`, the report as a page (report.html), and its figures as data.
    During training, checkpoints are in DIR.training beside DIR. After an interruption --resume continues from the last
    one, with the recipe saved there, so RECIPE and --set need not be repeated.
    """
    from linearize.recipe import load_recipe
    from linearize.training.workfolder import recipe_to_resume

    given = None if recipe is None else load_recipe(recipe, overrides or ())
    if resume:
        settings = recipe_to_resume(output, given, overrides or (), name=recipe, say=status)
    elif given is not None:
        settings = given
    else:
        raise typer.BadParameter("name a RECIPE, or pass --resume to go on with an interrupted run")
    check_free(output, overwrite=overwrite)
    quiet_libraries()
    from linearize.jobs.run import gains_line, run_recipe

    result = run_recipe(
        settings,
        output,
        say=status,
        data=data,
        overwrite=overwrite,
        resume=resume,
        trust_remote_code=trust_remote_code,
        command=command_line(),
    )
    if as_json:
        print_json({"output": str(output), **result.data})
        return
    Console(width=None if sys.stdout.isatty() else 160, highlight=False).print(result.table)
    print(gains_line(result.data["gains"]))
    best = output / ("finetuned" if settings.stages else "converted")
    status(f'next: linearize generate {best} "Once upon a time"')
    status(f"report: {output / 'report.html'}")
