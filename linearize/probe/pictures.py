"""The pictures of a probe: where the attention of every head lies, and what windowing costs."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from linearize.evaluation.drawing import Axis, HeatMap, Series, heat_maps, line_plot
from linearize.evaluation.plots import Plot

if TYPE_CHECKING:
    from linearize.evaluation.heldout import Estimate
    from linearize.probe.probing import Probe

_CELL = (22, 16)
_SHARES = {
    "window": "in the window",
    "sinks": "on sinks",
    "beyond": "beyond both",
    "retrieval": "on needles (retrieval)",
}
_DAMAGES = {"loss": "rise of loss on the text", "recall": "fall of the answers' log-probability"}
_MOST_TICKS = 16
_COUNTING = Axis("", lambda number: f"{number:.0f}")


def draw(probe: Probe) -> list[Plot]:
    """`probe`, the heads' attention; and where damage was measured that of layers, as `damage-loss` and
    `damage-recall`, or of key/value heads, as `damage`."""
    plots = [Plot("probe", None, _heads(probe))]
    if probe.windowed is not None and probe.options.damage == "layers":
        plots += [Plot(f"damage-{name}", None, _damage_of_layers(probe, name)) for name in _DAMAGES]
    elif probe.windowed is not None:
        plots.append(Plot("damage", None, _damage_of_heads(probe)))
    return plots


def _heads(probe: Probe) -> str:
    maps = [
        HeatMap(
            words,
            {
                (layer, head): (getattr(one, name), probe.needles if name == "retrieval" else probe.queries)
                for layer, heads in enumerate(probe.heads)
                for head, one in enumerate(heads)
            },
        )
        for name, words in _SHARES.items()
    ]
    return heat_maps("Where the attention mass lies", "layer", "query head", _COUNTING, _COUNTING, maps, _CELL)


def _damage_of_layers(probe: Probe, name: str) -> str:
    points = [(part.layer, *_estimate(probe, part, name)) for part in sorted(probe.parts)]
    lowest, highest = points[0][0], points[-1][0]
    step = max(1, math.ceil((highest - lowest + 1) / _MOST_TICKS))
    nats = Axis("nats per token", lambda value: f"{value:.4g}".replace("-", "−"))
    layer = Axis("layer that sees its window alone", _COUNTING.write)
    series = [Series(_DAMAGES[name], points, 0)]
    return line_plot(f"One layer windowed: {_DAMAGES[name]}", layer, nats, series, range(lowest, highest + 1, step))


def _damage_of_heads(probe: Probe) -> str:
    """Two maps, each in shares of its own largest damage."""
    maps = []
    for name, count in (("loss", probe.rows), ("recall", probe.needles)):
        found = {part: max(_estimate(probe, part, name).mean, 0.0) for part in probe.parts}
        most = max(found.values())
        cells = {
            (float(part.layer), float(part.head or 0)): (value / most if most else 0.0, count)
            for part, value in found.items()
        }
        maps.append(HeatMap(f"{name}: 100 % = {most:.3g}", cells))
    title = "Damage of windowing one key/value head alone, nats per token"
    return heat_maps(title, "layer", "key/value head", _COUNTING, _COUNTING, maps, _CELL)


def _estimate(probe: Probe, part: object, name: str) -> Estimate:
    estimate: Estimate = getattr(probe.parts[part], name)  # type: ignore[index]
    return estimate
