"""The short form of a decoder layer against the base model's own, in plain torch, for every family."""

from __future__ import annotations

import torch

from linearize.generation import blocks as short
from linearize.generation.blocks import Blocks
from linearize.generation.engine import Engine
from linearize.model import MixerConfig
from tests.model.test_families import build, convert, first_rows

MIXERS = [MixerConfig(layers=[0, 1], window=12, sinks=3)]
OTHERS = {"falcon", "gpt_neox", "gpt2", "granitemoe"}  # base models with layers of another form
EXPERTS = {"mixtral", "qwen2_moe", "qwen3_moe", "granitemoe"}  # whose products take no float64


@first_rows
def test_layers_equal_the_base_models_own(row):
    model = convert(row) if row.split(",")[0] in EXPERTS else convert(row).double()
    blocks = Blocks(model, fused=False)
    layers = len(model.attention_layers)
    assert len(blocks.short) == (0 if model.config.text_config.model_type in OTHERS else layers)
    assert sum(blocks.refused.values()) == layers - len(blocks.short)
    if blocks.short:
        errors = [error for _, error in short._distances(model, blocks)]
        assert errors == [None] * layers


def test_a_fault_in_a_layer_is_found(monkeypatch):
    model = convert("llama").double()
    blocks = Blocks(model, fused=False)
    monkeypatch.setattr(short, "activated", lambda x, *_, **__: x.chunk(2, -1)[1] * 1.0001)
    assert all("off by" in error for _, error in short._distances(model, blocks))
    monkeypatch.setattr(short, "activated", None)
    assert all("fails on this GPU" in error for _, error in short._distances(model, blocks))


def test_hooks_and_training_keep_the_base_models_own_code():
    model = convert("llama", MIXERS)
    layers = model.model.layers
    layers[0].register_forward_hook(lambda *_: None)
    blocks = Blocks(model, fused=False)
    assert list(blocks.short) == [layers[1]]
    assert not Blocks(model.train(), fused=False).short


@torch.no_grad()
def test_layers_are_their_own_again_afterwards():
    model, ids = convert("qwen2", MIXERS).double(), torch.arange(3, 9)[None]
    expected = model(ids).logits
    with Blocks(model, fused=False) as blocks:
        assert all("forward" in layer.__dict__ for layer in blocks.short)
    assert torch.equal(model(ids).logits, expected)


def test_a_cpu_runs_none():
    assert short.blocks_of(convert("llama", MIXERS)) is None
    assert Engine(build("llama"))._recorder is None
