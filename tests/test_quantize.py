"""Weights as integers: what they stand for, which are kept, and what they cost."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from transformers import AutoModelForCausalLM

from linearize import api
from linearize.cli.app import run
from linearize.errors import DataError, ModelError, OutputError
from linearize.model.quantized import Quantization, QuantizedLinear
from linearize.quantization.rounding import WEIGHTS, costliest, nbytes_after, rounded, to_int8
from linearize.runtime.memory import nbytes
from linearize.sources.source import find_source, load_model


@pytest.mark.parametrize("tokens", [1, 5, 40])
@pytest.mark.parametrize(("outputs", "bias"), [(7, False), (96, True)])
def test_a_layer_is_its_rounded_weights(tokens, outputs, bias):
    """Against float64 on the rounded weights: what is left is bfloat16 of the activations and of the sums."""
    torch.manual_seed(0)
    linear, x = nn.Linear(64, outputs, bias=bias), torch.randn(2, tokens, 64)
    layer = rounded(linear, Quantization())
    layer.fast = True
    assert layer.weight.dtype == torch.int8 and int(layer.weight.abs().max()) in (126, 127)
    stands_for = layer.weight.double() * layer.scale.double()
    largest = linear.weight.abs().amax(1, keepdim=True)
    assert bool(((stands_for - linear.weight).abs() <= 0.75 * largest / 127).all())  # the largest may be cut a little
    want = nn.functional.linear(x.double(), stands_for, None if linear.bias is None else linear.bias.double()).detach()
    got = layer(x).detach()
    assert got.dtype == x.dtype and got.shape == want.shape
    assert float((got - want).norm() / want.norm()) < 2**-7


def test_the_kernel_gets_tensors_where_it_can_read_them():
    """Tensors of a file may begin anywhere; from there the kernel ends the process."""
    layer, x = rounded(nn.Linear(64, 96), Quantization()), torch.randn(7, 64).bfloat16()
    want = layer(x)
    octets = torch.empty(96 * 64 + 2, dtype=torch.int8)[2:].view(96, 64)
    layer.weight, moved = octets.copy_(layer.weight), torch.empty(7 * 64 + 1, dtype=torch.bfloat16)[1:].view(7, 64)
    assert layer.weight.data_ptr() % 16 == 2
    assert torch.equal(layer(moved.copy_(x)), want)


def test_widths_that_the_kernel_cannot_read_stay():
    model = nn.Sequential(nn.Linear(33, 64), nn.Linear(64, 33))
    model.device = torch.device("cpu")
    to_int8(model)
    assert type(model[0]) is nn.Linear and type(model[1]) is QuantizedLinear
    model = nn.Sequential(nn.Linear(33, 33))
    model.device = torch.device("cpu")
    with pytest.raises(ModelError, match="multiple of 32"):
        to_int8(model)
    model.device = torch.device("meta")
    with pytest.raises(ModelError, match="on a GPU use bfloat16"):
        to_int8(model)


def test_a_model_in_int8_says_nearly_the_same(tiny_folder):
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
    assert run(["convert", str(tiny_folder), "-o", str(target), "-r", "window-gla", "--set", "mixer.window=16"]) == 0
    words = [str(target), "Once upon a time there was a", "-n", "8", "--dtype", "int8", "--json"]
    capfd.readouterr()
    assert run(["generate", *words, "--save-state", str(state)]) == 0
    assert json.loads(capfd.readouterr().out)["new_tokens"] > 0
    assert run(["generate", str(target), " and", "-n", "4", "--dtype", "int8", "--load-state", str(state)]) == 0
    assert run(["verify", str(target), "--dtype", "int8"]) == 2
    assert "--dtype int8: expected auto" in capfd.readouterr().err


@pytest.mark.parametrize("weights", WEIGHTS)
def test_what_is_stored_is_what_is_computed(weights):
    """Kept columns are exact, the rest is integers times scales; the same to the last bits in any number of rows."""
    torch.manual_seed(0)
    spec, linear = WEIGHTS[weights], nn.Linear(64, 96, dtype=torch.float64)
    layer, x = rounded(linear, spec, torch.rand(64)), torch.randn(40, 64, dtype=torch.float64)
    assert layer.columns.numel() == 1 and layer.weight.nbytes == 96 * 64 * spec.bits // 8
    integers = layer.integers()
    assert int(integers.abs().max()) == spec.largest and not integers[:, layer.columns].any()
    grouped = integers.double().unflatten(1, (layer.scale.shape[1], -1)) * layer.scale.double()[..., None]
    stands_for = grouped.flatten(1).index_copy(1, layer.columns.long(), linear.weight[:, layer.columns])
    want = nn.functional.linear(x, stands_for, linear.bias)
    torch.testing.assert_close(layer(x), want, rtol=0, atol=1e-12)
    torch.testing.assert_close(layer(x[:3]), want[:3], rtol=0, atol=1e-12)
    steps = layer.scale.double().repeat_interleave(64 // layer.scale.shape[1], 1)
    # Half a step each, but for what was cut off the largest of a group.
    assert ((stands_for - linear.weight).abs() <= 0.502 * steps).double().mean() > 0.9


@pytest.mark.parametrize("weights", WEIGHTS)
def test_a_super_weight_and_an_outlier_channel_are_kept(weights):
    """Planted: one huge weight, and one input with large activations. Without them kept, either spoils the layer."""
    torch.manual_seed(0)
    linear, x = nn.Linear(128, 64, bias=False), torch.randn(200, 128)
    with torch.no_grad():
        linear.weight[7, 40] = 9.0
    linear.requires_grad_(False)
    x[:, 90] *= 60
    power, spec = x.square().mean(0), replace(WEIGHTS[weights], kept=2 / 128)
    want = linear(x)
    kept, none = (rounded(linear, one, power) for one in (spec, replace(spec, kept=0.0)))
    assert kept.columns.tolist() == [40, 90]
    wrong = [float((layer(x) - want).norm() / want.norm()) for layer in (kept, none)]
    assert wrong[0] < 0.5 * wrong[1], wrong
    row = [float((layer(x) - want)[:, 7].norm()) for layer in (kept, none)]
    assert row[0] < 0.25 * row[1], row
    # Picked by what they cost, not by chance: as many other inputs do not help.
    order = costliest(linear.weight.detach(), spec, power)
    assert order[:2].sort().values.tolist() == [40, 90]


def test_cutting_the_largest_lowers_the_error_that_counts():
    torch.manual_seed(0)
    linear, power = nn.Linear(128, 64), torch.rand(128) ** 4
    spec = replace(WEIGHTS["int4"], kept=0.0)
    errors = []
    for counts in (None, power):
        layer = rounded(linear, spec, counts)
        wrong = layer.dequantized(torch.float32) - linear.weight.detach()
        errors.append(float((wrong.square() * power).sum()))
    assert errors[1] < 0.9 * errors[0]


@pytest.fixture(scope="module")
def converted(tiny_folder, tmp_path_factory):
    folder = tmp_path_factory.mktemp("quantize") / "tiny"
    api.convert(tiny_folder, folder, "window-gla", overrides=["mixer.window=16"])
    return folder


@pytest.mark.parametrize(
    ("weights", "dtype"), [pytest.param("int4", "float32", marks=pytest.mark.check), ("int8", "bfloat16")]
)
def test_a_checkpoint_of_integers_is_one_function(converted, tmp_path, weights, dtype):
    """On trained weights: what rounding costs random ones says little."""
    text = tmp_path / "text.txt"
    text.write_text(" ".join(f"{n} little girls had {n} red balls and a dog." for n in range(400)))
    done = api.export(converted, tmp_path / "out", weights=weights, dtype=dtype, text=str(text), tokens=2048)
    cost = done.cost
    assert cost == json.loads((tmp_path / "out" / "linearize.json").read_text())["quantized"]
    assert cost["measured_on"]["rows"] == 2 and cost["fitted_to_tokens"] == 1024 and cost["weights"] == weights
    card = (tmp_path / "out" / "README.md").read_text()
    assert f"## What {weights} weights cost" in card and f"{cost['kl']['mean']:.4f}" in card
    assert f"{cost['perplexity'][0]:.3f} | {cost['perplexity'][1]:.3f}" in card and str(tmp_path) not in card
    small = {"int8": 0.25, "int4": 0.16}[weights] * (1 if dtype == "float32" else 2)
    stored = load_file(tmp_path / "out" / "model.safetensors")
    whole = load_file(converted / "model.safetensors")
    names = [name for name in stored if name.endswith(".weight") and not stored[name].is_floating_point()]
    tied = json.loads((converted / "config.json").read_text())["text_config"]["tie_word_embeddings"]
    assert len(names) == cost["layers"] == 7 * 2 + (not tied)
    own = sum(stored[f"{n.removesuffix('weight')}{part}"].nbytes for n in names for part in ("weight", "scale", "kept"))
    assert own < (small + 0.06) * sum(whole[name].nbytes for name in names)
    assert 0 < cost["kl"]["mean"] < {"int8": 0.01, "int4": 0.5}[weights]
    assert not api.verify(tmp_path / "out", steps=8).failed
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    ids = torch.arange(5, 105)[None]
    with torch.no_grad():
        before = AutoModelForCausalLM.from_pretrained(converted, dtype=again.dtype)(ids).logits
        apart = float((again(ids).logits - before).norm() / before.norm())
    assert 0 < apart < {"int8": 0.03, "int4": 0.4}[weights]


@pytest.mark.parametrize("weights", WEIGHTS)
@pytest.mark.check
def test_a_checkpoint_of_integers_is_measured_beside_a_teacher_of_the_same(converted, tmp_path, weights, capfd):
    text = tmp_path / "text.txt"
    text.write_text(" ".join(f"Cat {n} sat on a mat." for n in range(400)))
    before = nbytes_after(load_model(find_source(str(converted))), WEIGHTS[weights])
    done = api.export(converted, tmp_path / "out", weights=weights, text=str(text), tokens=1024)
    assert before == done.cost["bytes"][1] == nbytes(load_model(find_source(str(tmp_path / "out"))))
    capfd.readouterr()
    quick = ("--lengths", "32", "--steps", "2", "--repeats", "1", "--int8", "--json")
    assert run(["bench", str(tmp_path / "out"), *quick]) == 0, capfd.readouterr().err
    facts = json.loads(capfd.readouterr().out)
    assert {row["system"] for row in facts["rows"]} >= {"teacher", "model", "int8"}
    assert all(row["tokens_per_second"] > 0 for row in facts["rows"])
    held = facts["weights_bytes"]
    assert held["teacher"] < held["model"] < 1.1 * held["teacher"] and held["model"] < 0.9 * done.cost["bytes"][0]


def test_a_disk_too_small_for_integers_is_told_before_they_are_measured(converted, tmp_path, monkeypatch):
    text = tmp_path / "text.txt"
    text.write_text(" ".join(f"Cat {n} sat on a mat." for n in range(400)))
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=16_000_000 + 100_000))
    said = []
    with pytest.raises(OutputError, match=r"out: \d+ MB are needed, and \d+ MB are free on that disk; free some"):
        api.export(converted, tmp_path / "out", weights="int8", text=str(text), tokens=1024, say=said.append)
    assert said == [] and [path.name for path in tmp_path.iterdir()] == ["text.txt"]


def test_what_integers_do_not_do(converted, tmp_path, tiny_folder):
    text = tmp_path / "text.txt"
    text.write_text(" ".join(f"Cat {n} sat on a mat." for n in range(400)))
    with pytest.raises(DataError, match="weights int3: expected int8 or int4"):
        api.export(converted, tmp_path / "none", weights="int3")
    api.export(converted, tmp_path / "out", weights="int8", text=str(text), tokens=1024)
    with pytest.raises(ModelError, match="weights are integers already"):
        api.export(tmp_path / "out", tmp_path / "none", weights="int4", text=str(text), tokens=1024)
    with pytest.raises(ModelError, match="out: its weights are integers, which cannot be trained; train what it was"):
        api.finetune("window-gla", tmp_path / "tuned", model=tmp_path / "out", overrides=[f"teacher={tiny_folder}"])
    assert not (tmp_path / "none").exists()
    again = api.export(tmp_path / "out", tmp_path / "again", dtype="bfloat16")  # but written once more they can be
    assert again.files["model.safetensors"] < (tmp_path / "out" / "model.safetensors").stat().st_size
    fast = load_model(find_source(str(tmp_path / "out")), dtype="int8")
    assert all(layer.fast for layer in fast.modules() if isinstance(layer, QuantizedLinear))
    with torch.no_grad():
        ids = torch.arange(5, 25)[None]
        slow = load_model(find_source(str(tmp_path / "out")))(ids).logits
        assert float((fast(ids).logits - slow).norm() / slow.norm()) < 0.03
