"""`linearize finetune`: recover the quality that the conversion cost."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from linearize.cli.console import JsonOption, OverwriteOption, SetOption, TrustOption, examples, print_json, status
from linearize.cli.libraries import quiet_libraries

EPILOG = examples(
    "linearize finetune default -o tuned --set model=./converted",
    "linearize finetune mine.yaml -o tuned --set stages.0.lr=5e-4",
    "linearize finetune mine.yaml -o tuned --resume",
)


def finetune(
    recipe: Annotated[str, typer.Argument(metavar="RECIPE", help="A shipped recipe or a recipe file.")],
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", metavar="OUT", help="The folder to write; the recipe's name if left out."),
    ] = None,
    overrides: SetOption = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on with an interrupted run from its last checkpoint.")
    ] = False,
    overwrite: OverwriteOption = False,
    trust_remote_code: TrustOption = False,
    as_json: JsonOption = False,
) -> None:
    """Train a model by a recipe's stages; the result is merged and ready to load.

    The recipe's `model` is a converted folder, or a model that is converted first. While training runs, checkpoints and
    metrics.jsonl are in OUT.training beside OUT; with an interruption they stay, and --resume goes on from them.
    """
    quiet_libraries()
    from linearize.conversion.output import check_free, staged_folder
    from linearize.errors import RecipeError
    from linearize.recipe import load_recipe
    from linearize.training.finetune import finetune as train
    from linearize.training.finetune import work_folder, write_result

    settings = load_recipe(recipe, overrides or ())
    if not settings.stages:
        raise RecipeError(
            f"{recipe}: has no stages, so there is nothing to train; see `linearize recipes show default`"
        )
    target = output or Path(Path(recipe).stem)
    check_free(target, overwrite=overwrite)
    with work_folder(target, settings, resume=resume) as work:
        result = train(settings, work, say=status, resume=resume, trust_remote_code=trust_remote_code)
        with staged_folder(target, overwrite=overwrite) as folder:
            write_result(folder, result, work, target.name)
    if as_json:
        print_json({"output": str(target), "stages": result.stages})
        return
    print(target)
    status(f"next: linearize eval {target} --baseline teacher,window")
