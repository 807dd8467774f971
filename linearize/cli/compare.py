"""`linearize compare`: several evaluations side by side."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from linearize.cli.console import JsonOption, examples, print_json, status

if TYPE_CHECKING:
    from linearize.report.pages import Grid

EPILOG = examples(
    "linearize compare reports/gla reports/gated_deltanet",
    "linearize compare before/results.json after/results.json --report comparison",
    "linearize compare a b c --json",
)


def compare(
    results: Annotated[
        list[Path], typer.Argument(metavar="RESULTS...", help="Two or more report folders, or their results.json.")
    ],
    report: Annotated[
        Path | None, typer.Option("--report", metavar="DIR", help="Write the comparison as pages, plots and data.")
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Show several evaluations side by side, on the tasks that they share.

    If the items are the same, systems are compared item by item: with the system of the same name in the first result,
    or else with the first result's last system. If they are not, the output gives the reason.
    """
    if len(results) < 2:
        raise typer.BadParameter("give two or more results to compare")
    from linearize.jobs.compare import compare as put_side_by_side

    page, data = put_side_by_side(results, report=report, say=status)
    if as_json:
        print_json(data)
        return
    console = Console(width=None if sys.stdout.isatty() else 160, highlight=False)
    for section in page.sections:
        for grid in section.grids:
            console.print(_table(f"{section.title}: {grid.caption}", grid))
            for note in grid.notes:
                console.print(note, markup=False, soft_wrap=True)


def _table(title: str, grid: Grid) -> Table:
    # Names come from files, so square brackets in them must not be parsed as markup.
    table = Table(title=Text(title), title_justify="left")
    for i, name in enumerate(grid.header):
        table.add_column(Text(name), justify="left" if i < grid.words else "right", overflow="fold")
    for row in grid.rows:
        table.add_row(*(Text(cell) for cell in row))
    return table
