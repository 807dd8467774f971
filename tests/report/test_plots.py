"""Plots as SVG: figures, labels, light and dark, names that are markup, and the same bytes every time."""

from __future__ import annotations

import itertools
import re
import subprocess
import sys
import xml.etree.ElementTree as ET
from pathlib import Path

import matplotlib
import pytest

from linearize import report
from linearize.report.formatting import readable_bytes, readable_count, readable_length
from linearize.report.plots import Axis, HeatMap, Lines, Plot, Series, log_ticks
from linearize.report.svg import STYLE

HOSTILE = '<script>alert("x")</script> & $\\frac{$ id="titled-0" \x1b[31m 模型'
SVG = "{http://www.w3.org/2000/svg}"


def axis(title: str, **more: object) -> Axis:
    return Axis(title, lambda value: f"{value:g}", **more)  # type: ignore[arg-type]


def lines(name: str = "model", **more: object) -> Lines:
    points = [(256.0, 3.5, 0.5), (1024.0, 3.0, 0.5), (4096.0, 2.0, 1.5)]
    tokens = Axis("tokens", readable_length, log=True, ticks=[point[0] for point in points])
    return Lines(tokens, axis("loss"), [Series("teacher", points, 0), Series(name, points, 1)], **more)  # type: ignore[arg-type]


def heads(written: bool = True) -> HeatMap:
    cells = {(float(row), float(column)): (row / 4, 10 + column) for row in range(5) for column in range(3)}
    return HeatMap("heads", axis("head"), axis("layer"), {**cells, (9.0, 0.0): (1.0, 99)}, written)


def texts(plot: Plot) -> list[str]:
    """The texts that are drawn."""
    return [element.text or "" for element in ET.fromstring(plot.alone).iter(f"{SVG}text")]  # noqa: S314


def titles(plot: Plot) -> list[str]:
    return [element.text or "" for element in ET.fromstring(plot.alone).iter(f"{SVG}title")]  # noqa: S314


def test_a_plot_is_named_described_and_scales() -> None:
    plot = Plot("loss", "Loss by position", [lines()], "Measured here")
    root = ET.fromstring(plot.alone)  # noqa: S314
    assert (root.get("role"), root.get("aria-label"), root.get("class")) == ("img", "Loss by position", "plot")
    assert root.get("viewBox") == f"0 0 {root.get('width')} {root.get('height')}"
    assert root.findtext(f"{SVG}desc") == (
        "teacher: 3.5 at 256, 3 at 1k, 2 at 4k. model: 3.5 at 256, 3 at 1k, 2 at 4k."
    )
    assert {"Loss by position", "teacher", "model", "256", "1k", "4k", "tokens", "loss", "Measured here"} <= {
        *texts(plot)
    }
    assert titles(plot) == ["Loss by position", "teacher", "model"]
    assert "metadata" not in plot.alone and "date" not in plot.alone.lower()


def test_text_is_legible_on_a_phone() -> None:
    for plot in (Plot("a", "A", [lines()]), Plot("b", "B", [heads(False), heads(False)])):
        width = float(ET.fromstring(plot.svg).get("width") or 0)  # noqa: S314
        sizes = [float(size) for size in re.findall(r"<text [^>]*?(\d+)px", plot.svg)]
        assert sizes and min(sizes) * (390 - 2 * 16) / width >= 11


def test_every_colour_has_one_for_dark_screens() -> None:
    plot = Plot(
        "many", "Many", [Lines(axis("x"), axis("y"), [Series(f"s{i}", [(1, i, 1), (2, i, 1)], i) for i in range(8)])]
    )
    assert plot.alone.count(STYLE) == 1 and plot.svg.count("<style") == 0
    dark = STYLE.partition("prefers-color-scheme:dark")[2]
    used = {*re.findall(r"(?:fill|stroke): #[0-9a-f]{6}", plot.svg)}
    assert len(used) > 10 and all(f'[style*="{colour}"]' in dark for colour in used)


def test_the_axis_holds_the_uncertainty_and_has_round_ticks() -> None:
    ticks = {float(text) for text in texts(Plot("p", "P", [lines()])) if re.fullmatch(r"[\d.]+", text)} - {256}
    assert ticks == {1, 2, 3, 4}  # 2 ± 1.5 and 3.5 ± 0.5 lie between 0.5 and 4


def test_bars_start_at_zero_and_tell_their_figures() -> None:
    bars = Lines(axis("layer"), axis("nats"), [Series("rise", [(i, 1.0 + i, 0.1) for i in range(4)], 0)], bars=True)
    plot = Plot("damage", "Damage", [bars])
    assert titles(plot)[1:] == ["0: 1", "1: 2", "2: 3", "3: 4"]
    assert {"0", "1", "2", "3", "4", "layer", "nats"} <= {*texts(plot)}


def test_every_cell_of_a_heat_map_tells_its_share_and_its_items() -> None:
    told = titles(Plot("heads", "Heads", [heads()]))[1:]
    assert told[:4] == ["0.0 % of 10", "0.0 % of 11", "0.0 % of 12", "25.0 % of 10"]
    assert told[-3:] == ["100.0 % of 99", "none", "none"] and len(told) == 18
    assert {"25", "50", "75"} <= {*texts(Plot("heads", "Heads", [heads()]))}
    scale = texts(Plot("heads", "Heads", [heads(False)]))
    assert {"0 %", "100 %"} <= {*scale} and "25" not in scale


@pytest.mark.parametrize("plot", [
    Plot("lines", HOSTILE, [lines(HOSTILE), lines(HOSTILE)], HOSTILE),
    Plot("map", HOSTILE, [HeatMap(HOSTILE, axis(HOSTILE), axis(HOSTILE), {(0.0, 0.0): (0.5, 1)})]),
])  # fmt: skip
def test_hostile_names_stay_text(plot: Plot, recwarn: pytest.WarningsRecorder) -> None:
    assert "<script" not in plot.alone and "\x1b" not in plot.alone and not recwarn.list
    kept = HOSTILE.replace("\x1b", "")
    assert titles(plot)[0] == kept
    assert '<script>alert("x")</script>' in " ".join(texts(plot)).replace("\n", " ")


def test_a_name_with_an_underscore_first_is_in_the_legend() -> None:
    assert " _hidden" in texts(Plot("p", "P", [lines("_hidden")]))


def test_the_same_bytes_whatever_the_users_settings_and_never_the_same_ids() -> None:
    first = Plot("a", "A", [lines()]).svg
    with matplotlib.rc_context({"font.size": 40, "svg.fonttype": "path", "axes.facecolor": "red"}):
        assert Plot("a", "A", [lines()]).svg == first
        assert matplotlib.rcParams["font.size"] == 40
    ids = [{*re.findall(r' id="([^"]+)"', Plot(name, "A", [lines()]).svg)} for name in ("a", "b")]
    assert ids[0] and not ids[0] & ids[1]


def test_labels_do_not_touch_and_a_plot_of_one_point_is_a_plot() -> None:
    crowded = axis("x", ticks=[1000.0 * i for i in range(1, 41)])
    labels = crowded.labels(1000, 40_000, 400)
    assert labels[-1] == 40_000 and 4 <= len(labels) <= 10
    assert {b - a for a, b in itertools.pairwise(labels)} == {labels[1] - labels[0]}
    for log in (False, True):
        one = Lines(axis("x", log=log, ticks=[8.0]), axis("y", log=log), [Series("s", [(8.0, 2.0, None)], 0)])
        assert {"8", "2"} <= {*texts(Plot("one", "One", [one]))}
    assert log_ticks(3, 40) == [4, 8, 16, 32] and log_ticks(5, 6) == [5]


def test_scales_of_counts() -> None:
    assert [readable_bytes(n) for n in (0, 999, 6_105_600, 2.5e15)] == ["0 B", "999 B", "6.1 MB", "2500.0 TB"]
    assert [readable_count(n) for n in (7, 70_778_880, 5e12)] == ["7", "70.8 M", "5.0 T"]
    assert [readable_length(n) for n in (512, 4096, 1 << 20, 1000)] == ["512", "4k", "1M", "1,000"]


def test_no_library_is_imported_before_a_plot_is_drawn() -> None:
    program = (
        "import sys, linearize.report.pages, linearize.evaluation.results.plots, linearize.training.plot;"
        "print(sorted({'matplotlib', 'jinja2', 'torch', 'numpy'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"


def test_the_room_stands_below_all_others() -> None:
    rooms = set()
    for path in Path(report.__file__).parent.glob("*.py"):
        rooms |= {*re.findall(r"^\s*(?:from|import) linearize\.?(\w*)", path.read_text(encoding="utf-8"), re.MULTILINE)}
    assert rooms == {"report"}
