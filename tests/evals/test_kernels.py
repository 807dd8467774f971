"""The kernels' benchmark: its formulas against counting, and that every line of it runs."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from evals.kernels import work
from evals.kernels.contenders import CONTENDERS, draw
from evals.kernels.telling import markdown, plot
from evals.kernels.work import Shape, Work
from linearize.families.base import AttentionLayer
from linearize.model.configuration import MixerConfig
from linearize.model.mixer.mixer import Mixer

ROOT = Path(__file__).resolve().parents[2]
SHAPE = Shape("small", 6, 2, 16, 5, 2)


@pytest.mark.parametrize("tokens", [1, 4, 5, 6, 7, 8, 40])
def test_pairs_are_those_of_the_mask(tokens):
    token = torch.arange(tokens)
    seen = (token <= token[:, None]) & ((token > token[:, None] - 5) | (token < 2))
    assert work.pairs_of_window(tokens, 5, 2) == int(seen.sum())


@pytest.mark.parametrize("recurrence", [True, False])
def test_bytes_are_those_of_the_tensors(recurrence):
    inputs = draw(SHAPE, 70, 3, torch.device("cpu"), torch.bfloat16, grad=False)
    read = [inputs.q_rotated, inputs.k_rotated, inputs.v, *([inputs.q, inputs.k] if recurrence else [])]
    size = sum(x.numel() * x.element_size() for x in read)
    outputs = inputs.q.numel() * 2
    assert work.forward(SHAPE, 70, 3, 2, recurrence=recurrence).bytes == size + outputs
    assert work.backward(SHAPE, 70, 3, 2, recurrence=recurrence).bytes == 2 * size + outputs


def test_flops_of_full_attention_and_of_the_recurrence():
    ours = work.forward(SHAPE, 100, 2, 2, recurrence=False, causal=True)
    assert ours.flops == 2 * 6 * (100 * 101 // 2) * 2 * 2 * 16
    with_it, without = (work.forward(SHAPE, 130, 1, 2, recurrence=x).flops for x in (True, False))
    inside = sum(t % work.CHUNK + 1 for t in range(130))  # pairs of a query and the keys of its chunk so far
    per_state = 2 * 16 * 17
    assert with_it - without == 6 * inside * 2 * (16 + 17) + 130 * (6 * per_state + 2 * per_state)


def test_a_step_counts_what_the_memory_holds():
    layer = AttentionLayer(6, 2, 16, 16, 0.25)
    mixer = Mixer(MixerConfig(layers=[0], window=5, sinks=2), layer)
    parts = mixer.parts(3, torch.bfloat16, torch.device("cpu"))
    kept = [parts["window"][name] for name in ("k_rotated", "v")] + list(parts["sinks"].values())
    token = [x[:, :1] for x in parts["window"].values()]
    size = sum(x.numel() * x.element_size() for x in (*kept, *token, *token))
    state = parts["state"]["state"]
    fresh = 3 * ((2 * (6 + 2) + 2) * 16 * 2 + 6 * 16 * 4)
    ours = work.step(SHAPE, 3, 2)
    assert ours.bytes == size + 2 * state.numel() * 4 + fresh
    assert ours.flops == 3 * mixer.flops
    assert work.causal_step(SHAPE, 2, 100, 2) == Work(2 * (200 * 2 + 12) * 16 * 2, 2 * 6 * 100 * 4 * 16)


def test_the_roof_is_the_nearer_of_the_two():
    assert Work(100, 10).seconds(10.0, 10.0) == 10.0
    assert Work(10, 100).seconds(10.0, 10.0) == 10.0


def test_without_a_gpu_it_says_what_to_do():
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    done = subprocess.run(
        [sys.executable, "-m", "evals.kernels"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 1
    assert done.stderr == "error: no CUDA device to measure; --dry-run shows what would be done\n"


@pytest.mark.triton
@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")
def test_a_dry_run_goes_through_every_line_and_claims_nothing(tmp_path):
    out = tmp_path / "figures" / "dry.json"
    command = [sys.executable, "-m", "evals.kernels", "--dry-run", "--out", str(out)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "not measurements" in done.stdout
    result = json.loads(out.read_text(encoding="utf-8"))
    assert result["dry_run"] is True and "not measurements" in result["note"]
    assert {"command", "device", "dtype", "versions", "turns", "roof"} <= result.keys()
    cases = {(row["kind"], row["length"], row["rows"], row["contender"]) for row in result["results"]}
    passes = [(kind, *size) for kind in ("forward", "backward") for size in ((16, 2), (32, 1))]
    steps = [("step", length, batch) for length in (16, 32) for batch in (1, 2)]
    assert cases == {(*case, name) for case in (*passes, *steps) for name in CONTENDERS}
    for row in result["results"]:
        assert 0 < row["least"] <= row["seconds"] <= row["most"] and row["percent_of_roof"] > 0
    assert "dry run: not measurements" in out.with_suffix(".svg").read_text(encoding="utf-8")
    assert "dry run" in plot(result) and "| tiny | step | 2 after 32 |" in markdown(result)
