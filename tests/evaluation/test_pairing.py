"""Paired statistics against values worked out by hand, and against independent formulas."""

from __future__ import annotations

import math
import statistics
from dataclasses import replace
from fractions import Fraction

import pytest

from linearize.evaluation.results.comparison import compare_systems
from linearize.evaluation.results.pairing import Closed, closed, contributions, difference, holm, mcnemar_p, student_p
from linearize.evaluation.results.results import Results, SystemInfo, SystemScores
from linearize.evaluation.results.telling import tell
from linearize.evaluation.tasks.task import TaskScore, by_row, mean_and_error

from .results_kit import accuracy, answers, results


def loss(items: list[float], **more: object) -> TaskScore:
    value, stderr = mean_and_error(items)
    return TaskScore("books", "loss", value, stderr, False, items, "length", **more)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("wins", "losses", "p"),
    [
        (0, 0, Fraction(1)),
        (1, 0, Fraction(1)),
        (0, 5, Fraction(2, 32)),
        (1, 9, Fraction(2 * 11, 1024)),
        (3, 3, Fraction(1)),
        (2, 8, Fraction(2 * 56, 1024)),
    ],
)
def test_mcnemar_is_the_exact_binomial(wins: int, losses: int, p: Fraction) -> None:
    assert mcnemar_p([1.0] * wins + [-1.0] * losses + [0.0] * 7) == pytest.approx(float(p))


def test_answers_about_one_text_are_not_independent() -> None:
    """Four texts of five questions, all right or all wrong: as sure as four answers, not as twenty."""
    tags = [{"length": 512, "row": row} for row in range(4) for _ in range(5)]
    a, b = (
        replace(loss([float(right) for right in rows for _ in range(5)]), tags=tags)
        for rows in ((1, 1, 1, 0), (0, 1, 0, 0))
    )
    found = difference([(a, b)])
    assert found is not None and found.test == "t"
    assert (found.value, found.stderr) == (0.5, pytest.approx(statistics.stdev([1, 0, 1, 0]) / 2))
    assert by_row(a.items, tags) == [1, 1, 1, 0]
    # Rows of which not all answers were drawn weigh by those that were; the mean stays that of the items.
    assert statistics.fmean(by_row(a.items[3:], tags[3:])) == pytest.approx(statistics.fmean(a.items[3:]))
    assert by_row(a.items, [{}] * 20) == a.items


def test_mcnemar_of_thousands_of_items() -> None:
    p = mcnemar_p([1.0] * 1400 + [-1.0] * 1600)
    z = (200 - 1) / math.sqrt(3000)  # with the continuity correction
    assert p == pytest.approx(math.erfc(z / math.sqrt(2)), rel=0.01)


@pytest.mark.parametrize(
    ("t", "freedom", "p"),
    # Tables of Student's t, and closed forms for 1 and 2 degrees.
    [
        (12.7062, 1, 0.05),
        (4.302653, 2, 0.05),
        (3.182446, 3, 0.05),
        (2.228139, 10, 0.05),
        (2.860935, 19, 0.01),
        (1.979930, 120, 0.05),
        (1.0, 1, 0.5),
        (1.0, 2, 1 - 1 / math.sqrt(3)),
        (0.0, 7, 1.0),
        (math.inf, 4, 0.0),
    ],
)
def test_student_p(t: float, freedom: int, p: float) -> None:
    assert student_p(t, freedom) == pytest.approx(p, abs=2e-6)
    assert student_p(-t, freedom) == student_p(t, freedom)


def test_student_p_by_numerical_integration() -> None:
    freedom, t = 7, 1.3
    scale = math.gamma(4) / (math.sqrt(7 * math.pi) * math.gamma(3.5))
    steps = 20_000
    inside = sum((1 + ((i + 0.5) * t / steps) ** 2 / freedom) ** -4 for i in range(steps)) * t / steps
    assert student_p(t, freedom) == pytest.approx(1 - 2 * scale * inside, abs=1e-8)


def test_holm() -> None:
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.9, 0.8]) == [1.0, 1.0]
    assert holm([]) == []


def test_right_and_wrong_items_are_paired_by_mcnemar() -> None:
    a, b = accuracy("piqa", [1.0, 1.0, 0.0, 0.0, 0.0, 1.0]), accuracy("piqa", [1.0, 1.0, 1.0, 1.0, 1.0, 1.0])
    found = difference([(a, b)])
    assert found is not None
    assert found.test == "McNemar"
    assert found.value == pytest.approx(-0.5)
    assert found.stderr == pytest.approx(math.sqrt(0.3 / 6))
    assert found.p == pytest.approx(2 / 8)


def test_continuous_items_are_paired_by_t() -> None:
    found = difference([(loss([3.0, 5.0, 4.5]), loss([2.0, 3.0, 4.0]))])
    assert found is not None
    assert found.test == "t"
    # Differences 1, 2 and 0.5: mean 7/6, variance 7/12.
    assert found.value == pytest.approx(7 / 6)
    assert found.stderr == pytest.approx(math.sqrt(7 / 36))
    t = (7 / 6) / math.sqrt(7 / 36)
    assert found.p == pytest.approx(1 - t / math.sqrt(2 + t * t))


def test_a_system_beside_itself() -> None:
    for score in (loss([3.0, 5.0, 4.5]), accuracy("piqa", answers(3, 7))):
        found = difference([(score, score)])
        assert found is not None
        assert (found.value, found.stderr, found.p) == (0.0, 0.0, 1.0)
        assert not found.significant


def test_one_item_has_no_error() -> None:
    found = difference([(loss([3.0]), loss([2.0]))])
    assert found is not None
    assert (found.value, found.stderr, found.p, found.test) == (1.0, None, None, "")
    assert closed([(loss([2.5]), loss([3.0]), loss([2.0]))]) is None
    right = difference([(accuracy("piqa", [0.0]), accuracy("piqa", [1.0]))])
    assert right is not None
    assert (right.value, right.stderr, right.p) == (-1.0, None, 1.0)


def test_other_items_are_not_paired() -> None:
    a = loss([3.0, 5.0], tags=[{"length": 1}, {"length": 2}])
    assert difference([(a, loss([3.0, 5.0, 1.0]))]) is None
    assert difference([(a, loss([3.0, 5.0], tags=[{"length": 2}, {"length": 1}]))]) is None
    nothing = replace(a, items=[], tags=[])
    assert difference([(nothing, nothing)]) is None


def test_a_mean_over_tasks() -> None:
    a, b = accuracy("piqa", answers(5, 10)), accuracy("piqa", answers(7, 10))
    c, d = accuracy("arc_easy", answers(4, 20)), accuracy("arc_easy", answers(10, 20))
    found = difference([(a, b), (c, d)])
    assert found is not None
    assert found.value == pytest.approx((-0.2 - 0.3) / 2)
    first, second = statistics.variance([-1.0] * 2 + [0.0] * 8), statistics.variance([-1.0] * 6 + [0.0] * 14)
    assert found.stderr == pytest.approx(math.sqrt(first / 10 + second / 20) / 2)
    assert found.test == "z"
    assert found.p == pytest.approx(math.erfc(abs(found.value / found.stderr) / math.sqrt(2)))


def test_the_distance_that_is_closed() -> None:
    teacher, window = loss([1.0, 2.0, 3.0]), loss([2.0, 3.2, 3.8])
    found = closed([(loss([1.5, 2.6, 3.4]), window, teacher)])
    assert found is not None
    assert found.value == pytest.approx(0.5)
    assert found.stderr == pytest.approx(0.0, abs=1e-12)
    assert closed([(window, window, teacher)]) == Closed(0.0, 0.0)
    uneven = closed([(loss([1.6, 2.6, 3.3]), window, teacher)])
    assert uneven is not None
    assert uneven.value == pytest.approx(0.5)
    # What is left of each gain after half the gap: 0.1, 0, -0.1 (as losses fall).
    assert uneven.stderr == pytest.approx(0.1 / math.sqrt(3))


def test_no_share_of_a_distance_within_its_error() -> None:
    teacher, window = loss([1.0, 2.0, 3.0]), loss([1.5, 1.8, 2.8])
    assert closed([(teacher, window, teacher)]) is None
    assert closed([(teacher, teacher, teacher)]) is None


@pytest.mark.parametrize("sums", [True, False])
def test_perplexities_are_linearised(sums: bool) -> None:
    nats, weights = [40.0, 90.0, 66.0], [10, 30, 20]
    rate = sum(nats) / sum(weights)
    items = [-value for value in nats] if sums else [n / w for n, w in zip(nats, weights, strict=True)]
    tags = [{"weight": weight} for weight in weights]
    score = TaskScore("wikitext2", "word_perplexity", math.exp(rate), 0.1, False, items, "core", tags)
    found = contributions(score)
    assert found is not None
    assert statistics.fmean(found) == pytest.approx(score.value)
    # The error of a ratio of sums, as lm-eval's perplexities have it.
    squares = sum((n - rate * w) ** 2 for n, w in zip(nats, weights, strict=True))
    assert statistics.stdev(found) / math.sqrt(3) == pytest.approx(score.value * math.sqrt(squares * 3 / 2) / 60)


def test_a_value_that_does_not_follow_from_its_items_is_not_paired() -> None:
    odd = replace(loss([1.0, 2.0]), value=9.0)
    assert contributions(odd) is None
    assert difference([(odd, odd)]) is None


def test_a_metric_that_is_no_mean_of_items_is_told_and_not_tested() -> None:
    def bleu(value: float) -> SystemScores:
        return SystemScores([TaskScore("wmt", "bleu", value, None, True, [], "benchmarks", count=12)])

    scores = {"teacher": bleu(30.0), "window": bleu(20.0), "model": bleu(25.0)}
    found = Results.from_json(results(scores=scores).to_json())
    (row,) = compare_systems(found)[0].rows
    assert not row.paired and {cell.n for cell in row.cells.values()} == {12}
    assert all(cell.to_teacher is None and cell.to_window is None for cell in row.cells.values())
    assert row.cells["model"].percent_of_teacher == pytest.approx(100 * 25 / 30)
    notes = [note for section in tell(found).sections for grid in section.grids for note in grid.notes]
    assert "Not the mean of its items, so without a paired test: wmt bleu." in notes


def test_the_window_of_equal_bytes_is_the_baseline_where_it_was_measured() -> None:
    found = results()
    wider = accuracy("piqa", answers(28, 40))
    found.systems.insert(1, SystemInfo("window_bytes"))
    found.scores["window_bytes"] = SystemScores([wider])
    cell = next(row for row in compare_systems(found)[0].rows if row.task == "piqa").cells["model"]
    assert cell.to_window is not None and cell.to_window.value == pytest.approx((25 - 28) / 40)


def test_bits_are_linearised() -> None:
    nats, sizes = [-10.0, -30.0, -5.0], [8, 20, 5]
    value = 45 / 33 / math.log(2)
    tags = [{"weight": size} for size in sizes]
    found = contributions(TaskScore("pages", "bits_per_byte", value, None, False, nats, tags=tags))
    assert found is not None and math.fsum(found) / 3 == pytest.approx(value)
