"""The report of an evaluation: systems side by side, as data, as a table in a terminal, and as pages to keep."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from rich.table import Table

from linearize.errors import DataError
from linearize.evaluation.results.comparison import TEACHER, compare_systems, comparison_data, percent_of_teacher
from linearize.evaluation.results.results import FILE_NAME, HELDOUT, SystemScores
from linearize.evaluation.results.telling import tell
from linearize.report.formatting import heading, with_error
from linearize.report.pages import write_pages
from linearize.runtime.files import staged_files

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from linearize.evaluation.results.results import Results

__all__ = ["HELDOUT", "TEACHER", "SystemScores", "report_data", "report_table", "write_report"]


def write_report(results: Results, folder: Path) -> None:
    """Writes `results.json`, `report.md`, `report.html` (one page with everything in it), and each plot as `.svg`.

    Files of an earlier report in the folder are replaced, each as a whole.

    Raises:
        DataError: a number that is not finite, or systems whose lists do not belong together.
    """
    document = results.to_json()
    tables = compare_systems(results)
    document["comparisons"] = comparison_data(tables)
    page = tell(results, tables)
    text = _dump(document) + "\n"
    with staged_files(folder) as staging:
        (staging / FILE_NAME).write_text(text, encoding="utf-8")
        write_pages(page, staging)


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
        for score in scores.all_tasks():
            row = rows.setdefault(
                (score.task, score.metric),
                {
                    "task": score.task,
                    "metric": score.metric,
                    "higher_is_better": score.higher_is_better,
                    "values": {},
                },
            )
            row["values"][name] = {"value": score.value, "stderr": score.stderr, "n": score.n}
    for row in rows.values():
        teacher = row["values"].get(TEACHER)
        for cell in row["values"].values():
            cell["percent_of_teacher"] = (
                percent_of_teacher(row["metric"], row["higher_is_better"], cell["value"], teacher["value"])
                if teacher is not None
                else None
            )
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
        cells = (_cell(name, row) for name in data["systems"])
        table.add_row(heading(row["task"], row["metric"], row["higher_is_better"]), *cells)
    return table


def _cell(name: str, row: Mapping[str, Any]) -> str:
    cell = row["values"].get(name)
    if cell is None:
        return "-"
    text = with_error(cell["value"], cell["stderr"], row["metric"])
    if name != TEACHER and cell["percent_of_teacher"] is not None:
        text += f"\n{cell['percent_of_teacher']:.1f} % of teacher"
    return text


def _dump(value: Any, indent: str = "") -> str:
    """JSON with an entry to a line, down to lists of items, which take one line each.

    Raises:
        DataError: a number that is not finite.
    """
    inner = indent + " "
    if isinstance(value, dict) and any(isinstance(entry, (dict, list)) for entry in value.values()):
        entries = (
            f"{inner}{json.dumps(key, ensure_ascii=False)}: {_dump(entry, inner)}" for key, entry in value.items()
        )
        return "{\n" + ",\n".join(entries) + f"\n{indent}}}"
    if isinstance(value, list) and any(isinstance(entry, dict) and "task" in entry for entry in value):
        return "[\n" + ",\n".join(inner + _dump(entry, inner) for entry in value) + f"\n{indent}]"
    try:
        return json.dumps(value, ensure_ascii=False, allow_nan=False)
    except ValueError:
        raise DataError("the results have a tag that is not finite: nothing is written") from None
