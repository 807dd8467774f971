"""A calibration's result as lines, a page and data."""

from __future__ import annotations

import statistics
from typing import TYPE_CHECKING, Any

from linearize.evaluation.tasks.task import mean_and_error
from linearize.probe.damage import damage

if TYPE_CHECKING:
    from linearize.calibration.calibrate import Calibration
    from linearize.evaluation.heldout import Estimate
    from linearize.probe.damage import Reading

SCHEMA = "linearize.calibration/1"
_NAMES = {
    "mixer": "mix, gates and feature maps",
    "output": "output projections by ridge regression",
}
_READINGS = {
    "teacher": "the pretrained model",
    "converted": "converted",
    "calibrated": "calibrated",
    "no recurrence": "calibrated, without its recurrence",
}


def calibration_lines(found: Calibration) -> list[str]:
    """Lines with the text, the fits that were kept, and the gain of the whole model."""
    lines = [
        f"{found.tokens:,} tokens of {found.source}, in rows of {found.length:,}; {found.held_out} held-out rows and "
        f"{found.needles} needles for the choice. No training. Seed {found.seed}. {found.seconds:,.0f} s."
    ]
    fitted = [layer for layer in found.layers if layer.kept != "silent"]
    if fitted:
        left = 100 * statistics.fmean(layer.error for layer in fitted)
        lines.append(
            f"Layers: the recurrence of {len(fitted)} of {len(found.layers)} lowers the error of their attention on "
            f"held-out rows to {left:.0f} % of the error of window and sinks alone; the others keep a mix weight of 0."
        )
    elif found.layers:
        lines.append("Layers: no recurrence lowers the error of its attention on held-out rows; mix weights are 0.")
    for one in found.ingredients:
        verdict = "kept" if one.kept else "not kept"
        recall = f", log-probability of the needles' answers {_signed(one.change.recall, -1)}"
        lines.append(
            f"{_NAMES[one.name]}: {verdict}; loss {_signed(one.change.loss)}{recall if found.needles else ''} "
            "(nats per token)."
        )
    read = {about: found.readings[name] for name, about in _READINGS.items() if name in found.readings}
    rows = ", ".join(f"{about} {float(one.loss.mean()):.4f}" for about, one in read.items())
    lines.append(f"Loss on held-out rows: {rows}.")
    if found.needles:
        rows = ", ".join(f"{about} {float(one.recall.mean()):.3f}" for about, one in read.items())
        lines.append(f"Log-probability of the needles' answers: {rows}.")
        if not found.recall_counts:
            lines.append("The needles did not count, because the converted model recalls them as well as its teacher.")
    return lines


def calibration_text_report(found: Calibration) -> str:
    """The page `calibration.md`."""
    lines = ["# Calibration", "", *(f"- {line}" for line in calibration_lines(found)), ""]
    if found.layers:
        names = list(dict.fromkeys(name for layer in found.layers for name in layer.errors))
        lines += [
            "Squared error of each layer's attention after the output projection, on held-out rows, divided by the "
            "error of window and sinks alone. The last column is the error of the output against the teacher's after "
            "ridge regression, divided by the error before it.",
            "",
            f"| layer | {' | '.join(names)} | kept | ridge |",
            "|---" * (len(names) + 3) + "|",
        ]
        for layer in found.layers:
            cells = [f"{layer.errors[name]:.3f}" if name in layer.errors else "" for name in names]
            ridge = f"{found.ridge[layer.layer]:.3f}" if layer.layer in found.ridge else ""
            lines.append(f"| {layer.layer} | {' | '.join(cells)} | {layer.kept} | {ridge} |")
        lines.append("")
    return "\n".join(lines)


def calibration_data(found: Calibration) -> dict[str, Any]:
    """The figures as plain data: losses and log-probabilities in nats per token, errors as in `LayerResult`."""
    silent = None
    if "no recurrence" in found.readings:
        silent = damage(found.readings["calibrated"], found.readings["no recurrence"])
    return {
        "schema": SCHEMA,
        "text": {
            "source": found.source,
            "tokens": found.tokens,
            "length": found.length,
            "held_out": found.held_out,
            "needles": found.needles,
        },
        "inputs": found.inputs,
        "seed": found.seed,
        "recall_counts": found.recall_counts,
        "seconds": round(found.seconds, 1),
        "readings": {name: _reading(one) for name, one in found.readings.items()},
        "recurrence": None
        if silent is None
        else {"loss": silent.loss._asdict(), "recall": silent.recall._asdict() if found.needles else None},
        "ingredients": [
            {
                "name": one.name,
                "kept": one.kept,
                "loss": one.change.loss._asdict(),
                "recall": one.change.recall._asdict() if found.needles else None,
            }
            for one in found.ingredients
        ],
        "layers": [
            {"layer": one.layer, "kept": one.kept, "errors": one.errors, "ridge": found.ridge.get(one.layer)}
            for one in found.layers
        ],
    }


def _reading(one: Reading) -> dict[str, Any]:
    told: dict[str, Any] = {}
    for name, values in (("loss", one.loss), ("recall", one.recall)):
        value, stderr = mean_and_error(values.tolist()) if len(values) else (None, None)
        told[name] = {"value": value, "stderr": stderr}
    return told


def _signed(one: Estimate, sign: int = 1) -> str:
    error = "" if one.stderr is None else f" ± {one.stderr:.4f}"
    return f"{sign * one.mean:+.4f}{error}".replace("-", "−")
