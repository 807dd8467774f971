"""The results of the recovery experiment: figures of a report, the table, and a plot for each figure."""

from __future__ import annotations

import math
import statistics
from typing import TYPE_CHECKING, Any

from linearize.evaluation.results.comparison import FIVE
from linearize.evaluation.tasks.task import mean_and_error
from linearize.report.formatting import number, with_error
from linearize.report.plots import Axis, Lines, Plot, Series

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from linearize.evaluation.results.results import Results

Figure = tuple[float, float | None]
"""A value and its standard error."""

# Figure -> heading, metric (for its digits), and the name of its plot.
FIGURES = {
    "core": ("mean of the core accuracies, %", "acc"),
    "lambada": ("LAMBADA, %", "acc"),
    "needles": ("needles found, %", "acc"),
    "perplexity": ("WikiText-2, word perplexity", "word_perplexity"),
    "kl": ("held-out rows, KL to the teacher", "kl"),
    "loss": ("held-out rows, loss", "loss"),
    "late": ("loss of a book's last tokens", "loss"),
    "rise": ("the same, minus loss at the length of training", "loss"),
}
TRAINED_LENGTH = 1024
MODEL, TEACHER, WINDOW = "model", "teacher", "window"


def figures(reports: Iterable[Results]) -> dict[str, dict[str, Figure]]:
    """System -> its figures in the reports."""
    found: dict[str, dict[str, Figure]] = {}
    for results in reports:
        for system in results.systems:
            found.setdefault(system.name, {}).update(_of(results, system.name))
    return found


def _of(results: Results, system: str) -> Iterator[tuple[str, Figure]]:
    scores = {(score.task, score.metric): score for score in results.scores[system].all_tasks()}
    tasks = {score.task: score for score in scores.values()}
    core = [tasks[name] for name in FIVE if name in tasks]
    if core:
        errors = [score.stderr or 0.0 for score in core]
        yield "core", (statistics.fmean(s.value for s in core), math.hypot(*errors) / len(core))
    if "lambada" in tasks:
        yield "lambada", (tasks["lambada"].value, tasks["lambada"].stderr)
    needles = [item for name, score in tasks.items() if name.startswith("niah_") for item in score.items]
    if needles:
        yield "needles", mean_and_error(needles)
    if "wikitext2" in tasks:
        yield "perplexity", (tasks["wikitext2"].value, None)
    for metric in ("kl", "loss"):
        if (score := scores.get(("held-out", metric))) is not None:
            yield metric, (score.value, score.stderr)
    if "loss_by_position" in tasks:
        curve = tasks["loss_by_position"]
        late = [one[-1] for one in curve.curves]
        yield "late", mean_and_error(late)
        if TRAINED_LENGTH in curve.axis:
            at = list(curve.axis).index(TRAINED_LENGTH)
            yield "rise", mean_and_error([one[-1] - one[at] for one in curve.curves])


def markdown(found: dict[str, Any]) -> str:
    """The table (systems and budgets down, figures across), then the reference figures."""
    present = [name for name in FIGURES if any(name in cell["figures"][MODEL] for cell in found["cells"])]
    lines = [
        f"| system | tokens | {' | '.join(FIGURES[name][0] for name in present)} |",
        "|---" * (len(present) + 2) + "|",
    ]

    def row(heading: str, tokens: str, of: dict[str, Figure]) -> str:
        cells = (_written(of[name], FIGURES[name][1]) if name in of else "" for name in present)
        return f"| {heading} | {tokens} | {' | '.join(cells)} |"

    cells = sorted(found["cells"], key=lambda cell: (cell["system"], cell["budget"]))
    lines += [row(cell["system"], f"{cell['tokens']:,}", cell["figures"][MODEL]) for cell in cells]
    for cell in cells:
        for name, of in cell["figures"].items():
            if name not in (MODEL, TEACHER, WINDOW):
                lines.append(row(f"{cell['system']}, {name}", f"{cell['tokens']:,}", of))
    if cells:
        beside = cells[-1]["figures"]
        lines += [row(name, "", beside[name]) for name in (TEACHER, WINDOW) if name in beside]
    return "\n".join(lines)


def _written(figure: Figure, metric: str) -> str:
    value, error = figure
    return number(value, metric) if error is None else with_error(value, error, metric)


def plots(found: dict[str, Any]) -> dict[str, str]:
    """Name -> a plot of each figure over the training tokens; the left edge is the untrained model."""
    budgets = sorted({cell["budget"] for cell in found["cells"]})
    trained = [budget for budget in budgets if budget]
    if not trained:
        return {}
    places, x = token_axis(budgets)
    systems = sorted({cell["system"] for cell in found["cells"]})
    drawn = {}
    for name, (heading, _) in FIGURES.items():
        series = []
        for look, system in enumerate(systems, 2):
            points = [
                (places[cell["budget"]], *cell["figures"][MODEL][name])
                for cell in sorted(found["cells"], key=lambda cell: cell["budget"])
                if cell["system"] == system and name in cell["figures"][MODEL]
            ]
            if points:
                series.append(Series(system, points, look))
        for look, beside in enumerate((TEACHER, WINDOW)):
            of = next((c["figures"][beside] for c in found["cells"] if name in c["figures"].get(beside, {})), None)
            if of is not None and series:
                series.append(Series(beside, [(place, *of[name]) for place in places.values()], look))
        if series:
            y = Axis("", lambda value: f"{value:g}")
            drawn[name] = Plot(name, heading, [Lines(x, y, series)]).alone
    return drawn


def token_axis(budgets: list[int]) -> tuple[dict[int, float], Axis]:
    """The place of each budget on a logarithmic axis, and the axis; the left edge is the untrained model."""
    none = min((budget for budget in budgets if budget), default=10) / 10  # a logarithmic axis has no zero
    places = {budget: budget or none for budget in budgets}
    ticks = [*places.values()]
    return places, Axis(
        "training tokens", lambda place: "0" if place == none else f"{place:,.0f}", log=True, ticks=ticks
    )
