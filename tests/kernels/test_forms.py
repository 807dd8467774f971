"""The three forms of every kernel against its equation, token by token in float64: outputs, states, all gradients."""

from __future__ import annotations

import importlib
import itertools
from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from linearize_kernels import (
    delta_rule,
    delta_rule_chunkwise,
    delta_rule_parallel,
    delta_rule_recurrent,
    delta_rule_step,
    gated_values,
    gated_values_chunkwise,
    gated_values_parallel,
    gated_values_recurrent,
    gated_values_step,
    gla,
    gla_chunkwise,
    gla_parallel,
    gla_recurrent,
    gla_step,
)
from torch import Tensor

from tests.tables import in_turn, pairwise

# `linearize_kernels.gla` is the function of that name.
SPLITTING = [importlib.import_module(f"linearize_kernels.{name}") for name in ("decay", "gla")]
Form = Callable[..., tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class Kernel:
    """One row of the table.

    Attributes:
        run: picks a form by length; `forms` are parallel, chunkwise and recurrent.
        gates: what has a gate of its own: each channel of the `key`, of the `value`, or the `head`.
        corrects: the kind of delta rule: `written` (gated DeltaNet, KDA; β up to 2) or `rate` (RWKV-7).
    """

    run: Form
    forms: tuple[Form, Form, Form]
    gates: str = "key"
    corrects: str = ""


GLA = (gla, (gla_parallel, gla_chunkwise, gla_recurrent))
VALUES = (gated_values, (gated_values_parallel, gated_values_chunkwise, gated_values_recurrent))
DELTA = (delta_rule, (delta_rule_parallel, delta_rule_chunkwise, delta_rule_recurrent))
KERNELS = {
    "gla": Kernel(*GLA),
    "gla, gate per head": Kernel(*GLA, gates="head"),
    "gated values": Kernel(*VALUES, gates="value"),
    "kda": Kernel(*DELTA, corrects="written"),
    "gated delta rule": Kernel(*DELTA, gates="head", corrects="written"),
    "rwkv7": Kernel(*DELTA, corrects="rate"),
}
LENGTHS = (1, 15, 16, 17, 63, 64, 65, 130)
# The strongest log-gate of a step. 0 keeps all; 2.2 is nearly as much as a chunk splits into two factors; from 30 on
# exp(-cumsum) leaves float32's range within a chunk; `tokens` and `channels` have 0, -0.01 and -300 beside each other.
GATES = (0.0, 0.01, 1.0, 2.2, 30.0, 300.0, "tokens", "channels")


def inputs(
    kernel: Kernel,
    tokens: int,
    gates: float | str,
    *,
    group: int = 3,
    width: int = 16,
    value_width: int | None = None,
    heads: int = 2,
    seed: int = 0,
) -> list[Tensor]:
    """float64 q, k, v, log gates, for delta rules a and b, and an initial state, for two rows."""
    generator = torch.Generator().manual_seed(seed)
    value_width = width + 1 if value_width is None else value_width

    def random(*shape: int, draw: Callable[..., Tensor] = torch.randn) -> Tensor:
        return draw(*shape, dtype=torch.float64, generator=generator)

    gate_width = {"key": width, "value": value_width, "head": 1}[kernel.gates]
    gate = -random(2, tokens, heads, gate_width, draw=torch.rand)
    if isinstance(gates, str):
        count = {"tokens": tokens, "channels": gate_width}[gates]
        strengths = torch.tensor([0.0, 300.0, 0.01, 0.01, 0.0], dtype=torch.float64).repeat(-(-count // 5))[:count]
        gate = gate * (strengths[:, None, None] if gates == "tokens" else strengths)
    else:
        gate = gate * gates
        gate[:, ::3] *= 1e-3  # weak and strong steps in one chunk
    q, k = random(2, tokens, group * heads, width), random(2, tokens, heads, width)
    v, state = random(2, tokens, heads, value_width), random(2, heads, width, value_width)
    if not kernel.corrects:
        return [q, k, v, gate, state]
    k = k / k.norm(dim=-1, keepdim=True)
    if kernel.corrects == "rate":
        rate = random(2, tokens, heads, width, draw=torch.rand)
        return [q, k * (0.3 + rate), v, gate, k, -rate * k, state]
    beta = 2 * random(2, tokens, heads, 1, draw=torch.rand)
    return [q, beta * k, v, gate, gate.exp() * k, -beta * k, state]


def literal(kernel: Kernel) -> Form:
    """The equation in the kernel's docstring, one token at a time."""

    def form(q: Tensor, k: Tensor, v: Tensor, log_gate: Tensor, *rest: Tensor) -> tuple[Tensor, Tensor]:
        state, outputs = rest[-1], []
        group = q.shape[2] // k.shape[2]
        for t in range(q.shape[1]):
            gate = log_gate[:, t].exp()
            gate = gate[:, :, None, :] if kernel.gates == "value" else gate[:, :, :, None]
            new = gate * state + torch.einsum("bkd,bkv->bkdv", k[:, t], v[:, t])
            if kernel.corrects:
                a, b = rest[0][:, t], rest[1][:, t]
                new = new + torch.einsum("bkd,bke,bkev->bkdv", b, a, state)
            state = new
            outputs.append(torch.einsum("bhd,bhdv->bhv", q[:, t], state.repeat_interleave(group, 1)))
        return torch.stack(outputs, 1), state

    return form


def run(form: Form, arguments: list[Tensor], dtype: torch.dtype, *, empty: bool = False) -> list[Tensor]:
    """Outputs, final state and gradients of a fixed functional of both, in float64; `empty` gives no initial state."""
    leaves = [x.detach().to(dtype).requires_grad_() for x in (arguments[:-1] if empty else arguments)]
    outputs, state = form(*leaves)
    assert outputs.dtype == state.dtype == dtype
    weights = torch.linspace(-1, 1, outputs.numel(), dtype=dtype).view_as(outputs)
    gradients = torch.autograd.grad((outputs * weights).sum() + state.square().sum(), leaves)
    return [x.detach().double() for x in (outputs, state, *gradients)]


def error(results: list[Tensor], reference: list[Tensor]) -> list[float]:
    assert all(bool(x.isfinite().all()) for x in results)
    return [float((a - b).norm() / b.norm().clamp_min(1e-20)) for a, b in zip(results, reference, strict=True)]


@pytest.mark.parametrize(
    ("name", "tokens", "gates"),
    [
        *pairwise(list(KERNELS), LENGTHS, (1.0, "tokens", "channels")),
        *pairwise(list(KERNELS), (17, 130), (0.0, 0.01, 30.0, 300.0)),
    ],
)
def test_forms_equal_the_equation_in_float64(name, tokens, gates):
    kernel = KERNELS[name]
    arguments = inputs(kernel, tokens, gates)
    reference = run(literal(kernel), arguments, torch.float64)
    for form in kernel.forms:
        assert max(error(run(form, arguments, torch.float64), reference)) < 1e-11


@pytest.mark.parametrize("name", KERNELS)
def test_no_initial_state_is_one_of_zeros(name):
    kernel = KERNELS[name]
    arguments = inputs(kernel, 20, "channels")
    zeros = [*arguments[:-1], torch.zeros_like(arguments[-1])]
    reference = run(literal(kernel), zeros, torch.float64)[:-1]
    for form in kernel.forms:
        assert max(error(run(form, arguments, torch.float64, empty=True), reference)) < 1e-11


WIDE = [(80, 1, 64), (80, 8, 16), (70, 2, 80), (40, 1, 256)]


@pytest.mark.parametrize(("name", "gates"), in_turn(list(KERNELS), GATES, every=2))
def test_float32_is_no_worse_than_twice_plain_torch(name, gates):
    no_worse(name, (100, 3, 16), gates)


@pytest.mark.parametrize(("name", "shape", "gates"), pairwise(list(KERNELS), WIDE, (2.2, "tokens")))
def test_wide_heads_in_float32_are_no_worse_than_twice_plain_torch(name, shape, gates):
    no_worse(name, shape, gates)


def no_worse(name, shape, gates):
    kernel, (tokens, group, width) = KERNELS[name], shape
    arguments = inputs(kernel, tokens, gates, group=group, width=width, value_width=24, heads=2 if width < 64 else 1)
    reference = run(literal(kernel), arguments, torch.float64)
    plain, chunked, step = (error(run(form, arguments, torch.float32), reference) for form in kernel.forms)
    assert max(plain + step) < 5e-6  # the yardstick itself is short
    for ours, *theirs in zip(chunked, plain, step, strict=True):
        assert ours <= 2 * max(theirs) + 1e-6


@pytest.mark.slow
@pytest.mark.parametrize("name", KERNELS)
@pytest.mark.parametrize("seed", [1, 2])
def test_float32_on_a_larger_grid(name, seed):
    kernel = KERNELS[name]
    for tokens, gates, (group, width) in itertools.product((64, 130), GATES, ((1, 80), (3, 16))):
        arguments = inputs(kernel, tokens, gates, group=group, width=width, value_width=24, heads=1, seed=seed)
        reference = run(literal(kernel), arguments, torch.float64)
        results = [error(run(form, arguments, torch.float32), reference) for form in kernel.forms]
        for plain, ours, step in zip(*results, strict=True):
            assert ours <= 2 * max(plain, step) + 1e-6, (tokens, gates, group, width)


@pytest.mark.parametrize("name", KERNELS)
@pytest.mark.parametrize("tokens", [5, 66])
def test_gradients_of_the_chunkwise_form_by_finite_differences(name, tokens):
    kernel = KERNELS[name]
    arguments = inputs(kernel, tokens, 0.3, group=2, width=2, value_width=1, heads=1)
    # A gate of 0 is the end of its range, and a finite difference would step beyond it.
    leaves = [x.requires_grad_() for x in arguments[:3]] + [(arguments[3] - 0.01).requires_grad_()]
    leaves += [x.requires_grad_() for x in arguments[4:]]
    assert torch.autograd.gradcheck(kernel.forms[1], leaves, fast_mode=tokens > 5)


@pytest.mark.parametrize("name", KERNELS)
def test_continuing_a_state_equals_one_pass(name):
    kernel = KERNELS[name]
    arguments = inputs(kernel, 90, 2.2)
    whole, final = literal(kernel)(*arguments)
    state, pieces = arguments[-1], []
    for start, stop in itertools.pairwise((0, 1, 38, 39, 90)):
        piece, state = kernel.run(*(x[:, start:stop] for x in arguments[:-1]), state)
        pieces.append(piece)
    torch.testing.assert_close(torch.cat(pieces, 1), whole)
    torch.testing.assert_close(state, final)


@pytest.mark.parametrize("name", KERNELS)
def test_a_silent_token_changes_nothing(name):
    """k = 0 (and b = 0) with a log-gate of 0: at the start, in the middle, beside another, at the end."""
    kernel = KERNELS[name]
    *arguments, state = inputs(kernel, 40, 30.0)
    silent = [0, 7, 8, 39]
    for index in (1, 3, 5)[: 3 if kernel.corrects else 2]:
        arguments[index][:, silent] = 0
    others = [t for t in range(40) if t not in silent]
    outputs, final = literal(kernel)(*(x[:, others] for x in arguments), state)
    for form in kernel.forms:
        answers, with_them = form(*arguments, state)
        torch.testing.assert_close(with_them, final)
        torch.testing.assert_close(answers[:, others], outputs)


@pytest.mark.parametrize("name", KERNELS)
def test_a_step_updates_the_state_where_it_lies(name):
    kernel = KERNELS[name]
    step = {gla: gla_step, gated_values: gated_values_step, delta_rule: delta_rule_step}[kernel.run]
    gates = "channels" if kernel.gates == "key" else 1.0
    q, k, v, gate, *corrections, state = inputs(kernel, 3, gates)
    outputs, final = kernel.forms[2](q, k, v, gate, *corrections, state)
    for t in range(3):
        one = slice(t, t + 1)
        given = [q, k, v, gate.exp(), *corrections]
        torch.testing.assert_close(step(*(x[:, one] for x in given), state), outputs[:, one])
    torch.testing.assert_close(state, final)


@pytest.mark.parametrize("name", KERNELS)
def test_one_token_takes_the_recurrent_form_and_more_the_chunkwise(name):
    kernel = KERNELS[name]
    for tokens, chosen in ((1, 2), (20, 1)):
        arguments = inputs(kernel, tokens, 1.0)
        assert torch.equal(kernel.run(*arguments)[0], kernel.forms[chosen](*arguments)[0])
        for form, function in zip(("parallel", "chunkwise", "recurrent"), kernel.forms, strict=True):
            assert torch.equal(kernel.run(*arguments, form=form)[0], function(*arguments)[0])


@pytest.mark.parametrize("name", KERNELS)
def test_half_precision_is_computed_in_float32(name):
    kernel = KERNELS[name]
    arguments = [x.bfloat16() for x in inputs(kernel, 20, 1.0)]
    for form in kernel.forms:
        outputs, state = form(*arguments)
        assert outputs.dtype == state.dtype == torch.float32
        torch.testing.assert_close(outputs, form(*(x.float() for x in arguments))[0])


@pytest.mark.parametrize("name", KERNELS)
def test_heads_that_do_not_divide_are_refused(name):
    q, *others = inputs(KERNELS[name], 4, 1.0, group=1)
    with pytest.raises(ValueError, match="cannot share"):
        KERNELS[name].run(torch.cat([q, q[:, :, :1]], 2), *others)


@pytest.mark.parametrize(
    ("name", "tokens", "gates"),
    pairwise(
        [name for name, kernel in KERNELS.items() if kernel.gates != "head"], [5, 40, 48, 130], [0.01, 1.0, "channels"]
    ),
)
def test_halves_give_the_numbers_of_one_split(name, tokens, gates, monkeypatch):
    """Other devices than a CPU take halves whatever the gates are, because they read no value."""
    kernel = KERNELS[name]
    arguments = inputs(kernel, tokens, gates, width=17)
    reference = run(literal(kernel), arguments, torch.float64)
    plain = error(run(kernel.forms[0], arguments, torch.float32), reference)
    for module in SPLITTING:
        monkeypatch.setattr(module, "splits", lambda cumulative: False)
    assert max(error(run(kernel.forms[1], arguments, torch.float64), reference)) < 1e-11
    for ours, theirs in zip(error(run(kernel.forms[1], arguments, torch.float32), reference), plain, strict=True):
        assert ours <= 2 * theirs + 1e-6
