"""Agreement with flash-linear-attention's own references, where that package is installed with triton."""

from __future__ import annotations

import pytest
import torch
from linearize_kernels import delta_rule, gated_values, gla
from torch import Tensor

from tests.kernels.test_forms import KERNELS, inputs

FORMS = ("parallel", "chunkwise", "recurrent")
TOKENS = 64


def naive(module: str, function: str):
    """A reference of flash-linear-attention. Without triton its modules are there and cannot be imported."""
    return getattr(pytest.importorskip(f"fla.ops.{module}", exc_type=ImportError), function)


def arguments(kernel: str, gates: float = 1.0) -> list[Tensor]:
    """float32, as the references compute, with one query head per key/value head, which most of them want."""
    return [x.float() for x in inputs(KERNELS[kernel], TOKENS, gates, group=1)]


def heads_first(*tensors: Tensor) -> list[Tensor]:
    return [x.transpose(1, 2) for x in tensors]


def close(ours: tuple[Tensor, ...], theirs: tuple[Tensor, ...]) -> None:
    for a, b in zip(ours, theirs, strict=True):
        assert float((a - b).norm()) <= 1e-5 * float(b.norm())


@pytest.mark.parametrize("form", FORMS)
def test_gla(form):
    q, k, v, gate, state = arguments("gla")
    theirs = naive("gla.naive", "naive_recurrent_gla")(q, k, v, gate, state, output_final_state=True)
    close(gla(q * q.shape[-1] ** -0.5, k, v, gate, state, form=form), theirs)


@pytest.mark.parametrize("form", FORMS)
def test_one_gate_per_head(form):
    q, k, v, gate, state = arguments("gla, gate per head")
    theirs = naive("simple_gla.naive", "naive_recurrent_simple_gla")(q, k, v, gate[..., 0], 1.0, state)
    close(gla(q, k, v, gate, state, form=form), theirs)


@pytest.mark.parametrize("form", FORMS)
def test_retention(form):
    q, k, v, _, _ = arguments("gla, gate per head")
    (theirs,) = heads_first(naive("retention.naive", "naive_retention")(*heads_first(q, k, v)))
    gate = torch.log1p(-torch.exp2(-5.0 - torch.arange(k.shape[2])))[:, None].expand(*k.shape[:3], 1)
    close(gla(q * q.shape[-1] ** -0.5, k, v, gate, form=form)[:1], (theirs,))


@pytest.mark.parametrize("form", FORMS)
def test_gated_values_without_keys(form):
    one = torch.ones(2, TOKENS, 1, 1)
    _, _, x, gate, _ = arguments("gated values")
    x, gate = x[:, :, :1], gate[:, :, :1]
    state = torch.randn(2, x.shape[-1], generator=torch.Generator().manual_seed(0))
    hidden, final = naive("hgrn.naive", "naive_recurrent_hgrn")(x[:, :, 0], gate[:, :, 0], state, True)
    close(
        gated_values(one, one, x, gate, state[:, None, None], form=form),
        (hidden[:, :, None], final[:, None, None]),
    )


@pytest.mark.parametrize("form", FORMS)
def test_gated_slots(form):
    q, k, s, gate, keys = arguments("gated values")
    generator = torch.Generator().manual_seed(0)
    v, values = (torch.randn(*x, 9, generator=generator) for x in (k.shape[:3], (2, 2, s.shape[-1])))
    reference = naive("gsa.naive", "naive_recurrent_gsa")
    theirs, finals = reference(q, k, v, s, gate, 1.0, (keys, values), True)
    scores, ours_keys = gated_values(q, k, s, gate, keys, form=form)
    ours, ours_values = gla(scores.softmax(-1), s, v, gate, values, form=form)
    close((ours, ours_keys, ours_values), (theirs, *finals))


@pytest.mark.parametrize("form", FORMS)
def test_gated_delta_rule(form):
    q, k, v, gate, a, b, state = arguments("gated delta rule")
    unit = a / gate.exp()
    beta = -(b * unit).sum(-1)
    reference = naive("gated_delta_rule.naive", "naive_recurrent_gated_delta_rule")
    theirs = reference(q, unit, v, beta, gate[..., 0], 1.0, state, True)
    close(delta_rule(q, k, v, gate, a, b, state, form=form), theirs)


@pytest.mark.parametrize("form", FORMS)
def test_kda(form):
    q, k, v, gate, a, b, state = arguments("kda")
    unit = a / gate.exp()
    beta = -(b * unit).sum(-1)
    theirs = naive("kda.naive", "naive_recurrent_kda")(q, unit, v, gate, beta, 1.0, state, True)
    close(delta_rule(q, k, v, gate, a, b, state, form=form), theirs)


@pytest.mark.parametrize("form", FORMS)
def test_rank_one_correction(form):
    """The op under RWKV-7."""
    q, k, v, gate, a, b, state = arguments("rwkv7")
    reference = naive("generalized_delta_rule.dplr.naive", "dplr_recurrence")
    outputs, final = reference(*heads_first(q, k, v, a, b, gate), state)
    ours = delta_rule(q * q.shape[-1] ** -0.5, k, v, gate, a, b, state, form=form)
    close(ours, (*heads_first(outputs), final))
