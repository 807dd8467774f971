"""Trouble in each kind of stage: align, distill and sft, alone and one after another."""

from __future__ import annotations

import json
import os
import signal
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import pytest
import torch
from safetensors.torch import load_file

from linearize.errors import LinearizeError
from linearize.recipe import Recipe, load_recipe
from linearize.runtime.interruption import Interrupted
from linearize.training.checkpoints import manifest, newest
from linearize.training.loop import StageLoop
from tests.conftest import random_llama
from tests.tables import some
from tests.training.troubles import at_step, poison, same, trained

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from linearize.training.steps import Batch
    from tests.training.troubles import Weights

KINDS: dict[str, dict[str, Any]] = {
    "align, beyond the window": {"objective": "align", "train": "mixer", "beyond": 1},
    "align, the whole layer": {"objective": "align", "train": "mixer", "beyond": 0},
    "distill": {"objective": "distill", "hide_window": 0.5},
    "distill, a teacher on disk": {"objective": "distill", "top_k": 8, "teacher_at": "disk"},
    "sft": {"objective": "sft"},
}
IN_A_ROW = (KINDS["align, beyond the window"], KINDS["distill"], KINDS["sft"])
"""A run of three stages."""


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Recipe]:
    tiny, text = random_llama(tmp_path_factory.mktemp("tiny")), tmp_path_factory.mktemp("text") / "stories.txt"
    text.write_text("\n\n".join(f"There were {n} small cats and a dog." for n in range(99)))

    def make(*stages: dict[str, Any], tokens: int = 512, **more: Any) -> Recipe:
        data = {"source": str(text), "tokens": tokens, "held_out": 0}
        common = {"data": data, "length": 32, "batch_tokens": 128, "save_every": 2, "warmup": 0}
        listed = [{**common, **stage, **more} for stage in stages]
        return load_recipe("window-gla", [f"model={tiny}", "mixer.window=8", f"stages={json.dumps(listed)}"])

    return make


@pytest.fixture(autouse=True)
def _cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LINEARIZE_CACHE", str(tmp_path / "cache"))


@pytest.fixture(scope="module")
def whole(recipe: Callable[..., Recipe], tmp_path_factory: pytest.TempPathFactory) -> Weights:
    """What the run of three stages comes to without any trouble."""
    return trained(recipe(*IN_A_ROW), tmp_path_factory.mktemp("whole"))


def metrics(work: Path, *names: str) -> list[list[Any]]:
    lines = (work / "metrics.jsonl").read_text().splitlines()
    return [[record[name] for name in names] for record in map(json.loads, lines)]


@pytest.mark.parametrize(
    "place",
    some(
        [(0, 3, "SIGTERM"), (1, 1, "killed"), (1, 3, "killed"), (2, 1, "SIGTERM"), (2, 4, "killed")],
        [(1, 1, "killed"), (2, 4, "killed")],
    ),
)
def test_a_run_of_stages_goes_on_bit_for_bit(recipe, whole, tmp_path, monkeypatch, place):
    stage, step, end = place

    class Killed(BaseException):
        pass

    def stop() -> None:
        if end == "killed":
            raise Killed
        os.kill(os.getpid(), signal.SIGTERM)

    with monkeypatch.context() as patch:
        at_step(patch, step, stop, stage)
        with pytest.raises((Killed, Interrupted)):
            trained(recipe(*IN_A_ROW), tmp_path / "cut")
    reached = metrics(tmp_path / "cut", "stage", "step")[-1]
    assert reached[0] == stage and step <= reached[1] <= step + 1
    assert same(whole, trained(recipe(*IN_A_ROW), tmp_path / "cut", resume=True))
    assert metrics(tmp_path / "cut", "stage", "step") == [[n, k] for n in range(3) for k in range(1, 5)]


@pytest.mark.parametrize("kind", some(list(KINDS), ["align, beyond the window", "distill"]))
def test_a_loss_that_is_no_number_stops_each_kind_of_stage(recipe, tmp_path, monkeypatch, kind):
    at = "mixer" if kind == "align, beyond the window" else "o_proj"
    poison(monkeypatch, {4}, at=at)
    work = tmp_path / "work"
    with pytest.raises(LinearizeError) as caught:
        trained(recipe(KINDS[kind]), work)
    told = str(caught.value)
    inside = "" if "align" in kind else "base_model.model."  # peft's
    assert f"the loss became nan at step 4, first in {inside}model.layers.1.self_attn.{at}; " in told
    assert f"the last good checkpoint is {work / 'stage-0' / 'checkpoint-2'}; " in told


@pytest.mark.parametrize(
    "bad",
    some(
        [*((kind, False) for kind in KINDS), ("align, the whole layer", True)],
        [("align, the whole layer", True), ("align, beyond the window", False), ("sft", False)],
    ),
)
def test_a_bad_step_of_each_kind_changes_nothing_and_is_counted(recipe, tmp_path, monkeypatch, bad):
    kind, gradient = bad
    at = "mixer" if kind == "align, beyond the window" else "o_proj"
    seen = poison(monkeypatch, {2}, gradient=gradient, at=at)
    work = tmp_path / "work"
    after = trained(recipe(KINDS[kind], skip_bad_batches=1), work)
    assert all(bool(torch.isfinite(tensor).all()) for tensor in after.values())
    assert [not same(a, b) for a, b in pairwise([*seen, after_of(seen[0], work)])] == [True, False, True, True]
    assert metrics(work, "skipped") == [[0], [1], [1], [1]]
    assert manifest(newest(work / "stage-0"))["skipped"] == 1


def after_of(started: Weights, work: Path) -> Weights:
    """The weights in the last checkpoint, under the names that they had at the start."""
    saved = load_file(newest(work / "stage-0") / "trained.safetensors")
    assert saved.keys() == started.keys()
    return saved


_FIXED = [kind for kind in KINDS if kind != "distill"]  # whose windows are drawn anew


@pytest.mark.parametrize("kind", some(_FIXED, ["align, the whole layer", "distill, a teacher on disk"]))
def test_too_little_memory_halves_the_micro_batch_of_each_kind(recipe, tmp_path, monkeypatch, kind):
    small = trained(recipe(KINDS[kind], micro_batch=1), tmp_path / "small")
    compute, passes = StageLoop.micro_loss, []

    def scarce(self: StageLoop, batch: Batch) -> Any:
        passes.append(len(batch.input_ids))
        if len(passes) > 1 and passes[-1] > 1:  # the second pass of the first step, and what is tried instead
            raise torch.OutOfMemoryError("CUDA out of memory")
        return compute(self, batch)

    monkeypatch.setattr(StageLoop, "micro_loss", scarce)
    said: list[str] = []
    found = trained(recipe(KINDS[kind], micro_batch=2), tmp_path / "work", said)
    assert passes[:6] == [2, 2, 1, 1, 1, 1] and set(passes[2:]) == {1}
    assert any("from here on 1 rows at a time and 4 passes" in line for line in said)
    for name, tensor in small.items():
        torch.testing.assert_close(found[name], tensor, rtol=1e-4, atol=1e-6)
    losses = [metrics(tmp_path / name, "loss", "grad_norm") for name in ("small", "work")]
    torch.testing.assert_close(*map(torch.tensor, losses), rtol=1e-4, atol=1e-6)
