"""`linearize eval`: score a model together with its teacher and training-free baselines."""

from __future__ import annotations

import math
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console

from linearize.cli.console import (
    Int8Option,
    JsonOption,
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
from linearize.errors import DataError
from linearize.runtime.files import check_writable

if TYPE_CHECKING:
    from linearize.evaluation.results.results import Results

EPILOG = examples(
    "linearize eval ./tuned --report ./report",
    "linearize eval ./tuned --tasks gsm8k,mmlu_pro,ifeval --limit 0.1 --apply-chat-template",
    "linearize eval --list 'mmlu_*'",
    "linearize eval ./tuned --suite core --limit 200 --data ./data --baseline all --report ./report",
    "linearize eval ./tuned --suite recall --lengths 256,1024,4096 --data ./data",
    "linearize eval HuggingFaceTB/SmolLM2-135M-Instruct --tasks wikitext2 --json",
)


def evaluate(
    model: Annotated[
        str | None,
        typer.Argument(metavar="MODEL", help="A Hub id, a model's folder, or a .gguf file; with --list a PATTERN."),
    ] = None,
    suite: Annotated[
        str | None,
        typer.Option("--suite", metavar="NAME,...", help="Suites of tasks: core, mmlu, recall, generation, length."),
    ] = None,
    tasks: Annotated[
        str | None,
        typer.Option(
            "--tasks",
            metavar="NAME,...",
            help="Single tasks: of any suite, e.g. piqa, passkey; any task, group or tag of lm-eval, e.g. gsm8k, "
            "mmlu_pro, or a pattern, e.g. 'mmlu_*'; and held_out. Without --suite and --tasks: the rows that "
            "fine-tuning held out if the folder has some, otherwise the suite core.",
        ),
    ] = None,
    list_tasks: Annotated[
        bool,
        typer.Option("--list", help="List the suites and tasks, those of a PATTERN in the place of MODEL, and stop."),
    ] = False,
    baseline: Annotated[
        str,
        typer.Option(
            "--baseline",
            metavar="NAME,...",
            help="Beside teacher, window_bytes (the teacher with a window alone, of as many bytes as the model's whole "
            "memory) and no_recurrence (the model with it off), which a converted model always has: window (the "
            "teacher with the model's window and sinks alone); no_window, neither (the model with these off); all. "
            "none leaves the three out.",
        ),
    ] = "",
    teacher: TeacherOption = None,
    limit: Annotated[
        str | None,
        typer.Option(
            "--limit",
            metavar="N|SHARE",
            help="N items of each task, or a share of them, such as 0.1; drawn at random with --seed.",
        ),
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
    include_path: Annotated[
        Path | None,
        typer.Option("--include-path", metavar="DIR", help="Folder of lm-eval YAML files with tasks of your own."),
    ] = None,
    num_fewshot: Annotated[
        int | None,
        typer.Option(
            "--num-fewshot", min=0, help="Solved examples before each question, instead of the task's number."
        ),
    ] = None,
    apply_chat_template: Annotated[
        bool, typer.Option("--apply-chat-template", help="Put prompts of lm-eval's tasks into the chat template.")
    ] = False,
    system_instruction: Annotated[
        str | None, typer.Option("--system-instruction", metavar="TEXT", help="A system message for these prompts.")
    ] = None,
    confirm_run_unsafe_code: Annotated[
        bool, typer.Option("--confirm-run-unsafe-code", help="Run tasks that run the code the model writes.")
    ] = False,
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
    from linearize.evaluation.tasks import suites

    if list_tasks:
        found = suites.list_tasks(model or "", include_path)
        if not found:
            raise DataError(f"--list {model}: no suite or task has such a name; --list alone shows all")
        _print_list(found, as_json)
        return
    if model is None:
        raise typer.BadParameter("name a MODEL, or pass --list to see the names of tasks")
    check_dtype(dtype, int8=True)
    sweep, part = _lengths(lengths), _limit(limit)
    task_names, suite_names = _chosen("--tasks", tasks), _chosen("--suite", suite)
    suites.choose_tasks(task_names, suite_names, include_path)
    if report is not None:
        check_writable(report)
    if launch is not None or accelerate_config is not None:
        raise typer.Exit(launched(launch, accelerate_config))
    quiet_libraries()
    from linearize.evaluation.progress import ProgressLine
    from linearize.evaluation.results.report import report_data, report_table
    from linearize.jobs.evaluate import evaluate as score
    from linearize.runtime import processes
    from linearize.sources.source import find_source

    progress = ProgressLine()
    try:
        results = score(
            model,
            suites=suite_names,
            tasks=task_names,
            baselines=_names(baseline),
            teacher=teacher,
            limit=part,
            seed=seed,
            lengths=sweep,
            samples=samples,
            data=data,
            include_path=include_path,
            num_fewshot=num_fewshot,
            apply_chat_template=apply_chat_template,
            system_instruction=system_instruction,
            confirm_run_unsafe_code=confirm_run_unsafe_code,
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
                "limit": part,
                "seed": seed,
                "items": {task: {"n": n, "of": total} for task, (n, total) in subsets.items()},
                **report_data(results.scores),
            }
        )
    else:
        Console(width=None if sys.stdout.isatty() else 160, highlight=False).print(report_table(results.scores))
    drawn = [f"{n:,} of {total:,} in {task}" for task, (n, total) in subsets.items() if n < total]
    if drawn and not as_json:
        status(f"items drawn with seed {seed}: {', '.join(drawn)}")
    if report is not None:
        status(f"report: {report / 'report.html'}")


def _print_list(found: list[tuple[str, str, str]], as_json: bool) -> None:
    if as_json:
        print_json([{"name": name, "kind": kind, "about": about} for name, kind, about in found])
        return
    width = max(len(name) for name, _, _ in found)
    for name, kind, about in found:
        print(f"{name:<{width}} {kind:<6} {about}".rstrip())


def _limit(text: str | None) -> float | None:
    if text is None:
        return None
    try:
        number = float(text.replace("_", ""))
    except ValueError:
        number = math.nan
    if not (0 < number < 1 or (number >= 1 and number.is_integer())):
        raise typer.BadParameter(f"--limit {text}: expected a number of items, such as 200, or a share, such as 0.1")
    return number if number < 1 else int(number)


def _subsets(results: Results) -> dict[str, tuple[int, int]]:
    """Task -> the number of items scored, and the number of all items."""
    scores = [score for system in results.scores.values() for score in system.tasks]
    return {score.task: (score.n, score.total) for score in scores if score.total is not None}


def _names(text: str) -> list[str]:
    return [name.strip() for name in text.split(",") if name.strip()]


def _chosen(option: str, text: str | None) -> list[str]:
    names = _names(text or "")
    if text is not None and not names:
        raise typer.BadParameter(f"{option} {text!r}: names nothing; `linearize eval --list` shows the names")
    return names


def _lengths(text: str) -> tuple[int, ...]:
    names = _names(text.replace("_", ""))
    if not all(name.isascii() and name.isdigit() and int(name) > 0 for name in names):
        raise typer.BadParameter(f"--lengths {text}: expected numbers of tokens, such as 256,1024")
    return tuple(map(int, names))
