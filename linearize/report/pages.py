"""Pages of words, tables and plots, written as Markdown and as one HTML file that needs no other file."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from linearize.report.svg import STYLE

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from linearize.report.plots import Plot

_TEMPLATES = Path(__file__).parent / "templates"


@dataclass(frozen=True)
class Grid:
    """A table: the first columns are words, the others figures.

    Attributes:
        words: how many columns are words. A row whose first cell is empty continues the row above it.
        notes: explanations below the table.
    """

    caption: str
    header: Sequence[str]
    rows: Sequence[Sequence[str]]
    words: int = 1
    notes: Sequence[str] = ()


@dataclass(frozen=True)
class Section:
    """A part of a page, in this order: sentences as (subject, sentences), tables, plots."""

    title: str
    told: Sequence[tuple[str, Sequence[str]]] = ()
    grids: Sequence[Grid] = ()
    plots: Sequence[Plot] = ()


@dataclass(frozen=True)
class Page:
    """A report: its title, facts as (name, text), sections."""

    title: str
    facts: Sequence[tuple[str, str]]
    sections: Sequence[Section] = field(default_factory=list)


def write_pages(page: Page, folder: Path) -> None:
    """Writes `report.md`, `report.html` and, beside them, every plot as an `.svg` of its own."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "report.md").write_text(to_markdown(page), encoding="utf-8")
    (folder / "report.html").write_text(to_html(page), encoding="utf-8")
    write_plots([plot for section in page.sections for plot in section.plots], folder)


def write_plots(plots: Sequence[Plot], folder: Path) -> None:
    """Writes each plot as `NAME.svg` into a folder."""
    for plot in plots:
        (folder / f"{plot.name}.svg").write_text(plot.alone, encoding="utf-8")


def to_markdown(page: Page) -> str:
    """The page as Markdown; plots are the files beside it."""
    return _rendered("report.md", _plain, page=page)


def to_html(page: Page) -> str:
    """The page as one HTML document with everything in it: no script, nothing to fetch."""
    return _rendered("report.html", _shown, page=page, plot_style=STYLE)


def _rendered(name: str, finalize: Callable[[Any], Any], **values: object) -> str:
    """A template with its values. Each value passes `finalize`, and in HTML is escaped after that."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined, select_autoescape

    environment = Environment(
        loader=FileSystemLoader(_TEMPLATES),
        autoescape=select_autoescape(("html",)),
        finalize=finalize,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    return environment.get_template(name).render(values)


def _shown(value: Any) -> Any:
    """Text without control characters; a unit or an arrow stays on the line of its number."""
    if hasattr(value, "__html__"):  # markup that a template marked as safe
        return value
    text = "".join(character for character in str(value) if character.isprintable())
    for mark in ("%", "↑", "↓"):
        text = text.replace(f" {mark}", f"\u00a0{mark}")
    return text


def _plain(value: Any) -> str:
    """Text in Markdown that stays text: on one line, no markup, no column marks."""
    text = "".join(character if character.isprintable() else " " for character in str(value))
    for mark in "\\`*_[]<>|#&~":
        text = text.replace(mark, "\\" + mark)
    return text
