"""A report's pages: words, tables and plots, written as Markdown and as one HTML page that needs no other file."""

from __future__ import annotations

import html
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from linearize.evaluation.drawing import STYLE, standing_alone

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from linearize.evaluation.plots import Plot

_PAGE_STYLE = """
:root{color-scheme:light dark;--paper:#fff;--ink:#1f2328;--soft:#59636e;--rule:#d5dae0;--tint:#f5f7f9}
@media screen and (prefers-color-scheme:dark){
:root{--paper:#0f1419;--ink:#e6edf3;--soft:#9aa7b4;--rule:#303943;--tint:#171d24}}
*{box-sizing:border-box}
body{margin:0;background:var(--paper);color:var(--ink);
font:15px/1.55 system-ui,"Segoe UI",Roboto,"Helvetica Neue",Arial,sans-serif}
main{max-width:1080px;margin:0 auto;padding:36px 24px 64px}
h1{font-size:26px;line-height:1.25;margin:0 0 12px;overflow-wrap:anywhere}
h2{font-size:19px;margin:44px 0 10px;padding-bottom:6px;border-bottom:1px solid var(--rule)}
dl{display:grid;grid-template-columns:max-content 1fr;gap:2px 18px;margin:0;color:var(--soft);font-size:13px}
dt{font-weight:600}dd{margin:0;overflow-wrap:anywhere}
h3{font-size:15px;margin:14px 0 2px;overflow-wrap:anywhere}
ul{margin:2px 0 10px;padding-left:20px;max-width:100ch}li{margin:3px 0;overflow-wrap:anywhere}
.note{color:var(--soft);font-size:13px;margin:4px 0}
.scroll{overflow-x:auto;margin:18px 0 6px}
table{border-collapse:collapse;font-size:13.5px;font-variant-numeric:tabular-nums}
caption{text-align:left;font-weight:600;padding-bottom:6px}
th,td{padding:5px 14px 5px 0;text-align:right;vertical-align:top;white-space:nowrap}
th:last-child,td:last-child{padding-right:4px}
thead th{border-bottom:1.5px solid var(--ink);font-weight:600;vertical-align:bottom}
tbody tr.first>*{border-top:1px solid var(--rule)}tbody tr:first-child>*{border-top:0}
.words{text-align:left;white-space:normal;overflow-wrap:break-word;max-width:270px}
thead th{max-width:190px;white-space:normal;overflow-wrap:break-word}
tbody th{font-weight:500}
figure{margin:26px 0;overflow-x:auto}svg.plot{display:block;max-width:100%;height:auto}
footer{margin-top:48px;color:var(--soft);font-size:12px}
@media print{main{max-width:none;padding:0}h2{break-after:avoid}figure,tr{break-inside:avoid}
.scroll,figure{overflow:visible}body{font-size:11pt}table{font-size:8.5pt}th,td{padding-right:9px}}
"""


@dataclass(frozen=True)
class Grid:
    """A table: the first columns are words, the others figures.

    Attributes:
        words: how many columns are words. A row whose first cell is empty goes on with the one above it.
        notes: what stands below it, to explain.
    """

    caption: str
    header: Sequence[str]
    rows: Sequence[Sequence[str]]
    words: int = 1
    notes: Sequence[str] = ()


@dataclass(frozen=True)
class Section:
    """A part of a page, in this order: what is told as (of what, sentences), tables, plots."""

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
    for section in page.sections:
        for plot in section.plots:
            (folder / f"{plot.name}.svg").write_text(standing_alone(plot.svg), encoding="utf-8")


def to_markdown(page: Page) -> str:
    """The page as Markdown; plots are the files beside it."""
    lines = [f"# {_plain(page.title)}", ""]
    lines += [f"- {name}: {_plain(text)}" for name, text in page.facts]
    for section in page.sections:
        lines += ["", f"## {_plain(section.title)}"]
        for about, sentences in section.told:
            lines += ["", f"**{_plain(about)}**", "", *(f"- {_plain(sentence)}" for sentence in sentences)]
        for grid in section.grids:
            lines += ["", f"**{_plain(grid.caption)}**", ""]
            lines.append(_markdown_row(grid.header))
            lines.append("|" + "|".join(" --- " if i < grid.words else " ---: " for i in range(len(grid.header))) + "|")
            lines += [_markdown_row(row) for row in grid.rows]
            for note in grid.notes:
                lines += ["", _plain(note)]
        for plot in section.plots:
            lines += ["", f"![{plot.name}]({plot.name}.svg)"]
    return "\n".join(lines) + "\n"


def to_html(page: Page) -> str:
    """The page as one HTML document with everything in it: no script, nothing to fetch."""
    facts = "".join(f"<dt>{_escape(name)}</dt><dd>{_escape(text)}</dd>" for name, text in page.facts)
    body = "\n".join(_html_section(section) for section in page.sections)
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8"/>\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1"/>\n'
        f"<title>{_escape(page.title)}</title>\n<style>{_PAGE_STYLE}{STYLE}</style>\n</head>\n<body>\n<main>\n"
        f"<h1>{_escape(page.title)}</h1>\n<dl>{facts}</dl>\n{body}\n"
        "<footer>± is one standard error. Written by linearize.</footer>\n</main>\n</body>\n</html>\n"
    )


def _html_section(section: Section) -> str:
    parts = [f"<section>\n<h2>{_escape(section.title)}</h2>"]
    for about, sentences in section.told:
        told = "".join(f"<li>{_escape(sentence)}</li>" for sentence in sentences)
        parts.append(f"<h3>{_escape(about)}</h3>\n<ul>{told}</ul>")
    parts += [_html_grid(grid) for grid in section.grids]
    parts += [f"<figure>{plot.svg}</figure>" for plot in section.plots]
    return "\n".join(parts) + "\n</section>"


def _html_grid(grid: Grid) -> str:
    def kind(i: int) -> str:
        return ' class="words"' if i < grid.words else ""

    head = "".join(f'<th scope="col"{kind(i)}>{_escape(name)}</th>' for i, name in enumerate(grid.header))
    rows = []
    for row in grid.rows:
        cells = "".join(
            f'<th scope="row"{kind(i)}>{_escape(cell)}</th>' if i < grid.words else f"<td>{_escape(cell)}</td>"
            for i, cell in enumerate(row)
        )
        rows.append(f'<tr class="first">{cells}</tr>' if row[0] else f"<tr>{cells}</tr>")
    notes = "".join(f'\n<p class="note">{_escape(note)}</p>' for note in grid.notes)
    return (
        f'<div class="scroll"><table>\n<caption>{_escape(grid.caption)}</caption>\n<thead><tr>{head}</tr></thead>\n'
        f"<tbody>\n{chr(10).join(rows)}\n</tbody>\n</table></div>{notes}"
    )


def _markdown_row(cells: Sequence[str]) -> str:
    return "| " + " | ".join(_plain(cell) for cell in cells) + " |"


def _escape(text: str) -> str:
    text = html.escape("".join(character for character in text if character.isprintable()))
    # A unit or an arrow stays with what it belongs to.
    for mark in ("%", "↑", "↓"):
        text = text.replace(f" {mark}", f"\u00a0{mark}")
    return text


def _plain(text: str) -> str:
    """Text in Markdown that stays text: on one line, no markup, no column marks."""
    text = "".join(character if character.isprintable() else " " for character in text)
    for mark in "\\`*_[]<>|#":
        text = text.replace(mark, "\\" + mark)
    return text
