"""The commands as functions, with the same names and options: `linearize.verify(...)` is `linearize verify`.

Everything public is imported from `linearize` itself, which loads this module when one of the functions is first used.
Models are named as on the command line: a Hub id, a folder, or a GGUF file.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from linearize.conversion.source import find_source, has_tokenizer, load_config, load_model, load_tokenizer
from linearize.errors import DataError, ModelError, RecipeError
from linearize.recipe import Recipe, load_recipe

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from linearize.evaluation.results import Results
    from linearize.generation import Continuation
    from linearize.hub.export import Exported
    from linearize.hub.push import Parcel
    from linearize.hub.upload import Upload
    from linearize.jobs.result import FinetuneResult
    from linearize.model import LinearizedForCausalLM
    from linearize.state import State
    from linearize.verification import Verification


def _quiet(_: str) -> None:
    """Says nothing."""


def _recipe(recipe: str | Path | Recipe, overrides: Sequence[str]) -> Recipe:
    if isinstance(recipe, Recipe):
        if overrides:
            raise RecipeError("overrides go with a recipe's name or file, not with one that was read already")
        return recipe
    return load_recipe(str(recipe), overrides)


def _written(model: LinearizedForCausalLM, output: str | Path) -> LinearizedForCausalLM:
    """`model` with the name of its folder, as `from_pretrained(output)` sets it; peft names an adapter's base by it."""
    model.name_or_path = model.config.name_or_path = str(output)
    return model


def convert(
    model: str | Path,
    output: str | Path,
    recipe: str | Path | Recipe = "default",
    *,
    overrides: Sequence[str] = (),
    overwrite: bool = False,
    trust_remote_code: bool = False,
    say: Callable[[str], None] = _quiet,
) -> LinearizedForCausalLM:
    """Converts a pretrained model by a recipe's mixer section, calibrated where it says so, and writes the checkpoint.

    Args:
        model: what to convert.
        output: the folder to write.
        recipe: a shipped recipe's name, a file, or a recipe that was read already.
        overrides: changes of single keys, such as `mixer.window=128`; `--set` on the command line.
        overwrite: replace the output if it exists.
        trust_remote_code: run Python code that the model brings.
        say: gets lines for the person at the terminal.

    Returns:
        the converted model, as it was written.

    Raises:
        ModelError: the model cannot be read or converted.
        RecipeError: the recipe is not valid, or does not fit the model.
        OutputError: the output cannot be written.
    """
    from linearize.conversion.convert import check_convertible, check_reach
    from linearize.conversion.output import staged_folder
    from linearize.jobs.convert import convert as _convert

    settings = _recipe(recipe, overrides)
    source = find_source(str(model), trust_remote_code=trust_remote_code)
    config = load_config(source)
    check_convertible(config, source, settings.mixer)
    check_reach(settings, config)
    with staged_folder(Path(output), overwrite=overwrite) as folder:
        converted = _convert(source, settings, folder, say=say).model
    if converted.device.type == "meta":  # its weights went from file to file
        read: Any = load_model(find_source(str(output)))
        converted = read
    return _written(converted, output)


def finetune(
    recipe: str | Path | Recipe,
    output: str | Path,
    *,
    model: str | Path | None = None,
    teacher: str | Path | None = None,
    overrides: Sequence[str] = (),
    resume: bool = False,
    overwrite: bool = False,
    trust_remote_code: bool = False,
    say: Callable[[str], None] = _quiet,
) -> FinetuneResult:
    """Trains a model by a recipe's stages, and writes it merged and ready to load.

    Args:
        recipe: a shipped recipe's name, a file, or a recipe that was read already.
        output: the folder to write; while training runs, checkpoints and metrics.jsonl are beside it.
        model: what to train, converted or not, instead of the recipe's `model`.
        teacher: the pretrained model, instead of the recipe's `teacher` or what the model was converted from.
        overrides: changes of single keys, such as `stages.0.lr=5e-4`.
        resume: go on with an interrupted run from its last checkpoint.
        overwrite: replace the output if it exists.
        trust_remote_code: run Python code that the model brings.
        say: gets lines for the person at the terminal.

    Returns:
        the trained model, its tokenizer, and a record of each stage.

    Raises:
        LinearizeError: the recipe, the model, the data or the output is not usable.
    """
    from linearize.conversion.output import check_free, staged_folder
    from linearize.jobs.finetune import finetune as _finetune
    from linearize.jobs.result import write_result
    from linearize.training.workfolder import work_folder

    settings, target = _recipe(recipe, overrides), Path(output)
    if model is not None:
        settings = settings.model_copy(update={"model": str(model)})
    if teacher is not None:
        settings = settings.model_copy(update={"teacher": str(teacher)})
    if not settings.stages:
        raise RecipeError("the recipe has no stages, so there is nothing to train")
    check_free(target, overwrite=overwrite)
    with work_folder(target, settings, resume=resume) as work:
        result = _finetune(settings, work, say=say, resume=resume, trust_remote_code=trust_remote_code)
        with staged_folder(target, overwrite=overwrite) as folder:
            write_result(folder, result, work, target.name)
    _written(result.model, target)
    return result


def evaluate(
    model: str | Path,
    *,
    suites: Sequence[str] = (),
    tasks: Sequence[str] = (),
    baselines: Sequence[str] = (),
    teacher: str | Path | None = None,
    limit: int | None = None,
    seed: int = 0,
    lengths: Sequence[int] = (),
    samples: int | None = None,
    data: str | Path | None = None,
    report: str | Path | None = None,
    fresh: bool = False,
    batch_size: int = 8,
    dtype: str = "auto",
    trust_remote_code: bool = False,
    say: Callable[[str], None] = _quiet,
) -> Results:
    """Scores a model, converted or not, beside its teacher and baselines that cost no training; `linearize eval`.

    Args:
        model: what to score.
        suites: names of whole suites: `core`, `mmlu`, `recall`, `generation`, `length`.
        tasks: names of single tasks, and `held_out`. With no suites either: the rows that fine-tuning held out where
            the folder has some, otherwise the suite `core`.
        baselines: of `teacher`, `window`, `window_bytes`, `no_recurrence`, `no_window`, `neither`; or `all`.
        teacher: the pretrained model, if not what the model was converted from.
        limit: score so many items of each task, drawn at random.
        seed: of the limit, and of tasks that draw their items.
        lengths: tokens of the texts, for tasks that sweep lengths.
        samples: items of each kind, for tasks that make their items.
        data: the folder of the tasks' files; None reads them from the Hub.
        report: a folder to write pages, plots and results.json to.
        fresh: score everything again; results of single items are kept otherwise.
        batch_size: sequences per forward pass.
        dtype: `auto`, `float32`, `bfloat16`, `float16`, or `int8` on a CPU.
        trust_remote_code: run Python code that the model brings.
        say: gets lines for the person at the terminal.

    Returns:
        by system its scores, with their standard errors and items.

    Raises:
        DataError: an unknown suite, task or baseline, or data that cannot be read.
        ModelError: a model that cannot be read, or gives results that are not finite; or no teacher where a baseline or
            a task needs it.
        OutputError: results cannot be kept, or another job is writing the report.
    """
    from linearize.conversion.claims import claimed
    from linearize.evaluation.report import write_report
    from linearize.evaluation.store import Store
    from linearize.evaluation.suites import SuiteOptions
    from linearize.evaluation.systems import evaluate as _evaluate

    folder = None if report is None else Path(report)
    with claimed(folder):
        results = _evaluate(
            find_source(str(model), trust_remote_code=trust_remote_code),
            tasks,
            suites=suites,
            baselines=baselines,
            teacher=None if teacher is None else str(teacher),
            options=SuiteOptions(
                data=None if data is None else Path(data), lengths=tuple(lengths), samples=samples, seed=seed
            ),
            limit=limit,
            batch_size=batch_size,
            dtype=dtype,
            store=Store(fresh=fresh),
            report=folder,
            say=say,
        )
        if folder is not None:
            write_report(results, folder)
    return results


def generate(
    model: str | Path | PreTrainedModel,
    prompt: str,
    *,
    tokenizer: PreTrainedTokenizerBase | None = None,
    state: State | None = None,
    chat: bool = False,
    max_new_tokens: int = 200,
    temperature: float = 0.0,
    top_p: float = 1.0,
    seed: int = 0,
    dtype: str = "auto",
    trust_remote_code: bool = False,
    write: Callable[[str], None] | None = None,
) -> Continuation:
    """Continues a prompt, and tells how fast and in how much memory.

    Args:
        model: which one, or the model itself where it is loaded already.
        tokenizer: of a model that is loaded already.
        prompt: the text to continue.
        state: of a text that the prompt continues; the prompt may be empty then.
        chat: put the prompt into the model's chat template.
        max_new_tokens: stop after so many; 0 reads and writes nothing, for the sake of the state.
        temperature: 0 takes the most likely token, otherwise tokens are sampled.
        top_p: sample among the most likely, up to this mass.
        seed: of the sampling.
        dtype: `auto`, `float32`, `bfloat16`, `float16`, or `int8` on a CPU.
        trust_remote_code: run Python code that the model brings.
        write: called with each piece of new text as soon as it is there.

    Returns:
        the new text, speed, memory and the state after it.

    Raises:
        DataError: the prompt has no tokens.
        ModelError: the model cannot be read, or has no tokenizer, or no chat template that was asked for.
        StateError: a state, or reading alone, is asked of a model that was not converted.
    """
    from linearize.conversion.convert import open_model
    from linearize.generation import continue_text

    loaded: Any = model
    if isinstance(model, (str, Path)):
        loaded, own, _ = open_model(str(model), dtype=dtype, trust_remote_code=trust_remote_code)
        tokenizer = tokenizer or own
    if tokenizer is None:
        raise DataError("a model that is loaded already needs its tokenizer: generate(model, prompt, tokenizer=...)")
    if chat and not getattr(tokenizer, "chat_template", None):
        raise ModelError("the tokenizer has no chat template; leave chat out")
    return continue_text(
        loaded,
        tokenizer,
        prompt,
        state=state,
        chat=chat,
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        top_p=top_p,
        seed=seed,
        write=write,
    )


def verify(
    model: str | Path,
    *,
    tokens: int | None = None,
    steps: int | None = None,
    dtype: str = "auto",
    trust_remote_code: bool = False,
    tick: Callable[[str, int, int], None] | None = None,
) -> Verification:
    """Proves on a converted model that it is one function, however it is called; `failed` names what fails.

    Args:
        model: which one.
        tokens: length of the rows of random tokens; None for three of the widest window, at least 192.
        steps: single decode steps of the drift check; None for two rows' length.
        dtype: `auto`, `float32`, `bfloat16` or `float16`.
        trust_remote_code: run Python code that the model brings.
        tick: called with a check's name, the steps it has done, and how many there are.

    Raises:
        ModelError: the model cannot be read, or was not converted.
        VerificationError: `tokens` do not fill a window and its sinks.
    """
    from linearize.verification import verify as _verify

    source = find_source(str(model), trust_remote_code=trust_remote_code)
    if load_config(source).model_type != "linearized":
        raise ModelError(
            f"{source.name}: is not a converted model; convert it first: linearize convert {model} -o converted"
        )
    special = load_tokenizer(source).all_special_ids if has_tokenizer(source) else ()
    loaded: Any = load_model(source, dtype=dtype)
    return _verify(loaded, source, dtype=dtype, special=special, tokens=tokens, steps=steps, tick=tick)


def export(
    folder: str | Path,
    output: str | Path,
    *,
    name: str | None = None,
    base: str | None = None,
    licence: str | None = None,
    report: str | Path | None = None,
    dtype: str = "auto",
    weights: str | None = None,
    outliers: float | None = None,
    text: str | None = None,
    tokens: int = 8192,
    shard_size: str = "5GB",
    overwrite: bool = False,
    say: Callable[[str], None] = _quiet,
) -> Exported:
    """Writes a checkpoint as a folder that is fit to be shared: shards, carried code, a card with what was measured.

    Args:
        folder: what `convert`, `finetune` or `run` wrote.
        output: the folder to write.
        name: of the model on its card; the folder's, if left out.
        base: the Hub id of the base model, where that came from a file or a folder.
        licence: of the base model; read from it, if left out.
        report: the folder that `linearize eval --report` or `run` wrote; found by itself where `run` made `folder`.
        dtype: of the weights: `auto`, `float32`, `bfloat16` or `float16`.
        weights: `int8` or `int4`, for linear layers of integers; what that costs is measured, and said on the card.
        outliers: share of a layer's inputs that keep their weights then; 1/64 if left out.
        text: what that is measured on: a file, a data set of the Hub, or `self`, which the model writes. If left out,
            the rows that fine-tuning held out, or `self` where there are none.
        tokens: of the text; half of them are read to choose what is kept, the others measure.
        shard_size: the most that one file of weights holds.
        overwrite: replace the output if it exists.
        say: gets lines for the person at the terminal.

    Raises:
        ModelError: `folder` is no converted checkpoint.
        OutputError: the output cannot be written.
        DataError: `report` has no results, or those of another checkpoint; `weights` is unknown; or the text cannot be
            read, or is too short.
    """
    from linearize.hub.export import export as _export

    return _export(
        find_source(str(folder)),
        Path(output),
        name=name,
        base=base,
        licence=licence,
        report=None if report is None else Path(report),
        dtype=dtype,
        weights=weights,
        outliers=outliers,
        text=text,
        tokens=tokens,
        shard_size=shard_size,
        overwrite=overwrite,
        say=say,
    )


def push(
    repo: str,
    folder: str | Path,
    *,
    public: bool = False,
    force: bool = False,
    message: str | None = None,
    steps: int = 256,
    confirm: Callable[[Parcel, str, bool], None] = lambda *_: None,
    tick: Callable[[str, int, int], None] | None = None,
    say: Callable[[str], None] = _quiet,
) -> Upload:
    """Puts a checkpoint on the Hub in one commit, after it was verified.

    Args:
        repo: OWNER/NAME; who is logged in is the owner, if left out.
        folder: a checkpoint that is fit to be shared; `export` writes one.
        public: make the repository public; it is private otherwise.
        force: push though checks fail, or the folder has paths of this machine or rows of the training data.
        message: of the commit.
        steps: of the drift check of `verify`.
        confirm: called with what would be pushed, where, and whether that is private; raises to stop.
        tick: see `verify`.
        say: gets lines for the person at the terminal.

    Raises:
        HubError: the folder is not to be pushed, or the Hub does not do as asked.
        OutputError: another push to the repository is under way on this machine, or a disk is full.
    """
    from linearize.hub.push import push as _push

    return _push(
        Path(folder),
        repo,
        failed=lambda: verify(folder, steps=steps, tick=tick).failed,
        public=public,
        force=force,
        message=message,
        confirm=confirm,
        say=say,
    )
