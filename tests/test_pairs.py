"""Large int8 layers with activations as pairs of int8: nothing is rounded but the weights."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from linearize import pairs
from linearize.model.quantized import Quantization, QuantizedLinear
from linearize.pairs import PairedLinear, pairs_are_fast
from linearize.quantize import rounded, to_int8

pytestmark = pytest.mark.skipif(not pairs_are_fast(), reason="the processor does not multiply int8")


@torch.no_grad()
@pytest.mark.parametrize("tokens", [1, 5, 40])
@pytest.mark.parametrize(("bias", "kept"), [(False, 0.0), (True, 0.0), (True, 1 / 16)])
def test_nothing_is_rounded_but_the_weights(tokens, bias, kept):
    """Inputs of very different size, 0 among them: each row has a scale of its own."""
    torch.manual_seed(0)
    layer = rounded(nn.Linear(64, 96, bias=bias), Quantization(kept=kept))
    x = torch.randn(2, tokens, 64) * torch.logspace(-3, 3, tokens)[:, None]
    x[0, 0] = 0
    want = layer.double()(x.double())
    got = PairedLinear(layer.float())(x)
    assert got.dtype == x.dtype and got.shape == want.shape
    assert bool(((got - want).norm(dim=-1) <= 2**-13 * want.norm(dim=-1)).all())


@torch.no_grad()
def test_large_layers_take_pairs(monkeypatch):
    model = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 96))
    model.device = torch.device("cpu")
    monkeypatch.setattr(pairs, "_LARGE", 64 * 96)
    x = torch.randn(3, 64)
    want = model(x)
    assert [type(layer) for layer in to_int8(model)] == [QuantizedLinear, PairedLinear]
    assert float((model(x) - want).norm() / want.norm()) < 0.02
