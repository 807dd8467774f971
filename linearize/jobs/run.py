"""`linearize run`: convert, fine-tune, evaluate and report, from one recipe."""

from __future__ import annotations

import copy
import json
import time
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from linearize.checkpoint.provenance import checkpoint_digest
from linearize.conversion.swap import (
    check_convertible,
    check_reach,
    coding_of,
    convert_model,
    window_baseline,
    window_sections,
)
from linearize.errors import ModelError
from linearize.evaluation.baselines import BRANCHES_OFF, equal_bytes, silence
from linearize.evaluation.heldout import paired_difference
from linearize.evaluation.results.report import SystemScores, report_data, report_table, write_report
from linearize.evaluation.results.results import Results
from linearize.evaluation.store import Store
from linearize.evaluation.systems import BASELINES, describe, score_systems
from linearize.evaluation.tasks.suites import SuiteOptions, build_suites, choose_tasks
from linearize.jobs.checks import model_of
from linearize.jobs.convert import Start, convert_into, prepares
from linearize.jobs.result import FinetuneResult, write_result
from linearize.jobs.stages import run_stages
from linearize.runtime.files import check_free, staged_folder
from linearize.sources.source import Source, find_source, load_config, load_model, load_tokenizer
from linearize.training.adapters import check_dtype
from linearize.training.workfolder import work_folder

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    import torch
    from rich.table import Table

    from linearize.evaluation.results.results import SystemInfo
    from linearize.evaluation.runner import Loader
    from linearize.recipe import Recipe


@dataclass
class RunResult:
    """The result of a run.

    Attributes:
        scores: the scores by system: the recipe's baselines, `converted` and, if the recipe has stages, `finetuned`.
        table: the scores as a table.
        data: the scores as plain data, with the seconds of each part.
        trained: the fine-tuned model, still in memory.
    """

    scores: dict[str, SystemScores]
    table: Table
    data: dict[str, Any]
    trained: FinetuneResult


def run_recipe(
    recipe: Recipe,
    target: Path,
    *,
    say: Callable[[str], None],
    data: Path | None = None,
    overwrite: bool = False,
    resume: bool = False,
    trust_remote_code: bool = False,
    command: str = "",
) -> RunResult:
    """Run `recipe` and write `target`: the folders `converted` and `finetuned`, `report.json` with the figures of all
    parts, and the evaluation's report (`report.html`, `report.md`, `results.json`).

    Args:
        data: the folder of the evaluation tasks' files; None reads them from the Hub.
        resume: continue the training of an interrupted run.
        command: the command line, for the report.

    Raises:
        LinearizeError: the recipe, the model, the data or the output is not usable; `target` is then not written.
    """
    reference = model_of(recipe)
    check_dtype(recipe)
    source = find_source(reference, trust_remote_code=trust_remote_code)
    if source.is_converted:
        raise ModelError(f"{source.name}: is converted already; use `linearize finetune` and `linearize eval`")
    config = load_config(source)
    check_convertible(config, source, recipe.mixer)
    check_reach(recipe, config)
    chosen = choose_tasks(recipe.evaluate.tasks)
    check_free(target, overwrite=overwrite)
    seconds: dict[str, float] = {}
    with (
        work_folder(target, recipe, resume=resume) as work,
        staged_folder(target, overwrite=overwrite) as folder,
    ):
        with _timed(seconds, "convert"):
            say(f"converting {source.name}")
            (folder / "converted").mkdir()
            teacher, tokenizer = load_model(source, dtype=recipe.dtype), load_tokenizer(source)
            start = convert_into(
                source,
                recipe,
                folder / "converted",
                say=say,
                teacher=copy.deepcopy(teacher),
                tokenizer=tokenizer,
            )
            mixers, base = start.model.config.mixers or [], start.model.config.text_config
            coding = coding_of(start.model)
            if not prepares(recipe):
                # A second swap is cheaper than keeping or reading another model.
                loads = _Again(lambda: convert_model(copy.deepcopy(teacher), recipe.mixer), start)
            else:
                written = find_source(str(folder / "converted"))
                loads = _Again(lambda: load_model(written), start)
            del start
        with _timed(seconds, "finetune"):
            trained = run_stages(
                recipe,
                work,
                say=say,
                resume=resume,
                trust_remote_code=trust_remote_code,
                pretrained=teacher,
                tokenizer=tokenizer,
                begin=loads.start,
            )
            if recipe.stages:
                (folder / "finetuned").mkdir()
                write_result(folder / "finetuned", trained, work, "finetuned")
        with _timed(seconds, "evaluate"):
            wanted: list[str] = list(recipe.evaluate.baselines)
            widest = equal_bytes(base, mixers, teacher.dtype) if "window_bytes" in wanted else []
            last = loads.load if not recipe.stages else lambda: trained.model
            baselines: dict[str, Loader] = {
                "teacher": lambda: teacher,
                "window": lambda: window_baseline(copy.deepcopy(teacher), mixers, coding),
                "window_bytes": lambda: window_baseline(copy.deepcopy(teacher), widest, coding),
            }
            if any(mixer["recurrence"] != "none" for mixer in mixers):
                baselines["no_recurrence"] = lambda: silence(last(), BRANCHES_OFF["no_recurrence"])
            systems: dict[str, Loader] = {name: load for name, load in baselines.items() if name in wanted}
            systems["converted"] = loads.load
            if recipe.stages:
                systems["finetuned"] = lambda: silence(trained.model, ())  # with its recurrence again
            rows = trained.data.held_out if trained.data is not None and len(trained.data.held_out) else None
            options = SuiteOptions(data=data, seed=recipe.seed, teacher=lambda: teacher)
            tasks = build_suites(chosen, trained.tokenizer, options)
            scores = score_systems(
                systems,
                trained.tokenizer,
                tasks,
                rows=rows,
                teacher=teacher,
                limit=recipe.evaluate.limit,
                seed=recipe.seed,
                store=Store(),
                say=say,
            )
        gains = _gains(scores)
        figures = {**report_data(scores), "gains": gains, "stages": trained.stages, "seconds": seconds}
        table = report_table(scores)
        (folder / "report.json").write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")
        sections = {"teacher": [], "window": window_sections(mixers), "window_bytes": window_sections(widest)}
        dtypes = {"converted": teacher.dtype, "finetuned": trained.model.dtype}
        results = Results(
            model=source.name,
            systems=[
                _marked(describe(name, _ABOUT[name], base, sections.get(name, mixers), teacher.dtype), folder, dtypes)
                for name in scores
            ],
            scores=scores,
            command=command,
            limit=recipe.evaluate.limit,
            digests={task.name: task.digest for task in tasks},
        )
        write_report(results, folder)
    return RunResult(scores, table, figures, trained)


def _marked(info: SystemInfo, folder: Path, dtypes: dict[str, torch.dtype]) -> SystemInfo:
    """`info` with the digest and dtype of the system's checkpoint in `folder`, if it has one."""
    if info.name not in dtypes:
        return info
    made = checkpoint_digest(Source(str(folder / info.name), "folder"))
    return replace(info, checkpoint=made, dtype=str(dtypes[info.name]).removeprefix("torch."))


class _Again:
    """The result of the conversion without its model; `load` makes the model again."""

    def __init__(self, load: Callable[[], Any], start: Start) -> None:
        self.load, self.of = load, replace(start, model=None)  # type: ignore[arg-type]

    def start(self) -> Start:
        return replace(self.of, model=self.load())


_ABOUT = {
    **BASELINES,
    "converted": "the model as converted, before any training",
    "finetuned": "the converted model after fine-tuning",
}


def _gains(scores: dict[str, SystemScores]) -> dict[str, dict[str, float | None]]:
    """The change by fine-tuning on the held-out rows, row by row: mean difference and its standard error, in nats."""
    before, after = (scores[name].rows if name in scores else None for name in ("converted", "finetuned"))
    if before is None or after is None:
        return {}
    difference = paired_difference(after, before)
    found = {"loss": difference.loss, "kl": difference.kl}
    return {name: {"mean": d.mean, "stderr": d.stderr} for name, d in found.items() if d is not None}


def gains_line(gains: dict[str, dict[str, float | None]]) -> str:
    """The gains as a sentence; empty without gains."""
    if not gains:
        return ""
    parts = (f"{name} {d['mean']:+.4f} ± {d['stderr'] or 0:.4f}" for name, d in gains.items())
    return f"fine-tuning changed, row by row: {', '.join(parts)} nats per token"


class _timed:
    """A context manager that stores the seconds of its block, rounded to tenths, in `seconds[name]`."""

    def __init__(self, seconds: dict[str, float], name: str) -> None:
        self.seconds, self.name = seconds, name

    def __enter__(self) -> None:
        self.started = time.monotonic()

    def __exit__(self, *_: object) -> None:
        self.seconds[self.name] = round(time.monotonic() - self.started, 1)
