"""`linearize convert`: choose the layers that keep softmax, swap the attention, calibrate, and write the checkpoint."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from linearize.calibration.calibrate import Calibration, calibrate, calibration_text, deciding_needles
from linearize.calibration.select import put_fitted, select
from linearize.calibration.telling import calibration_data, calibration_lines, calibration_text_report
from linearize.calibration.weights import FileWeights, Weights
from linearize.checkpoint.write import SHARD_BYTES, base_record, write_checkpoint
from linearize.conversion.choices import selects
from linearize.conversion.streaming import Streamer
from linearize.conversion.swap import check_convertible, check_reach, convert_model
from linearize.data.load import reserved_tokens
from linearize.errors import ModelError
from linearize.jobs.checks import quiet, read_recipe
from linearize.jobs.inspect import convertible
from linearize.model.positions import rotary_notes
from linearize.probe.report import probe_data
from linearize.recipe import SELF
from linearize.runtime.files import check_space, staged_folder
from linearize.runtime.memory import nbytes
from linearize.sources.limits import check_length, context_of, vocabulary_warning
from linearize.sources.source import find_source, has_tokenizer, load_config, load_model, load_tokenizer
from linearize.sources.weightfiles import NotStreamable

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from torch import Tensor
    from transformers import PreTrainedModel

    from linearize.data.rows import TrainingData
    from linearize.model import LinearizedForCausalLM
    from linearize.probe import Probe
    from linearize.recipe import Recipe
    from linearize.sources.source import Source


@dataclass
class Start:
    """A converted model before any training.

    Attributes:
        recipe: the recipe, with the chosen layers or heads named in it.
        probe, why: the measurement behind that choice, and its reasons in lines; None and empty without a choice.
        calibration: None if the recipe has no `calibrate` section.
        chats: True if the tokenizer has a chat template.
    """

    model: LinearizedForCausalLM
    recipe: Recipe
    probe: Probe | None = None
    why: list[str] = field(default_factory=list)
    calibration: Calibration | None = None
    chats: bool = False

    @property
    def record(self) -> dict[str, Any]:
        """The `start` record in `linearize.json`."""
        told: dict[str, Any] = {}
        if self.why:
            told["selection"] = self.why
        if self.calibration is not None:
            told["calibration"] = calibration_lines(self.calibration)
        return told

    def write(self, folder: Path) -> None:
        """Write `selection.json`, `calibration.json` and `calibration.md` into `folder`, if it has them."""
        if self.probe is not None:
            _write_json(folder / "selection.json", probe_data(self.probe))
        if self.calibration is not None:
            _write_json(folder / "calibration.json", calibration_data(self.calibration))
            (folder / "calibration.md").write_text(calibration_text_report(self.calibration), encoding="utf-8")


def convert(
    model: str | Path,
    output: str | Path,
    recipe: str | Path | Recipe = "default",
    *,
    overrides: Sequence[str] = (),
    overwrite: bool = False,
    trust_remote_code: bool = False,
    say: Callable[[str], None] = quiet,
) -> LinearizedForCausalLM:
    """Convert a pretrained model by a recipe's mixer section, calibrate it if the recipe asks for it, and write it.

    Args:
        model: the model to convert.
        output: the folder to write.
        recipe: a shipped recipe's name, a file, or a `Recipe`.
        overrides: changes of single keys, such as `mixer.window=128`; `--set` on the command line.
        overwrite: replace the output if it exists.
        trust_remote_code: run Python code from the model's repository.
        say: called with each progress line.

    Returns:
        the converted model, as written.

    Raises:
        ModelError: the model cannot be read or converted.
        RecipeError: the recipe is not valid, or does not fit the model.
        OutputError: the output cannot be written.
    """
    start = run_convert(
        model,
        output,
        recipe,
        overrides=overrides,
        overwrite=overwrite,
        trust_remote_code=trust_remote_code,
        say=say,
    )
    converted: Any = start.model
    if converted.device.type == "meta":  # the weights were streamed from file to file
        converted = load_model(find_source(str(output)))
    return named_after(converted, output)


def run_convert(
    model: str | Path,
    output: str | Path,
    recipe: str | Path | Recipe = "default",
    *,
    overrides: Sequence[str] = (),
    overwrite: bool = False,
    trust_remote_code: bool = False,
    shard_bytes: int = SHARD_BYTES,
    workers: int = 1,
    say: Callable[[str], None] = quiet,
) -> Start:
    """`convert` with the additional options of `convert_into`; returns its `Start`."""
    settings, target = read_recipe(recipe, overrides), Path(output)
    source, _ = convertible(model, target, settings, overwrite=overwrite, trust_remote_code=trust_remote_code)
    with staged_folder(target, overwrite=overwrite) as folder:
        say(f"converting {source.name}")
        return convert_into(source, settings, folder, say=say, shard_bytes=shard_bytes, workers=workers)


def named_after(model: LinearizedForCausalLM, output: str | Path) -> LinearizedForCausalLM:
    """Set the model's name as `from_pretrained(output)` does, because peft records it as an adapter's base."""
    model.name_or_path = model.config.name_or_path = str(output)
    return model


def prepares(recipe: Recipe) -> bool:
    """True if a conversion by `recipe` needs more than the swap."""
    return recipe.calibrate is not None or selects(recipe)


def tokenizer_for(source: Source, recipe: Recipe, config: Any, *, say: Callable[[str], None]) -> Any:
    """Load the tokenizer of a model to convert; None if it has none and the conversion reads no text.

    Args:
        config: the model's configuration.
        say: called with a warning if there is no tokenizer, or if it has more tokens than the embedding has rows.

    Raises:
        ModelError: the tokenizer is missing and the conversion reads text, or it cannot be read.
    """
    if not has_tokenizer(source):
        if prepares(recipe):
            raise ModelError(
                f"{source.name}: has no tokenizer (no tokenizer.json), and this recipe measures the model on text; add "
                "it, or take the recipe window-gla"
            )
        say(f"{source.name}: has no tokenizer, so the result has none; finetune, eval and generate need it")
        return None
    tokenizer = load_tokenizer(source)
    if warning := vocabulary_warning(tokenizer, config, source.name):
        say(warning)
    return tokenizer


def make_start(
    source: Source, recipe: Recipe, teacher: PreTrainedModel, tokenizer: Any, *, say: Callable[[str], None]
) -> Start:
    """Convert `teacher` in place by `recipe.mixer`, with layers chosen by `select` if needed, and calibrate it.

    Raises:
        LinearizeError: the recipe does not fit the model, or its text cannot be read.
    """
    text = None
    check_reach(recipe, teacher.config)
    if recipe.calibrate is not None:
        recipe = _within_context(recipe, teacher, say=say)
        # Before the conversion changes the teacher, because it may have to generate the text.
        text = _text(recipe, tokenizer, teacher, say=say)
    probe, why = None, list[str]()
    fitted: dict[int, dict[str, Tensor]] = {}
    if selects(recipe):
        recipe, probe, why, fitted = select(source, recipe, teacher, tokenizer, say=say)
        for line in why:
            say(f"select: {line}")
    start = Start(convert_model(teacher, recipe.mixer), recipe, probe, why)
    put_fitted(start.model, fitted)
    if text is not None:
        start.calibration = _calibrated(Weights(start.model), recipe, text, tokenizer, say=say)
    return start


def _within_context(recipe: Recipe, model: Any, *, say: Callable[[str], None]) -> Recipe:
    """`recipe` with rows of calibration no longer than the context that the model was trained for.

    Raises:
        DataError: the rows are longer than a table of learned positions.
    """
    spec, context = recipe.calibrate, context_of(model.config)
    assert spec is not None  # noqa: S101 - for the type checker; the callers have looked
    check_length(model, spec.length, "calibrate.length")
    if context is None or spec.length <= context:
        return recipe
    say(f"calibrate: rows of {context:,} tokens, the model's context, for calibrate.length {spec.length:,} exceeds it")
    return recipe.model_copy(update={"calibrate": spec.model_copy(update={"length": context})})


def _text(
    recipe: Recipe, tokenizer: Any, teacher: PreTrainedModel | None, *, say: Callable[[str], None]
) -> TrainingData:
    assert recipe.calibrate is not None  # noqa: S101 - the caller has looked
    reserved = reserved_tokens(recipe.stages)
    return calibration_text(recipe.calibrate, tokenizer, teacher, seed=recipe.seed, say=say, reserved=reserved)


def _calibrated(
    weights: Weights, recipe: Recipe, text: TrainingData, tokenizer: Any, *, say: Callable[[str], None]
) -> Calibration:
    assert recipe.calibrate is not None  # noqa: S101 - the caller has looked
    needles = deciding_needles(weights.model, tokenizer, text.held_out, recipe.seed)
    found = calibrate(weights, text, recipe.calibrate, needles=needles, seed=recipe.seed, say=say)
    for line in calibration_lines(found):
        say(f"calibrate: {line}")
    return found


def convert_into(
    source: Source,
    recipe: Recipe,
    folder: Path,
    *,
    say: Callable[[str], None] = lambda line: None,
    teacher: PreTrainedModel | None = None,
    tokenizer: Any = None,
    shard_bytes: int = SHARD_BYTES,
    workers: int = 1,
) -> Start:
    """Convert `source` by `recipe` and write the checkpoint into `folder`, which must exist.

    Weights in safetensors files are streamed from file to file and calibrated block by block; the returned model is
    then on the meta device. The whole model is loaded instead if it has to choose layers or generate text.

    Args:
        teacher, tokenizer: those of `source`, if already loaded; the teacher is converted in place.
        shard_bytes: the maximum size of a file of weights.
        workers: the number of files written in parallel when weights are streamed.

    Raises:
        LinearizeError: the model, the recipe, the text or the output is not usable.
    """
    config = load_config(source) if teacher is None else teacher.config
    check_convertible(config, source, recipe.mixer)
    for line in rotary_notes(config):
        say(f"{source.name}: {line}")
    if tokenizer is None:
        tokenizer = tokenizer_for(source, recipe, config, say=say)
    chats = bool(getattr(tokenizer, "chat_template", None))
    if teacher is None:
        if (reason := _needs_memory(recipe)) is not None:
            say(f"{source.name}: converted in memory, not file by file: {reason}")
        elif (streamer := open_files(source, recipe, shard_bytes=shard_bytes, say=say)) is not None:
            start = _convert_files(source, streamer, recipe, folder, tokenizer, workers=workers, say=say)
            start.chats = chats
            return start
    teacher = teacher or load_model(source, dtype=recipe.dtype)
    check_convertible(teacher.config, source)
    check_space(folder, nbytes(teacher))
    revision = getattr(teacher.config, "_commit_hash", None)
    start = make_start(source, recipe, teacher, tokenizer, say=say)
    start.chats = chats
    start.write(folder)
    base = base_record(source, revision)
    write_checkpoint(folder, start.model, tokenizer, start.recipe, base, start=start.record, shard_size=shard_bytes)
    return start


def open_files(source: Source, recipe: Recipe, *, shard_bytes: int, say: Callable[[str], None]) -> Streamer | None:
    """A streaming conversion of `source` by `recipe.mixer`: the model is on the meta device, and its weights can be
    streamed from file to file or calibrated block by block.

    Args:
        shard_bytes: the maximum size of a written file of weights.
        say: called with the reason if weights cannot be streamed.

    Returns:
        None if the weights cannot be streamed.

    Raises:
        ModelError: the model cannot be read or converted.
    """
    check_convertible(load_config(source), source)
    try:
        return Streamer(source, recipe.dtype, lambda model: convert_model(model, recipe.mixer), most=shard_bytes)
    except NotStreamable as reason:
        if source.kind != "gguf":
            say(f"{source.name}: converted in memory, not file by file: {reason}")
        return None


def _needs_memory(recipe: Recipe) -> str | None:
    """The reason why a conversion by `recipe` needs the whole model; None if single blocks are enough."""
    if selects(recipe):
        return "which layers keep or see more is measured on the whole model"
    if recipe.calibrate is not None and recipe.calibrate.source == SELF:
        return "it writes the text that it is calibrated on (calibrate.source: self)"
    return None


def _convert_files(
    source: Source,
    streamer: Streamer,
    recipe: Recipe,
    folder: Path,
    tokenizer: Any,
    *,
    workers: int,
    say: Callable[[str], None],
) -> Start:
    """`convert_into` with at most one block in memory."""
    start = Start(streamer.model, recipe)
    if recipe.calibrate is None:
        digests = streamer.write(folder, workers=workers)
    else:
        check_reach(recipe, streamer.model.config.text_config)
        start.recipe = recipe = _within_context(recipe, streamer.model, say=say)
        # On the disk of the checkpoint, because the system's temporary folder is often in memory.
        with TemporaryDirectory(prefix=".fitted-", dir=folder) as fitted:
            weights = FileWeights(streamer, Path(fitted))
            check_space(folder, streamer.nbytes + weights.fitted_nbytes)
            text = _text(recipe, tokenizer, None, say=say)
            start.calibration = _calibrated(weights, recipe, text, tokenizer, say=say)
            digests = streamer.write(folder, workers=workers, fitted=weights.fitted)
    start.write(folder)
    base = base_record(source, streamer.revision)
    write_checkpoint(folder, streamer.model, tokenizer, recipe, base, start=start.record, written=digests)
    return start


def _write_json(path: Path, data: dict[str, Any]) -> None:
    path.write_text(json.dumps(data, indent=1, ensure_ascii=False, allow_nan=False) + "\n", encoding="utf-8")
