"""Weights as int8: what they stand for, and what they cost."""

from __future__ import annotations

import json

import pytest
import torch
from torch import nn

from linearize import int8
from linearize.errors import ModelError
from linearize.int8 import Int8Linear, PairedInt8Linear, pairs_are_fast, to_int8


@pytest.mark.parametrize("tokens", [1, 5, 40])
@pytest.mark.parametrize(("outputs", "bias"), [(7, False), (96, True)])
def test_a_layer_is_its_rounded_weights(tokens, outputs, bias):
    """Against float64 on the rounded weights: what is left is bfloat16 of the activations and of the sums."""
    torch.manual_seed(0)
    linear, x = nn.Linear(64, outputs, bias=bias), torch.randn(2, tokens, 64)
    layer = Int8Linear(linear)
    assert layer.weight.dtype == torch.int8 and int(layer.weight.abs().max()) in (126, 127)
    rounded = layer.weight.double() * layer.scale.double()[:, None]
    largest = linear.weight.abs().amax(1, keepdim=True)
    assert bool(((rounded - linear.weight).abs() <= 0.75 * largest / 127).all())  # the largest may be cut a little
    want = nn.functional.linear(x.double(), rounded, None if linear.bias is None else linear.bias.double()).detach()
    got = layer(x).detach()
    assert got.dtype == x.dtype and got.shape == want.shape
    assert float((got - want).norm() / want.norm()) < 2**-7


@pytest.mark.skipif(not pairs_are_fast(), reason="the processor does not multiply int8")
@pytest.mark.parametrize("tokens", [1, 5, 40])
@pytest.mark.parametrize("bias", [False, True])
def test_a_layer_of_pairs_rounds_nothing_but_its_weights(tokens, bias):
    """Inputs of very different size, 0 among them: each row has a scale of its own."""
    torch.manual_seed(0)
    linear = nn.Linear(64, 96, bias=bias)
    x = torch.randn(2, tokens, 64) * torch.logspace(-3, 3, tokens)[:, None]
    x[0, 0] = 0
    scale = linear.weight.abs().amax(1, keepdim=True).double() / 127
    rounded = (linear.weight.double() / scale).round() * scale
    want = nn.functional.linear(x.double(), rounded, None if linear.bias is None else linear.bias.double()).detach()
    got = PairedInt8Linear(linear)(x).detach()
    assert got.dtype == x.dtype and bool(torch.isfinite(got).all())
    assert bool(((got - want).norm(dim=-1) <= 2**-13 * want.norm(dim=-1)).all())


@pytest.mark.skipif(not pairs_are_fast(), reason="the processor does not multiply int8")
def test_large_layers_take_pairs(monkeypatch):
    model = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 96))
    model.device = torch.device("cpu")
    monkeypatch.setattr(int8, "_LARGE", 64 * 96)
    assert [type(layer) for layer in to_int8(model)] == [Int8Linear, PairedInt8Linear]


def test_widths_that_the_kernel_cannot_read_stay():
    model = nn.Sequential(nn.Linear(33, 64), nn.Linear(64, 33))
    model.device = torch.device("cpu")
    to_int8(model)
    assert type(model[0]) is nn.Linear and type(model[1]) is Int8Linear
    model = nn.Sequential(nn.Linear(33, 33))
    model.device = torch.device("cpu")
    with pytest.raises(ModelError, match="multiple of 32"):
        to_int8(model)
    model.device = torch.device("meta")
    with pytest.raises(ModelError, match="on a GPU use bfloat16"):
        to_int8(model)


def test_a_model_in_int8_says_nearly_the_same(tiny_folder):
    from linearize.conversion.source import find_source, load_model

    source, ids = find_source(str(tiny_folder)), torch.arange(5, 45)[None]
    whole, small = load_model(source, dtype="float32"), load_model(source, dtype="int8")
    with torch.no_grad():
        want, got = whole(ids).logits, small(ids).logits
        kl = nn.functional.kl_div(got.log_softmax(-1), want.log_softmax(-1), log_target=True, reduction="sum") / 40
    assert 0 < float(kl) < 0.05
    assert sum(p.numel() for p in small.parameters()) < sum(p.numel() for p in whole.parameters())


def test_generate_and_its_states_in_int8(tmp_path, tiny_folder, capfd):
    from linearize.cli.app import run

    target, state = tmp_path / "model", tmp_path / "kept.state"
    assert run(["convert", str(tiny_folder), "-o", str(target), "--set", "mixer.window=16"]) == 0
    words = [str(target), "Once upon a time there was a", "-n", "8", "--dtype", "int8", "--json"]
    capfd.readouterr()
    assert run(["generate", *words, "--save-state", str(state)]) == 0
    assert json.loads(capfd.readouterr().out)["new_tokens"] > 0
    assert run(["generate", str(target), " and", "-n", "4", "--dtype", "int8", "--load-state", str(state)]) == 0
    assert run(["verify", str(target), "--dtype", "int8"]) == 2
    assert "--dtype int8: expected auto" in capfd.readouterr().err
