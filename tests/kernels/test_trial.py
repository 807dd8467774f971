"""A fused kernel that does not agree with plain torch on the machine at hand is not used there."""

from __future__ import annotations

import importlib.util
import os

import pytest
import torch
from linearize_kernels import say_once

from linearize.families.base import AttentionLayer
from linearize.model.configuration import MixerConfig
from linearize.model.mixer import mixer as mixing
from linearize.model.mixer import trial
from linearize.model.mixer.mixer import Mixer

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def _trials_of_the_cpu(monkeypatch):
    monkeypatch.setattr(trial, "ON_TRIAL", {"cpu"})
    monkeypatch.setattr(trial, "_VERDICTS", {})
    say_once.cache_clear()


def mixer(window: int = 8) -> Mixer:
    config = MixerConfig(layers=[0], recurrence="gla", window=window, sinks=2)
    return Mixer(config, AttentionLayer(key_value_heads=1, query_heads=2, key_width=8, value_width=8, scale=0.3))


def sound(one, new, lengths, memory):
    return one.forward(new, lengths, memory, fused=False)


def off(one, new, lengths, memory):
    return sound(one, new, lengths, memory) * 1.1


def spoils_memory(one, new, lengths, memory):
    answer = sound(one, new, lengths, memory)
    memory.parts["state"]["state"].mul_(0.5)
    return answer


def not_a_number(one, new, lengths, memory):
    return sound(one, new, lengths, memory) * float("nan")


def fails(*_):
    raise RuntimeError("out of resource: shared memory\nmore")


@pytest.mark.parametrize(
    ("kernel", "told"),
    [
        (sound, None),
        (off, "is off by"),
        (spoils_memory, "is off by"),
        (not_a_number, "off by inf"),
        (fails, "of resource"),
    ],
)
def test_only_a_sound_kernel_is_used(kernel, told, monkeypatch, caplog):
    monkeypatch.setattr(mixing, "fused_step", kernel)
    one = mixer()
    weight = one.mix_weight
    assert trial.passes("step", one, CPU, torch.float32) == (told is None)
    assert one.mix_weight is weight and not weight.any()
    said = [record.getMessage() for record in caplog.records]
    assert len(said) == (told is not None) and (told is None or (told in said[0] and "\n" not in said[0]))
    # Asked once: the verdict stands for every mixer of the kind, and for no other.
    monkeypatch.setattr(mixing, "fused_step", fails)
    assert trial.passes("step", mixer(), CPU, torch.float32) == (told is None)
    assert not trial.passes("step", mixer(window=9), CPU, torch.float32)


def test_gradients_are_checked_where_they_are_on(monkeypatch):
    asked = []
    monkeypatch.setattr(trial, "_agrees", lambda *arguments: asked.append(arguments[-1]) or True)
    for _ in range(2):
        with torch.no_grad():
            assert trial.passes("attention", mixer(), CPU, torch.float32)
        assert trial.passes("attention", mixer(), CPU, torch.float32)
    assert asked == [False, True]


@pytest.mark.triton
@pytest.mark.skipif(
    importlib.util.find_spec("triton") is None or os.environ.get("TRITON_INTERPRET") != "1",
    reason="Triton's interpreter runs the kernels on a CPU: make test-kernels",
)
@pytest.mark.parametrize("operation", ["step", "attention"])
def test_the_kernels_pass(operation):
    assert trial.passes(operation, mixer(), CPU, torch.float32)
