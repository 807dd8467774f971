"""Runs the checks: what a model is lent for them, and how far apart two ways of calling it may be."""

from __future__ import annotations

import math
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from linearize.verification.checks import KINDS
from linearize.verification.subject import Subject, relative_error

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterator

    from linearize.model import LinearizedForCausalLM
    from linearize.sources.source import Source

FLOAT32_TOLERANCE = 1e-4
"""One function in another order of sums: that is 1e-6 to 1e-5, while one token out of place is above 1e-3."""
HALF_FLOOR = 1e-3
"""Nothing tighter is asked in half precision, whose steps are 1e-3 (float16) and 8e-3 (bfloat16) of a value."""
SEEN = 0.05
"""A recurrence that moves the logits by so much is seen by every check. More is no better: too loud for weights that
were never trained with it, it makes single tokens so sensitive that float32 itself is 3e-4 away from float64."""
_MIX_WEIGHTS = (0.05, 0.1, 0.2, 0.4, 1.0, 10.0, 100.0)


@dataclass(frozen=True)
class Check:
    """Result of one check.

    Attributes:
        name, proves: what was checked, in a word and in a sentence.
        error: the worst relative error, max |a - b| / max |b|; infinite where something was not finite or an
            exception was raised.
        tolerance: the largest error that passes; 0 where bits must agree.
        detail: what else there is to say; of an exception its first line.
    """

    name: str
    proves: str
    error: float
    tolerance: float
    detail: str

    @property
    def passed(self) -> bool:
        return math.isfinite(self.error) and self.error <= self.tolerance


@dataclass(frozen=True)
class Verification:
    """The checks of one model.

    Attributes:
        checks: in the order in which they ran.
        dtype: of the model's weights.
        tokens, steps: length of the rows, and of the drift check.
        woken: how many layers' mix weights were raised for the checks.
        moved: relative change of the logits by the recurrence during the checks; None where no weight says how much.
        distance: relative distance of the logits from those of the same weights in a wider type: float32 for half
            precision, float64 for float32, where it is measured only if a check asks for more than the usual.
    """

    checks: list[Check]
    dtype: str
    tokens: int
    steps: int
    woken: int
    moved: float | None
    distance: float | None

    @property
    def failed(self) -> list[str]:
        """Names of the checks that did not pass."""
        return [check.name for check in self.checks if not check.passed]


@torch.no_grad()
def verify(
    model: LinearizedForCausalLM,
    source: Source,
    *,
    dtype: str = "auto",
    special: Collection[int] = (),
    tokens: int | None = None,
    steps: int | None = None,
    tick: Callable[[str, int, int], None] | None = None,
) -> Verification:
    """Runs every check. Weights that are changed meanwhile (see `awake`, `widened`) are put back bit for bit.

    Args:
        model: as loaded from `source` in `dtype`, a key of `DTYPES` or `auto`.
        special: token ids that do not stand inside a text.
        tokens: length of the rows; None for three of the widest window, at least 192.
        steps: single decode steps of the drift check; None for two rows' length, because most of a verification's time
            goes with single steps, and what drifts at all shows more with each window that passes.
        tick: called with a check's name and number, the steps it has done, and how many there are.

    Raises:
        VerificationError: `tokens` do not fill a window and its sinks, or are more than the model has positions for.
    """
    name = ""

    def report(done: int, total: int) -> None:
        if tick is not None:
            tick(f"{name} ({list(KINDS).index(name) + 1} of {len(KINDS)})", done, total)

    subject = Subject(model, source, dtype=dtype, special=special, tokens=tokens, steps=steps, tick=report)
    checks = []
    for name in (name for name, kind in KINDS.items() if kind.as_loaded):
        report(0, 1)
        checks.append(_check(subject, name))
    with awake(subject) as (woken, moved):
        half = model.dtype in (torch.bfloat16, torch.float16)
        distance = _distance_from(subject, torch.float32) if half else None
        subject.tolerance = FLOAT32_TOLERANCE if distance is None else _tolerance(distance, HALF_FLOOR)
        for name in (name for name, kind in KINDS.items() if not kind.as_loaded):
            report(0, 1)
            checks.append(_check(subject, name))
        if not half and any(FLOAT32_TOLERANCE < check.error < math.inf for check in checks):
            # Some models amplify rounding; how much, only a run in float64 can tell, so it is made where it is needed.
            distance = _distance_from(subject, torch.float64)
            # Which token it is that amplifies most is chance, and the checks see more of them than these rows have.
            subject.tolerance = _tolerance(2 * distance, FLOAT32_TOLERANCE)
            for place, check in enumerate(checks):
                if not check.passed and not KINDS[name := check.name].as_loaded:
                    report(0, 1)
                    checks[place] = _check(subject, name)
    kind = str(model.dtype).removeprefix("torch.")
    return Verification(checks, kind, subject.tokens, subject.steps, woken, moved, distance)


def _check(subject: Subject, name: str) -> Check:
    kind = KINDS[name]
    try:
        error, detail = kind.measure(subject)
    except Exception as exception:
        # Whatever breaks is what the user wants to know of, together with what the other checks find.
        first = next(iter(str(exception).strip().splitlines()), "")
        error, detail = math.inf, f"{type(exception).__name__}: {first}"
    allowed = 0.0 if kind.exact else max(subject.tolerance, kind.least_tolerance)
    return Check(name, kind.proves, error, allowed, detail)


def _tolerance(distance: float, floor: float) -> float:
    # Each of two ways of calling may be that far from the exact logits, on opposite sides.
    return max(floor, 2 * distance) if math.isfinite(distance) else floor


def _distance_from(subject: Subject, wide: torch.dtype) -> float:
    """Distance by which rounding alone moves the logits; infinite if it cannot be measured."""
    rows = range(len(subject.ids))
    try:
        narrow = [subject.alone(row) for row in rows]
        with widened(subject.model, wide):
            return max(relative_error(narrow[row], subject.parallel(subject.ids[row : row + 1])[0]) for row in rows)
    except Exception:
        return math.inf  # the checks run into the same and report it


@contextmanager
def widened(model: torch.nn.Module, wide: torch.dtype) -> Iterator[None]:
    """The same weights in a wider type for a while. Every value of the narrower is one of the wider, so the way back
    is exact, and only one copy of the weights is held at a time."""
    changed: list[tuple[torch.nn.Parameter | torch.Tensor, torch.dtype]] = []
    try:
        for tensor in (*model.parameters(), *model.buffers()):
            if tensor.is_floating_point() and tensor.dtype.itemsize < wide.itemsize:
                changed.append((tensor, tensor.dtype))
                tensor.data = tensor.data.to(wide)
        yield
    finally:
        for tensor, dtype in changed:
            tensor.data = tensor.data.to(dtype)


@contextmanager
def awake(subject: Subject) -> Iterator[tuple[int, float | None]]:
    """Lets the recurrence be heard for a while, or no check could see it: a converted model starts with mix weights
    of 0, and training may have left some close to it. Weights are raised until the logits move by `SEEN`.

    Yields:
        how many layers' weights were raised, and how far the recurrence moves the logits (None: no such weights).
    """
    weights = [weight for name, weight in subject.model.named_parameters() if name.endswith("mixer.mix_weight")]
    own = [weight.detach().clone() for weight in weights]
    try:
        yield _wake(subject, weights, own)
    finally:
        with torch.no_grad():
            for weight, value in zip(weights, own, strict=True):
                weight.copy_(value)


def _wake(subject: Subject, weights: list[torch.nn.Parameter], own: list[torch.Tensor]) -> tuple[int, float | None]:
    if not weights:
        return 0, None
    ids, moved = subject.ids[:1], 0.0
    try:
        for weight in weights:
            weight.zero_()
        silent = subject.parallel(ids)
        for least in _MIX_WEIGHTS:
            for weight, value in zip(weights, own, strict=True):
                weight.copy_(torch.where(value.abs() < least, torch.full_like(value, least).copysign(value), value))
            moved = relative_error(subject.parallel(ids), silent)
            if moved >= SEEN:
                break
    except Exception:
        moved = math.inf  # the checks run into the same and report it
    raised = sum(not torch.equal(weight, value) for weight, value in zip(weights, own, strict=True))
    return raised, moved
