"""`linearize eval`: score a model together with its teacher and training-free baselines."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console

from linearize.cli.console import (
    Int8Option,
    JsonOption,
    ModelArgument,
    TeacherOption,
    TrustOption,
    check_dtype,
    command_line,
    examples,
    print_json,
    status,
)
from linearize.cli.launching import AccelerateOption, LaunchOption, launched
from linearize.cli.libraries import quiet_libraries
from linearize.runtime.files import check_writable

if TYPE_CHECKING:
    from linearize.evaluation.results.results import Results

EPILOG = examples(
    "linearize eval ./tuned --baseline teacher,window",
    "linearize eval ./tuned --suite core --limit 200 --data ./data --baseline all --report ./report",
    "linearize eval ./tuned --suite recall --lengths 256,1024,4096 --data ./data",
    "linearize eval HuggingFaceTB/SmolLM2-135M-Instruct --tasks wikitext2 --json",
)


def evaluate(
    model: ModelArgument,
    suite: Annotated[
        str,
        typer.Option("--suite", metavar="NAME,...", help="Suites of tasks: core, mmlu, recall, generation, length."),
    ] = "",
    tasks: Annotated[
        str,
        typer.Option(
            "--tasks",
            metavar="NAME,...",
            help="Single tasks of any suite, e.g. piqa, wikitext2, passkey; and held_out. Without --suite and --tasks: "
            "the rows that fine-tuning held out if the folder has some, otherwise the suite core.",
        ),
    ] = "",
    baseline: Annotated[
        str,
        typer.Option(
            "--baseline",
            metavar="NAME,...",
            help="teacher; window (the teacher with the model's window and sinks alone); window_bytes (the same with a "
            "window of as many bytes as the model's whole memory); no_recurrence, no_window, neither (the model with "
            "these off); all.",
        ),
    ] = "",
    teacher: TeacherOption = None,
    limit: Annotated[
        int | None,
        typer.Option("--limit", min=1, help="N items of each task, drawn at random with --seed."),
    ] = None,
    seed: Annotated[int, typer.Option("--seed", min=0, help="Seed of --limit, and of tasks that draw items.")] = 0,
    lengths: Annotated[
        str, typer.Option("--lengths", metavar="N,...", help="Lengths of the texts in tokens, for tasks that sweep.")
    ] = "",
    samples: Annotated[
        int | None, typer.Option("--samples", min=1, help="Items of each kind, for tasks that generate items.")
    ] = None,
    data: Annotated[
        Path | None, typer.Option("--data", metavar="DIR", help="Folder of the tasks' files; the Hub if left out.")
    ] = None,
    report: Annotated[
        Path | None, typer.Option("--report", metavar="DIR", help="Write the report as pages, plots and data.")
    ] = None,
    fresh: Annotated[
        bool, typer.Option("--fresh", help="Score everything again, without cached results of single items.")
    ] = False,
    batch_size: Annotated[int, typer.Option("--batch-size", min=1, help="Sequences per forward pass.")] = 8,
    dtype: Int8Option = "auto",
    launch: LaunchOption = None,
    accelerate_config: AccelerateOption = None,
    trust_remote_code: TrustOption = False,
    as_json: JsonOption = False,
) -> None:
    """Score a model, converted or not, on suites of tasks and on held-out rows.

    Scores have standard errors and, if a teacher is scored too, the percentage of the teacher's score. An interrupted
    evaluation continues where it stopped. A converted model whose base is not available is scored alone.
    """
    from linearize.evaluation.tasks.suites import choose_tasks

    check_dtype(dtype, int8=True)
    sweep = _lengths(lengths)
    choose_tasks(_names(tasks), _names(suite))
    if report is not None:
        check_writable(report)
    if launch is not None or accelerate_config is not None:
        raise typer.Exit(launched(launch, accelerate_config))
    quiet_libraries()
    from linearize.evaluation.progress import ProgressLine
    from linearize.evaluation.results.report import report_data, report_table
    from linearize.jobs.evaluate import run_evaluate
    from linearize.runtime import processes
    from linearize.sources.source import find_source

    progress = ProgressLine()
    try:
        results = run_evaluate(
            model,
            suites=_names(suite),
            tasks=_names(tasks),
            baselines=_names(baseline),
            teacher=teacher,
            limit=limit,
            seed=seed,
            lengths=sweep,
            samples=samples,
            data=data,
            report=report,
            fresh=fresh,
            batch_size=batch_size,
            dtype=dtype,
            trust_remote_code=trust_remote_code,
            progress=progress,
            say=status,
            command=command_line(),
        )
    finally:
        progress.clear()
    if not processes.is_first():
        return
    subsets = _subsets(results)
    if as_json:
        print_json(
            {
                "model": find_source(model).reference,
                "limit": limit,
                "seed": seed,
                "items": {task: {"n": n, "of": total} for task, (n, total) in subsets.items()},
                **report_data(results.scores),
            }
        )
        return
    Console(width=None if sys.stdout.isatty() else 160, highlight=False).print(report_table(results.scores))
    drawn = [f"{n:,} of {total:,} in {task}" for task, (n, total) in subsets.items() if n < total]
    if drawn:
        status(f"items drawn with seed {seed}: {', '.join(drawn)}")


def _subsets(results: Results) -> dict[str, tuple[int, int]]:
    """Task -> the number of items scored, and the number of all items."""
    scores = [score for system in results.scores.values() for score in system.tasks]
    return {score.task: (score.n, score.total) for score in scores if score.total is not None}


def _names(text: str) -> list[str]:
    return [name.strip() for name in text.split(",") if name.strip()]


def _lengths(text: str) -> tuple[int, ...]:
    names = _names(text.replace("_", ""))
    if not all(name.isascii() and name.isdigit() and int(name) > 0 for name in names):
        raise typer.BadParameter(f"--lengths {text}: expected numbers of tokens, such as 256,1024")
    return tuple(map(int, names))
