"""`linearize eval`: score a model together with its teacher and training-free baselines."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from linearize.evaluation.results.report import write_report
from linearize.evaluation.runner import check_limit
from linearize.evaluation.store import Store
from linearize.evaluation.systems import evaluate as score
from linearize.evaluation.tasks.suites import SuiteOptions, choose_tasks
from linearize.jobs.checks import check_dtype, check_numbers, quiet
from linearize.runtime import processes
from linearize.runtime.claims import claimed
from linearize.runtime.files import check_writable
from linearize.sources.source import find_source

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from linearize.evaluation.results.results import Results
    from linearize.evaluation.runner import Progress


def evaluate(
    model: str | Path,
    *,
    suites: Sequence[str] = (),
    tasks: Sequence[str] = (),
    baselines: Sequence[str] = (),
    teacher: str | Path | None = None,
    limit: float | None = None,
    seed: int = 0,
    lengths: Sequence[int] = (),
    samples: int | None = None,
    data: str | Path | None = None,
    include_path: str | Path | None = None,
    num_fewshot: int | None = None,
    apply_chat_template: bool = False,
    system_instruction: str | None = None,
    confirm_run_unsafe_code: bool = False,
    report: str | Path | None = None,
    fresh: bool = False,
    batch_size: int = 8,
    dtype: str = "auto",
    trust_remote_code: bool = False,
    progress: Progress | None = None,
    say: Callable[[str], None] = quiet,
    command: str = "",
) -> Results:
    """Score a model, converted or not, together with its teacher and training-free baselines; `linearize eval`.

    Args:
        model: the model to score.
        suites: names of suites: `core`, `mmlu`, `recall`, `generation`, `length`.
        tasks: names of single tasks, of any task, group or tag of lm-eval, and `held_out`. Without tasks and suites:
            the rows that fine-tuning held out if the folder has some, otherwise the suite `core`.
        baselines: any of `window`, `no_window`, `neither`; or `all`. A converted model always stands beside `teacher`,
            `window_bytes` and `no_recurrence`, as far as it has them; `none` leaves these out.
        teacher: the pretrained model, if it is not the one that the model was converted from.
        limit: score this many items of each task, or below 1 this share of them, drawn at random.
        seed: the seed of `limit`, and of tasks that draw their items.
        lengths: lengths of the texts in tokens, for tasks that sweep lengths.
        samples: items of each kind, for tasks that generate their items.
        data: the folder of the tasks' files; None reads them from the Hub.
        include_path: a folder of lm-eval YAML files with tasks of your own; their names take precedence.
        num_fewshot: solved examples before each question; None for each task's own number. A task that sets 0 keeps it.
        apply_chat_template: put the prompts of lm-eval's tasks into the tokenizer's chat template.
        system_instruction: a system message for these prompts.
        confirm_run_unsafe_code: run tasks that run the code a model writes.
        report: a folder to write pages, plots and results.json to.
        fresh: score everything again; by default cached results of single items are reused.
        batch_size: sequences per forward pass.
        dtype: `auto`, `float32`, `bfloat16`, `float16`, or `int8` on a CPU.
        trust_remote_code: run Python code from the model's repository.
        progress: called with how many items are scored, see `runner.Progress`.
        say: called with each progress line. With several processes, only the first calls it and writes.
        command: the command line, for the report.

    Returns:
        the scores of each system, with standard errors and items.

    Raises:
        DataError: a suite, task or baseline is unknown, or data cannot be read.
        ModelError: a model cannot be read or gives results that are not finite; or a baseline or task needs a teacher
            and there is none.
        OutputError: results cannot be stored, or another job is writing the report.
    """
    check_dtype(dtype, int8=True)
    check_limit(limit)
    check_numbers(1, samples=samples, batch_size=batch_size, lengths=min(lengths, default=None))
    check_numbers(0, seed=seed, num_fewshot=num_fewshot)
    include = None if include_path is None else Path(include_path)
    choose_tasks(tasks, suites, include)
    folder = None if report is None else Path(report)
    if folder is not None:
        check_writable(folder)
    processes.join()
    first = processes.is_first()
    say = say if first else quiet
    source = find_source(str(model), trust_remote_code=trust_remote_code)
    with claimed(folder if first else None):
        results = score(
            source,
            tasks,
            suites=suites,
            baselines=baselines,
            teacher=None if teacher is None else str(teacher),
            options=SuiteOptions(
                data=None if data is None else Path(data),
                lengths=tuple(lengths),
                samples=samples,
                seed=seed,
                include=include,
                num_fewshot=num_fewshot,
                chat=apply_chat_template,
                system=system_instruction,
                unsafe_code=confirm_run_unsafe_code,
            ),
            limit=limit,
            batch_size=batch_size,
            dtype=dtype,
            store=Store(fresh=fresh),
            report=folder,
            progress=progress if first else None,
            say=say,
            command=command,
        )
        processes.leave()
        if folder is not None and first:
            write_report(results, folder)
    return results
