"""`linearize finetune`: train a model by a recipe and write a merged, loadable checkpoint."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from linearize.checkpoint.provenance import sound_provenance
from linearize.conversion.swap import check_reach
from linearize.errors import OutputError
from linearize.jobs.checks import model_of, quiet, recipe_to_train
from linearize.jobs.convert import named_after
from linearize.jobs.result import FinetuneResult, write_result
from linearize.jobs.stages import run_stages
from linearize.recipe import Recipe, load_recipe
from linearize.runtime import processes
from linearize.runtime.files import check_free, staged_folder
from linearize.sources.source import find_source, load_config, load_model, load_tokenizer
from linearize.training.adapters import check_dtype
from linearize.training.memory import stages_memory
from linearize.training.workfolder import finished_stages, recipe_to_resume, shared_work_folder

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from linearize.training.memory import Engine, TrainingMemory


def finetune(
    recipe: str | Path | Recipe,
    output: str | Path,
    *,
    model: str | Path | None = None,
    teacher: str | Path | None = None,
    overrides: Sequence[str] = (),
    resume: bool = False,
    overwrite: bool = False,
    shard: bool = False,
    trust_remote_code: bool = False,
    say: Callable[[str], None] = quiet,
) -> FinetuneResult:
    """Train a model by a recipe's stages, and write it merged and ready to load.

    Args:
        recipe: a shipped recipe's name, a file, or a `Recipe`.
        output: the folder to write; during training, checkpoints and metrics.jsonl are in a work folder beside it.
        model: the model to train, converted or not, instead of the recipe's `model`.
        teacher: the pretrained model, instead of the recipe's `teacher` or the base of the converted model.
        overrides: changes of single keys, such as `stages.0.lr=5e-4`.
        resume: continue an interrupted run from its last checkpoint, with the recipe saved in it; a finished run is
            loaded.
        overwrite: replace the output if it exists.
        shard: split weights, gradients and optimizer state among the processes (FSDP2); see `run_stages`.
        trust_remote_code: run Python code from the model's repository.
        say: called with each progress line.

    Returns:
        the trained model, its tokenizer, and a record of each stage.

    Raises:
        LinearizeError: the recipe, the model, the data or the output is not usable.
    """
    target, first = Path(output), processes.is_first()
    say = say if first else quiet
    if resume and not overwrite and finished_stages(target):
        say(f"{target}: this run is finished, so there is nothing to resume")
        return _finished(target)
    settings = recipe_to_train(recipe, overrides, model=model, teacher=teacher)
    if first:
        check_free(target, overwrite=overwrite)
    shard = processes.join() or shard
    if resume and isinstance(recipe, (str, Path)):
        kept = partial(recipe_to_resume, target, settings, overrides, name=str(recipe), say=say)
        settings = processes.from_the_first(kept)
        _check_named(target, settings, model=model, teacher=teacher)
    with shared_work_folder(target, settings, resume=resume) as work:
        result = run_stages(settings, work, say=say, resume=resume, trust_remote_code=trust_remote_code, shard=shard)
        processes.leave()
        if first:
            with staged_folder(target, overwrite=overwrite) as folder:
                write_result(folder, result, work, target.name)
    named_after(result.model, target)
    return result


def plan_finetune(recipe: Recipe, gpus: int, *, trust_remote_code: bool = False) -> list[dict[Engine, TrainingMemory]]:
    """The memory of each stage by engine, on each of `gpus` GPUs; nothing is trained or written."""
    check_dtype(recipe)
    source = find_source(model_of(recipe), trust_remote_code=trust_remote_code)
    config = load_config(source)
    if not source.is_converted:
        check_reach(recipe, config)
    return stages_memory(config, recipe, gpus)


def _check_named(target: Path, recipe: Recipe, **named: str | Path | None) -> None:
    """Raises:
    OutputError: the unfinished run has another model or teacher than the given one.
    """
    for key, value in named.items():
        own = getattr(recipe, key)
        if value is not None and str(value) != own:
            raise OutputError(
                f"{target}: the unfinished run has {key} {own}, not {value}; leave {key} out to resume it, or begin "
                "anew with another output"
            )


def _finished(target: Path) -> FinetuneResult:
    """The result of the finished run that wrote `target`."""
    source, recipe = find_source(str(target)), load_recipe(str(target / "recipe.yaml"))
    told, model = sound_provenance(source), cast("Any", load_model(source))
    named_after(model, target)
    return FinetuneResult(model, load_tokenizer(source), None, None, recipe, told["stages"], told.get("start", {}))
