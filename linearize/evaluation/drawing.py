"""Plots as SVG: lines over an axis, and heat maps. Text and shapes only, coloured by style sheets for light and dark.

Series differ in colour, dash and marker, so that neither colour blindness nor a grey printer joins them. Their colours
follow Okabe and Ito, the heat map's are cividis.
"""

from __future__ import annotations

import html
import math
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

WIDTH = 760
_COLOURS = {
    "light": ("#1f2328", "#d55e00", "#0072b2", "#009e73", "#b0568f", "#c98a00", "#3d9fd6", "#8c564b"),
    "dark": ("#e6edf3", "#ff8a3d", "#4aa8ff", "#2ec4a0", "#e39ac6", "#f2c14e", "#9bdcff", "#c79a8b"),
}
_DASHES = ("", "7 4", "", "9 3 2 3", "", "2 3", "7 4", "9 3 2 3")
_MARKERS = ("circle", "square", "triangle", "diamond", "cross", "plus", "down", "circle")
_CIVIDIS = ((0, 34, 78), (53, 69, 108), (102, 105, 112), (148, 142, 119), (200, 184, 102), (254, 232, 56))


def _variables(mode: str) -> str:
    paper, ink, soft, grid = {
        "light": ("#ffffff", "#1f2328", "#59636e", "#e2e6ea"),
        "dark": ("#0f1419", "#e6edf3", "#9aa7b4", "#2b333c"),
    }[mode]
    series = "".join(f"--s{i}:{colour};" for i, colour in enumerate(_COLOURS[mode]))
    return f".plot{{--paper:{paper};--ink:{ink};--soft:{soft};--grid:{grid};{series}}}"


# Only screens are dark: what is printed is printed on white.
STYLE = (
    _variables("light")
    + f"@media screen and (prefers-color-scheme:dark){{{_variables('dark')}}}"
    + ".plot{font:12px system-ui,'Segoe UI',Roboto,'Helvetica Neue',Arial,sans-serif}"
    ".plot text{fill:var(--ink)}.plot .soft{fill:var(--soft)}.plot .title{font-size:14px;font-weight:600}"
    ".plot .grid{stroke:var(--grid);stroke-width:1}.plot .axis{stroke:var(--soft);stroke-width:1}"
    ".plot .line{fill:none;stroke-width:2;stroke-linejoin:round}.plot .band{opacity:.13;stroke:none}"
    ".plot .mark{fill:var(--paper);stroke-width:1.8}.plot .paper{fill:var(--paper)}"
    + "".join(
        f".plot .s{i}{{stroke:var(--s{i}){';stroke-dasharray:' + dash if dash else ''}}}"
        f".plot .m{i}{{stroke:var(--s{i})}}.plot .b{i}{{fill:var(--s{i})}}"
        for i, dash in enumerate(_DASHES)
    )
)
"""The style sheet of every plot: part of a plot that stands alone, once in a page that holds several."""


@dataclass(frozen=True)
class Series:
    """A line: points (x, y, standard error of y or None), and a number that gives its look."""

    name: str
    points: Sequence[tuple[float, float, float | None]]
    look: int


@dataclass(frozen=True)
class Axis:
    """An axis: its title with the unit, whether it is logarithmic, and how its ticks are written."""

    title: str
    write: Callable[[float], str]
    log: bool = False
    limits: tuple[float, float] | None = None


@dataclass(frozen=True)
class HeatMap:
    """A heat map of shares in [0, 1]: by (row, column) the share and the number of items."""

    name: str
    cells: Mapping[tuple[float, float], tuple[float, int]]


def line_plot(
    title: str, x: Axis, y: Axis, series: Sequence[Series], x_ticks: Sequence[float], width: int = WIDTH
) -> str:
    """Lines with markers and a band of one standard error on either side; the legend stands above them."""
    legend, top = _legend(series, 44, width)
    left, right, height = 66, width - 22, 250
    top += 42
    bottom = top + height
    x_low, x_high = x.limits or _range([p[0] for s in series for p in s.points])
    y_low, y_high = y.limits or _padded([p[1] for s in series for p in s.points], y.log)

    def at_x(value: float) -> float:
        return left + (right - left) * _place(value, x_low, x_high, x.log)

    def at_y(value: float) -> float:
        return bottom - height * min(1.0, max(0.0, _place(value, y_low, y_high, y.log)))

    parts = [_text(0, 16, title, "title"), *legend, _text(0, top - 14, y.title, "soft")]
    for tick in _decades(y_low, y_high) if y.log else _steps(y_low, y_high):
        parts.append(f'<path class="grid" d="M{left} {at_y(tick):.1f}H{right}"/>')
        parts.append(_text(left - 8, at_y(tick) + 4, y.write(tick), "soft", "end"))
    for tick in x_ticks:
        parts.append(f'<path class="axis" d="M{at_x(tick):.1f} {bottom}v5"/>')
        parts.append(_text(at_x(tick), bottom + 20, x.write(tick), "soft", "middle"))
    parts.append(f'<path class="axis" d="M{left} {bottom}H{right}"/>')
    parts.append(_text((left + right) / 2, bottom + 42, x.title, "soft", "middle"))
    # Dashes last: of two lines that are one, both can be seen.
    for one in sorted(series, key=lambda one: bool(_DASHES[one.look % len(_DASHES)])):
        parts += _line(one, at_x, at_y)
    return _svg(parts, bottom + 54, title, width)


_LEAST_MAP_WIDTH = 170


_LEAST_WRITTEN_WIDTH = 30


def heat_maps(
    title: str,
    row_title: str,
    column_title: str,
    rows: Axis,
    columns: Axis,
    maps: Sequence[HeatMap],
    cell: tuple[int, int] = (46, 26),
) -> str:
    """Heat maps of one size beside each other, as many to a line as fit, with the share in percent in every cell that
    is wide enough; `cell` is a cell's width and height in pixels."""
    at_rows = sorted({key[0] for one in maps for key in one.cells})
    at_columns = sorted({key[1] for one in maps for key in one.cells})
    (cell_width, cell_height), left, above, gap = cell, 54, 24, 26
    # A map of one length still has to hold its name and the title of its columns.
    block = left + max(cell_width * len(at_columns), _LEAST_MAP_WIDTH)
    across = max(1, (WIDTH + gap) // (block + gap))
    tall = above + cell_height * len(at_rows) + 44
    parts = [_text(0, 16, title, "title"), *_scale(WIDTH - 200, 8)]
    for index, one in enumerate(maps):
        x0 = index % across * (block + gap) + left
        y0 = 40 + index // across * (tall + 14) + above
        parts.append(_text(x0, y0 - 8, shorten(one.name, block - left), full=one.name))
        parts.append(_text(x0 - left, y0 - 8, row_title, "soft"))
        for i, row in enumerate(at_rows):
            parts.append(_text(x0 - 8, y0 + cell_height * (i + 0.5) + 4, rows.write(row), "soft", "end"))
            for j, column in enumerate(at_columns):
                parts.append(
                    _cell(x0 + cell_width * j, y0 + cell_height * i, cell_width, cell_height, one, row, column)
                )
        under = y0 + cell_height * len(at_rows)
        for j, column in enumerate(at_columns):
            parts.append(_text(x0 + cell_width * (j + 0.5), under + 16, columns.write(column), "soft", "middle"))
        parts.append(_text(x0, under + 34, column_title, "soft"))
    lines = math.ceil(len(maps) / across)
    return _svg(parts, 40 + lines * (tall + 14), title, max(WIDTH, block))


def beside(title: str, panels: Sequence[str], width: int, words: str) -> str:
    """Plots of one width beside each other, with a title above and words below them."""
    gap, above = 34, 34
    heights = [float(found[1]) for panel in panels if (found := re.search(r'height="(\d+)"', panel))]
    parts = [_text(0, 16, title, "title")]
    for index, panel in enumerate(panels):
        parts.append(panel.replace("<svg ", f'<svg x="{index * (width + gap)}" y="{above}" ', 1))
    under = above + max(heights)
    whole = len(panels) * (width + gap) - gap
    return _svg([*parts, _text(0, under + 10, words, "soft")], under + 20, title, whole)


def standing_alone(svg: str) -> str:
    """A plot with its own style sheet and background, as a file of its own."""
    start = svg.index(">") + 1
    return f'{svg[:start]}<style>{STYLE}</style><rect class="paper" width="100%" height="100%"/>{svg[start:]}\n'


def shorten(name: str, width: float) -> str:
    """A name cut to about so many pixels of plain text."""
    fits = max(4, int(width / 6.6))
    return name if len(name) <= fits else name[: fits - 1] + "…"


def log_ticks(low: float, high: float, most: int = 8) -> list[float]:
    """Powers of two between two numbers, at most so many, evenly chosen."""
    powers = list(range(math.ceil(math.log2(low) - 1e-9), math.floor(math.log2(high) + 1e-9) + 1))
    stride = max(1, math.ceil(len(powers) / most))
    return [2.0**power for power in powers[::-1][::stride][::-1]] or [low]


def _line(one: Series, at_x: Callable[[float], float], at_y: Callable[[float], float]) -> list[str]:
    look = one.look % len(_MARKERS)
    points = [(at_x(x), at_y(y)) for x, y, _ in one.points]
    parts = [f"<g><title>{_escape(one.name)}</title>"]
    sure = [(x, y, error) for x, y, error in one.points if error is not None]
    if len(sure) > 1:
        edge = [(at_x(x), at_y(y + e)) for x, y, e in sure] + [(at_x(x), at_y(y - e)) for x, y, e in reversed(sure)]
        parts.append(f'<path class="band b{look}" d="{_path(edge)}Z"/>')
    parts.append(f'<path class="line s{look}" d="{_path(points)}"/>')
    # Of many points the line is enough, with a marker here and there to tell it by.
    parts += [_marker(x, y, look) for x, y in points[:: max(1, math.ceil(len(points) / 12))]]
    return [*parts, "</g>"]


def _legend(series: Sequence[Series], y: float, most: float) -> tuple[list[str], float]:
    parts, x = [], 0.0
    for one in series:
        look = one.look % len(_MARKERS)
        name = shorten(one.name, 300)
        width = 40 + 7.2 * len(name) + 14
        if x and x + width > most:
            x, y = 0.0, y + 20
        parts.append(f'<path class="line s{look}" d="M{x:.1f} {y - 4}h32"/>')
        parts.append(_marker(x + 16, y - 4, look))
        parts.append(_text(x + 40, y, name, full=one.name))
        x += width
    return parts, y


def _marker(x: float, y: float, look: int) -> str:
    r = 3.6
    shapes = {
        "circle": f"M{x - r:.1f} {y:.1f}a{r} {r} 0 1 0 {2 * r} 0a{r} {r} 0 1 0 {-2 * r} 0Z",
        "square": f"M{x - r:.1f} {y - r:.1f}h{2 * r}v{2 * r}h{-2 * r}Z",
        "triangle": f"M{x:.1f} {y - r - 0.8:.1f}l{r + 0.6} {2 * r}h{-2 * r - 1.2}Z",
        "down": f"M{x:.1f} {y + r + 0.8:.1f}l{r + 0.6} {-2 * r}h{-2 * r - 1.2}Z",
        "diamond": f"M{x:.1f} {y - r - 1:.1f}l{r + 1} {r + 1}l{-r - 1} {r + 1}l{-r - 1} {-r - 1}Z",
        "cross": f"M{x - r:.1f} {y - r:.1f}l{2 * r} {2 * r}M{x - r:.1f} {y + r:.1f}l{2 * r} {-2 * r}",
        "plus": f"M{x - r:.1f} {y:.1f}h{2 * r}M{x:.1f} {y - r:.1f}v{2 * r}",
    }
    return f'<path class="mark m{look}" d="{shapes[_MARKERS[look]]}"/>'


def _cell(x: float, y: float, width: float, height: float, one: HeatMap, row: float, column: float) -> str:
    found = one.cells.get((row, column))
    box = f'x="{x:.1f}" y="{y:.1f}" width="{width - 1}" height="{height - 1}"'
    if found is None:
        return f'<rect class="mark grid" {box}/>'
    share, n = found
    ink = "#ffffff" if share < 0.55 else "#1f2328"
    written = (
        f'<text x="{x + (width - 1) / 2:.1f}" y="{y + height / 2 + 4:.1f}" text-anchor="middle" style="fill:{ink}">'
        f"{100 * share:.0f}</text>"
        if width >= _LEAST_WRITTEN_WIDTH
        else ""
    )
    return f'<g><title>{100 * share:.1f} % of {n}</title><rect {box} fill="{_cividis(share)}"/>{written}</g>'


def _scale(x: float, y: float) -> list[str]:
    steps = 20
    boxes = [
        f'<rect x="{x + 30 + 5 * i}" y="{y}" width="5.5" height="10" fill="{_cividis(i / (steps - 1))}"/>'
        for i in range(steps)
    ]
    return [_text(x + 24, y + 9, "0 %", "soft", "end"), *boxes, _text(x + 136, y + 9, "100 %", "soft")]


def _cividis(share: float) -> str:
    place = min(1.0, max(0.0, share)) * (len(_CIVIDIS) - 1)
    low = min(int(place), len(_CIVIDIS) - 2)
    mixed = (a + (place - low) * (b - a) for a, b in zip(_CIVIDIS[low], _CIVIDIS[low + 1], strict=True))
    return "#" + "".join(f"{round(part):02x}" for part in mixed)


def _text(x: float, y: float, text: str, kind: str = "", anchor: str = "start", full: str = "") -> str:
    kind = f' class="{kind}"' if kind else ""
    anchor = f' text-anchor="{anchor}"' if anchor != "start" else ""
    told = f"<title>{_escape(full)}</title>" if full and full != text else ""
    return f'<text x="{x:.1f}" y="{y:.1f}"{kind}{anchor}>{told}{_escape(text)}</text>'


def _svg(parts: Sequence[str], height: float, title: str, width: float = WIDTH) -> str:
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" class="plot" viewBox="-1 0 {width + 10} {height:.0f}" '
        f'width="{width + 10}" height="{height:.0f}" role="img" aria-label="{_escape(title)}">{"".join(parts)}</svg>'
    )


def _escape(text: str) -> str:
    return html.escape("".join(character for character in text if character.isprintable()))


def _path(points: Sequence[tuple[float, float]]) -> str:
    return "M" + "L".join(f"{x:.1f} {y:.1f}" for x, y in points)


def _place(value: float, low: float, high: float, log: bool) -> float:
    if log:
        value, low, high = math.log(value), math.log(low), math.log(high)
    return (value - low) / (high - low) if high > low else 0.5


def _range(values: Sequence[float]) -> tuple[float, float]:
    return min(values), max(values)


def _padded(values: Sequence[float], log: bool) -> tuple[float, float]:
    low, high = _range(values)
    if log:
        return 10 ** math.floor(math.log10(low)), 10 ** math.ceil(math.log10(high) + 1e-9)
    margin = 0.08 * (high - low) or 0.05 * abs(high) or 1.0
    return low - margin, high + margin


def _steps(low: float, high: float) -> list[float]:
    """About five round numbers between two."""
    rough = (high - low) / 5
    size = 10 ** math.floor(math.log10(rough))
    step = next(size * factor for factor in (1, 2, 2.5, 5, 10) if size * factor >= rough)
    return [step * k for k in range(math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9) + 1)]


def _decades(low: float, high: float) -> list[float]:
    return [10.0**k for k in range(math.ceil(math.log10(low) - 1e-9), math.floor(math.log10(high) + 1e-9) + 1)]
