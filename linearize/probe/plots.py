"""The plots of a probe: the attention mass of every head, and the damage of windowing."""

from __future__ import annotations

from typing import TYPE_CHECKING

from linearize.report.plots import Axis, HeatMap, Lines, Plot, Series

if TYPE_CHECKING:
    from linearize.evaluation.heldout import Estimate
    from linearize.probe.damage import Part
    from linearize.probe.probing import Probe

_SHARES = ("window", "sinks", "beyond", "retrieval")
_DAMAGES = {"loss": "rise of loss on the text", "recall": "fall of the answers' log-probability"}


def plots_of(probe: Probe) -> list[Plot]:
    """The plot `probe` of the heads' attention. If damage was measured, also `damage-loss` and `damage-recall` for
    layers, or `damage` for key/value heads."""
    plots = [Plot("probe", "Attention mass by layer and head", _heads(probe))]
    if probe.windowed is not None and probe.options.damage == "layers":
        plots += [_damage_of_layers(probe, name) for name in _DAMAGES]
    elif probe.windowed is not None:
        title = "Damage of windowing one key/value head alone, nats per token"
        plots.append(Plot("damage", title, _damage_of_heads(probe)))
    return plots


def _heads(probe: Probe) -> list[HeatMap]:
    return [
        HeatMap(
            name,
            _counting("query head"),
            _counting("layer"),
            {
                (layer, head): (getattr(one, name), probe.needles if name == "retrieval" else probe.queries)
                for layer, heads in enumerate(probe.heads)
                for head, one in enumerate(heads)
            },
            written=False,
        )
        for name in _SHARES
    ]


def _damage_of_layers(probe: Probe, name: str) -> Plot:
    points = [(part.layer, *_estimate(probe, part, name)) for part in sorted(probe.parts)]
    nats = Axis("nats per token", lambda value: f"{value:.4g}".replace("-", "−"))
    bars = Lines(_counting("layer that sees its window alone"), nats, [Series(_DAMAGES[name], points, 0)], bars=True)
    return Plot(f"damage-{name}", f"One layer windowed: {_DAMAGES[name]}", [bars])


def _damage_of_heads(probe: Probe) -> list[HeatMap]:
    """Two maps, each as shares of its largest damage."""
    maps = []
    for name, count in (("loss", probe.rows), ("recall", probe.needles)):
        found = {part: max(_estimate(probe, part, name).mean, 0.0) for part in probe.parts}
        most = max(found.values())
        cells: dict[tuple[float, ...], tuple[float, int]] = {
            (float(part.layer), float(part.head or 0)): (value / most if most else 0.0, count)
            for part, value in found.items()
        }
        heads, layers = _counting("key/value head"), _counting("layer")
        maps.append(HeatMap(f"{name}: 100 % = {most:.3g}", heads, layers, cells, written=False))
    return maps


def _counting(title: str) -> Axis:
    return Axis(title, lambda number: f"{number:.0f}")


def _estimate(probe: Probe, part: Part, name: str) -> Estimate:
    estimate: Estimate = getattr(probe.parts[part], name)
    return estimate
