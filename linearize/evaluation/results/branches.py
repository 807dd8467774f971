"""Say in a sentence what a model loses when one of its branches is off, because a branch may do nothing."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from linearize.evaluation.results.pairing import ALPHA, difference, holm

if TYPE_CHECKING:
    from collections.abc import Iterable

    from linearize.evaluation.results.results import Results
    from linearize.evaluation.tasks.task import TaskScore

# The system whose branches are off in others: that of `eval`, or the last one of `run`.
_WHOLE = ("model", "finetuned", "converted")
_OFF = {"no_recurrence": "recurrence", "no_window": "window"}


def whole_of(systems: Iterable[str]) -> str:
    """The system whose branches are off in others; empty without one."""
    names = set(systems)
    return next((name for name in _WHOLE if name in names), "")


def branch_sentences(results: Results) -> list[str]:
    """One for each branch that was turned off in a system of its own, if the model itself was measured beside it.

    Differences are paired over items, and p is corrected over the tasks of one sentence.
    """
    sentences, model = [], whole_of(system.name for system in results.systems)
    for system, branch in _OFF.items():
        pairs = [(scores[model], scores[system]) for scores in results.tasks().values() if {model, system} <= {*scores}]
        if not pairs:
            continue
        if all(_same(*pair) for pair in pairs):
            sentences.append(f"With its {branch} off every item scores the same: the {branch} does nothing here.")
            continue
        found = [(whole, difference([(whole, off)])) for whole, off in pairs]
        tests = [(whole, d, d.p) for whole, d in found if d is not None and d.p is not None]
        sure = [
            (whole.task, (d.value > 0) == whole.higher_is_better)
            for (whole, d, _), p in zip(tests, holm([p for _, _, p in tests]), strict=True)
            if p < ALPHA
        ]
        sides = [
            f"{side} on {len(names)} of {len(tests)} measures ({', '.join(dict.fromkeys(names))})"
            for side, names in (
                ("worse", [name for name, helps in sure if helps]),
                ("better", [name for name, helps in sure if not helps]),
            )
            if names
        ]
        said = f"it is significantly {' and '.join(sides)}" if sides else "no figure changes with significance"
        sentences.append(f"With its {branch} off {said}.")
    return sentences


def _same(whole: TaskScore, off: TaskScore) -> bool:
    """True if every item has the same score up to rounding."""
    return 0 < len(whole.items) == len(off.items) and all(
        math.isclose(a, b, rel_tol=1e-5, abs_tol=1e-6) for a, b in zip(whole.items, off.items, strict=True)
    )
