"""The report of an evaluation: several systems side by side, as JSON and as a table for people."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from rich.table import Table

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from linearize.evaluation.harness import TaskScore
    from linearize.evaluation.heldout import RowScores

# The system that the others are measured by.
TEACHER = "teacher"
HELDOUT = "held-out"
_SHARES = ("acc", "acc_norm", "agreement")
# Metrics whose ratio to the teacher's says something. A divergence from the teacher is 0 for the teacher itself,
# agreement is relative to it already, and losses are logarithms.
_COMPARABLE = ("acc", "acc_norm", "word_perplexity", "perplexity")


@dataclass(frozen=True)
class SystemScores:
    """What was measured of one system: benchmark tasks, held-out rows, or both."""

    tasks: Sequence[TaskScore] = ()
    rows: RowScores | None = None


@dataclass(frozen=True)
class _Value:
    task: str
    metric: str
    value: float
    stderr: float | None
    n: int
    higher_is_better: bool


def report_data(systems: Mapping[str, SystemScores]) -> dict[str, Any]:
    """The figures as plain data for JSON.

    Args:
        systems: by name, in the order to show; `teacher` is the one to compare with, where it is present.

    Returns:
        `{"systems": [names], "metrics": [row, ...]}`. A row has `task`, `metric`, `higher_is_better`, and `values`: for
        each system that was measured `value`, `stderr` (or None), `n` (items or rows) and `percent_of_teacher` (None
        where a percentage would mean nothing). 100 % is the teacher's own quality and less is worse for every metric:
        where lower is better the teacher's value is divided by the system's. Shares lie in [0, 1], losses and
        divergences are in nats per token.
    """
    rows: dict[tuple[str, str], dict[str, Any]] = {}
    for name, scores in systems.items():
        for value in _values(scores):
            row = rows.setdefault(
                (value.task, value.metric),
                {
                    "task": value.task,
                    "metric": value.metric,
                    "higher_is_better": value.higher_is_better,
                    "values": {},
                },
            )
            row["values"][name] = {"value": value.value, "stderr": value.stderr, "n": value.n}
    for row in rows.values():
        for cell in row["values"].values():
            cell["percent_of_teacher"] = _percent(row, cell["value"])
    return {"systems": list(systems), "metrics": list(rows.values())}


def report_table(systems: Mapping[str, SystemScores], title: str | None = None) -> Table:
    """The figures as a table: a row per metric (↑ higher is better, ↓ lower is), a column per system.

    Cells are `value ± standard error`, shares in percent; under them, for all but the teacher, the percent of the
    teacher.
    """
    data = report_data(systems)
    table = Table(title=title)
    table.add_column("metric")
    for name in data["systems"]:
        table.add_column(name, justify="right")
    for row in data["metrics"]:
        arrow = "↑" if row["higher_is_better"] else "↓"
        unit = " %" if row["metric"] in _SHARES else ""
        cells = (_cell(name, row) for name in data["systems"])
        table.add_row(f"{row['task']} {row['metric'].replace('_', ' ')}{unit} {arrow}", *cells)
    return table


def _values(scores: SystemScores) -> list[_Value]:
    values = [_Value(s.task, s.metric, s.value, s.stderr, s.n, s.higher_is_better) for s in scores.tasks]
    rows = scores.rows
    if rows is None:
        return values
    n = len(rows.loss)
    loss = rows.mean_loss
    values.append(_Value(HELDOUT, "loss", loss.mean, loss.stderr, n, False))
    # Its error is not given: the loss above it has one, of which this is the exponential.
    values.append(_Value(HELDOUT, "perplexity", rows.perplexity, None, n, False))
    for metric, estimate, higher in (("kl", rows.mean_kl, False), ("agreement", rows.mean_agreement, True)):
        if estimate is not None:
            values.append(_Value(HELDOUT, metric, estimate.mean, estimate.stderr, n, higher))
    return values


def _percent(row: Mapping[str, Any], value: float) -> float | None:
    teacher = row["values"].get(TEACHER)
    if teacher is None or row["metric"] not in _COMPARABLE:
        return None
    above, below = (value, teacher["value"]) if row["higher_is_better"] else (teacher["value"], value)
    return 100.0 * above / below if below else None


def _cell(name: str, row: Mapping[str, Any]) -> str:
    cell = row["values"].get(name)
    if cell is None:
        return "-"
    # Shares in percent with one decimal, as papers print them; losses with enough digits to tell small ones.
    scale, digits = (100.0, 1) if row["metric"] in _SHARES else (1.0, 2 if "perplexity" in row["metric"] else 4)
    text = f"{scale * cell['value']:.{digits}f}"
    if cell["stderr"] is not None:
        text += f" ± {scale * cell['stderr']:.{digits}f}"
    if name != TEACHER and cell["percent_of_teacher"] is not None:
        text += f"\n{cell['percent_of_teacher']:.1f} % of teacher"
    return text
