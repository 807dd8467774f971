"""The three forms of GLA against the float64 reference: outputs, states and all gradients."""

from __future__ import annotations

import itertools

import pytest
import torch
from linearize_kernels import gla, gla_chunkwise, gla_parallel, gla_recurrent
from torch import Tensor

LENGTHS = (1, 15, 16, 17, 63, 64, 65, 130)
# The strongest log-gate of a step: nearly 1, ordinary, and strong enough that exp(-cumsum) leaves float32's range.
STRENGTHS = (0.01, 1.0, 30.0, 300.0)


def inputs(tokens: int, strength: float, *, group: int, width: int, seed: int = 0) -> list[Tensor]:
    """float64 q, k, v, log gates and an initial state for two rows with two key/value heads."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, dtype=torch.float64, generator=generator)

    gate = -strength * torch.rand(2, tokens, 2, width, dtype=torch.float64, generator=generator)
    gate[:, ::3] *= 1e-3  # weak and strong steps in one chunk
    return [
        normal(2, tokens, 2 * group, width).softmax(-1),
        normal(2, tokens, 2, width).softmax(-1),
        normal(2, tokens, 2, width + 1),
        gate,
        normal(2, 2, width, width + 1),
    ]


def run(form, arguments: list[Tensor], dtype: torch.dtype) -> list[Tensor]:
    """Outputs, final state and the gradients of a fixed functional of both, in float64."""
    leaves = [x.detach().to(dtype).requires_grad_() for x in arguments]
    outputs, state = form(*leaves)
    weights = torch.linspace(-1, 1, outputs.numel(), dtype=dtype).view_as(outputs)
    gradients = torch.autograd.grad((outputs * weights).sum() + state.square().sum(), leaves)
    return [x.detach().double() for x in (outputs, state, *gradients)]


def error(results: list[Tensor], reference: list[Tensor]) -> list[float]:
    return [float((a - b).norm() / b.norm().clamp_min(1e-30)) for a, b in zip(results, reference, strict=True)]


@pytest.mark.parametrize(("tokens", "strength"), itertools.product(LENGTHS, STRENGTHS))
@pytest.mark.parametrize("form", [gla_chunkwise, gla_recurrent])
def test_forms_equal_the_reference_in_float64(form, tokens, strength):
    arguments = inputs(tokens, strength, group=3, width=16)
    reference = run(gla_parallel, arguments, torch.float64)
    assert max(error(run(form, arguments, torch.float64), reference)) < 1e-11


@pytest.mark.parametrize(("group", "width"), [(1, 64), (3, 16), (8, 32), (2, 80)])
@pytest.mark.parametrize("strength", STRENGTHS)
def test_float32_is_no_worse_than_twice_plain_torch(group, width, strength):
    arguments = inputs(100, strength, group=group, width=width)
    reference = run(gla_parallel, arguments, torch.float64)
    plain, step = (error(run(form, arguments, torch.float32), reference) for form in (gla_parallel, gla_recurrent))
    assert max(plain + step) < 2e-6  # the yardstick itself is short
    chunked = error(run(gla_chunkwise, arguments, torch.float32), reference)
    for ours, *theirs in zip(chunked, plain, step, strict=True):
        assert ours <= 2 * max(theirs) + 1e-6


def test_continuing_a_state_equals_one_pass():
    arguments = inputs(90, 2.0, group=3, width=16)
    whole, final = gla_chunkwise(*arguments)
    state, pieces = arguments[4], []
    for start, stop in itertools.pairwise((0, 1, 38, 39, 90)):
        piece, state = gla(*(x[:, start:stop] for x in arguments[:4]), state)
        pieces.append(piece)
    torch.testing.assert_close(torch.cat(pieces, 1), whole)
    torch.testing.assert_close(state, final)


def test_a_silent_token_changes_nothing():
    q, k, v, gate, state = inputs(40, 2.0, group=1, width=16)
    k[:, 7], gate[:, 7] = 0, 0
    others = [i for i in range(40) if i != 7]
    _, with_it = gla_chunkwise(q, k, v, gate, state)
    _, without = gla_chunkwise(*(x[:, others] for x in (q, k, v, gate)), state)
    torch.testing.assert_close(with_it, without)


def test_heads_that_do_not_divide_are_refused():
    q, k, v, gate, state = inputs(4, 1.0, group=1, width=16)
    with pytest.raises(ValueError, match="cannot share"):
        gla(torch.cat([q, q[:, :, :1]], 2), k, v, gate, state)
