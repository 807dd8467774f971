"""`linearize verify` passes what is right, and names the check that sees each way of being wrong."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from importlib import import_module
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel

from linearize.cli import console
from linearize.cli.app import run
from linearize.cli.verify import _remarks
from linearize.conversion.swap import convert_model
from linearize.errors import ModelError, VerificationError
from linearize.jobs.convert import convert_into
from linearize.model import LinearizedForCausalLM
from linearize.model.memory import cache_nbytes
from linearize.model.recurrences import RECURRENCES
from linearize.recipe import load_recipe
from linearize.sources.source import find_source, load_model
from linearize.verification import Verification, verify, widened
from linearize.verification.checks import KINDS as KINDS_OF_CHECKS
from linearize.verification.subject import Subject
from linearize.verification.verify import FLOAT32_TOLERANCE, Check, _check, _shaken, rounds, without_rounding
from tests.made import LANDMARKS
from tests.tables import in_turn, some
from tests.verification_faults import (
    FAULTS,
    beams_that_raise,
    memory_that_grows,
    no_packing,
    no_pads,
    nothing_counted,
    parameter_lost,
    rows_that_leak,
    sinks_that_drift,
    state_file_loses_the_sinks,
    state_not_updated,
    values_not_finite,
)

GLA = ("-r", "window-gla")
ALL = ["reload", "decode", "chunks", "pads", "packing", "batch", "reorder", "state", "memory", "drift"]
KINDS = {
    "default": ("window-gla",),
    "liger": ("liger-gla", "mixer.sinks=0"),
    "softmax": ("window-gla", "mixer.mix=softmax"),
    "kept": ("window-gla", "mixer.keep.layers=[1]", "mixer.keep.heads={0: [1]}"),
    "landmarks": (LANDMARKS, "mixer.landmarks=20", "mixer.landmarks_by=null"),
    "int4": (LANDMARKS, "mixer.landmarks=20", "mixer.landmarks_by=null", "mixer.memory_dtype=int4"),
    "bfloat16": ("window-gla", "dtype=bfloat16"),
    "int4 in bfloat16": (
        LANDMARKS,
        "mixer.landmarks=20",
        "mixer.landmarks_by=null",
        "mixer.memory_dtype=int4",
        "dtype=bfloat16",
    ),
    "float16": ("window-gla", "dtype=float16"),
}


@pytest.fixture(scope="module")
def folder(tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The tiny model as each of `KINDS`, with a window of 16, on disk."""

    @cache
    def make(kind: str) -> Path:
        name, *changes = KINDS[kind]
        target = tmp_path_factory.mktemp(kind)
        convert_into(find_source(str(tiny_folder)), load_recipe(name, ["mixer.window=16", *changes]), target)
        return target

    return make


def load(folder: Path) -> LinearizedForCausalLM:
    return load_model(find_source(str(folder)), device="cpu")


def verified(folder: Path, model: LinearizedForCausalLM | None = None, steps: int = 40, **options) -> Verification:
    source = find_source(str(folder))
    return verify(model or load(folder), source, tokens=80, steps=steps, **options)


@torch.no_grad()
def held_after(model: LinearizedForCausalLM, tokens: int) -> int:
    return cache_nbytes(model(torch.full((1, tokens), 7), use_cache=True).past_key_values)


@pytest.mark.parametrize("kind", some(list(KINDS), ["default", "kept", "landmarks", "bfloat16"]))
def test_every_kind_of_model_passes_and_gets_its_weights_back(folder, kind):
    model = load(folder(kind))
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    found = verified(folder(kind), model)
    assert [check.name for check in found.checks] == ALL and found.failed == [], found
    assert before.keys() == model.state_dict().keys()
    for name, tensor in model.state_dict().items():
        assert tensor.dtype == before[name].dtype and torch.equal(tensor, before[name]), name

    assert found.dtype == (kind.split()[-1] if "float" in kind else "float32")
    if kind != "liger":  # whose mix has no weights
        assert found.woken == (1 if kind == "kept" else 2) and 0.05 <= found.moved < math.inf
    errors = {check.name: check for check in found.checks}
    assert errors["state"].error == errors["reload"].error == errors["memory"].error == 0
    if found.distance is None:
        # Rounding to codes may turn a difference in the last bit into one of a code.
        assert all(check.error < (1e-4 if kind.startswith("int") else 5e-6) for check in found.checks)
    else:
        if not kind.startswith("int"):
            assert errors["decode"].tolerance == pytest.approx(2 * found.distance)
        assert found.distance < 0.05
    growing = "keep softmax add" in errors["memory"].detail
    assert growing == (kind == "kept")
    # It counts what it can reach, and comes to what the layers say of themselves.
    assert errors["memory"].detail.startswith(f"{held_after(load(folder(kind)), 100):,} bytes after 100 tokens")


RECIPES = [*(name for name in RECURRENCES if name != "gla"), "liger-gla", "liger-hgrn2", "liger-gsa", "liger-gla-h"]


_DISTINCT = ["gsa", "kda", "gateloop", "liger-gla-h"]


@pytest.mark.parametrize("name", some(RECIPES, _DISTINCT))
def test_every_recurrence_passes(tiny_folder, tmp_path, name):
    changes = ["mixer.window=16", *(["mixer.keep.every=2"] if name == "liger-gla-h" else [])]
    convert_into(find_source(str(tiny_folder)), load_recipe(name, changes), tmp_path)
    found = verified(tmp_path)
    assert found.failed == [], found


_ONE_FOR_EACH_CHECK = [
    beams_that_raise, no_pads, no_packing, nothing_counted, memory_that_grows, state_file_loses_the_sinks,
    parameter_lost,
]  # fmt: skip


@pytest.mark.parametrize("fault", some(list(FAULTS), _ONE_FOR_EACH_CHECK), ids=lambda fault: fault.__name__.strip("<>"))
def test_a_fault_is_found_by_the_checks_that_should(folder, monkeypatch, fault):
    path = folder("default")
    fault(monkeypatch)
    found = verified(path, steps=120 if fault is values_not_finite else 40)
    assert set(found.failed) == FAULTS[fault], [(check.name, check.error, check.detail) for check in found.checks]
    if fault is beams_that_raise:
        reorder = next(check for check in found.checks if check.name == "reorder")
        assert reorder.detail == "RuntimeError: no beams" and reorder.error == math.inf


@pytest.mark.check
def test_a_slow_drift_is_seen_in_a_long_run_only(folder, monkeypatch):
    sinks_that_drift(monkeypatch)
    assert verified(folder("default"), steps=40).failed == []
    assert verified(folder("default"), steps=1200).failed == ["drift"]


@pytest.mark.parametrize(("kind", "fault"), in_turn(["softmax", "kept"], [no_pads, state_not_updated, rows_that_leak]))
def test_faults_show_in_other_kinds_of_model(folder, monkeypatch, kind, fault):
    path = folder(kind)
    fault(monkeypatch)
    assert set(verified(path).failed) == FAULTS[fault]


@pytest.mark.parametrize("kind", ["bfloat16", "int4 in bfloat16"])
def test_faults_show_in_half_precision(folder, monkeypatch, kind):
    path = folder(kind)
    assert verified(path).failed == []
    state_not_updated(monkeypatch)
    failed = set(verified(path).failed)
    # After a few single tokens the fault may hide behind the rounding, but not after many. The 40 of `drift` fill the
    # slots alone.
    assert {"decode"} | ({"drift"} if kind == "bfloat16" else set()) <= failed <= FAULTS[state_not_updated]


@pytest.mark.parametrize("fault", ["renamed", "lost", "added"])
def test_a_broken_weight_name_is_found(folder, tmp_path, fault):
    for file in folder("default").iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    tensors = load_file(tmp_path / "model.safetensors")
    name = "model.layers.0.self_attn.mixer.recurrence.gate_scale"
    changed = {**tensors, name.replace("gate_scale", "scale"): tensors[name].clone()}
    if fault == "lost":
        changed = dict(tensors)
    if fault != "added":
        del changed[name]
    save_file(changed, tmp_path / "model.safetensors", {"format": "pt"})
    told = "has no place in the model .*recurrence.scale" if fault == "added" else "is not there, .*gate_scale"
    with pytest.raises(ModelError, match=rf"1 weight {told}"):  # before any check, as in every command that loads it
        verified(tmp_path)


def test_weights_come_back_after_an_interruption(folder):
    for kind in ("default", "bfloat16"):
        model = load(folder(kind))
        before = {name: tensor.clone() for name, tensor in model.state_dict().items()}

        def interrupt(name: str, done: int, total: int) -> None:
            if name.startswith("decode "):
                raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            verified(folder(kind), model, tick=interrupt)
        for name, tensor in model.state_dict().items():
            assert tensor.dtype == before[name].dtype and torch.equal(tensor, before[name]), name


def test_a_remark_on_the_tolerance_says_what_it_is():
    """A distance from float64 that leaves the usual tolerance is not told as one that sets it."""
    found = Verification([], "float32", tokens=192, steps=8, woken=0, moved=None, distance=1e-7)
    assert _remarks(found) == []
    assert "0.1 %; the tolerance is four times as much" in _remarks(replace(found, distance=1e-3))[0]
    half = replace(found, dtype="float16", distance=1e-3)
    assert "0.1 %; the tolerance is twice as much" in _remarks(half)[0]


@pytest.mark.check
def test_a_model_that_amplifies_rounding_is_measured_by_its_own(folder, monkeypatch):
    """What a check allows in float32 grows with the model's distance from float64, and with nothing else."""
    monkeypatch.setattr(
        import_module("linearize.verification.verify"), "FLOAT32_TOLERANCE", 1e-9
    )  # as if this model were such a one
    model = load(folder("default"))
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    found = verified(folder("default"), model, steps=8)
    allowed = {check.name: check.tolerance for check in found.checks}
    assert 1e-8 < found.distance < 1e-5
    assert allowed["decode"] == pytest.approx(4 * found.distance) and allowed["reload"] == allowed["memory"] == 0
    for name, tensor in model.state_dict().items():
        assert tensor.dtype == before[name].dtype and torch.equal(tensor, before[name]), name
    state_not_updated(monkeypatch)
    assert {"decode", "drift"} <= set(verified(folder("default")).failed)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_every_value_of_half_precision_survives_float32(dtype):
    every = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype)
    model = nn.Module()
    model.weight = nn.Parameter(every[~every.isnan()].clone())
    before = model.weight.detach().clone()
    with pytest.raises(RuntimeError, match="stop"), widened(model, torch.float32):
        assert model.weight.dtype == torch.float32
        raise RuntimeError("stop")
    assert torch.equal(model.weight.view(torch.int16), before.view(torch.int16))


def test_learned_weights_that_are_large_enough_stay(folder):
    model = load(folder("default"))
    for name, weight in model.named_parameters():
        if name.endswith("mix_weight"):
            weight.data.fill_(-0.5)
    found = verified(folder("default"), model)
    assert found.woken == 0 and found.moved > 0.01
    assert found.failed == ["reload"]  # which sees that these are not the weights on disk


def test_learned_positions_that_end_are_no_obstacle(tmp_path):
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=97, n_positions=128, n_embd=32, n_layer=2, n_head=4, initializer_range=0.2)
    model = convert_model(GPT2LMHeadModel(config).eval(), load_recipe("window-gla", ["mixer.window=16"]).mixer)
    model.save_pretrained(tmp_path)
    source = find_source(str(tmp_path))
    found = verify(model, source, steps=200)
    assert found.failed == [] and found.tokens == 128
    with pytest.raises(VerificationError, match="128 positions"):
        verify(model, source, tokens=129)


LONGROPE = {
    "rope_type": "longrope", "rope_theta": 1e4, "short_factor": [1.0] * 8, "long_factor": [1.0, 2.0, 4.0, 8.0] * 2,
    "original_max_position_embeddings": 100,
}  # fmt: skip
DYNAMIC = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 4.0}


@pytest.mark.parametrize(
    ("kind", "rope", "most", "told"),
    [
        ("phi3", LONGROPE, 1000, "LongRoPE: converted, texts of all lengths are read with the long factors; the "),
        ("llama", DYNAMIC, 100, "dynamic NTK: converted, texts of all lengths are read with the base for 400 tokens"),
    ],
)
@pytest.mark.check
def test_rotary_tables_that_change_with_the_length_are_one_and_said(kind, rope, most, told, tmp_path, capfd):
    torch.manual_seed(0)
    sizes = {"vocab_size": 97, "hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2}
    heads = {
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "bos_token_id": 0,
        "eos_token_id": 1,
        "pad_token_id": 1,
    }
    own = {"original_max_position_embeddings": 100} if kind == "phi3" else {}
    config = AutoConfig.for_model(
        kind, **sizes, **heads, **own, rope_parameters=rope, max_position_embeddings=most, initializer_range=0.2
    )
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "base")
    base, target = str(tmp_path / "base"), str(tmp_path / "converted")
    for command in (
        ["inspect", base],
        ["convert", base, "-o", target, "--dry-run", *GLA],
        ["convert", base, "-o", target, *GLA],
    ):
        assert run([*command, "--set", "mixer.window=16"]) == 0
        text, words = capfd.readouterr()
        assert (text if command[0] == "inspect" else words).count(told) == 1
    assert run(["inspect", target]) == 0
    assert told[:10] not in capfd.readouterr().out
    assert run(["verify", target, "--steps", "300"]) == 0, capfd.readouterr().out


def test_rows_must_fill_window_and_sinks(folder):
    with pytest.raises(VerificationError, match="--tokens 36 or more"):
        verify(load(folder("default")), find_source(str(folder("default"))), tokens=20)


def test_the_command_says_what_it_found(folder, tiny_folder, monkeypatch, capfd):
    path = str(folder("default"))
    assert run(["verify", path, "--tokens", "80", "--steps", "20"]) == 0
    text, words = capfd.readouterr()
    assert all(name in text for name in ALL) and "FAILED" not in text
    # There is no counter where stderr is no terminal.
    assert "restored" in words and "error" not in words and "steps" not in words

    no_packing(monkeypatch)
    assert run(["verify", path, "--tokens", "80", "--steps", "20", "--json"]) == 1
    text, words = capfd.readouterr()
    facts = json.loads(text)
    assert not facts["passed"] and facts["failed"] == ["packing"]
    assert [check["name"] for check in facts["checks"] if not check["passed"]] == ["packing"]
    assert "1 of 10 checks failed: packing" in words.splitlines()[-1]

    assert run(["verify", str(tiny_folder)]) == 1
    text, words = capfd.readouterr()
    assert not text and "linearize convert" in words and len(words.splitlines()) == 1
    assert run(["verify", path, "--dtype", "int8"]) == 2
    capfd.readouterr()
    assert run(["verify", "--help"]) == 0
    assert "linearize verify" in capfd.readouterr().out.split("Examples:")[1]


def test_progress_names_the_check_and_its_place(folder, monkeypatch, capfd):
    """Off a terminal a line now and then, and on one a line that is written over."""
    monkeypatch.setattr(console, "seconds_between_lines", lambda: 0.0)
    assert run(["verify", str(folder("default")), "--tokens", "80", "--steps", "20"]) == 0
    lines = capfd.readouterr().err.splitlines()
    assert f"verifying: reload (1 of {len(ALL)})" in lines
    assert f"verifying: drift ({len(ALL)} of {len(ALL)}), 20 of 20 steps" in lines


@pytest.mark.real
@pytest.mark.slow
def test_smollm2_passes_and_does_not_drift_over_4096_steps(smollm2_gguf, tmp_path):
    """A short run of the command is in the quickstart, which the tests run."""
    source = find_source(str(smollm2_gguf))
    convert_into(source, load_recipe("window-gla"), tmp_path)
    found = verify(load(tmp_path), find_source(str(tmp_path)), steps=4096)
    assert found.failed == [] and found.steps == 4096, found
    assert found.moved >= 0.05


@pytest.mark.real
@pytest.mark.slow
@pytest.mark.parametrize("name", RECIPES)
def test_every_recurrence_passes_on_smollm2(smollm2_path, tmp_path, name):
    source = find_source(str(smollm2_path))
    convert_into(source, load_recipe(name), tmp_path)
    found = verify(load(tmp_path), find_source(str(tmp_path)), tokens=128, steps=128)
    assert found.failed == [], found


def test_a_code_at_a_boundary_is_no_failure_of_a_rounded_memory(folder, monkeypatch):
    model = load(folder("int4"))
    subject = Subject(
        model, find_source(str(folder("int4"))), dtype="auto", special=(), tokens=80, steps=1, tick=lambda *_: None
    )

    def judged(narrow: float, wide: float, noisy: float = 0.0) -> Check:
        def measure(one: Subject) -> tuple[float, str]:
            shaken = all(layer._forward_pre_hooks for layer in one.model.attention_layers)
            return (noisy if shaken else wide) if one.model.dtype.itemsize == 8 else 1.0, ""

        kind = replace(KINDS_OF_CHECKS["packing"], measure=measure)
        monkeypatch.setitem(KINDS_OF_CHECKS, "packing", kind)
        return without_rounding(subject, Check("packing", kind.holds, narrow, FLOAT32_TOLERANCE, ""), 1e-2)

    assert rounds(model) and not rounds(load(folder("default")))
    assert judged(9e-3, 1e-12).passed and "1.0e-12 in float64" in judged(9e-3, 1e-12).detail
    assert not judged(2e-2, 1e-12).passed and not judged(9e-3, 9e-3).passed
    assert judged(2e-2, 1e-12, noisy=2.5e-3).passed and "2.5e-03 with noise" in judged(2e-2, 1e-12, noisy=2.5e-3).detail
    assert not judged(2e-2, 1e-12, noisy=1.5e-3).passed and not judged(2e-2, 9e-3, noisy=1.0).passed
    assert not judged(2e-2, 1e-12, noisy=math.inf).passed and not judged(math.inf, 1e-12, noisy=1.0).passed
    assert model.dtype == torch.float32
    assert not any(layer._forward_pre_hooks for layer in model.attention_layers)


def test_noise_of_the_size_of_rounding_moves_logits_as_rounding_does(folder):
    model = load(folder("int4"))
    subject = Subject(
        model, find_source(str(folder("int4"))), dtype="auto", special=(), tokens=80, steps=1, tick=lambda *_: None
    )
    with torch.no_grad(), widened(model, torch.float64):
        still, noisy = _check(subject, "packing").error, _shaken(subject, "packing", seed=0)
    assert still < 1e-12 and 1e-8 < noisy < 1e-4


def test_many_slots_are_checked_with_few_and_once_with_all(tiny_folder, tmp_path):
    changes = ["mixer.window=16", "mixer.landmarks=500", "mixer.landmarks_by=null", "mixer.memory_dtype=int8"]
    convert_into(
        find_source(str(tiny_folder)), load_recipe("default", [*changes, "mixer.landmark_score=novelty"]), tmp_path
    )
    model = load(tmp_path)
    found = verify(model, find_source(str(tmp_path)), steps=8)
    assert [check.name for check in found.checks] == [*ALL, "full size"] and found.failed == [], found
    assert found.tokens == 192 < 500 < found.full_tokens
    assert {attention.mixer.config.landmarks for attention in model.attention_layers} == {500}
