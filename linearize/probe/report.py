"""The files of a probe: its figures as data, the choice as a recipe, and a report with plots."""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from linearize.evaluation.tasks.task import mean_and_error
from linearize.probe.selection import fragment, set_option
from linearize.probe.telling import basis, tell
from linearize.report.pages import write_pages

if TYPE_CHECKING:
    from pathlib import Path

    from torch import Tensor

    from linearize.evaluation.heldout import Estimate
    from linearize.probe.damage import Damage
    from linearize.probe.probing import Probe

SCHEMA = "linearize.probe/1"
FILE_NAME = "probe.json"
RECIPE_NAME = "keep.yaml"


def write_probe(probe: Probe, folder: Path) -> None:
    """Write `probe.json`, `report.md`, `report.html`, the plots as `.svg` (`probe.svg` shows the heads) and, if the
    probe chose parts, `keep.yaml`."""
    document = json.dumps(probe_data(probe), indent=1, ensure_ascii=False, allow_nan=False)
    (folder / FILE_NAME).write_text(document + "\n", encoding="utf-8")
    recipe = recipe_text(probe)
    if recipe is not None:
        (folder / RECIPE_NAME).write_text(recipe, encoding="utf-8")
    write_pages(tell(probe), folder)


def probe_data(probe: Probe) -> dict[str, Any]:
    """The figures as plain data. Shares are in [0, 1], losses and log-probabilities in nats per token, sizes in bytes
    of one sequence's cache. Layers and heads count from 0. `damage.parts` is sorted, largest first."""
    group = [layer.query_heads // layer.key_value_heads for layer in probe.layers]
    return {
        "schema": SCHEMA,
        "model": probe.model,
        "command": probe.command,
        "date": probe.date,
        "versions": probe.versions,
        "seed": probe.options.seed,
        "window": probe.window,
        "sinks": probe.sinks,
        "text": {
            "source": probe.source,
            "rows": probe.rows,
            "length": probe.options.length,
            "queries": probe.queries,
        },
        "needles": probe.needles,
        "teacher": {"loss": _mean(probe.teacher.loss), "recall": _mean(probe.teacher.recall)},
        "layers": [
            {
                "layer": index,
                "own_window": probe.layers[index].window,
                "converts": index in probe.convertible,
                "heads": [
                    {"head": head, "key_value_head": head // group[index], **asdict(one)}
                    for head, one in enumerate(heads)
                ],
            }
            for index, heads in enumerate(probe.heads)
        ],
        "damage": _damage_data(probe),
        "keep": _kept_data(probe),
    }


def recipe_text(probe: Probe) -> str | None:
    """The chosen parts as a recipe, with the reasons as comments; None if there are none."""
    kept = probe.kept
    if kept is None or not kept.parts:
        return None
    return fragment(kept.section, basis(probe))


def _damage_data(probe: Probe) -> dict[str, Any] | None:
    if probe.windowed is None:
        return None
    return {
        "by": probe.options.damage,
        "recall_counts": probe.recall_counts,
        "all_windowed": _damage(probe, probe.windowed),
        "parts": [
            {
                "layer": part.layer,
                "key_value_head": part.head,
                **_damage(probe, probe.parts[part]),
                "bytes": probe.sizes[part],
            }
            for part in probe.ranked()
        ],
    }


def _kept_data(probe: Probe) -> dict[str, Any] | None:
    kept = probe.kept
    if kept is None:
        return None
    return {
        "mixer": {"keep": kept.section} if kept.section else {},
        "set": set_option(kept.section) if kept.section else None,
        "bytes": kept.nbytes,
        "budget_bytes": kept.budget,
        "context": kept.context,
        "damage": None if kept.damage is None else _damage(probe, kept.damage),
        "basis": basis(probe),
    }


def _damage(probe: Probe, found: Damage) -> dict[str, Any]:
    total = found.total(probe.recall_counts)
    return {name: _estimate(one) for name, one in (("loss", found.loss), ("recall", found.recall), ("total", total))}


def _mean(values: Tensor) -> dict[str, Any]:
    value, stderr = mean_and_error(values.tolist())
    return {"value": value, "stderr": stderr}


def _estimate(one: Estimate) -> dict[str, Any]:
    return {"value": one.mean, "stderr": one.stderr}
