"""What single recurrences can do, and that the scripts which measure it run."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from evals.recurrences import linear_time, mqar, parity
from linearize.model.configuration import MixerConfig
from linearize.model.recurrences import RECURRENCES, build_recurrence
from linearize.model.recurrences.base import _SEGMENT

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "evals" / "recurrences"


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("negative_eigenvalues", [True, False])
@pytest.mark.check
def test_parity_holds_beyond_the_trained_length_only_with_negative_eigenvalues(negative_eigenvalues):
    lengths = (parity.TRAINED_LENGTH, 256)
    accuracies = parity.run(negative_eigenvalues=negative_eigenvalues, seed=0, lengths=lengths)
    if negative_eigenvalues:
        assert min(accuracies.values()) >= parity.HOLDS, accuracies
    else:
        assert accuracies[256] < 0.6, accuracies


def test_recall_draws_each_key_once_after_its_pair():
    tokens, targets = mqar.draw(8, torch.Generator().manual_seed(0), pairs=4, length=20)
    for row, wanted in zip(tokens.tolist(), targets.tolist(), strict=True):
        pairs = dict(zip(row[:8:2], row[1:8:2], strict=True))
        asked = [(key, mqar.KEYS + value) for key, value in zip(row, wanted, strict=True) if value != -100]
        assert sorted(asked) == sorted(pairs.items())
        assert wanted[:8] == [-100] * 8
        assert row[8:].count(mqar.FILLER) == 8


@pytest.mark.check
def test_recall_script_writes_one_result_and_keeps_the_others(tmp_path):
    out = tmp_path / "mqar.json"
    for name in ("mingru", "softmax"):
        command = [sys.executable, "-m", "evals.recurrences.mqar", "--only", name, "--steps", "20", "--out", str(out)]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
    written = json.loads(out.read_text(encoding="utf-8"))
    assert {"command", "torch", "python", "cpu", "threads", "setting"} <= written.keys()
    assert [result["recurrence"] for result in written["results"]] == ["mingru", "softmax"]
    assert all(0 <= r["accuracy"] <= 1 and math.isfinite(r["last_loss"]) for r in written["results"])
    assert "| mingru | 16 |" in done.stdout


def test_time_per_token_is_taken_for_every_length():
    taken = linear_time.microseconds_per_token("gla", lengths=(64, 128), turns=1)
    assert list(taken) == [64, 128] and all(value > 0 for value in taken.values())


@pytest.mark.parametrize("name", RECURRENCES)
def test_segments_change_nothing(name):
    torch.manual_seed(0)
    layer = linear_time.LAYER
    module = build_recurrence(MixerConfig(layers=[0], recurrence=name), layer, depth=1.0)
    tokens = _SEGMENT + 70
    q, k, v = (torch.randn(2, tokens, heads, layer.key_width) for heads in (9, 3, 3))
    writes = torch.arange(tokens) < torch.tensor([[tokens], [tokens - 100]])
    with torch.no_grad():
        whole, cut = module.state(2, q.device), module.state(2, q.device)
        expected, expected_mass = module(q, k, v, k, writes, whole)
        read, mass = module.in_segments(q, k, v, k, writes, cut)
        unkept, _ = module.in_segments(q, k, v, k, writes, None)
    torch.testing.assert_close(read, expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(unkept, read, rtol=0, atol=0)
    assert (mass is None) == (expected_mass is None)
    if mass is not None:
        torch.testing.assert_close(mass, expected_mass, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(cut, whole, rtol=1e-4, atol=1e-4)


def test_the_committed_results_cover_every_recurrence():
    recall = json.loads((RESULTS / "mqar.json").read_text(encoding="utf-8"))
    times = json.loads((RESULTS / "linear_time.json").read_text(encoding="utf-8"))
    assert [result["recurrence"] for result in recall["results"]] == [*RECURRENCES, "softmax"]
    assert [result["recurrence"] for result in times["results"]] == list(RECURRENCES)
    page = (ROOT / "docs" / "recurrences.md").read_text(encoding="utf-8")
    for result in recall["results"]:
        assert f"{result['accuracy']:.3f}" in page, result


def test_the_page_has_the_measured_figures():
    page = (ROOT / "docs" / "recurrences.md").read_text(encoding="utf-8")
    times = json.loads((RESULTS / "linear_time.json").read_text(encoding="utf-8"))["results"]
    for row in times:
        figures = " | ".join(f"{value:.1f}" for value in row["microseconds_per_token"].values())
        ratios = f"{row['longest_to_shortest']:.2f} | {row['longest_to_shortest_with_memory_kept']:.2f}"
        assert f"| `{row['recurrence']}` | {figures} | {ratios} |" in page
    for row in json.loads((RESULTS / "mqar.json").read_text(encoding="utf-8"))["results"]:
        name = row["recurrence"] if row["recurrence"] == "softmax" else f"`{row['recurrence']}`"
        (line,) = (line for line in page.split("## Recall")[0].splitlines() if line.startswith(f"| {name} |"))
        assert f"| {row['accuracy']:.3f} |" in line
