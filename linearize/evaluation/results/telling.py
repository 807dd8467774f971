"""Write results as sentences and tables: quality kept, quality lost, and the uncertainty of both."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from linearize.evaluation.results.branches import branch_sentences, whole_of
from linearize.evaluation.results.comparison import TEACHER, WINDOWS, SuiteTable, compare_systems, window_of
from linearize.evaluation.results.pairing import closed_text, difference_text, p_text
from linearize.evaluation.results.plots import plots_of
from linearize.evaluation.results.results import HELDOUT
from linearize.report.formatting import heading, percent_text, readable_bytes, with_error
from linearize.report.pages import Grid, Page, Section

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from linearize.evaluation.results.comparison import Cell, Row
    from linearize.evaluation.results.results import Results, SystemInfo
    from linearize.report.plots import Plot

# The length at which the summary gives memory; the plot has the others.
_FAR = 131_072

READING = (
    "± is one standard error, over items. ↑ higher is better, ↓ lower is better.",
    "Differences are paired over the same items; those of shares are in percentage points. * marks p < 0.05.",
    "p is two-sided, and corrected by Holm's method over all tests of its table. The tests: McNemar's exact one where "
    "items are right or wrong, otherwise a paired t over items, and z for means over tasks.",
)
"""Legend of every table."""
_BASELINES = (
    "Distance closed is (system − window) / (teacher − window). None is given where that distance is smaller than its "
    "own standard error.",
    "Percent of teacher is 100 for what is as good as the teacher, and less for what is worse.",
    "The baseline window costs no training: it is the teacher with a window and sinks alone, of as many tokens as fit "
    "into the model's bytes (window_bytes) or, where that was not measured, the model's own (window).",
)


def tell(results: Results, tables: Sequence[SuiteTable] | None = None) -> Page:
    """The report of one evaluation."""
    tables = compare_systems(results) if tables is None else tables
    plots = plots_of(results)
    sections = [Section("What was kept, and what was lost", summary(results, tables), [_systems(results)])]
    for table in tables:
        sections.append(suite_section(table, [system.name for system in results.systems], plots.get(table.suite, [])))
    sections += memory_section(plots)
    sections.append(Section("How to read this", [("In the tables", [*READING, *_BASELINES])]))
    return Page(f"Evaluation of {results.model}", facts(results), sections)


def facts(results: Results) -> list[tuple[str, str]]:
    """Sources of the figures."""
    found = [
        ("command", results.command),
        ("date", results.date),
        ("items", _drawn(results)),
        ("versions", ", ".join(f"{name} {version}" for name, version in results.versions.items())),
    ]
    return [(name, text) for name, text in found if text]


def _drawn(results: Results) -> str:
    """Number of scored items per task, and how they were chosen."""
    seeds = sorted(
        {score.seed for one in results.scores.values() for score in one.all_tasks() if score.seed is not None}
    )
    how = f", drawn at random with seed {', '.join(map(str, seeds))}" if seeds else ""
    return f"{limit_text(results.limit)} of each task{how}" if results.limit is not None else "all"


def limit_text(limit: float) -> str:
    """`at most 100`, or of a share `10 %`."""
    return f"{100 * limit:g} %" if limit < 1 else f"at most {int(limit):,}"


def suite_title(suite: str) -> str:
    """A suite's name as a heading."""
    return (suite or "Benchmarks").replace("_", " ").replace("held-out", "Held-out rows").capitalize()


def memory_section(plots: Mapping[str | None, Sequence[Plot]]) -> list[Section]:
    """A section with the plots of memory, if there are any."""
    return [Section("Memory", plots=plots[None])] if None in plots else []


def suite_section(table: SuiteTable, systems: Sequence[str], plots: Sequence[Plot]) -> Section:
    """A suite's scores, differences and plots."""
    present = [name for name in systems if any(name in row.cells for row in table.rows)]
    grids = [_scores(table, present)]
    differences = _differences(table, present)
    if differences is not None:
        grids.append(differences)
    return Section(suite_title(table.suite), grids=grids, plots=plots)


def summary(results: Results, tables: Sequence[SuiteTable]) -> list[tuple[str, list[str]]]:
    """For each system that is neither the teacher nor the baseline: its name, and plain sentences."""
    names = [system.name for system in results.systems]
    if TEACHER not in names:
        return [("No teacher", ["None was measured beside these systems, so nothing here says what was kept or lost."])]
    # Where there is nothing but the baseline, the baseline is what there is to tell of.
    subjects = [n for n in names if n not in (TEACHER, *WINDOWS)] or [n for n in names if n != TEACHER]
    if not subjects:
        return [("Only the teacher", ["Nothing else was measured, so there is nothing to compare."])]
    told = []
    for name in subjects:
        sentences = [
            *_means(name, tables),
            *_held_out(name, tables),
            *_verdicts(name, tables),
            *(branch_sentences(results) if name == whole_of(names) else []),
            *_memory(name, results.systems),
        ]
        told.append((name, sentences or ["Nothing was measured that the teacher was measured on."]))
    if untold := _untold(subjects, tables):
        told.append(("What could not be told apart", untold))
    if not window_of(names):
        missing = "It was not measured, so what the recurrence and the training brought cannot be told."
        told.append(("No window baseline", [missing]))
    return told


def _means(name: str, tables: Sequence[SuiteTable]) -> list[str]:
    sentences = []
    for table in tables:
        for row in table.rows:
            cell, teacher = row.cells.get(name), row.cells.get(TEACHER)
            if not row.mean_of or cell is None or teacher is None:
                continue
            own, its = (with_error(c.value, c.stderr, row.metric) for c in (cell, teacher))
            sentences.append(
                f"{suite_title(table.suite)}, mean of {len(row.mean_of)} accuracies: {own} %, which is "
                f"{percent_text(cell.percent_of_teacher)} of the teacher's {its} %{_gap(name, row, cell)}."
            )
    return sentences


def _gap(name: str, row: Row, cell: Cell) -> str:
    window = window_of(row.cells)
    if name == window or not window:
        return ""
    if cell.closed is None:
        return ""  # `_untold` says why
    return f"; {closed_text(cell.closed)} of the distance from the window baseline is closed"


def _held_out(name: str, tables: Sequence[SuiteTable]) -> list[str]:
    rows = [row for table in tables if table.suite == HELDOUT for row in table.rows if row.metric == "loss"]
    cell = rows[0].cells.get(name) if rows else None
    if cell is None or cell.to_teacher is None:
        return []
    change = difference_text(replace(cell.to_teacher, p_corrected=None), "loss")
    return [f"Held-out loss: {change} nats per token beside the teacher's{_gap(name, rows[0], cell)}."]


def _verdicts(name: str, tables: Sequence[SuiteTable]) -> list[str]:
    sentences = []
    window = window_of(system for table in tables for row in table.rows for system in row.cells)
    for other, words in ((TEACHER, "the teacher"), (window, "the window baseline")):
        worse, better, tested = _significant(name, other, tables)
        if not tested:
            continue
        sides = [
            f"{side} than {words} on {len(labels)} of {tested} measures ({', '.join(labels)})"
            for side, labels in (("worse", worse), ("better", better))
            if labels
        ]
        if sides:
            sentences.append(f"Significantly {' and '.join(sides)}.")
    return sentences


def _untold(names: Sequence[str], tables: Sequence[SuiteTable]) -> list[str]:
    """Sentences on differences that no figure shows, once for all systems and suites."""
    window = window_of(system for table in tables for row in table.rows for system in row.cells)
    equal, no_better = list[str](), list[str]()
    for name in names:
        worse, better, tested = _significant(name, TEACHER, tables)
        if tested and not worse and not better:
            equal.append(name)
        _, better, tested = _significant(name, window, tables)
        if tested and not better:
            no_better.append(name)
    sentences = []
    if equal:
        sentences.append(
            f"No figure tells {' or '.join(equal)} from the teacher with significance; with few items that does not "
            "make them equal."
        )
    if no_better:
        sentences.append(
            f"Nothing here shows {' or '.join(no_better)} to be better than the window baseline, which costs no "
            "training."
        )
    close = [suite_title(table.suite) for table in tables if _too_close(table, names)]
    if close:
        sentences.append(
            f"{', '.join(close)}: the window baseline is too close to the teacher to say what part of the distance is "
            "closed."
        )
    return sentences


def _too_close(table: SuiteTable, names: Sequence[str]) -> bool:
    """True if the distance from baseline to teacher is within its error in a row of the summary."""
    rows = [row for row in table.rows if row.mean_of or (table.suite == HELDOUT and row.metric == "loss")]
    return any(
        row.cells[name].closed is None and {TEACHER, window_of(row.cells)} <= {*row.cells} - {name}
        for row in rows
        for name in names
        if name in row.cells
    )


def _significant(name: str, other: str, tables: Sequence[SuiteTable]) -> tuple[list[str], list[str], int]:
    """Tasks on which a system is significantly worse or better than another, and the number of compared items."""
    worse: list[str] = []
    better: list[str] = []
    tested = 0
    for table in tables:
        for row in table.rows:
            cell = row.cells.get(name)
            found = None if cell is None else cell.to_teacher if other == TEACHER else cell.to_window
            # Perplexity repeats the loss. A mean may be significant where no single task has enough items.
            again = table.suite == HELDOUT and row.metric == "perplexity"
            if name == other or found is None or found.p_corrected is None or again:
                continue
            tested += 1
            if found.significant:
                label = f"{row.task} {row.metric}" if table.suite == HELDOUT else row.task
                label = f"the mean of {suite_title(table.suite).lower()}" if row.mean_of else label
                (better if (found.value > 0) == row.higher_is_better else worse).append(label)
    return worse, better, tested


def _memory(name: str, systems: Sequence[SystemInfo]) -> list[str]:
    by_name = {system.name: system for system in systems}
    own, teacher = by_name[name], by_name[TEACHER]
    if own.state_bytes is None or not teacher.growth_bytes_per_token:
        return []
    growth = own.growth_bytes_per_token or 0
    mine = own.state_bytes + _FAR * growth
    its = (teacher.state_bytes or 0) + _FAR * teacher.growth_bytes_per_token
    if not mine:
        return []
    more = f" and {readable_bytes(growth)} per token" if growth else ", whatever its length"
    return [
        f"Memory of one sequence: {readable_bytes(own.state_bytes)}{more}; at {_FAR:,} tokens the teacher's cache is "
        f"{readable_bytes(its)}, {its / mine:,.1f} times as much."
    ]


def _systems(results: Results) -> Grid:
    rows = []
    for system in results.systems:
        constant, growth = system.state_bytes, system.growth_bytes_per_token
        rows.append(
            [
                system.name,
                system.description,
                "–" if constant is None else readable_bytes(constant),
                "–" if growth is None else readable_bytes(growth),
            ]
        )
    return Grid("Systems", ["system", "what it is", "memory", "and per token"], rows, words=2)


def _scores(table: SuiteTable, systems: Sequence[str]) -> Grid:
    rows = []
    for row in table.rows:
        counts = sorted({cell.n for cell in row.cells.values()})
        cells = (row.cells.get(name) for name in systems)
        rows.append(
            [
                heading(row.task, row.metric, row.higher_is_better),
                " / ".join(f"{count:,}" for count in counts),
                *("–" if cell is None else with_error(cell.value, cell.stderr, row.metric) for cell in cells),
            ]
        )
    notes = [f"{row.task}: {', '.join(row.mean_of)}." for row in table.rows if row.mean_of]
    return Grid("Scores ± standard error", ["task", "items", *systems], rows, notes=notes)


def _differences(table: SuiteTable, systems: Sequence[str]) -> Grid | None:
    window = window_of(systems)
    has_teacher, has_window = TEACHER in systems, bool(window)
    others = [name for name in systems if name != TEACHER and (has_teacher or name != window)]
    if not others or not (has_teacher or has_window):
        return None
    header = ["task", "system", *(["% of teacher"] if has_teacher else [])]
    header += ["distance closed"] if has_teacher and has_window else []
    header += ["minus teacher", "p"] if has_teacher else []
    header += [f"minus {window}", "p"] if has_window else []
    header.append("test")
    rows, tests = [], 0
    for row in table.rows:
        label = heading(row.task, row.metric, row.higher_is_better)
        for name in others:
            cell = row.cells.get(name)
            if cell is None:
                continue
            line = [label, name]
            if has_teacher:
                line.append(percent_text(cell.percent_of_teacher))
            if has_teacher and has_window:
                line.append("–" if name == window else closed_text(cell.closed))
            if has_teacher:
                line += [difference_text(cell.to_teacher, row.metric), p_text(cell.to_teacher)]
            if has_window:
                own = None if name == window else cell.to_window
                line += [difference_text(own, row.metric), p_text(own)]
            found = cell.to_teacher or cell.to_window
            rows.append([*line, found.test if found is not None and found.test else "–"])
            label = ""
        every = [d for cell in row.cells.values() for d in (cell.to_teacher, cell.to_window)]
        tests += sum(d is not None and d.p_corrected is not None for d in every)
    notes = [f"p is corrected over this table's {tests} tests."] if tests > 1 else []
    if unpaired := [f"{row.task} {row.metric}" for row in table.rows if not row.paired]:
        notes.append(f"Not the mean of its items, so without a paired test: {', '.join(unpaired)}.")
    return Grid("Beside the teacher and the baseline", header, rows, words=2, notes=notes)
