"""`linearize finetune`: train a converted model to recover the quality lost by the conversion."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from linearize.cli.console import (
    JsonOption,
    OverwriteOption,
    RecipeArgument,
    SetOption,
    TeacherOption,
    TrustOption,
    examples,
    print_json,
    status,
)
from linearize.cli.launching import AccelerateOption, LaunchOption, launched
from linearize.cli.libraries import quiet_libraries
from linearize.cli.memory import GPUS, memory_facts, show_memory

EPILOG = examples(
    "linearize finetune train -o tuned --set model=./converted",
    "linearize finetune mine.yaml -o tuned --set stages.0.lr=5e-4",
    "linearize finetune mine.yaml -o tuned --resume",
    "linearize finetune mine.yaml -o tuned --teacher HuggingFaceTB/SmolLM2-135M-Instruct",
    "linearize finetune mine.yaml -o tuned --launch 8 --shard",
)


def finetune(
    recipe: RecipeArgument,
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", metavar="OUT", help="The folder to write; the recipe's name if left out."),
    ] = None,
    overrides: SetOption = None,
    teacher: TeacherOption = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Continue an interrupted run from its last checkpoint.")
    ] = False,
    launch: LaunchOption = None,
    accelerate_config: AccelerateOption = None,
    shard: Annotated[
        bool, typer.Option("--shard", help="Split weights, gradients and optimizer among the processes (FSDP2).")
    ] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the memory of each stage, and stop.")] = False,
    gpus: Annotated[
        int | None,
        typer.Option(
            "--gpus", metavar="N", min=1, help=f"Number of GPUs for --dry-run: as many as are launched, or {GPUS}."
        ),
    ] = None,
    overwrite: OverwriteOption = False,
    trust_remote_code: TrustOption = False,
    as_json: JsonOption = False,
) -> None:
    """Train a model by a recipe's stages; the result is merged and ready to load.

    The recipe's `model` is a converted folder, or a model that is converted first. During training, checkpoints and
    metrics.jsonl are in OUT.training beside OUT. After an interruption --resume continues from them, with the recipe
    saved there, so --set need not be repeated.

    Several processes share the rows of each step; the losses equal those of one process with the same recipe.
    """
    from linearize.jobs.checks import recipe_to_train
    from linearize.runtime import processes
    from linearize.runtime.files import check_free
    from linearize.training.workfolder import finished_stages

    target, first = output or Path(Path(recipe).stem), processes.is_first()
    if resume and not overwrite and (stages := finished_stages(target)):
        if first:
            status(f"{target}: this run is finished, so there is nothing to resume")
            _show_result(target, stages, as_json)
        return
    # The job checks this too, but only after importing torch, which takes seconds.
    settings = recipe_to_train(recipe, overrides or (), teacher=teacher)
    if not dry_run and first:
        check_free(target, overwrite=overwrite)
    if not dry_run and (launch is not None or accelerate_config is not None):
        raise typer.Exit(launched(launch, accelerate_config))
    quiet_libraries()
    if dry_run and not first:
        return
    from linearize.jobs.finetune import finetune as train
    from linearize.jobs.finetune import plan_finetune

    if dry_run:
        configured = None if accelerate_config is None else processes.asked_for(accelerate_config)
        started = processes.count() if processes.count() > 1 else None
        counted = gpus or launch or configured or started or GPUS
        taken = plan_finetune(settings, counted, trust_remote_code=trust_remote_code)
        if as_json:
            print_json(memory_facts(taken))
        else:
            show_memory(settings, taken, counted)
        return
    result = train(
        recipe,
        target,
        teacher=teacher,
        overrides=overrides or (),
        resume=resume,
        overwrite=overwrite,
        shard=shard,
        trust_remote_code=trust_remote_code,
        say=status,
    )
    if not first:
        return
    _show_result(target, result.stages, as_json)
    if not as_json:
        status(f"next: linearize eval {target}")


def _show_result(target: Path, stages: list[dict[str, Any]], as_json: bool) -> None:
    if as_json:
        print_json({"output": str(target), "stages": stages})
    else:
        print(target)
