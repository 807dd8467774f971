"""Run the checks on a model with raised mix weights, and set the tolerances."""

from __future__ import annotations

import math
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch

from linearize.verification.checks import KINDS, Kind
from linearize.verification.subject import Subject, relative_error

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterator

    from linearize.model import LinearizedForCausalLM
    from linearize.sources.source import Source

FLOAT32_TOLERANCE = 1e-4
"""Another order of sums gives an error of 1e-6 to 1e-5; one misplaced token gives more than 1e-3."""
HALF_FLOOR = 1e-3
"""The lowest tolerance in half precision, because the relative spacing is 1e-3 (float16) and 8e-3 (bfloat16)."""
SEEN = 0.05
"""The recurrence's target effect on the logits, large enough for every check to detect it. A larger effect is no
better: weights that were not trained with it make single tokens so sensitive that float32 is 3e-4 away from float64."""
ROUNDED_TOLERANCE = 1e-2
"""The float32 tolerance for a rounded memory whose check passes in float64. A sum that is 1e-7 off can lie on the other
side of a code's boundary, and one code changes the logits by up to 1e-3."""
ROUNDING, SHAKES, SPREAD = 5e-7, 5, 10.0
"""The relative noise in the input of every attention layer that stands for rounding to float32; how often a check is
repeated with other noise; and the tolerance as a multiple of the worst error with noise. Noise decides between equally
good codes and slots as rounding does. In weights that are random or sharp one other slot can change the logits by a
tenth, and another one by a hundredth."""
_MIX_WEIGHTS = (0.05, 0.1, 0.2, 0.4, 1.0, 10.0, 100.0)


@dataclass(frozen=True)
class Check:
    """The result of one check.

    Attributes:
        name, holds: the check's name, and the property that it checks, as a sentence.
        error: the worst relative error, max |a - b| / max |b|; infinite for values that are not finite or an exception.
        tolerance: the maximum error that passes; 0 for bitwise equality.
        detail: a remark; for an exception its first line.
    """

    name: str
    holds: str
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
        checks: in the order of execution.
        dtype: of the model's weights.
        tokens, steps: length of the rows, and of the drift check.
        woken: number of layers whose mix weights were raised for the checks.
        moved: the recurrence's relative effect on the logits during the checks; None for models without mix weights.
        distance: relative distance of the logits from the same weights in a wider dtype: float32 for half precision,
            float64 for float32; of a rounded memory in half precision without its codes. In float32 it is measured only
            if a check exceeds the usual tolerance.
        full_tokens: the length of the row that was read with all landmarks; None if all checks had all of them.
    """

    checks: list[Check]
    dtype: str
    tokens: int
    steps: int
    woken: int
    moved: float | None
    distance: float | None
    full_tokens: int | None = None

    @property
    def failed(self) -> list[str]:
        """Names of the checks that failed."""
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
    """Run every check. Weights changed by `awake` or `widened` are restored bit for bit.

    Args:
        model: loaded from `source` in `dtype`, a key of `DTYPES` or `auto`.
        special: token ids that do not occur inside a text.
        tokens: row length; None for three times the widest window, at least 192. Landmarks that take more than 512
            tokens to fill are then lowered to `FEW_SLOTS` during the checks, and one more check runs with all of them.
        steps: single decode steps of the drift check; None for two row lengths, because single steps take most of the
            time and drift grows with each window.
        tick: called with a check's name and number, the completed steps, and their total.

    Raises:
        VerificationError: `tokens` do not fill a window and its sinks, or exceed the model's positions.
    """

    def report(done: int, total: int) -> None:
        if tick is not None:
            tick(f"{subject.doing} ({kinds.index(subject.doing) + 1} of {len(kinds)})", done, total)

    subject = Subject(model, source, dtype=dtype, special=special, tokens=tokens, steps=steps, tick=report)
    kinds = [name for name, kind in KINDS.items() if not kind.only_full or subject.full_tokens is not None]
    try:
        return _run(subject, kinds)
    finally:
        subject.restore()


def _run(subject: Subject, kinds: list[str]) -> Verification:
    model = subject.model
    checks = []
    for name in (name for name in kinds if KINDS[name].as_loaded):
        checks.append(_check(subject, name))
    with awake(subject) as (woken, moved):
        half, most = model.dtype in (torch.bfloat16, torch.float16), ROUNDED_TOLERANCE
        distance = _distance_from(subject, torch.float32) if half else None
        if distance is not None and rounds(model):
            # Codes amplify the rounding of what they code, in some rows and not in others, so the distance with codes
            # is a bound for checks that pass in float64 alone.
            most = max(most, _tolerance(distance, HALF_FLOOR))
            with subject.uncoded():
                distance = _distance_from(subject, torch.float32)
        subject.tolerance = FLOAT32_TOLERANCE if distance is None else _tolerance(distance, HALF_FLOOR)
        for name in (name for name in kinds if not KINDS[name].as_loaded):
            checks.append(_check(subject, name))
        if not half and any(FLOAT32_TOLERANCE < check.error < math.inf for check in checks):
            # Some models amplify rounding. Only a float64 run measures by how much, so it is made if a float32 check
            # fails.
            distance = _distance_from(subject, torch.float64)
            # The factor 2 allows for tokens outside these rows that amplify rounding more.
            subject.tolerance = _tolerance(2 * distance, FLOAT32_TOLERANCE)
            checks = [_judged_again(subject, check) for check in checks]
        if rounds(model):
            checks = [without_rounding(subject, check, most) for check in checks]
    kind = str(model.dtype).removeprefix("torch.")
    return Verification(checks, kind, subject.tokens, subject.steps, woken, moved, distance, subject.full_tokens)


def _check(subject: Subject, name: str) -> Check:
    kind, subject.doing = KINDS[name], name
    subject.tick(0, 1)
    try:
        error, detail = kind.measure(subject)
    except Exception as exception:
        # Catch every exception, so the report shows it together with the other checks' results.
        first = next(iter(str(exception).strip().splitlines()), "")
        error, detail = math.inf, f"{type(exception).__name__}: {first}"
    return Check(name, kind.holds, error, _allowed(subject, kind), detail)


def _allowed(subject: Subject, kind: Kind) -> float:
    return 0.0 if kind.exact else max(subject.tolerance, kind.least_tolerance)


def _judged_again(subject: Subject, check: Check) -> Check:
    """A failed check by the tolerance that was set after it. Its error is still that of the same weights, except that
    an exact check may have the tolerance in it."""
    kind = KINDS[check.name]
    if check.passed or kind.as_loaded:
        return check
    return _check(subject, check.name) if kind.exact else replace(check, tolerance=_allowed(subject, kind))


def rounds(model: LinearizedForCausalLM) -> bool:
    """True if some layer stores keys and values as codes, or chooses what it keeps."""
    sections = (attention.mixer.config for attention in model.attention_layers if attention.mixer is not None)
    return any(section.memory_dtype != "auto" or section.landmarks for section in sections)


def without_rounding(subject: Subject, check: Check, most: float) -> Check:
    """A failed check of a model that rounds or chooses, if it passes in float64: by the tolerance `most`, or by
    `SPREAD` times its error in float64 with noise of the size of float32's rounding. In an exact check only what need
    not be exact has this tolerance."""
    kind = KINDS[check.name]
    if check.passed or kind.as_loaded or not math.isfinite(check.error) or (kind.exact and check.error > most):
        return check
    subject.forget()
    with widened(subject.model, torch.float64):
        wide, with_noise = _check(subject, check.name), ""
        if check.error > most and wide.error <= FLOAT32_TOLERANCE:
            noisy = max(_shaken(subject, check.name, seed) for seed in range(SHAKES))
            if math.isfinite(noisy):
                most, with_noise = min(SPREAD * noisy, 1.0), f" and {noisy:.1e} with noise like float32's"
    subject.forget()
    if wide.error > (0.0 if kind.exact else FLOAT32_TOLERANCE) or check.error > most:
        return check
    if kind.exact:
        usual, subject.tolerance = subject.tolerance, most
        check = _check(subject, check.name)
        subject.tolerance = usual
    detail = "; ".join(filter(None, (check.detail, f"{wide.error:.1e} in float64{with_noise}: codes or slots differ")))
    return replace(check, tolerance=0.0 if kind.exact else most, detail=detail)


def _shaken(subject: Subject, name: str, seed: int) -> float:
    """The error of a check while every attention layer reads its input with noise."""
    noise = torch.Generator(subject.model.device).manual_seed(seed)

    def shake(_: torch.nn.Module, given: tuple[Any, ...], named: dict[str, Any]) -> Any:
        x = given[0] if given else named["hidden_states"]
        x = x * (1 + ROUNDING * torch.randn(x.shape, generator=noise, device=x.device, dtype=x.dtype))
        return ((x, *given[1:]), named) if given else (given, {**named, "hidden_states": x})

    hooks = [layer.register_forward_pre_hook(shake, with_kwargs=True) for layer in subject.model.attention_layers]
    subject.forget()
    try:
        return _check(subject, name).error
    finally:
        for hook in hooks:
            hook.remove()


def _tolerance(distance: float, floor: float) -> float:
    # The two ways of calling can each differ by `distance` from the exact logits, in opposite directions.
    return max(floor, 2 * distance) if math.isfinite(distance) else floor


def _distance_from(subject: Subject, wide: torch.dtype) -> float:
    """The relative change of the logits by rounding alone; infinite if it cannot be measured."""
    rows = range(len(subject.ids))
    try:
        narrow = [subject.alone(row) for row in rows]
        with widened(subject.model, wide):
            return max(relative_error(narrow[row], subject.parallel(subject.ids[row : row + 1])[0]) for row in rows)
    except Exception:
        return math.inf  # the checks raise and report the same exception


@contextmanager
def widened(model: torch.nn.Module, wide: torch.dtype) -> Iterator[None]:
    """Convert the weights to a wider dtype during the block. The conversion back is exact, because the wider dtype
    represents every value of the narrower. Only one copy of the weights exists at a time."""
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
    """Raise the mix weights during the block until the recurrence changes the logits by `SEEN`. A converted model
    starts with mix weights of 0, and training may leave some near 0; the checks could then not detect errors of the
    recurrence.

    Yields:
        the number of layers with raised weights, and the recurrence's relative effect on the logits (None without mix
        weights).
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
        moved = math.inf  # the checks raise and report the same exception
    raised = sum(not torch.equal(weight, value) for weight, value in zip(weights, own, strict=True))
    return raised, moved
