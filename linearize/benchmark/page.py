"""The page of `linearize bench`: speed and memory by length, as tables, sentences and plots."""

from __future__ import annotations

import json
from dataclasses import replace
from signal import Signals
from typing import TYPE_CHECKING, Any

from linearize.benchmark.bench import sequence_of
from linearize.benchmark.running import TEACHERS
from linearize.evaluation.results.plots import BYTES
from linearize.report.formatting import readable_bytes, readable_length
from linearize.report.pages import Grid, Page, Section, write_pages
from linearize.report.plots import Axis, Lines, Plot, Series

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

_TITLES = {
    "decode": "Decoding: tokens per second by context length",
    "prefill": "Prefill: tokens per second by length",
    "train": "Training: tokens per second by length",
}
_KINDS: dict[str, tuple[str, str, tuple[str, ...]]] = {
    "decode": ("writing", "writes", ("of roof", "cache")),
    "prefill": ("reading", "reads", ("first token",)),
    "train": ("training", "trains", ()),
}
"""A kind's title, its verb, and its additional columns."""
_FIGURES = {
    "tokens_per_second": Axis("tokens per second", lambda value: f"{value:,g}", log=True),
    "cache_bytes": replace(BYTES, title="cache of all sequences"),
}


def write_report(facts: dict[str, Any], folder: Path) -> None:
    """Write `bench.json`, `report.html`, `report.md` and the plots as SVG files."""
    (folder / "bench.json").write_text(json.dumps(facts, indent=2) + "\n", encoding="utf-8")
    write_pages(page_of(facts), folder)


def page_of(facts: dict[str, Any]) -> Page:
    """The figures as a page: a section for each kind of work, and the overview."""
    mixer, layers, whole = facts["mixers"][0], facts["layers"], facts["layers_of_the_whole"]
    cut = f"{layers} of its {whole} layers" if layers != whole else f"{layers} layers"
    random = ", random weights" if facts["weights"] == "random" else ""
    about = [
        ("model", f"{facts['model']}, {cut}, {facts['dtype']}{random}"),
        ("mixer", f"{mixer['recurrence']}, window {mixer['window']}, {mixer['sinks']} sinks"),
        ("machine", f"{facts['device']}, {facts['threads']} threads, torch {facts['versions'].get('torch', '?')}"),
        ("weights", ", ".join(f"{name} {readable_bytes(size)}" for name, size in facts["weights_bytes"].items())),
    ]
    if facts["stopped_by"] is not None:
        about.append(("stopped", f"by {Signals(facts['stopped_by']).name}; lengths that were not measured are missing"))
    plots = plots_of(facts)
    sections = []
    for kind, (title, _, _) in _KINDS.items():
        if rows := [row for row in facts["rows"] if row["kind"] == kind]:
            own = [plot for plot in plots if plot.name.startswith(f"{kind}-")]
            sections.append(Section(title.capitalize(), _told(facts, kind, rows), [_grid(kind, rows)], own))
    both = [plot for plot in plots if plot.name == "overview"]
    return Page(
        f"Speed and memory of {facts['model']}", about, [*sections, *([Section("Overview", plots=both)] * bool(both))]
    )


def _told(facts: dict[str, Any], kind: str, rows: Sequence[dict[str, Any]]) -> list[tuple[str, list[str]]]:
    _, verb, _ = _KINDS[kind]
    missing = {
        f"{row['system']} at {row['tokens']:,} tokens, batch {row['batch']}: {row['skipped']}": None
        for row in rows
        if "skipped" in row
    }
    ahead = [
        f"{system}, batch {batch}: {verb} faster than the teacher "
        + (f"from {tokens:,} tokens on" if tokens else "at no length measured")
        for system, kinds in facts["ahead_from"].items()
        for batch, tokens in kinds.get(kind, {}).items()
        if any(str(row["batch"]) == batch for row in rows)
    ]
    found = [("Left out", list(missing)), ("Beside the teacher", ahead)]
    return [(about, sentences) for about, sentences in found if sentences]


def _grid(kind: str, rows: Sequence[dict[str, Any]]) -> Grid:
    title, _, more = _KINDS[kind]
    teacher = {(row["batch"], row["tokens"]): row for row in rows if row["system"] == "teacher"}
    header = ["batch", "tokens", title, "tok/s", "x teacher", *more, "peak memory"]
    lines = []
    for row in rows:
        cells = ["no room"] if "skipped" in row else _cells(row, teacher.get((row["batch"], row["tokens"])))
        cells += ["–"] * (len(header) - 3 - len(cells))
        lines.append([str(row["batch"]), f"{row['tokens']:,}", row["system"], *cells])
    return Grid("Medians of all runs", header, lines, words=3)


def _cells(row: dict[str, Any], teacher: dict[str, Any] | None) -> list[str]:
    ratio = "–"
    if teacher is not None and teacher is not row and "skipped" not in teacher:
        ratio = f"{row['tokens_per_second'] / teacher['tokens_per_second']:.2f}"
    if row["kind"] == "decode":
        more = [f"{100 * row['roof_share']:.0f} %", readable_bytes(row["cache_bytes"])]
    else:
        more = [f"{row['first_token_seconds']:.2f} s"] if row["kind"] == "prefill" else []
    peak = "–" if row["peak_bytes"] is None else readable_bytes(row["peak_bytes"])
    return [f"{row['tokens_per_second']:,.1f}", ratio, *more, peak]


def plots_of(facts: dict[str, Any]) -> list[Plot]:
    """One plot per figure that was measured at two or more lengths."""
    plots = []
    speeds = [(kind, "tokens_per_second", title) for kind, title in _TITLES.items()]
    for kind, figure, title in (*speeds, ("decode", "cache_bytes", "Memory by context length")):
        panel = _by_length(_series(facts, kind, figure), _FIGURES[figure])
        if panel is not None:
            name = f"{kind}-{figure.replace('_', '-')}"
            plots.append(Plot(name, f"{title} ({facts['model']}, {facts['dtype']})", [panel]))
    both = overview(facts)
    return plots if both is None else [*plots, both]


def overview(facts: dict[str, Any]) -> Plot | None:
    """Teacher and converted model at the smallest batch, in two panels by context length: bytes of the cache, and
    tokens per second. None if fewer than two lengths were measured."""
    batch = min(row["batch"] for row in facts["rows"])
    names = {"teacher": TEACHERS, "converted": ("model",)}
    panels = []
    for figure, title in (("cache_bytes", "Memory of the context"), ("tokens_per_second", "Tokens written per second")):
        series = [
            Series(name, points, look)
            for look, (name, systems) in enumerate(names.items())
            if (points := _best(facts, systems, batch, figure))
        ]
        y = replace(_FIGURES[figure], title=title)
        if figure == "tokens_per_second":
            highest = max((y for one in series for _, y, _ in one.points), default=1.0)
            y = replace(y, log=False, limits=(0.0, 1.15 * highest))
        panel = _by_length(series, y)
        if panel is None:
            return None
        panels.append(panel)
    whole = "" if facts["layers"] == facts["layers_of_the_whole"] else f", {facts['layers']} layers"
    title = f"{facts['model'].removesuffix('.gguf')}{whole}, {facts['dtype']}: softmax attention, and converted"
    machine = facts["device"]
    if facts.get("backend") != "cuda":
        machine = f"{facts.get('cpu', machine)}, {facts['threads']} threads"
    command = f"; {facts['command']}" if "command" in facts else ""
    words = f"Measured on {machine}, torch {facts['versions'].get('torch', '?')}, batch {batch}{command}"
    return Plot("overview", title, panels, words)


def _by_length(series: Sequence[Series], y: Axis) -> Lines | None:
    lengths = sorted({x for one in series for x, _, _ in one.points})
    if len(lengths) < 2:
        return None
    return Lines(Axis("context (tokens)", readable_length, log=True, ticks=lengths), y, series)


def _best(
    facts: dict[str, Any], systems: Sequence[str], batch: int, figure: str
) -> list[tuple[float, float, float | None]]:
    """The points of a line: at each length the fastest of some systems."""
    fastest: dict[int, dict[str, Any]] = {}
    for system in systems:
        for row in sequence_of(facts["rows"], "decode", system, batch):
            if row["tokens_per_second"] > fastest.get(row["tokens"], row)["tokens_per_second"]:
                fastest[row["tokens"]] = row
            fastest.setdefault(row["tokens"], row)
    return [(float(tokens), float(row[figure]), None) for tokens, row in sorted(fastest.items())]


def _series(facts: dict[str, Any], kind: str, figure: str) -> list[Series]:
    systems = list(facts["weights_bytes"])
    batches = sorted({row["batch"] for row in facts["rows"]})
    series: list[Series] = []
    for system in systems:
        for batch in batches:
            points = [
                (float(row["tokens"]), float(row[figure]), None)
                for row in sequence_of(facts["rows"], kind, system, batch)
            ]
            if points:
                name = system if len(batches) == 1 else f"{system}, batch {batch}"
                series.append(Series(name, points, len(series)))
    return series
