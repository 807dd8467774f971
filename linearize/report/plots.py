"""Plots as SVG by matplotlib: lines, bars and heat maps, for light and dark screens and for phones.

Series differ in colour, dash and marker, so they are distinct in grey and for colour-blind readers. Colours follow
Okabe and Ito; heat maps use cividis. A plot is plain data; matplotlib is a lazy import of its `svg` property.
"""

from __future__ import annotations

import io
import itertools
import math
import textwrap
import warnings
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING

from linearize.report import svg

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from matplotlib.artist import Artist
    from matplotlib.axes import Axes
    from matplotlib.collections import QuadMesh
    from matplotlib.figure import Figure

_LINE, _CHARACTER = 21, 8.6
"""The height of a line of text and the width of a character, in pixels."""
_WIDE = 320
"""The width of a panel beside others, in pixels."""

_DASHES = (None, (3.5, 2), None, (4.5, 1.5, 1, 1.5), None, (1, 1.5), (3.5, 2), (4.5, 1.5, 1, 1.5))
_MARKERS = "os^Dx+vo"
_MARKED_POINTS = 12


@dataclass(frozen=True)
class Axis:
    """An axis: its title with the unit, the format of its ticks, and its scale.

    Attributes:
        ticks: values to label, thinned until the labels fit; None for round numbers.
    """

    title: str
    write: Callable[[float], str]
    log: bool = False
    limits: tuple[float, float] | None = None
    ticks: Sequence[float] | None = None

    def labels(self, low: float, high: float, pixels: float) -> list[float]:
        """Every n-th of the ticks, counted from the last one, for the smallest n whose labels do not touch."""
        ticks = sorted(tick for tick in self.ticks or () if low <= tick <= high)
        scale = math.log if self.log else float
        places = [pixels * (scale(tick) - scale(low)) / (scale(high) - scale(low)) for tick in ticks]
        halves = [_CHARACTER * len(self.write(tick)) / 2 + 4 for tick in ticks]
        for stride in range(1, len(ticks)):
            chosen = range(len(ticks))[::-1][::stride][::-1]
            if all(places[b] - places[a] >= halves[a] + halves[b] for a, b in itertools.pairwise(chosen)):
                return [ticks[i] for i in chosen]
        return ticks[-1:]


@dataclass(frozen=True)
class Series:
    """A line, or bars: points (x, y, standard error of y or None), and an index into the colours and markers."""

    name: str
    points: Sequence[tuple[float, float, float | None]]
    look: int


@dataclass(frozen=True)
class Lines:
    """Lines with markers and a band of one standard error on either side; or bars with error bars, from 0."""

    x: Axis
    y: Axis
    series: Sequence[Series]
    bars: bool = False

    across = 1
    height = 250

    def draw(self, axes: Axes, drawing: _Drawing) -> None:
        """Draw into `axes`."""
        from matplotlib.ticker import FixedLocator, FuncFormatter, LogLocator, MaxNLocator, NullLocator

        axes.set_xscale("log" if self.x.log else "linear")
        axes.set_yscale("log" if self.y.log else "linear")
        axes.margins(0.03, 0.08)
        # Dashed lines last, so that both of two identical lines are visible.
        for one in sorted(self.series, key=lambda one: _DASHES[one.look % len(_DASHES)] is not None):
            (self._bars if self.bars else self._line)(axes, one, drawing)
        axes.set_ylim(self.y.limits)
        for axis, scale, (low, high) in ((axes.xaxis, self.x, axes.get_xlim()), (axes.yaxis, self.y, axes.get_ylim())):
            if scale.ticks is not None:
                axis.set_major_locator(FixedLocator(scale.labels(low, high, 0.85 * drawing.room)))
            elif scale.log and high / low < 5:
                axis.set_major_locator(MaxNLocator(4, steps=[1, 2, 5, 10]))
            elif scale.log:
                axis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0) if high / low < 100 else (1.0,), numticks=8))
            else:
                axis.set_major_locator(MaxNLocator(5, steps=[1, 2, 2.5, 5, 10]))
            axis.set_minor_locator(NullLocator())
            axis.set_major_formatter(FuncFormatter(lambda value, _, write=scale.write: write(value)))
        axes.set_xlabel(self.x.title)
        axes.set_title(self.y.title)
        axes.grid(axis="y", linewidth=1)

    def words(self) -> list[str]:
        """The figures as text, one line per series."""
        return [
            f"{one.name}: "
            + ", ".join(f"{self.y.write(y)} at {self.x.write(x)}" for x, y, _ in one.points[:: _every(one.points)])
            + "."
            for one in self.series
        ]

    def _line(self, axes: Axes, one: Series, drawing: _Drawing) -> None:
        look = one.look % len(svg.SERIES)
        colour, dash = svg.SERIES[look], _DASHES[look]
        sure = [(x, y - error, y + error) for x, y, error in one.points if error is not None]
        if len(sure) > 1:
            x, low, high = zip(*sure, strict=True)
            axes.fill_between(x, low, high, color=colour, alpha=0.15, linewidth=0)
        [line] = axes.plot(
            [x for x, _, _ in one.points],
            [y for _, y, _ in one.points],
            color=colour,
            linestyle="-" if dash is None else (0, dash),
            marker=_MARKERS[look],
            markevery=_every(one.points),
            markerfacecolor=svg.PAPER,
            clip_on=False,
        )
        line.set_gid(drawing.title([one.name]))
        drawing.legend.setdefault(one.name, line)

    def _bars(self, axes: Axes, one: Series, drawing: _Drawing) -> None:
        colour = svg.SERIES[(one.look + 2) % len(svg.SERIES)]
        axes.axhline(0, color=svg.SOFT, linewidth=1)
        for x, y, error in one.points:
            [bar] = axes.bar([x], [y], 0.8, yerr=error, color=colour, ecolor=svg.INK, error_kw={"elinewidth": 1.5})
            bar.set_gid(drawing.title([f"{self.x.write(x)}: {self.y.write(y)}"]))


@dataclass(frozen=True)
class HeatMap:
    """A heat map of shares in [0, 1].

    Attributes:
        cells: (row, column) -> the share and the number of items.
        written: write the shares into the cells, in percent; otherwise a colour scale is drawn below.
    """

    name: str
    x: Axis
    y: Axis
    cells: Mapping[tuple[float, ...], tuple[float, int]]
    written: bool = True

    @property
    def across(self) -> int:
        """The number of these maps in a row of panels."""
        return 2 if not self.written or len({column for _, column in self.cells}) <= 3 else 1

    @property
    def height(self) -> float:
        """The height in pixels, title and ticks included."""
        return 96 + (24 if self.written else 13) * len({row for row, _ in self.cells})

    def draw(self, axes: Axes, drawing: _Drawing) -> None:
        """Draw into `axes`."""
        import numpy

        rows, columns = (sorted({key[i] for key in self.cells}) for i in (0, 1))
        found = [[self.cells.get((row, column)) for column in columns] for row in rows]
        shares = numpy.ma.masked_invalid([[math.nan if cell is None else cell[0] for cell in line] for line in found])
        mesh = axes.pcolormesh(shares, vmin=0, vmax=1, edgecolors=svg.PAPER, linewidth=1, clip_on=False)
        titles = ["none" if cell is None else f"{100 * cell[0]:.1f} % of {cell[1]}" for line in found for cell in line]
        mesh.set_gid(drawing.title(titles))
        drawing.mesh = None if self.written else mesh
        axes.invert_yaxis()
        axes.spines[:].set_visible(False)
        axes.tick_params(length=0)
        for values, scale, set_ticks, least in (
            (columns, self.x, axes.set_xticks, _CHARACTER * max(len(self.x.write(one)) for one in columns) + 8),
            (rows, self.y, axes.set_yticks, _LINE),
        ):
            room = (0.82 * svg.WIDTH / self.across if scale is self.x else self.height - 96) / len(values)
            stride = max(1, math.ceil(least / room))
            set_ticks([i + 0.5 for i in range(len(values))][::stride], [scale.write(one) for one in values][::stride])
        axes.set_xlabel(self.x.title)
        axes.set_ylabel(self.y.title)
        axes.set_title(_shortened(self.name, svg.WIDTH / self.across - 70), color=svg.INK)
        if self.written:
            for (row, column), (share, _) in self.cells.items():
                # Fixed colours, because the cell's colour does not change with the screen's theme.
                ink, place = "#fefefe" if share < 0.55 else "#111111", (columns.index(column), rows.index(row))
                axes.text(place[0] + 0.5, place[1] + 0.5, f"{100 * share:.0f}", color=ink, ha="center", va="center")

    def words(self) -> list[str]:
        """Empty, because every cell has its own title."""
        return []


@dataclass(frozen=True)
class Plot:
    """A plot: the name of its file without `.svg`, panels of one kind, and text below them.

    Attributes:
        wide: draw the panels side by side, for screens; otherwise the plot is as wide as a phone.
    """

    name: str
    title: str
    panels: Sequence[Lines] | Sequence[HeatMap]
    words: str = ""
    wide: bool = False

    @property
    def width(self) -> int:
        """Pixels across."""
        return _WIDE * len(self.panels) if self.wide else svg.WIDTH

    @cached_property
    def svg(self) -> str:
        """The plot as an `<svg>` for a page with `svg.STYLE`; the output is deterministic."""
        import matplotlib

        drawing = _Drawing(room=_WIDE if self.wide else svg.WIDTH)
        with matplotlib.rc_context(), warnings.catch_warnings(), io.StringIO() as file:
            # matplotlib's font may lack a glyph; the viewer's font draws it.
            warnings.filterwarnings("ignore", "Glyph .* missing", UserWarning)
            matplotlib.rcdefaults()  # ignore the user's settings
            matplotlib.rcParams.update(svg.settings(self.name))
            nothing = dict.fromkeys(("Date", "Creator", "Format", "Type"))
            self._figure(drawing).savefig(file, format="svg", metadata=nothing)
            text = file.getvalue()
        words = [words for panel in self.panels for words in panel.words()]
        return svg.element(text, self.name, self.title, words, drawing.titles, (self.width, drawing.height))

    @property
    def alone(self) -> str:
        """The plot as the text of an SVG file, with its style sheet."""
        start = self.svg.index(">") + 1
        return f"{self.svg[:start]}<style>{svg.STYLE}</style>{self.svg[start:]}\n"

    def _figure(self, drawing: _Drawing) -> Figure:
        from matplotlib.figure import Figure

        panels: Sequence[Lines | HeatMap] = self.panels
        across = len(panels) if self.wide else min(panels[0].across, len(panels))
        count = math.ceil(len(panels) / across)
        title, words = (textwrap.wrap(svg.clean(text), self.width // 9 - 1) for text in (self.title, self.words))
        names = _legend_names([panel for panel in panels if isinstance(panel, Lines)])
        columns = max(1, int(self.width / (_CHARACTER * max(map(len, names.values()), default=1) + 52)))
        legend_lines = math.ceil(len(names) / columns) if len(names) > 1 else 0
        head, foot = _LINE * (len(title) + legend_lines) + 10, _LINE * len(words)
        scaled = any(isinstance(panel, HeatMap) and not panel.written for panel in panels)
        height = head + foot + count * max(panel.height for panel in panels) + (50 if scaled else 0)
        drawing.height = height
        figure = Figure(figsize=(self.width / 72, height / 72), dpi=72)
        figure.set_layout_engine("constrained", rect=(0, foot / height, 1, 1 - (head + foot) / height))
        every = list(figure.subplots(count, across, squeeze=False).flat)
        for axes, panel in zip(every, panels, strict=False):
            panel.draw(axes, drawing)
        for axes in every[len(panels) :]:
            axes.set_visible(False)
        if drawing.mesh is not None:
            bar = figure.colorbar(
                drawing.mesh, ax=every, location="bottom", aspect=40, format=lambda share, _: f"{100 * share:.0f} %"
            )
            bar.outline.set_visible(False)
        figure.text(4 / self.width, 1 - 4 / height, "\n".join(title), va="top", weight="bold")
        figure.text(4 / self.width, 4 / height, "\n".join(words), va="bottom", color=svg.SOFT)
        if legend_lines:
            figure.legend(
                [drawing.legend[name] for name in names],
                list(names.values()),
                loc="upper left",
                ncols=columns,
                bbox_to_anchor=(4 / self.width, 1 - (_LINE * len(title) + 4) / height),
            )
        return figure


@dataclass
class _Drawing:
    """The state of a figure while it is drawn: the width of a panel of lines, its height, the legend's lines by name,
    titles by group id, and the mesh of a colour scale."""

    room: float = svg.WIDTH
    height: float = 0.0
    legend: dict[str, Artist] = field(default_factory=dict)
    titles: dict[str, list[str]] = field(default_factory=dict)
    mesh: QuadMesh | None = None

    def title(self, titles: list[str]) -> str:
        """A new group id; its group, or each path in it, gets these titles."""
        gid = f"titled-{len(self.titles)}"
        self.titles[gid] = titles
        return gid


def log_ticks(low: float, high: float) -> list[float]:
    """The powers of two between two numbers; the lower number if there are none."""
    powers = range(math.ceil(math.log2(low) - 1e-9), math.floor(math.log2(high) + 1e-9) + 1)
    return [2.0**power for power in powers] or [low]


def _legend_names(panels: Sequence[Lines]) -> dict[str, str]:
    """Names of series in the legend. matplotlib drops names that begin with an underscore, so these get a space."""
    names = {one.name: _shortened(one.name, svg.WIDTH - 52) for panel in panels for one in panel.series}
    return {name: f" {shown}" if shown.startswith("_") else shown for name, shown in names.items()}


def _shortened(name: str, pixels: float) -> str:
    name, fits = svg.clean(name), max(4, int(pixels / _CHARACTER))
    return name if len(name) <= fits else name[: fits - 1] + "…"


def _every(points: Sequence[object]) -> int:
    return max(1, math.ceil(len(points) / _MARKED_POINTS))
