"""`linearize export`: write a checkpoint to a folder for sharing.

The folder holds all files to load and assess the model. It leaves out local paths and rows of the training data.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from linearize.checkpoint.card import CardFacts
from linearize.checkpoint.provenance import checkpoint_digest, sound_provenance
from linearize.checkpoint.write import base_record, versions, write_checkpoint
from linearize.data.load import load_data
from linearize.data.rows import Rows
from linearize.errors import DataError, ModelError
from linearize.evaluation.results.results import FILE_NAME, read_results
from linearize.evaluation.results.telling import tell
from linearize.evaluation.rounding_cost import cost_record, cost_section, quantize
from linearize.evaluation.systems import held_out_rows
from linearize.evaluation.tasks.names import HELD_OUT
from linearize.hub.contents import Finding, local_things, shared_files
from linearize.hub.licence import licence_of
from linearize.hub.paths import Portable, is_local_path, local_paths, strings
from linearize.quantization.rounding import WEIGHTS, nbytes_after
from linearize.recipe import SELF, DataSpec, Recipe, dump_recipe, load_recipe
from linearize.report.pages import to_markdown
from linearize.runtime.files import check_space, staged_folder
from linearize.sources.source import Source, find_source, has_tokenizer, load_model, load_tokenizer

if TYPE_CHECKING:
    from collections.abc import Callable

    from linearize.evaluation.results.results import Results
    from linearize.model.quantized import Quantization

# Records of training and calibration.
_ALONG = ("metrics.jsonl", "training.svg", "calibration.md", "calibration.json", "selection.json")

_LENGTH = 512
"""Row length of the text for rounding weights, in tokens."""


@dataclass(frozen=True)
class Exported:
    """The files that an export wrote.

    Attributes:
        folder: the output folder.
        files: name -> bytes.
        base: the base model's Hub id; None if unknown.
        licence: the card's licence; empty if unknown.
        measured: the results in the card's tables; None without results.
        findings: content that a push would still refuse.
        cost: the cost of int8 or int4 weights, as in `linearize.json`; None without rounding.
    """

    folder: Path
    files: dict[str, int]
    base: str | None
    licence: dict[str, str]
    measured: Path | None
    findings: list[Finding]
    cost: dict[str, Any] | None = None


def export(
    source: Source,
    output: Path,
    *,
    name: str | None = None,
    base: str | None = None,
    licence: str | None = None,
    report: Path | None = None,
    dtype: str = "auto",
    weights: str | None = None,
    outliers: float | None = None,
    text: str | None = None,
    tokens: int = 8192,
    shard_size: int | str = "5GB",
    overwrite: bool = False,
    say: Callable[[str], None] = lambda _: None,
) -> Exported:
    """Write a copy of the checkpoint `source` to `output`; see `linearize.export` for options and errors.

    Args:
        report: results.json, or its folder; by default searched beside `source`.
        outliers: None for the default share in `quantize.WEIGHTS`.
        shard_size: maximum size of a weight file, as in `save_pretrained`.
    """
    spec = _quantization(weights, outliers)
    if not (source.kind == "folder" and source.is_converted):
        raise ModelError(f"{source.name}: is not a converted folder; convert it first: linearize convert")
    made_of, written = Path(source.reference), sound_provenance(source)
    record = _base(written.get("base", {}), base)
    shown = _report(report, source)
    as_made = load_recipe(str(made_of / "recipe.yaml"))
    trained_on = [stage["data"] for stage in written.get("stages", [])]
    portable = Portable(strings([as_made.model_dump(), written.get("base", {}).get("model"), trained_on]))
    if shown is not None and not shown.marked:
        say(f"{shown.path}: does not say which checkpoint it is of; see that it is {made_of.name}")
    recipe = _recipe(as_made, record, portable)
    rights = {"license": licence} if licence else licence_of(_bases(written.get("base", {}), base))
    with staged_folder(output, overwrite=overwrite) as folder:
        model: Any = load_model(source, dtype=dtype)
        tokenizer = load_tokenizer(source) if spec is not None or has_tokenizer(source) else None
        cost = None
        if spec is not None:
            check_space(output, nbytes_after(model, spec))  # early, because rounding and measuring take minutes
            fitted, held_out, named = _text(source, model, tokenizer, text, tokens, recipe.seed, say)
            say(f"rounding weights to int{spec.bits}, and measuring what that costs")
            cost = quantize(model, spec, fitted, held_out, portable.text(named))
        told = cost_record(spec, cost) if spec and cost else None
        say(f"writing {output}")
        for file in _ALONG:
            if (made_of / file).is_file():
                (folder / file).write_text(portable.file(made_of / file), encoding="utf-8")
        write_checkpoint(
            folder,
            model,
            tokenizer,
            recipe,
            record,
            portable.data(written.get("stages", [])),
            name or output.resolve().name,
            start=portable.data(written.get("start", {})),
            shard_size=shard_size,
            facts=CardFacts(
                rights,
                [
                    _measured(shown, str(model.dtype).removeprefix("torch."), weights) if shown else _NOT_MEASURED,
                    *([cost_section(spec, cost)] if spec and cost else ()),
                    _recipe_section(recipe),
                    _licence_section(rights),
                ],
            ),
            more={
                "versions": written.get("versions", versions()),
                "exported": versions(),
                **({"quantized": told} if told else {}),
            },
        )
        findings = local_things(folder)
        files = {file: (folder / file).stat().st_size for file in shared_files(folder)}
    return Exported(output, files, record.get("model"), rights, shown.path if shown else None, findings, told)


def _quantization(weights: str | None, outliers: float | None) -> Quantization | None:
    if weights is None:
        return None
    if weights not in WEIGHTS:
        raise DataError(f"weights {weights}: expected {' or '.join(WEIGHTS)}")
    spec = WEIGHTS[weights]
    return spec if outliers is None else replace(spec, kept=outliers)


def _text(
    source: Source, model: Any, tokenizer: Any, text: str | None, tokens: int, seed: int, say: Callable[[str], None]
) -> tuple[Rows, Rows, str]:
    """Rows to fit to, rows to measure on, and their source."""
    if text is None and (Path(source.reference) / f"{HELD_OUT}.safetensors").is_file():
        kept = held_out_rows(source)
        rows = Rows(*(kept[name] for name in ("input_ids", "labels", "position_ids"))).scored()
        rows, named = rows[: max(2, tokens // rows.input_ids.shape[1])], "rows that fine-tuning held out"
        half = len(rows) // 2
        if not half:
            raise DataError(f"{source.name}: has one held-out row, and two are needed; name a text: --text FILE")
        return rows[:half], rows[half:], named
    count = max(1, tokens // (2 * _LENGTH))
    spec = DataSpec(source=text or SELF, tokens=count * _LENGTH, held_out=count)
    found = load_data(spec, tokenizer=tokenizer, length=_LENGTH, seed=seed, teacher=lambda: model, progress=say)
    return found.train, found.held_out, "text by the model itself" if spec.source == SELF else found.source


def _base(written: dict[str, Any], base: str | None) -> dict[str, Any]:
    """The base model's record without its path: with the Hub id, or, if it is unknown, with the name only."""
    if written.get("kind") == "hub" and base is None:
        return written
    if base is None:
        return {key: value for key, value in written.items() if key != "model"}
    record = base_record(Source(base, "hub"), None)
    return record if written.get("kind") == "hub" else {**record, "read_from": written.get("name")}


def _bases(written: dict[str, Any], base: str | None) -> list[Source]:
    """Models whose card may state the base model's licence."""
    found = []
    for reference in (written.get("model"), base):
        try:
            found += [find_source(reference)] if reference else []
        except ModelError:  # the model no longer exists
            continue
    return found


def _results_beside(folder: Path) -> Path | None:
    """The results of the run that wrote this folder."""
    beside = folder.parent / FILE_NAME
    return beside if folder.name in ("converted", "finetuned") and beside.is_file() else None


@dataclass(frozen=True)
class _Report:
    """Results for a card.

    Attributes:
        path: of the results file.
        own: the exported checkpoint's name in the results; None if it is not in them.
        marked: True if the results name this checkpoint by its digest.
        dtype: dtype of the evaluation; None if not recorded.
    """

    path: Path
    results: Results
    own: str | None
    marked: bool
    dtype: str | None


def _report(named: Path | None, source: Source) -> _Report | None:
    """The results to show on the card.

    Raises:
        DataError: the named report cannot be read, or belongs to another checkpoint.
    """
    folder = Path(source.reference)
    path = named or _results_beside(folder)
    if path is None:
        return None
    results, digest = read_results(path), checkpoint_digest(source)
    # Reports of earlier versions have no digests.
    if digest is None or not any(system.checkpoint or system.dtype for system in results.systems):
        own = next((name for name in (folder.name, "model") if name in results.scores), None)
        return _Report(path, _of(results, own), own, marked=False, dtype=None)
    own_ones = {system.name: system for system in results.systems if system.checkpoint == digest}
    if own_ones:  # one, unless training changed no weight
        system = own_ones.get(folder.name) or next(iter(own_ones.values()))
        return _Report(path, _of(results, system.name), system.name, marked=True, dtype=system.dtype)
    if named is None:
        return None
    raise DataError(
        f"{path}: its figures are of another checkpoint ({results.model!r}), not of {folder}; evaluate this one: "
        f"linearize eval {folder} --report DIR"
    )


def _of(results: Results, own: str | None) -> Results:
    """Drop results of models that were made from this one by later training."""
    if own != "converted":
        return results
    return replace(
        results,
        systems=[system for system in results.systems if system.name != "finetuned"],
        scores={name: scores for name, scores in results.scores.items() if name != "finetuned"},
    )


def _measured(report: _Report, dtype: str, weights: str | None) -> str:
    """Format evaluation results as a section of a card: text and tables, with their limits.

    Args:
        dtype, weights: of the exported model.
    """
    page = tell(report.results)
    sections = [replace(section, plots=()) for section in page.sections if section.told or section.grids]
    facts = [(key, text) for key, text in page.facts if not local_paths(text)]  # a command may name paths
    text = to_markdown(replace(page, facts=facts, sections=sections))
    told = [f"In the tables this model is **{report.own}**."] if report.own else []
    if not report.marked:
        told.append("The report does not say which checkpoint it is of, nor in which dtype that was scored.")
    if weights is not None or report.dtype not in (None, dtype):
        then = "with other weights" if report.dtype is None else f"in {report.dtype}"
        now = dtype if weights is None else f"{weights} and {dtype}"
        told.append(f"It was scored {then}, and its weights are {now} here, so its own figures may differ.")
    here = "".join(f"{line}\n" for line in told)
    body = re.sub(r"^# .*\n", "", re.sub(r"^##", "###", text, flags=re.MULTILINE), count=1)
    return f"## What was measured\n\n{here}{body}"


_NOT_MEASURED = """## What was measured

Nothing that is written here. `linearize eval MODEL --report DIR` measures what the conversion cost beside its
teacher and a window of equal bytes.
"""


def _recipe_section(recipe: Recipe) -> str:
    return f"## Recipe\n\n```yaml\n{dump_recipe(recipe)}```\n"


def _licence_section(rights: dict[str, str]) -> str:
    said = (
        f"That of the base model: {rights.get('license_name', rights['license'])}."
        if "license" in rights
        else "That of the base model, which could not be read; look there before you use this one."
    )
    return f"## Licence\n\n{said}\n"


def _recipe(recipe: Recipe, base: dict[str, Any], portable: Portable) -> Recipe:
    """The checkpoint's recipe with the base model's Hub id and without paths."""
    values = recipe.model_dump()
    teacher = values.get("teacher")
    values["teacher"] = None if teacher and is_local_path(teacher) else teacher
    values["model"] = base.get("model")
    return Recipe.model_validate(portable.data(values))
