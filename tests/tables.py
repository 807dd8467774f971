"""Tables of parameters: a few rows in which every pair of values occurs, instead of the full product."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import pytest


def pairwise(*axes: Sequence[Any]) -> list[tuple[Any, ...]]:
    """Rows of one value per axis, in which every two values of different axes stand together at least once.

    Each row is the combination that covers most of the pairs still missing, and among equals the first in the order of
    the product, so the table is the same in every run.
    """
    places = [tuple(enumerate(row)) for row in itertools.product(*(range(len(axis)) for axis in axes))]
    missing = {pair for row in places for pair in itertools.combinations(row, 2)}
    table = []
    while missing:
        best = max(places, key=lambda row: sum(pair in missing for pair in itertools.combinations(row, 2)))
        missing -= set(itertools.combinations(best, 2))
        table.append(tuple(axes[axis][index] for axis, index in best))
    return table


def in_turn(values: Sequence[Any], others: Sequence[Any], every: int | None = None) -> list[Any]:
    """Each value with each other one; `make test` runs a value with one other, or with one of `every`, in turn, and
    `make check` the rest."""
    step = every or len(others)
    return [
        pytest.param(value, other, marks=() if place % step == number % step else pytest.mark.check)
        for number, value in enumerate(values)
        for place, other in enumerate(others)
    ]


def some(values: Sequence[Any], kept: Sequence[Any]) -> list[Any]:
    """All values, of which `make test` runs those that are `kept`, and `make check` the rest."""
    assert all(value in values for value in kept), kept
    return [value if value in kept else pytest.param(value, marks=pytest.mark.check) for value in values]


def first_of(rows: Sequence[tuple[Any, ...]], count: int) -> list[Any]:
    """All rows, of which `make test` runs the first `count`, and `make check` the rest."""
    return [row if place < count else pytest.param(*row, marks=pytest.mark.check) for place, row in enumerate(rows)]
