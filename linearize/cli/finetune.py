"""`linearize finetune`: recover the quality that the conversion cost."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

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
from linearize.cli.memory import GPUS, memory_facts, show_memory, stages_memory

if TYPE_CHECKING:
    from linearize.recipe import Recipe

EPILOG = examples(
    "linearize finetune default -o tuned --set model=./converted",
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
        bool, typer.Option("--resume", help="Go on with an interrupted run from its last checkpoint.")
    ] = False,
    launch: LaunchOption = None,
    accelerate_config: AccelerateOption = None,
    shard: Annotated[
        bool, typer.Option("--shard", help="Split weights, gradients and optimizer among the processes (FSDP2).")
    ] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what each stage takes per GPU, and stop.")] = False,
    gpus: Annotated[
        int | None,
        typer.Option(
            "--gpus", metavar="N", min=1, help=f"GPUs that --dry-run counts with: as many as are launched, or {GPUS}."
        ),
    ] = None,
    overwrite: OverwriteOption = False,
    trust_remote_code: TrustOption = False,
    as_json: JsonOption = False,
) -> None:
    """Train a model by a recipe's stages; the result is merged and ready to load.

    The recipe's `model` is a converted folder, or a model that is converted first. While training runs, checkpoints and
    metrics.jsonl are in OUT.training beside OUT; with an interruption they stay, and --resume goes on from them.
    It takes the recipe that is saved there: --set need not be repeated.

    Several processes share the rows of each step: losses are those of one, and the recipe is the same.
    """
    from linearize.conversion.output import check_free, staged_folder
    from linearize.errors import RecipeError
    from linearize.recipe import load_recipe
    from linearize.training import processes
    from linearize.training.workfolder import finished_stages, recipe_to_resume, shared_work_folder

    target = output or Path(Path(recipe).stem)
    if resume and not overwrite and (stages := finished_stages(target)):
        if processes.is_first():
            status(f"{target}: this run is finished, so there is nothing to resume")
            _show_result(target, stages, as_json)
        return
    settings = load_recipe(recipe, overrides or ())
    if teacher is not None:
        settings = settings.model_copy(update={"teacher": teacher})
    if not settings.stages:
        raise RecipeError(
            f"{recipe}: has no stages, so there is nothing to train; see `linearize recipes show default`"
        )
    if not dry_run and processes.is_first():
        check_free(target, overwrite=overwrite)
    if not dry_run and (launch is not None or accelerate_config is not None):
        raise typer.Exit(launched(launch, accelerate_config))
    quiet_libraries()
    if dry_run:
        if processes.is_first():
            configured = None if accelerate_config is None else processes.asked_for(accelerate_config)
            started = processes.count() if processes.count() > 1 else None
            _show_memory(settings, gpus or launch or configured or started or GPUS, trust_remote_code, as_json)
        return
    from linearize.jobs.finetune import finetune as train
    from linearize.jobs.result import write_result

    say = status if processes.is_first() else _nothing
    if resume:
        settings = recipe_to_resume(target, settings, overrides or (), name=recipe, say=say)
    shard = processes.join() or shard
    with shared_work_folder(target, settings, resume=resume) as work:
        result = train(settings, work, say=say, resume=resume, trust_remote_code=trust_remote_code, shard=shard)
        processes.leave()
        if not processes.is_first():
            return
        with staged_folder(target, overwrite=overwrite) as folder:
            write_result(folder, result, work, target.name)
    _show_result(target, result.stages, as_json)
    if not as_json:
        status(f"next: linearize eval {target} --baseline teacher,window")


def _show_result(target: Path, stages: list[dict[str, Any]], as_json: bool) -> None:
    if as_json:
        print_json({"output": str(target), "stages": stages})
    else:
        print(target)


def _show_memory(settings: Recipe, gpus: int, trust_remote_code: bool, as_json: bool) -> None:
    from linearize.conversion.convert import check_reach
    from linearize.conversion.source import find_source, load_config
    from linearize.errors import RecipeError
    from linearize.jobs.finetune import check_dtype

    check_dtype(settings)
    if settings.model is None:
        raise RecipeError("the recipe names no model; add `model:` or pass --set model=ID_OR_PATH")
    source = find_source(settings.model, trust_remote_code=trust_remote_code)
    if not source.is_converted:
        check_reach(settings, load_config(source))
    stages = stages_memory(source, settings, gpus)
    if as_json:
        print_json(memory_facts(stages))
    else:
        show_memory(settings, stages, gpus)


def _nothing(_: str) -> None:
    """What all but the first of several processes say."""
