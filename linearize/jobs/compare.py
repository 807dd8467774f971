"""`linearize compare`: put several evaluations side by side and write the comparison."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from linearize.evaluation.results.sidebyside import put_side_by_side, read_all, side_by_side_data, side_by_side_page
from linearize.jobs.checks import quiet
from linearize.report.pages import write_pages
from linearize.runtime.claims import claimed
from linearize.runtime.files import staged_files

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

    from linearize.report.pages import Page


def compare(
    results: Sequence[Path], *, report: Path | None = None, say: Callable[[str], None] = quiet
) -> tuple[Page, dict[str, Any]]:
    """Compare results on the tasks that they share.

    Args:
        results: two or more report folders, or their results.json.
        report: a folder to write pages, plots and data to.

    Returns:
        the comparison as a page and as data.

    Raises:
        DataError: a file has no results, or they have no task in common.
        OutputError: the report cannot be written, or another job is writing it.
    """
    found = put_side_by_side(read_all(results))
    data, page = side_by_side_data(found), side_by_side_page(found)
    if report is not None:
        text = json.dumps(data, indent=1, ensure_ascii=False, allow_nan=False)
        with claimed(report), staged_files(report) as staging:
            write_pages(page, staging)
            (staging / "comparison.json").write_text(text + "\n", encoding="utf-8")
        say(f"wrote {report / 'report.html'}")
    return page, data
