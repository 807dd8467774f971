"""What `linearize bench` shows people: plots of speed and memory by length, and a folder with them and the facts."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from linearize.benchmark.bench import sequence_of
from linearize.benchmark.running import TEACHERS
from linearize.evaluation.drawing import Axis, Series, beside, line_plot, standing_alone
from linearize.evaluation.formatting import readable_bytes, readable_length

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

_PANEL = 390
_TITLES = {
    "decode": "Writing: tokens per second by context length",
    "prefill": "Reading: tokens per second by length",
    "train": "Training: tokens per second by length",
}
_FIGURES: dict[str, tuple[str, Callable[[float], str]]] = {
    "tokens_per_second": ("tokens per second", lambda value: f"{value:g}"),
    "cache_bytes": ("cache, all sequences", lambda value: readable_bytes(value).replace(".0 ", " ")),
}


def draw(facts: dict[str, Any]) -> dict[str, str]:
    """File name without `.svg` -> plot, for everything that was measured at two lengths or more."""
    plots = {}
    speeds = [(kind, "tokens_per_second", title) for kind, title in _TITLES.items()]
    for kind, figure, title in (*speeds, ("decode", "cache_bytes", "Memory by context length")):
        series = _series(facts, kind, figure)
        lengths = sorted({x for one in series for x, _, _ in one.points})
        if len(lengths) > 1:
            words, write = _FIGURES[figure]
            x = Axis("context (tokens)", readable_length, log=True)
            name = f"{kind}-{figure.replace('_', '-')}"
            plots[name] = line_plot(
                f"{title} ({facts['model']}, {facts['dtype']})", x, Axis(words, write, log=True), series, lengths[:10]
            )
    if (both := overview(facts)) is not None:
        plots["overview"] = both
    return plots


def overview(facts: dict[str, Any]) -> str | None:
    """What converting is for, in two panels by context length: the bytes of the cache, and tokens per second; teacher
    and converted model, at the smallest batch. None where fewer than two lengths were measured."""
    batch = min(row["batch"] for row in facts["rows"])
    names = {"teacher": TEACHERS, "converted": ("model",)}
    panels = []
    for figure, title in (
        ("cache_bytes", "Memory of the context"),
        ("tokens_per_second", "Writing, tokens per second"),
    ):
        series = [
            Series(name, points, look)
            for look, (name, systems) in enumerate(names.items())
            if (points := _best(facts, systems, batch, figure))
        ]
        lengths = sorted({x for one in series for x, _, _ in one.points})
        if len(lengths) < 2:
            return None
        unit, write = _FIGURES[figure]
        y = Axis(unit, write, log=True)
        if figure == "tokens_per_second":
            y = Axis(unit, write, limits=(0.0, 1.15 * max(y for one in series for _, y, _ in one.points)))
        x = Axis("context (tokens)", readable_length, log=True)
        panels.append(line_plot(title, x, y, series, lengths[:8], width=_PANEL))
    whole = "" if facts["layers"] == facts["layers_of_the_whole"] else f", {facts['layers']} layers"
    title = f"{facts['model'].removesuffix('.gguf')}{whole}, {facts['dtype']}: softmax attention, and converted"
    machine = facts["device"]
    if facts.get("backend") != "cuda":
        machine = f"{facts.get('cpu', machine)}, {facts['threads']} threads"
    command = f"; {facts['command']}" if "command" in facts else ""
    words = f"Measured on {machine}, torch {facts['versions'].get('torch', '?')}, batch {batch}{command}"
    return beside(title, panels, _PANEL, words)


def _best(
    facts: dict[str, Any], systems: Sequence[str], batch: int, figure: str
) -> list[tuple[float, float, float | None]]:
    """A line's points, each by the fastest of some systems."""
    fastest: dict[int, dict[str, Any]] = {}
    for system in systems:
        for row in sequence_of(facts["rows"], "decode", system, batch):
            if row["tokens_per_second"] > fastest.get(row["tokens"], row)["tokens_per_second"]:
                fastest[row["tokens"]] = row
            fastest.setdefault(row["tokens"], row)
    return [(float(tokens), float(row[figure]), None) for tokens, row in sorted(fastest.items())]


def write_report(facts: dict[str, Any], folder: Path) -> None:
    """`bench.json` and the plots as SVG files."""
    (folder / "bench.json").write_text(json.dumps(facts, indent=2) + "\n", encoding="utf-8")
    for name, svg in draw(facts).items():
        (folder / f"{name}.svg").write_text(standing_alone(svg), encoding="utf-8")


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
