"""Which kernels run where, who is told, and that nothing needs triton to be decided or to run."""

from __future__ import annotations

import logging

import pytest
import torch
from linearize_kernels import CHOICES, decide, delta_rule, dispatch, gated_values, gla
from linearize_kernels.dispatch import UnknownKernelsError, choose, say_once

from linearize.families.base import AttentionLayer
from linearize.model.configuration import MixerConfig
from linearize.model.mixer.fused import decide_mixer, refusal
from linearize.model.recurrences import RECURRENCES
from tests.forked import run_forked
from tests.kernels.test_forms import KERNELS, inputs

LAYER = AttentionLayer(8, 2, 64, 64, 0.125)
CPU, CUDA = torch.device("cpu"), torch.device("cuda")


@pytest.fixture(autouse=True)
def fresh(monkeypatch):
    """No pin, no interpreter, triton and fla installed, nothing decided or said yet."""
    monkeypatch.delenv("LINEARIZE_KERNELS", raising=False)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    packages = {"triton", "fla"}
    monkeypatch.setattr(dispatch.importlib.util, "find_spec", lambda name: name if name in packages else None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    dispatch._decide.cache_clear()
    say_once.cache_clear()
    yield packages
    dispatch._decide.cache_clear()
    say_once.cache_clear()


def of(**options) -> MixerConfig:
    return MixerConfig(layers=[0], **options)


def kernels(config: MixerConfig, device: torch.device, dtype: torch.dtype = torch.bfloat16) -> dict[str, str]:
    return {part: decision.kernels for part, decision in decide_mixer(config, LAYER, device, dtype).items()}


@pytest.mark.parametrize("recurrence", ["none", *RECURRENCES])
def test_a_cpu_runs_torch_and_nobody_is_told_of_it(recurrence, caplog):
    config = of(recurrence=recurrence)
    assert set(kernels(config, CPU, torch.float32).values()) == {"torch"}
    assert choose("attention", CPU, torch.float32, refusal=refusal("attention", config, LAYER)) == "torch"
    assert not caplog.records


def test_a_gpu_runs_the_fused_kernels():
    assert kernels(of(), CUDA) == {"prefill": "triton", "step": "triton"}
    assert kernels(of(recurrence="mamba2", feature_map="exp", covers="all"), CUDA)["prefill"] == "triton"
    assert kernels(of(recurrence="none"), CUDA) == {"prefill": "torch", "step": "triton"}
    assert kernels(of(), CUDA, torch.float64) == {"prefill": "torch", "step": "torch", "recurrence": "torch"}


@pytest.mark.parametrize("recurrence", ["kda", "gsa", "rwkv6"])
def test_what_no_kernel_takes_falls_back_loudly_and_once(recurrence, caplog):
    config = of(recurrence=recurrence)
    reason = refusal("step", config, LAYER)
    assert decide("step", CUDA, torch.bfloat16, refusal=reason).why == f"no fused kernel for {recurrence}"
    with caplog.at_level(logging.WARNING):
        for _ in range(3):
            assert choose("step", CUDA, torch.bfloat16, refusal=reason) == "torch"
    (record,) = caplog.records
    assert "step runs in plain torch on cuda, which is slower" in record.message and recurrence in record.message


def test_a_gpu_without_triton_says_what_to_install(fresh, caplog):
    fresh.remove("triton")
    with caplog.at_level(logging.WARNING):
        assert choose("attention", CUDA, torch.bfloat16) == "torch"
    assert "pip install triton" in caplog.text


def test_an_old_gpu_runs_torch(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    assert "Ampere" in decide("attention", CUDA, torch.float16).why


@pytest.mark.parametrize(
    ("capability", "version", "kernels"),
    [
        ((9, 0), "3.8.1", "torch"),
        ((9, 0), "3.9.0", "triton"),
        ((9, 0), "3.10.0", "triton"),
        ((8, 6), "3.4.0", "triton"),
    ],
)
def test_a_hopper_gpu_needs_an_assembler_without_the_fault(fresh, capability, version, kernels, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(dispatch, "version", lambda package: version)
    found = decide("attention", CUDA, torch.bfloat16)
    assert found.kernels == kernels
    assert found.lost == (kernels == "torch") == (f"this is triton {version}" in found.why)


def test_fla_waits_for_a_program_that_allows_tf32(fresh, monkeypatch):
    assert decide("delta_rule", CUDA, torch.float32).kernels == "torch"
    monkeypatch.setattr(torch, "get_float32_matmul_precision", lambda: "high")
    assert decide("delta_rule", CUDA, torch.float32).kernels == "fla"
    fresh.remove("fla")
    dispatch._decide.cache_clear()
    found = decide("delta_rule", CUDA, torch.float32)
    assert found.kernels == "torch" and not found.lost and "pip install flash-linear-attention" in found.why


@pytest.mark.parametrize(
    ("pin", "gpu", "cpu"),
    [
        ("reference", ("reference", "reference", "reference"), ("reference", "reference", "reference")),
        ("torch", ("torch", "torch", "torch"), ("torch", "torch", "torch")),
        ("triton", ("triton", "triton", "torch"), ("torch", "torch", "torch")),
        ("fla", ("torch", "torch", "fla"), ("torch", "torch", "torch")),
    ],
)
def test_a_pin_decides(pin, gpu, cpu, monkeypatch):
    monkeypatch.setenv("LINEARIZE_KERNELS", pin)
    operations = ("attention", "step", "gla")
    assert tuple(decide(o, CUDA, torch.float32).kernels for o in operations) == gpu
    assert tuple(decide(o, CPU, torch.float32).kernels for o in operations) == cpu
    assert all(pin in decide(o, device, torch.float32).why for o in operations for device in (CPU, CUDA))


def test_the_interpreter_runs_what_is_pinned_and_nothing_else(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert decide("step", CPU, torch.float32).kernels == "torch"
    monkeypatch.setenv("LINEARIZE_KERNELS", "triton")
    assert decide("step", CPU, torch.float32).kernels == "triton"


def test_an_unknown_choice_is_one_line_with_the_choices(monkeypatch):
    monkeypatch.setenv("LINEARIZE_KERNELS", "cudnn")
    with pytest.raises(UnknownKernelsError) as caught:
        decide("step", CPU, torch.float32)
    assert all(choice in str(caught.value) for choice in ("LINEARIZE_KERNELS=cudnn", *CHOICES))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(("name", "run"), [("gla", gla), ("gated values", gated_values), ("kda", delta_rule)])
def test_reference_takes_the_parallel_form(name, run, monkeypatch):
    arguments = inputs(KERNELS[name], 20, 1.0)
    monkeypatch.setenv("LINEARIZE_KERNELS", "reference")
    assert torch.equal(run(*arguments)[0], run(*arguments, form="parallel")[0])
    one = [x[:, :1] for x in arguments[:-1]]
    assert torch.equal(run(*one, arguments[-1])[0], run(*one, arguments[-1], form="recurrent")[0])


@pytest.mark.parametrize(
    ("layer", "options", "said"),
    [
        (AttentionLayer(34, 2, 64, 64, 1.0), {}, "query heads"),
        (AttentionLayer(4, 2, 512, 64, 1.0), {}, "wider than 256"),
        (AttentionLayer(4, 2, 256, 64, 1.0), {"feature_map": "exp"}, "under exp"),
    ],
)
def test_shapes_that_the_kernels_do_not_take(layer, options, said):
    assert said in refusal("attention", of(**options), layer)


def test_deciding_imports_no_kernel():
    """torch itself may import triton; ours wait until they run."""
    program = (
        "import sys, torch, linearize.model; from linearize_kernels import decide\n"
        "decide('step', 'cuda', torch.bfloat16)\n"
        "ours = [name for name in sys.modules if name.startswith(('linearize_kernels.step_', 'fla.'))]\n"
        "assert not ours, ours"
    )
    done = run_forked(program)
    assert done.returncode == 0, done.stderr
