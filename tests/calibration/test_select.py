"""How windows are shared out."""

from __future__ import annotations

from linearize.calibration.select import share_windows
from linearize.evaluation.heldout import Estimate


def recall(**falls: float) -> dict[int, Estimate]:
    return {int(name[1:]): Estimate(fall, 0.01) for name, fall in falls.items()}


def test_the_layer_that_recall_needs_sees_far_and_the_sum_stays():
    found = share_windows(recall(l0=0.0, l1=1.5, l2=0.01, l3=0.0), 64, 100)
    assert found[1] == 100 and found[0] == found[2] == found[3] == 16 + (192 - 84) // 3
    assert sum(found.values()) <= 4 * 64


def test_one_after_the_other_as_far_as_the_tokens_go():
    found = share_windows(recall(l0=0.2, l1=1.5, l2=0.0, l3=0.0), 64, 150)
    assert (found[1], found[0]) == (150, 16 + 192 - 134)
    assert found[2] == found[3] == 16


def test_where_no_layer_stands_out_windows_stay_equal():
    assert share_windows(recall(l0=0.0, l1=0.015), 64, 500) == {0: 64, 1: 64}


def test_narrow_windows_are_not_cut():
    assert share_windows(recall(l0=0.0, l1=1.0), 8, 500) == {0: 8, 1: 8}
