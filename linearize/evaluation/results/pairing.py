"""Statistics of systems on the same items: differences, their errors and tests, and the closed share of a gap."""

from __future__ import annotations

import math
import statistics
from dataclasses import dataclass
from typing import TYPE_CHECKING

from linearize.evaluation.tasks.task import by_row
from linearize.report.formatting import number, with_error

if TYPE_CHECKING:
    from collections.abc import Sequence

    from linearize.evaluation.tasks.task import TaskScore

# The level below which a difference is called significant.
ALPHA = 0.05


@dataclass(frozen=True)
class Difference:
    """One system minus another on the same items, in the metric's own unit.

    Attributes:
        value: the difference.
        stderr: its standard error, over items (or over texts, where items of one text are several); None with fewer
            than two.
        p: two-sided, of the test that `test` names, not corrected; None where there is nothing to test with.
        test: `McNemar` (exact, for items that are right or wrong), `t` (paired, over items), or `z` (of a mean over
            tasks); empty where `p` is None.
        p_corrected: `p` after Holm's correction over the tests of one table; None until it is made.
    """

    value: float
    stderr: float | None
    p: float | None
    test: str
    p_corrected: float | None = None

    @property
    def significant(self) -> bool:
        """True if the corrected p is below 0.05."""
        return self.p_corrected is not None and self.p_corrected < ALPHA


@dataclass(frozen=True)
class Closed:
    """The share of the distance from a baseline to the teacher that is closed; 1 is the teacher, 0 the baseline."""

    value: float
    stderr: float | None


def difference_text(found: Difference | None, metric: str) -> str:
    """`−0.8 ± 0.3 *`, where * marks a significant one."""
    if found is None:
        return "–"
    sign = "+" if found.value > 0 and number(found.value, metric).strip("0.") else ""
    return sign + with_error(found.value, found.stderr, metric) + (" *" if found.significant else "")


def p_text(found: Difference | None) -> str:
    """The corrected p: `0.013`."""
    if found is None or found.p_corrected is None:
        return "–"
    p = found.p_corrected
    return "< 0.001" if p < 0.001 else f"{p:.3f}"


def closed_text(found: Closed | None) -> str:
    """`41.0 ± 12.3 %`."""
    return "–" if found is None else f"{with_error(found.value, found.stderr, 'acc')} %"


def same_items(a: TaskScore, b: TaskScore) -> bool:
    """True if two results of one task can be paired: as many items, of the same kinds, in the same order."""
    return len(a.items) == len(b.items) and a.n == b.n and list(a.tags) == list(b.tags)


def difference(pairs: Sequence[tuple[TaskScore, TaskScore]]) -> Difference | None:
    """The mean over tasks of a - b, paired item by item; of one task, if there is one pair.

    None where the items are not the same, or a value does not follow from its items.
    """
    parts = [_pairwise(a, b) for a, b in pairs]
    known = [part for part in parts if part is not None]
    if not known or len(known) < len(parts):
        return None
    value = statistics.fmean(statistics.fmean(part) for part in known)
    stderr = _error(known)
    if len(pairs) == 1 and _binary(*pairs[0]):
        return Difference(value, stderr, mcnemar_p(known[0]), "McNemar")
    if stderr is None:
        return Difference(value, None, None, "")
    if len(pairs) == 1:
        return Difference(value, stderr, student_p(_ratio(value, stderr), len(known[0]) - 1), "t")
    return Difference(value, stderr, math.erfc(abs(_ratio(value, stderr)) / math.sqrt(2)), "z")


def closed(triples: Sequence[tuple[TaskScore, TaskScore, TaskScore]]) -> Closed | None:
    """(x - baseline) / (teacher - baseline) of triples (x, baseline, teacher), one per task, each averaged over tasks.

    None where the distance is smaller than its own standard error, or that is not known: a share of it would be noise.
    """
    gap = difference([(teacher, baseline) for _, baseline, teacher in triples])
    gain = difference([(x, baseline) for x, baseline, _ in triples])
    if gap is None or gain is None or gap.stderr is None or gap.value == 0 or abs(gap.value) < gap.stderr:
        return None
    share = gain.value / gap.value
    # The error of a ratio of two means over the same items, linearised.
    rests = []
    for x, baseline, teacher in triples:
        gains, gaps = _pairwise(x, baseline), _pairwise(teacher, baseline)
        if gains is None or gaps is None:
            return None
        rests.append([up - share * whole for up, whole in zip(gains, gaps, strict=True)])
    error = _error(rests)
    return Closed(share, None if error is None else error / abs(gap.value))


def contributions(score: TaskScore) -> list[float] | None:
    """Per item a number, so that their mean is the score's value and their scatter gives its error.

    These are the items themselves where the value is their mean. A score does not say how its value comes from its
    items, so the other forms that tasks have are tried: means by `weight`, perplexities, whose items are nats (or
    log-likelihoods) per unit of weight, or sums over it, and bits. Such values are linearised at their mean.

    None where no form gives the value.
    """
    n = len(score.items)
    if n == 0:
        return None
    if _close(statistics.fmean(score.items), score.value):
        return score.items
    weights = [tag.get("weight", 1.0) for tag in score.tags] or [1.0] * n
    if not all(isinstance(weight, (int, float)) and weight > 0 for weight in weights):
        return None
    total = math.fsum(weights)
    weighted = [weight * item for weight, item in zip(weights, score.items, strict=True)]
    for sums in (weighted, score.items):
        rate = math.fsum(sums) / total
        bits = -1.0 / math.log(2)
        for value, slope in ((rate, 1.0), (_exp(rate), score.value), (_exp(-rate), -score.value), (rate * bits, bits)):
            if _close(value, score.value):
                scale = slope * n / total
                return [score.value + scale * (s - rate * w) for s, w in zip(sums, weights, strict=True)]
    return None


def mcnemar_p(differences: Sequence[float]) -> float:
    """The exact two-sided p of McNemar's test (a sign test) on differences of -1, 0 and 1."""
    from scipy.special import bdtr  # lazy: half a second

    wins, losses = sum(d > 0 for d in differences), sum(d < 0 for d in differences)
    return min(1.0, 2 * float(bdtr(min(wins, losses), wins + losses, 0.5)))


def student_p(t: float, freedom: int) -> float:
    """The two-sided p of Student's t with `freedom` degrees of freedom."""
    from scipy.special import stdtr  # lazy: half a second

    return 2 * float(stdtr(freedom, -abs(t)))


def holm(ps: Sequence[float]) -> list[float]:
    """p-values after Holm's correction: the chance of even one false finding among them stays below the level."""
    corrected = [0.0] * len(ps)
    highest = 0.0
    for rank, index in enumerate(sorted(range(len(ps)), key=ps.__getitem__)):
        highest = max(highest, min(1.0, (len(ps) - rank) * ps[index]))
        corrected[index] = highest
    return corrected


def _pairwise(a: TaskScore, b: TaskScore) -> list[float] | None:
    if not same_items(a, b):
        return None
    of_a, of_b = contributions(a), contributions(b)
    return None if of_a is None or of_b is None else by_row([x - y for x, y in zip(of_a, of_b, strict=True)], a.tags)


def _error(parts: Sequence[Sequence[float]]) -> float | None:
    """The standard error of the mean over tasks of the means over their items; tasks are independent."""
    if any(len(part) < 2 for part in parts):
        return None
    return math.sqrt(math.fsum(statistics.variance(part) / len(part) for part in parts)) / len(parts)


def _ratio(value: float, error: float) -> float:
    # All items differ by the same: no doubt about it, unless by nothing.
    return value / error if error else math.copysign(math.inf, value) if value else 0.0


def _binary(a: TaskScore, b: TaskScore) -> bool:
    if any("row" in tag for tag in a.tags):
        return False
    return all(item in (0.0, 1.0) for score in (a, b) for item in score.items) and all(
        _close(statistics.fmean(score.items), score.value) for score in (a, b)
    )


def _close(value: float, expected: float) -> bool:
    return math.isclose(value, expected, rel_tol=1e-6, abs_tol=1e-9)


def _exp(value: float) -> float:
    return math.exp(value) if value < 700 else math.inf
