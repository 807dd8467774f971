"""Runs that meet trouble: signals, torn checkpoints, numbers that are none, too little memory, a full disk."""

from __future__ import annotations

import errno
import json
import os
import signal
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import pytest
import torch

from linearize.errors import LinearizeError, ModelError, OutputError
from linearize.recipe import Recipe, load_recipe
from linearize.runtime.interruption import Interrupted
from linearize.training import checkpoints as saving
from linearize.training.checkpoints import MANIFEST, checkpoints, manifest, newest
from linearize.training.loop import StageLoop
from tests.conftest import random_llama
from tests.tables import some
from tests.training.troubles import Weights, at_step, poison, same, steps, trained

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from linearize.training.steps import Batch


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return random_llama(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "stories.txt"
    path.write_text("\n\n".join(f"There were {n} small cats and a dog." for n in range(99)))
    return path


@pytest.fixture(scope="module")
def recipe(tiny: Path, text: Path) -> Callable[..., Recipe]:
    def make(*more: str) -> Recipe:
        changes = (
            f"model={tiny}", "mixer.window=8", f"stages.0.data.source={text}", "stages.0.data.tokens=1024",
            "stages.0.data.held_out=0", "stages.0.length=32", "stages.0.batch_tokens=128", "stages.0.save_every=3",
        )  # fmt: skip
        return load_recipe("window-gla", [*changes, *more])

    return make


@pytest.fixture(scope="module")
def whole(recipe: Callable[..., Recipe], tmp_path_factory: pytest.TempPathFactory) -> Weights:
    """What a run that met no trouble comes to."""
    return trained(recipe(), tmp_path_factory.mktemp("whole"))


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_ends_the_step_saves_and_resumes_bit_for_bit(
    recipe, whole, tmp_path, monkeypatch, request, number, status
):
    # A shell starts work in the background with SIGINT ignored, and a run leaves what is ignored alone.
    inherited = signal.signal(signal.SIGINT, signal.default_int_handler)
    request.addfinalizer(lambda: signal.signal(signal.SIGINT, inherited))
    before = {one: signal.getsignal(one) for one in (signal.SIGINT, signal.SIGTERM)}
    with monkeypatch.context() as patch:
        at_step(patch, 4, lambda: os.kill(os.getpid(), number))
        with pytest.raises(Interrupted, match=f"{number.name} after step 4 of 8, which is saved; .* --resume") as stop:
            trained(recipe(), tmp_path / "cut")
    assert stop.value.status == status
    assert {one: signal.getsignal(one) for one in before} == before
    assert newest(tmp_path / "cut" / "stage-0").name == "checkpoint-4"
    assert same(whole, trained(recipe(), tmp_path / "cut", resume=True))
    assert steps(tmp_path / "cut") == list(range(1, 9))


def test_a_second_signal_is_obeyed_at_once(recipe, tmp_path, monkeypatch):
    def twice() -> None:
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGTERM)

    at_step(monkeypatch, 4, twice)
    with pytest.raises(Interrupted):
        trained(recipe(), tmp_path / "cut")
    assert newest(tmp_path / "cut" / "stage-0").name == "checkpoint-3"


def torn(checkpoint: Path) -> None:
    os.truncate(checkpoint / "optimizer.pt", 100)


def flipped(checkpoint: Path) -> None:
    content = bytearray((checkpoint / "trained.safetensors").read_bytes())
    content[-3] ^= 1
    (checkpoint / "trained.safetensors").write_bytes(content)


def without_a_file(checkpoint: Path) -> None:
    (checkpoint / "random-0.safetensors").unlink()


def without_a_list(checkpoint: Path) -> None:
    (checkpoint / MANIFEST).write_text("{")


@pytest.mark.parametrize("damage", some([torn, flipped, without_a_file, without_a_list], [flipped, without_a_list]))
def test_a_damaged_checkpoint_does_not_count(recipe, whole, tmp_path, monkeypatch, damage):
    def stop() -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        at_step(patch, 7, stop)
        with pytest.raises(KeyboardInterrupt):
            trained(recipe(), tmp_path / "cut")
    folder = tmp_path / "cut" / "stage-0"
    assert [one.name for one in checkpoints(folder)] == ["checkpoint-3", "checkpoint-6"]
    damage(folder / "checkpoint-6")
    assert newest(folder).name == "checkpoint-3"
    said: list[str] = []
    assert same(whole, trained(recipe(), tmp_path / "cut", said, resume=True))
    assert "stage 1: going on from checkpoint-3" in said
    assert steps(tmp_path / "cut") == list(range(1, 9))


def test_a_loss_that_is_no_number_names_step_layer_and_checkpoint(recipe, tmp_path, monkeypatch):
    poison(monkeypatch, {5})
    with pytest.raises(LinearizeError) as caught:
        trained(recipe(), tmp_path / "work")
    told = str(caught.value)
    assert "the loss became nan at step 5, first in base_model.model.model.layers.1.self_attn.o_proj; " in told
    assert f"the last good checkpoint is {tmp_path / 'work' / 'stage-0' / 'checkpoint-3'}; lower lr" in told
    assert "\n" not in told


@pytest.mark.parametrize("clip", [1.0, 0.0])
def test_a_gradient_that_is_no_number_stops_before_the_optimizer(recipe, tmp_path, monkeypatch, clip):
    poison(monkeypatch, {2}, gradient=True)
    with pytest.raises(LinearizeError, match=r"the gradient became nan at step 2, in .*layers\.0.* there is no check"):
        trained(recipe(f"stages.0.clip={clip}"), tmp_path / "work")


@pytest.mark.parametrize("gradient", [False, True])
def test_bad_steps_are_skipped_counted_and_change_nothing(recipe, tmp_path, monkeypatch, gradient):
    seen = poison(monkeypatch, {2, 5}, gradient=gradient)
    said: list[str] = []
    work = tmp_path / "work"
    result = trained(recipe("stages.0.skip_bad_batches=2", "stages.0.warmup=0"), work, said)
    assert all(bool(torch.isfinite(tensor).all()) for tensor in result.values())
    changed = [not same(a, b) for a, b in pairwise(seen)]
    assert changed == [step not in (2, 5) for step in range(1, 8)]
    assert [line for line in said if "skipped" in line] == [
        "step 2 was skipped (1 of at most 2)", "step 5 was skipped (2 of at most 2)",
    ]  # fmt: skip
    counts = [json.loads(line)["skipped"] for line in (work / "metrics.jsonl").read_text().splitlines()]
    assert counts == [0, 1, 1, 1, 2, 2, 2, 2]
    assert manifest(newest(work / "stage-0"))["skipped"] == 2
    poison(monkeypatch, {2, 3, 4}, gradient=gradient)
    with pytest.raises(LinearizeError, match=r"at step 4.*\(2 such steps were skipped before\); the last good"):
        trained(recipe("stages.0.skip_bad_batches=2"), tmp_path / "again")


@pytest.mark.parametrize(("fits", "failing"), [(2, "forward"), (2, "backward"), (1, "backward")])
@pytest.mark.check
def test_too_little_memory_halves_the_micro_batch_and_nothing_else(recipe, tmp_path, monkeypatch, fits, failing):
    small = trained(recipe(f"stages.0.micro_batch={fits}"), tmp_path / "small")
    losses = (tmp_path / "small" / "metrics.jsonl").read_text()
    compute = StageLoop.micro_loss

    def scarce(self: StageLoop, batch: Batch) -> Any:
        too_many = len(batch.input_ids) > fits and self.progress.step >= 2  # later than the first step
        if too_many and failing == "forward":
            raise torch.OutOfMemoryError("CUDA out of memory")
        loss = compute(self, batch)
        return _Backward.apply(loss) if too_many else loss

    monkeypatch.setattr(StageLoop, "micro_loss", scarce)
    said: list[str] = []
    found = trained(recipe("stages.0.micro_batch=4"), tmp_path / "work", said)
    told = [line for line in said if line.startswith("out of memory")]
    assert len(told) == {2: 1, 1: 2}[fits] and f"from here on {fits} rows at a time and {4 // fits} passes" in told[-1]
    for name, tensor in small.items():  # the first steps were taken with 4 rows at once, which rounds otherwise
        torch.testing.assert_close(found[name], tensor, rtol=1e-4, atol=1e-6)
    assert len((tmp_path / "work" / "metrics.jsonl").read_text().splitlines()) == len(losses.splitlines())


class _Backward(torch.autograd.Function):
    """Runs out of memory in the backward pass."""

    @staticmethod
    def forward(ctx: Any, loss: torch.Tensor) -> torch.Tensor:
        return loss.clone()

    @staticmethod
    def backward(ctx: Any, *_: Any) -> Any:
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 1 bytes")


def test_an_attempt_that_failed_leaves_no_trace(recipe, tmp_path, monkeypatch):
    """From the first step on it is bit for bit the run with the smaller micro-batch, though earlier passes of a step
    were computed already when memory ran out."""
    small = trained(recipe("stages.0.micro_batch=1"), tmp_path / "small")
    compute, calls = StageLoop.micro_loss, []

    def scarce(self: StageLoop, batch: Batch) -> Any:
        calls.append(len(batch.input_ids))
        if calls == [2, 2]:  # the second pass of the first step, when gradients of the first one are there
            raise torch.OutOfMemoryError("CUDA out of memory")
        return compute(self, batch)

    monkeypatch.setattr(StageLoop, "micro_loss", scarce)
    assert same(small, trained(recipe("stages.0.micro_batch=2"), tmp_path / "work"))
    assert calls[:6] == [2, 2, 1, 1, 1, 1] and set(calls[2:]) == {1}


def test_no_memory_for_one_row_is_told(recipe, tmp_path, monkeypatch):
    def scarce(*_: Any, **__: Any) -> Any:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(StageLoop, "micro_loss", scarce)
    with pytest.raises(ModelError, match=r"out of memory with one row at a time; .* gradient_checkpointing: true"):
        trained(recipe("stages.0.micro_batch=4"), tmp_path / "work")


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOSPC, "No space left on device"),
        pytest.param(RuntimeError("PytorchStreamWriter failed writing file data/0"), marks=pytest.mark.check),
        RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 8384 vs 8278"),
    ],
)
def test_a_disk_that_fills_up_keeps_the_last_checkpoint(recipe, whole, tmp_path, monkeypatch, error):
    write = saving._write

    def full(folder: Path, *others: Any) -> None:
        write(folder, *others)
        if folder.name == "checkpoint-6":
            raise error

    with monkeypatch.context() as patch:
        patch.setattr(saving, "_write", full)
        with pytest.raises(OutputError) as caught:
            trained(recipe(), tmp_path / "cut")
    told = str(caught.value).lower()
    assert "no space left on device; the checkpoint after step 6 is lost; go on from checkpoint-3 with --resume" in told
    assert [path.name for path in (tmp_path / "cut" / "stage-0").iterdir()] == ["checkpoint-3"]
    assert same(whole, trained(recipe(), tmp_path / "cut", resume=True))


def test_a_disk_that_is_too_small_is_told_before_the_work(recipe, tmp_path, monkeypatch):
    free = type("usage", (), {"free": 1_000_000})
    monkeypatch.setattr("linearize.runtime.files.shutil.disk_usage", lambda _: free)
    with pytest.raises(
        OutputError, match=r"17 MB are needed, and 1 MB are free on that disk; free some space, or name"
    ):
        trained(recipe(), tmp_path / "work")
    assert not (tmp_path / "work" / "metrics.jsonl").exists()
