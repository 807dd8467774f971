"""A probe's figures as sentences, tables and a page."""

from __future__ import annotations

import statistics
from typing import TYPE_CHECKING

from linearize.probe.plots import plots_of
from linearize.probe.selection import SURE, set_option
from linearize.report.formatting import number, readable_bytes, with_error
from linearize.report.pages import Grid, Page, Section

if TYPE_CHECKING:
    from collections.abc import Sequence

    from linearize.probe.damage import Damage, Part
    from linearize.probe.probing import Probe
    from linearize.probe.statistics import HeadStatistics

MOST_HEADS = 20
_PLACES = ("window", "sinks", "beyond")
_READING = (
    "± is one standard error, over rows of text or over needles; losses and log-probabilities are in nats per token.",
    "Window, sinks and beyond are shares of a head's attention mass: on the last tokens, on the first tokens, and on "
    "all others. Each is the mean over queries with tokens beyond window and sinks.",
    "Half-life is the distance in tokens that holds half of the mass outside the sinks.",
    "Retrieval is the share of the mass on a needle's value while the model has to repeat it.",
    "Loss rise and recall fall are measured with only that part windowed, without training. They do not add up, "
    "because two layers can hold the same information.",
)


def tell(probe: Probe) -> Page:
    """The report of one probe."""
    plots = {plot.name: plot for plot in plots_of(probe)}
    grids = [_layers_grid(probe), _heads_grid(probe)]
    sections = [Section("Attention of the heads", _attention(probe), grids, [plots.pop("probe")])]
    if probe.windowed is not None:
        told = [("The whole model", _whole(probe))]
        sections.append(Section("Damage of a window", told, [_damage_grid(probe)], list(plots.values())))
        kept = [str(part.layer) + ("" if part.head is None else f".{part.head}") for part in _kept(probe)]
        named = f"Best first: {', '.join(kept)}" if kept else "Nothing"
        sections.append(Section("Layers and heads to keep as softmax", [(named, basis(probe))]))
    sections.append(Section("How to read this", [("In the tables", _READING)]))
    return Page(f"Probe of {probe.model}", _facts(probe), sections)


def basis(probe: Probe) -> list[str]:
    """Lines with the figures behind the choice, or the reason why nothing was chosen."""
    kept, all_windowed = probe.kept, probe.windowed
    if kept is None or all_windowed is None:
        return ["Nothing was chosen, because no damage was measured (--damage layers or heads)."]
    keep = probe.options.keep
    named = bool(keep.layers or keep.every or keep.heads)
    if kept.damage is None:
        more = " beside the layers and heads in the recipe" if named else ""
        return [
            f"Nothing to keep{more}: no damage is more than {SURE:g} standard errors above 0. More text lowers the "
            "standard errors (`linearize probe --tokens`)."
        ]
    kind = "layer" if probe.options.damage == "layers" else "key/value head"
    rise = f"rise of loss on {probe.rows} rows of {probe.options.length:,} tokens ({probe.source})"
    if probe.recall_counts:
        measure = f"{rise} plus fall of the log-probability of the answers to {probe.needles} needles, per token"
    else:
        measure = f"{rise}; needles do not count, because windowing all layers does not lower their recall"
    beside, every = (" beside those in the recipe", "All others") if named else ("", "All")
    with_all, with_kept = _words(probe, all_windowed), _words(probe, kept.damage)
    return [
        f"Kept: {len(kept.parts)} of {len(probe.parts)} {kind}s{beside}, by damage per byte of cache; only damage of "
        f"more than {SURE:g} standard errors counts.",
        f"Damage: {measure}, with a window of {probe.window} tokens and {probe.sinks} sinks in that {kind} only. "
        f"Measured without training, which may reduce it. Seed {probe.options.seed}.",
        f"{every} windowed: {with_all}. All but these: {with_kept} (nats per token).",
        f"Caches of these at {kept.context:,} tokens: {readable_bytes(kept.nbytes)}, of {readable_bytes(kept.budget)} "
        "allowed.",
        f"As an option: --set '{set_option(kept.section)}'",
    ]


def hardest(probe: Probe, most: int) -> list[dict[str, str]]:
    """The parts with the largest damage, as table rows: texts by column."""
    kept = set(_kept(probe))
    return [
        {
            **part_name(part),
            "loss rise": with_error(*probe.parts[part].loss, "loss"),
            "recall fall": with_error(*probe.parts[part].recall, "loss"),
            "beyond": f"{100 * statistics.fmean(one.beyond for one in heads_of(probe, part)):.1f} %",
            "retrieval": f"{100 * max(one.retrieval for one in heads_of(probe, part)):.1f} %",
            "cache": readable_bytes(probe.sizes[part]),
            "keep": "yes" if part in kept else "",
        }
        for part in probe.ranked()[:most]
    ]


def part_name(part: Part) -> dict[str, str]:
    """The table columns that name a part."""
    return {"layer": str(part.layer), **({} if part.head is None else {"key/value head": str(part.head)})}


def heads_of(probe: Probe, part: Part) -> list[HeadStatistics]:
    """The query heads of a part."""
    heads, layer = probe.heads[part.layer], probe.layers[part.layer]
    group = layer.query_heads // layer.key_value_heads
    return heads if part.head is None else heads[part.head * group : (part.head + 1) * group]


def far_heads(probe: Probe, most: int) -> list[dict[str, str]]:
    """The query heads with the highest retrieval score, as table rows."""
    every = [(one.retrieval, layer, head) for layer, heads in enumerate(probe.heads) for head, one in enumerate(heads)]
    rows = []
    for _, layer, head in sorted(every, key=lambda entry: (-entry[0], entry[1:]))[:most]:
        rows.append({"layer": str(layer), "head": str(head), **_shares([probe.heads[layer][head]])})
    return rows


def _facts(probe: Probe) -> list[tuple[str, str]]:
    found = [
        ("command", probe.command),
        ("date", probe.date),
        ("text", f"{probe.rows} rows of {probe.options.length:,} tokens, {probe.source}"),
        ("needles", f"{probe.needles} in texts of as many tokens"),
        ("window", f"{probe.window} tokens and {probe.sinks} sinks"),
        ("seed", str(probe.options.seed)),
        ("versions", ", ".join(f"{name} {version}" for name, version in probe.versions.items())),
    ]
    return [(name, text) for name, text in found if text]


def _attention(probe: Probe) -> list[tuple[str, Sequence[str]]]:
    heads = [one for heads in probe.heads for one in heads]
    local = sum(one.beyond < 0.1 for one in heads)
    mean = {name: 100 * statistics.fmean(getattr(one, name) for one in heads) for name in _PLACES}
    return [
        (
            f"{len(heads)} query heads, {probe.queries:,} queries each",
            [
                f"Their attention mass is {mean['window']:.1f} % in the window, {mean['sinks']:.1f} % on sinks and "
                f"{mean['beyond']:.1f} % beyond.",
                f"{local} of the heads have less than 10 % beyond, so window and sinks hold nearly all of their mass.",
            ],
        )
    ]


def _whole(probe: Probe) -> list[str]:
    assert probe.windowed is not None  # noqa: S101 - for the type checker; the caller has looked
    base = probe.teacher
    sentences = [
        f"The pretrained model: loss {number(float(base.loss.mean()), 'loss')}, log-probability of the answers to "
        f"needles {number(float(base.recall.mean()), 'loss')}, in nats per token.",
        f"With all {len(probe.convertible)} layers windowed: {_words(probe, probe.windowed)}.",
    ]
    if not probe.recall_counts:
        sentences.append("Windowing all layers does not lower recall of the needles, so recall does not count.")
    return sentences


def _kept(probe: Probe) -> list[Part]:
    return [] if probe.kept is None else probe.kept.parts


def _layers_grid(probe: Probe) -> Grid:
    rows = [[str(layer), *_shares(heads).values()] for layer, heads in enumerate(probe.heads)]
    header = ["layer", *_shares(probe.heads[0])]
    note = "Means over a layer's heads; the median for half-life, the maximum for retrieval."
    return Grid("Layers", header, rows, notes=[note])


def _heads_grid(probe: Probe) -> Grid:
    rows = far_heads(probe, MOST_HEADS)
    return Grid("Heads with the highest retrieval", [*rows[0]], [[*row.values()] for row in rows])


def _damage_grid(probe: Probe) -> Grid:
    rows = hardest(probe, len(probe.parts))
    kind = "layer" if probe.options.damage == "layers" else "key/value head"
    sum_of = "loss rise plus recall fall" if probe.recall_counts else "loss rise"
    note = f"Sorted by {sum_of}. Beyond is the mean and retrieval the maximum over the windowed query heads."
    caption = f"Damage of windowing one {kind} only, largest first"
    return Grid(caption, [*rows[0]], [[*row.values()] for row in rows], notes=[note])


def _shares(heads: Sequence[HeadStatistics]) -> dict[str, str]:
    halves = [one.half_life for one in heads if one.half_life is not None]
    return {
        **{name: f"{100 * statistics.fmean(getattr(one, name) for one in heads):.1f} %" for name in _PLACES},
        "half-life": f"{statistics.median(halves):,.0f}" if halves else "–",
        "entropy": f"{statistics.fmean(one.entropy for one in heads):.2f}",
        "retrieval": f"{100 * max(one.retrieval for one in heads):.1f} %",
    }


def _words(probe: Probe, found: Damage) -> str:
    recall = f", answers {_signed(-found.recall.mean)}" if probe.recall_counts else ""
    return f"loss {_signed(found.loss.mean)}{recall}"


def _signed(value: float) -> str:
    return f"{value:+.4f}".replace("-", "−")
