"""Pages of text, tables and plots, written as Markdown and as one self-contained HTML file."""

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
    """A table: the first columns are text, the others figures.

    Attributes:
        words: the number of text columns. A row whose first cell is empty continues the row above it.
        notes: explanations below the table.
    """

    caption: str
    header: Sequence[str]
    rows: Sequence[Sequence[str]]
    words: int = 1
    notes: Sequence[str] = ()


@dataclass(frozen=True)
class Section:
    """A part of a page: sentences as (subject, sentences), then tables, then plots."""

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
    """Write `report.md`, `report.html` and, in the same folder, every plot as an `.svg`."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "report.md").write_text(to_markdown(page), encoding="utf-8")
    (folder / "report.html").write_text(to_html(page), encoding="utf-8")
    for plot in (plot for section in page.sections for plot in section.plots):
        (folder / f"{plot.name}.svg").write_text(plot.alone, encoding="utf-8")


def to_markdown(page: Page) -> str:
    """The page as Markdown; it refers to the plots' files."""
    return _rendered("report.md", _plain, page=page)


def to_html(page: Page) -> str:
    """The page as one self-contained HTML document without scripts."""
    return _rendered("report.html", _shown, page=page, plot_style=STYLE)


def _rendered(name: str, finalize: Callable[[Any], Any], **values: object) -> str:
    """A template with its values. Each value passes `finalize`, and in HTML is escaped afterwards."""
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
    """Text without control characters; units and arrows get a non-breaking space before them."""
    if hasattr(value, "__html__"):  # markup that a template marked as safe
        return value
    text = "".join(character for character in str(value) if character.isprintable())
    for mark in ("%", "↑", "↓"):
        text = text.replace(f" {mark}", f"\u00a0{mark}")
    return text


def _plain(value: Any) -> str:
    """Text escaped for Markdown: on one line, without markup and column marks."""
    text = "".join(character if character.isprintable() else " " for character in str(value))
    for mark in "\\`*_[]<>|#&~":
        text = text.replace(mark, "\\" + mark)
    return text
