"""A text that two processes share is the text that one runs: outputs, states and gradients."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.nn.functional import cross_entropy
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM

from linearize.conversion.convert import convert_model
from linearize.recipe import load_recipe

TOKENS = 73
KINDS = {
    "default": [],
    "all tokens at once": ["mixer.covers=all", "mixer.mix=fixed"],
    "one normaliser": ["mixer.mix=softmax", "mixer.sinks=0"],
    "delta rule": ["mixer.recurrence=gated_deltanet"],
    "slots": ["mixer.recurrence=gsa"],
    "log-scaled": ["mixer.recurrence=mlstm"],
    "queries as source": ["mixer.gate.source=q", "mixer.recurrence=gated_retention"],
    "a window longer than a part": ["mixer.window=40"],
    "landmarks": ["mixer.landmarks=5"],
    "landmarks in either part": ["mixer.landmarks=9", "mixer.window=1", "mixer.sinks=0", "mixer.mix=softmax"],
    "kept layers and heads": ["mixer.keep={layers: [0], heads: {1: [1]}}"],
}
ROOT = Path(__file__).resolve().parents[2]


def build(kind: str):
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=97, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, initializer_range=0.3,
    )  # fmt: skip
    model = convert_model(LlamaForCausalLM(config), load_recipe("default", ["mixer.window=6", *KINDS[kind]]).mixer)
    for name, parameter in model.named_parameters():
        if "mix_weight" in name:
            parameter.data.uniform_(-0.5, 0.5)  # 0 is a branch that is off
    return model.train()


def text(tokens: int) -> torch.Tensor:
    return torch.randint(0, 97, (2, tokens), generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module")
def parts(tmp_path_factory):
    folder = tmp_path_factory.mktemp("parts")
    command = [
        sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "-m",
        "tests.training.split_sequence", str(folder),
    ]  # fmt: skip
    path = os.pathsep.join([str(ROOT), *sys.path])
    done = subprocess.run(
        command, cwd=ROOT, env={**os.environ, "PYTHONPATH": path}, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return [torch.load(folder / f"{rank}.pt") for rank in range(2)]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.check
def test_two_processes_are_one(kind, parts):
    model, ids = build(kind), text(TOKENS)
    cache = DynamicCache()
    logits = model(ids, past_key_values=cache, use_cache=True).logits
    total = cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten(), reduction="sum")
    total.backward()
    first, second = (found[kind] for found in parts)
    both, largest = torch.cat([first["logits"], second["logits"]], 1), float(logits.detach().abs().max())
    torch.testing.assert_close(both, logits, rtol=0, atol=1e-5 * largest)
    assert 1 < largest < 10
    torch.testing.assert_close(second["loss"], total, rtol=1e-6, atol=0)
    states = {f"{i}.{name}": x for i, memory in enumerate(cache.layers) for name, x in memory.tensors()}
    assert states.keys() == second["states"].keys()
    for name, state in states.items():
        torch.testing.assert_close(second["states"][name], state, rtol=0, atol=1e-5)
    for name, parameter in model.named_parameters():
        largest = float(parameter.grad.abs().max())
        torch.testing.assert_close(second["gradients"][name], parameter.grad, rtol=0, atol=1e-5 * max(largest, 1))
        assert largest > 0 or "bias" in name, name
