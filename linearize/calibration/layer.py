"""One layer's calibration: fits the mixer's own parameters to the output of the teacher's attention.

    silent   the window alone, without the recurrence
    start    mix in closed form, with the recurrence's own gate or one that matches the teacher's look-back distance
    fitted   gradient steps from there; no gradient leaves the layer

Each step is measured on held-out rows by the squared error of the attention's output after the output projection. The
step with the least error is kept.

Dimensions: R documents of a row, L tokens, H query heads, V a value's width, C the model's width.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from linearize_kernels import window_attention
from torch import Tensor

from linearize.calibration.closed import bisect, channel_weights, decay_of, mass_weights
from linearize.calibration.weights import output_projection
from linearize.probe.statistics import Tally

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from linearize.families import Projections
    from linearize.model.attention import LinearizedAttention
    from linearize.model.mixer.mixer import Mixer

# Rows for the closed forms, which estimate few numbers.
_CLOSED_ROWS = 4
# Bytes of projected rows to cache between steps.
_ROOM = 512 * 2**20
_WRITES = (-2.0, -1.0, 0.0, 1.0, 2.0)
# Beyond this bias the gate is saturated, and its derivative is close to 0.
_MOST_BIAS = 9.0

Row = tuple["Projections", "Tensor | None"]
"""Projections of one row of text, as rows of real tokens, and their lengths (None: all)."""

Lesson = tuple[Row, Tensor, Tensor]
"""A row, the output of the teacher's attention for it, and that output's squared norm."""


class Read(NamedTuple):
    """The branches before the mix, for the tokens with a state that is not empty: `[N, H, V or none]`."""

    y: Tensor
    normaliser: Tensor | None
    read: Tensor
    mass: Tensor | None
    target: Tensor
    log_beyond: Tensor | None


@dataclass
class LayerResult:
    """Result of one layer. Errors are shares of the error of window and sinks alone, on the held-out rows.

    Attributes:
        errors: the error after each step, in order.
        kept: the step that was kept, `silent` if none was better.
    """

    layer: int
    errors: dict[str, float] = field(default_factory=dict)
    kept: str = "silent"

    @property
    def error(self) -> float:
        return self.errors[self.kept]


class LayerFit:
    """Fits one layer.

    Args:
        attention: the student's attention, which is changed.
        teacher: the pretrained attention with the same weights.
        row: returns training row number i.
        rows: the number of training rows.
        held_out: the rows that decide.
    """

    def __init__(
        self,
        attention: LinearizedAttention,
        teacher: LinearizedAttention,
        row: Callable[[int], Row],
        rows: int,
        held_out: Sequence[Row],
    ) -> None:
        assert attention.mixer is not None  # noqa: S101 - for the type checker; such layers are not fitted
        self.attention, self.teacher, self.mixer = attention, teacher, attention.mixer
        self.row, self.rows, self.held_out = row, rows, held_out
        self.weight = _columns(attention)
        self._lessons: dict[int, Lesson] = {}
        with torch.no_grad():
            self.targets = [self.target(*one) for one in held_out]

    def run(self, layer: int, *, steps: int, lr: float, seed: int) -> LayerResult:
        """Try every step in order and leave the best one's parameters in the layer."""
        mixer, result = self.mixer, LayerResult(layer)
        assert mixer.recurrence is not None  # noqa: S101 - for the type checker
        silent = self._silent_error()
        if silent <= 0:
            return LayerResult(layer, {"silent": 1.0})
        result.errors["silent"] = 1.0
        initial = self._values()
        states = {"silent": initial}

        def measure(name: str) -> None:
            error = self.error() / silent
            if math.isfinite(error):
                result.errors[name], states[name] = error, self._values()

        measure("as converted")
        rows = [self.row(index) for index in range(min(_CLOSED_ROWS, self.rows))]
        reads = self._start(rows)
        measure("mix")
        if self._write_strength(rows):
            measure("write strength")
        self._load(states[result_best(result)])
        if self._gate(rows):
            self._start(rows)
            measure("gate from look-back")
        if reads and steps and initial:
            self._load(states[result_best(result)])
            self._steps(steps, lr, seed)
            measure("fitted")
        result.kept = result_best(result)
        self._load(states[result.kept])
        if result.kept == "silent":
            silence_mix(mixer)
        return result

    def target(self, new: Projections, lengths: Tensor | None) -> Tensor:
        """The output of the teacher's attention, `[R, L, H, V]`, for the mixed heads."""
        heads = self.teacher.mix(new, lengths, None)
        if not self.attention.softmax_heads:
            return heads
        groups: Tensor = heads.unflatten(2, (self.attention.layer.key_value_heads, -1))
        return groups[:, :, self.attention.mixed_heads].flatten(2, 3)

    def output(self, new: Projections, lengths: Tensor | None) -> Tensor:
        """The output of the student's mixer for the same inputs, `[R, L, H, V]`."""
        output: Tensor = self.mixer(self._mixed(new), lengths, None)
        return output

    def squared(self, output: Tensor, target: Tensor, lengths: Tensor | None) -> Tensor:
        """The squared error after the output projection, summed over all real tokens."""
        difference = (output - target).flatten(2).float() @ self.weight.T
        if lengths is not None:
            real = torch.arange(difference.shape[1], device=difference.device) < lengths[:, None]
            difference = difference * real[..., None]
        return difference.square().sum()

    @torch.no_grad()
    def error(self) -> float:
        """The squared error on the held-out rows."""
        pairs = zip(self.held_out, self.targets, strict=True)
        return sum(float(self.squared(self.output(*row), target, row[1])) for row, target in pairs)

    def _silent_error(self) -> float:
        before = self.mixer.branches_off
        self.mixer.branches_off = before | {"recurrence"}
        try:
            return self.error()
        finally:
            self.mixer.branches_off = before

    def _mixed(self, new: Projections) -> Projections:
        attention = self.attention
        return attention.select(new, attention.mixed_heads) if attention.softmax_heads else new

    def _values(self) -> dict[str, Tensor]:
        return {name: x.detach().clone() for name, x in self.mixer.named_parameters()}

    @torch.no_grad()
    def _load(self, values: dict[str, Tensor]) -> None:
        for name, parameter in self.mixer.named_parameters():
            parameter.copy_(values[name])

    @torch.no_grad()
    def _start(self, rows: Sequence[Row]) -> bool:
        """Fit the mix in closed form. False if no token lies beyond the window."""
        reads = [found for row in rows if (found := self._read(*row)) is not None]
        if not reads:
            return False
        weight = self.mixer._parameters.get("mix_weight")
        if weight is None:
            return True
        joined: list[Any] = [None if x[0] is None else torch.cat(x) for x in zip(*reads, strict=True)]
        y, normaliser, read, mass, target, log_beyond = joined
        if self.mixer.config.mix == "softmax":
            value = mass_weights(y, normaliser, read, mass, target, log_beyond)
        else:
            if mass is not None and self.mixer.config.normalize:
                read = torch.where(mass[..., None] > 0, read / mass[..., None].clamp_min(1e-30), y)
            value = channel_weights(y, read, target)
        weight.copy_(value)
        return True

    def _read(self, new: Projections, lengths: Tensor | None) -> Read | None:
        """The branches of the mixer before the mix, for one row; None if no token leaves its window."""
        mixer, seen = self.mixer, []

        def look(y: Tensor, normaliser: Tensor | None, read: Tensor, mass: Tensor | None) -> Tensor:
            seen.append((y, normaliser, read, mass))
            return y

        mixer.mix = look  # type: ignore[method-assign]
        try:
            mixer(self._mixed(new), lengths, None, fused=False)
        finally:
            del mixer.mix
        if not seen:
            return None
        y, normaliser, read, mass = seen[0]
        tokens = new.q.shape[1]
        first = tokens - y.shape[1]
        place = torch.arange(first, tokens, device=y.device)[None]
        inside = place >= mixer.config.exact_tokens
        if lengths is not None:
            inside = inside & (place < lengths[:, None])
        keep = inside.expand(y.shape[0], -1)
        beyond = None if normaliser is None else self._log_beyond(new, first, normaliser)[keep]
        return Read(
            y[keep],
            None if normaliser is None else normaliser[keep],
            read[keep],
            None if mass is None else mass[..., 0][keep],
            self.target(new, lengths)[:, first:][keep].to(y.dtype),
            beyond,
        )

    def _log_beyond(self, new: Projections, first: int, exact: Tensor) -> Tensor:
        """The log of the teacher's denominator beyond window and sinks, whose own log-denominator is `exact`."""
        mixed, layer = self._mixed(new), self.mixer.layer
        _, whole = window_attention(
            mixed.q_rotated,
            mixed.k_rotated,
            mixed.v,
            window=min(layer.window or new.q.shape[1], new.q.shape[1]),
            scale=layer.scale,
            softcap=layer.softcap,
        )
        assert whole is not None  # noqa: S101 - it was asked for
        whole = whole[:, first:]
        return whole + torch.log(-torch.expm1((exact - whole).clamp(max=0)))

    @torch.no_grad()
    def _gate(self, rows: Sequence[Row]) -> bool:
        """Set the gate's bias from the teacher's look-back distance. False without a bias or without such distances."""
        mixer = self.mixer
        recurrence, layer = mixer.recurrence, mixer.layer
        assert recurrence is not None  # noqa: S101 - the caller has looked
        bias = recurrence._parameters.get("gate_bias")
        if bias is None:
            return False
        window, sinks = mixer.window, mixer.config.sinks
        tally = Tally(layer, window, sinks)
        for new, lengths in rows:
            tally(self._mixed(new), lengths)
        mass, available = tally.beyond()
        if mass.shape[1] < 2:
            return False
        grouped = mass.unflatten(0, (layer.key_value_heads, -1)).sum(1)
        wanted = decay_of(grouped, available).to(bias.device)
        sources = [mixer.source(self._mixed(new)) for new, _ in rows]

        def mean_log_gate(value: Tensor) -> Tensor:
            bias.copy_(value[:, None].expand_as(bias))
            gates = [recurrence.log_gate(source.float()).double().mean((0, 1, 3)) for source in sources]
            return torch.stack(gates).mean(0)

        low, high = (torch.full_like(wanted, x) for x in (-_MOST_BIAS, _MOST_BIAS))
        rises = bool((mean_log_gate(high) > mean_log_gate(low)).all())
        if rises:
            found = bisect(mean_log_gate, wanted, low, high, steps=16)
        else:
            found = -bisect(lambda value: mean_log_gate(-value), wanted, low, high, steps=16)
        bias.copy_(found[:, None].expand_as(bias))
        return True

    @torch.no_grad()
    def _write_strength(self, rows: Sequence[Row]) -> bool:
        """Choose the write strength with the least error on the rows. False if the recurrence has none."""
        assert self.mixer.recurrence is not None  # noqa: S101 - the caller has looked
        bias = self.mixer.recurrence._parameters.get("write_bias")
        if bias is None:
            return False
        targets = [self.target(*row) for row in rows]
        start, tried = bias.clone(), []
        for shift in _WRITES:
            bias.copy_(start + shift)
            self._start(rows)
            pairs = zip(rows, targets, strict=True)
            error = sum(float(self.squared(self.output(*row), target, row[1])) for row, target in pairs)
            tried.append((error, shift))
        bias.copy_(start + min(tried)[1])
        self._start(rows)
        return True

    @torch.no_grad()
    def _lesson(self, number: int) -> Lesson:
        """A training row; the first ones are cached, up to `_ROOM` bytes."""
        if number in self._lessons:
            return self._lessons[number]
        new, lengths = self.row(number)
        target = self.target(new, lengths)
        size = self.squared(torch.zeros_like(target), target, lengths).clamp_min(1e-30)
        lesson = (new, lengths), target, size
        nbytes = sum(x.numel() * x.element_size() for x in (*new, target))
        if (len(self._lessons) + 1) * nbytes <= _ROOM:
            self._lessons[number] = lesson
        return lesson

    def _steps(self, steps: int, lr: float, seed: int) -> None:
        """Adam on the mixer's own parameters, one row per step."""
        named = list(self.mixer.named_parameters())
        frozen = [parameter.requires_grad for _, parameter in named]
        peaks = [lr * _scale(name, parameter) for name, parameter in named]
        groups = [{"params": [parameter], "lr": peak} for (_, parameter), peak in zip(named, peaks, strict=True)]
        generator = torch.Generator().manual_seed(seed)
        order: list[int] = []
        try:
            for _, parameter in named:
                parameter.requires_grad_(True)
            optimizer = torch.optim.Adam(groups, betas=(0.9, 0.95))
            for step in range(steps):
                for group, peak in zip(optimizer.param_groups, peaks, strict=True):
                    group["lr"] = peak * (0.5 + 0.5 * math.cos(math.pi * step / steps))
                order = order or torch.randperm(self.rows, generator=generator).tolist()
                (new, lengths), target, size = self._lesson(order.pop())
                loss = self.squared(self.output(new, lengths), target, lengths) / size
                if not loss.requires_grad or not bool(torch.isfinite(loss)):
                    continue  # no token of the row leaves the window, or the last step diverged
                optimizer.zero_grad()
                loss.backward()
                torch.nn.utils.clip_grad_norm_([parameter for _, parameter in named], 1.0)
                optimizer.step()
        finally:
            for (_, parameter), had in zip(named, frozen, strict=True):
                parameter.requires_grad_(had)
                parameter.grad = None


def result_best(result: LayerResult) -> str:
    """The step with the least error; on a tie the first."""
    return min(result.errors, key=lambda name: result.errors[name])


@torch.no_grad()
def silence_mix(mixer: Mixer) -> None:
    """Set the mix weight, if there is one, to 0, which switches the recurrence off."""
    weight = mixer._parameters.get("mix_weight")
    if weight is not None:
        weight.zero_()


def _columns(attention: LinearizedAttention) -> Tensor:
    """The columns `[C, H V]` of the output projection's weight for the mixed heads, float32."""
    weight = projection_weight(output_projection(attention)).detach().float()
    groups = weight.unflatten(1, (attention.layer.key_value_heads, -1))
    columns: Tensor = groups[:, attention.mixed_heads].flatten(1)
    return columns


def projection_weight(module: torch.nn.Module) -> Tensor:
    """A projection's weight `[outputs, inputs]`, a view of it."""
    weight: Tensor = module.weight  # type: ignore[assignment]
    return weight if isinstance(module, torch.nn.Linear) else weight.t()


def _scale(name: str, parameter: Tensor) -> float:
    """Factor of the learning rate: proportional to the weight for weights of a mass, which have no fixed scale."""
    if name != "mix_weight" or parameter.dim() > 1:
        return 1.0
    return float(parameter.detach().abs().mean()) or 1.0
