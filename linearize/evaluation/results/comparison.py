"""Compare each system with the teacher and the baseline, task by task and over a suite."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any

from linearize.evaluation.results.pairing import Closed, Difference, closed, contributions, difference, holm

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from linearize.evaluation.results.results import Results
    from linearize.evaluation.tasks.task import TaskScore

# The system that the others are measured by, and the baselines that cost no training: the first that is there counts.
TEACHER = "teacher"
WINDOWS = ("window_bytes", "window")
# The five whose mean papers on linearizing report.
FIVE = ("piqa", "arc_easy", "arc_challenge", "hellaswag", "winogrande")
_ACCURACIES = ("acc", "acc_norm")
# Measured against the teacher already: nothing can be better than it is itself.
_RELATIVE = ("kl", "agreement", "common_prefix")


@dataclass(frozen=True)
class Cell:
    """One system on one task.

    Attributes:
        percent_of_teacher: 100 is the teacher's own quality and less is worse, for every metric; None where a
            percentage would mean nothing.
        closed: the share of the distance from the window baseline (`window_of`) to the teacher.
        to_teacher, to_window: this system minus the other on the same items; None where it was not measured on them.
            To the teacher there is none of a divergence from it, or of agreement with it.
    """

    value: float
    stderr: float | None
    n: int
    percent_of_teacher: float | None
    closed: Closed | None
    to_teacher: Difference | None
    to_window: Difference | None


@dataclass(frozen=True)
class Row:
    """A task, or the mean over several (`mean_of` names them), with a cell for each system that was measured. It is
    `paired` if its values follow from its items, so that systems can be compared item by item."""

    task: str
    metric: str
    higher_is_better: bool
    cells: Mapping[str, Cell]
    mean_of: tuple[str, ...] = ()
    paired: bool = True


@dataclass(frozen=True)
class SuiteTable:
    """The rows of one suite. Corrected p-values are so over all the tests in here."""

    suite: str
    rows: tuple[Row, ...]


def window_of(systems: Iterable[str]) -> str:
    """The window baseline among these systems: that of as many bytes as the model's memory, or else the model's own
    window; empty where neither is there."""
    names = set(systems)
    return next((name for name in WINDOWS if name in names), "")


def compare_systems(results: Results) -> list[SuiteTable]:
    """A table per suite, in the order first met."""
    suites: dict[str, list[dict[str, TaskScore]]] = {}
    for scores in results.tasks().values():
        suites.setdefault(_first(scores).suite, []).append(scores)
    tables = []
    for suite, tasks in suites.items():
        rows = [_row([scores]) for scores in tasks]
        averaged = _averaged(tasks)
        if averaged:
            rows.append(_row(averaged))
        tables.append(SuiteTable(suite, _corrected(rows)))
    return tables


def comparison_data(tables: Iterable[SuiteTable]) -> list[dict[str, Any]]:
    """The same as plain data: differences with their p before and after correction."""
    return [asdict(table) for table in tables]


def percent_of_teacher(metric: str, higher_is_better: bool, value: float, teacher: float) -> float | None:
    """A value as percent of the teacher's; where lower is better, the teacher's is divided by the value.

    None where that means nothing: agreement is relative to the teacher already, losses and divergences are logarithms.
    """
    if metric in _RELATIVE or not (higher_is_better or "perplexity" in metric):
        return None
    above, below = (value, teacher) if higher_is_better else (teacher, value)
    return 100.0 * above / below if below > 0 else None


def _averaged(tasks: list[dict[str, TaskScore]]) -> list[dict[str, TaskScore]]:
    """The accuracies that a suite's mean is over: the five that papers report where all are there, otherwise all."""
    accuracies = [scores for scores in tasks if _first(scores).metric in _ACCURACIES]
    if len({_first(scores).task for scores in accuracies}) < len(accuracies):
        return []  # a task with two accuracies: which of them a mean should take is the reader's choice
    five = [scores for scores in accuracies if _first(scores).task in FIVE]
    chosen = five if len(five) == len(FIVE) else accuracies
    return chosen if len(chosen) > 1 else []


def _row(tasks: list[dict[str, TaskScore]]) -> Row:
    """The row of one task or, of several, of their mean, for the systems that were scored on all of them."""
    first = _first(tasks[0])
    systems = [name for name in tasks[0] if all(name in scores for scores in tasks)]
    cells = {name: _cell(name, tasks, systems) for name in systems}
    if len(tasks) == 1:
        paired = all(contributions(score) is not None for score in tasks[0].values())
        return Row(first.task, first.metric, first.higher_is_better, cells, paired=paired)
    names = tuple(_first(scores).task for scores in tasks)
    return Row(f"mean of {len(tasks)}", "acc", True, cells, names)


def _cell(name: str, tasks: list[dict[str, TaskScore]], systems: list[str]) -> Cell:
    own = [scores[name] for scores in tasks]
    teacher = [scores[TEACHER] for scores in tasks] if TEACHER in systems else None
    beside = window_of(systems)
    window = [scores[beside] for scores in tasks] if beside else None
    value, stderr = _mean(own)
    relative = own[0].metric in _RELATIVE
    percent = None
    if teacher is not None:
        percent = percent_of_teacher(own[0].metric, own[0].higher_is_better, value, _mean(teacher)[0])
    return Cell(
        value=value,
        stderr=stderr,
        n=sum(score.n for score in own),
        percent_of_teacher=percent,
        closed=closed(list(zip(own, window, teacher, strict=True))) if window and teacher else None,
        to_teacher=difference(list(zip(own, teacher, strict=True))) if teacher and not relative else None,
        to_window=difference(list(zip(own, window, strict=True))) if window else None,
    )


def _mean(scores: list[TaskScore]) -> tuple[float, float | None]:
    """The mean over tasks, and its standard error."""
    value = math.fsum(score.value for score in scores) / len(scores)
    errors = [score.stderr for score in scores if score.stderr is not None]
    if len(errors) < len(scores):
        return value, None
    return value, math.sqrt(math.fsum(error**2 for error in errors)) / len(scores)


def _corrected(rows: list[Row]) -> tuple[Row, ...]:
    """Rows with Holm's correction over all their tests; a system against itself is no test."""
    tests: dict[tuple[int, str, str], float] = {}
    for number, row in enumerate(rows):
        window = window_of(row.cells)
        for name, cell in row.cells.items():
            for other, found in (("to_teacher", cell.to_teacher), ("to_window", cell.to_window)):
                itself = name == {"to_teacher": TEACHER, "to_window": window}[other]
                # The teacher against the window is the same test as the window against the teacher.
                mirrored = name == TEACHER and other == "to_window"
                if found is not None and found.p is not None and not itself and not mirrored:
                    tests[number, name, other] = found.p
    corrected = dict(zip(tests, holm(list(tests.values())), strict=True))
    return tuple(
        replace(
            row,
            cells={
                name: replace(
                    cell,
                    to_teacher=_with_p(cell.to_teacher, corrected.get((number, name, "to_teacher"))),
                    to_window=_with_p(cell.to_window, corrected.get((number, name, "to_window"))),
                )
                for name, cell in row.cells.items()
            },
        )
        for number, row in enumerate(rows)
    )


def _with_p(found: Difference | None, p: float | None) -> Difference | None:
    return found if found is None or p is None else replace(found, p_corrected=p)


def _first(scores: dict[str, TaskScore]) -> TaskScore:
    return next(iter(scores.values()))
