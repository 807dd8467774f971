"""Checkpoints of a stage: the trained parameters, the optimizer's state, random states and progress.

A checkpoint is atomic: its manifest has each file's SHA-256 and is written last, then the folder is renamed once.
Tensors are saved unsharded, so any number of processes can resume.
"""

from __future__ import annotations

import json
import math
import os
import shutil
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import load_file, save_file

from linearize.errors import LinearizeError
from linearize.runtime import processes
from linearize.runtime.files import flush, sha256, telling
from linearize.training.sharding import is_sharded, part_like, split_state, whole, whole_state

if TYPE_CHECKING:
    from pathlib import Path

    from torch import Tensor, nn

MANIFEST = "manifest.json"
_PREFIX = "checkpoint-"
_TRAINED, _OPTIMIZER, _RANDOM = "trained.safetensors", "optimizer.pt", "random-{}.safetensors"
_KEPT = 2


@dataclass
class Progress:
    """Counts and the best held-out loss of a stage after some steps.

    Attributes:
        step: optimizer steps done.
        skipped: skipped steps among them, because a loss or gradient was not finite.
        best: the minimum held-out loss so far, in nats per token.
        worse: evaluations since the minimum.
        best_step: the step of the checkpoint with the best weights; 0 if the stage ends with its last weights.
    """

    step: int = 0
    skipped: int = 0
    best: float | None = None
    worse: int = 0
    best_step: int = 0

    def note(self, loss: float, *, keeps: bool) -> None:
        """Record the held-out loss after this step.

        Args:
            keeps: True if the stage ends with its best weights.
        """
        self.worse += 1
        if math.isfinite(loss) and (self.best is None or loss < self.best):
            self.best, self.worse = loss, 0
            self.best_step = self.step if keeps else 0


def save_training(
    folder: Path, model: nn.Module, optimizer: torch.optim.Optimizer, progress: Progress, *, done: bool
) -> None:
    """Write the checkpoint after `progress.step` steps and remove old ones; all processes call it, the first writes.

    Args:
        done: True if the stage ends with this step.

    Raises:
        OutputError: the disk is full.
    """
    good = newest(folder)
    kept = f"go on from {good.name} with --resume" if good else "there is no earlier checkpoint"
    target = checkpoint_of(folder, progress.step)
    staging = folder / ".partial" / target.name
    if processes.is_first():
        shutil.rmtree(staging.parent, ignore_errors=True)
    try:
        with telling(folder, f"the checkpoint after step {progress.step} is lost; {kept}"):
            processes.wait()
            staging.mkdir(parents=True, exist_ok=True)
            _write(staging, model, optimizer)
            processes.wait()  # each process has written its random state
            if processes.is_first():
                seal(staging, target, **asdict(progress), done=done)
    finally:
        if processes.is_first():
            shutil.rmtree(staging.parent, ignore_errors=True)
    if processes.is_first():
        complete = checkpoints(folder)
        for old in set(complete).difference(*map(_with_best, complete[-_KEPT:])):
            shutil.rmtree(old, ignore_errors=True)
    processes.wait()


def _write(folder: Path, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """The files of a checkpoint; all processes call it."""
    trained, state = whole_trained(model), optimizer.state_dict()
    state = whole_state(state) if is_sharded(model) else state
    if processes.is_first():
        save_file(trained, folder / _TRAINED)
        torch.save(state, folder / _OPTIMIZER)
    save_file(_random_numbers(), folder / _RANDOM.format(processes.rank()))


def load_training(checkpoint: Path, model: nn.Module, optimizer: torch.optim.Optimizer) -> Progress:
    """Load a checkpoint of `save_training`.

    Raises:
        LinearizeError: it does not fit the model, or an earlier version wrote it.
    """
    progress = progress_of(checkpoint)
    load_trained(model, checkpoint)
    state = torch.load(checkpoint / _OPTIMIZER, map_location="cpu", weights_only=True)
    optimizer.load_state_dict(split_state(state, optimizer) if is_sharded(model) else state)
    numbers = checkpoint / _RANDOM.format(processes.rank())
    if numbers.is_file():  # missing for a process that the earlier run did not have
        saved = load_file(numbers)
        torch.set_rng_state(saved["cpu"])
        if "cuda" in saved and torch.cuda.is_available():
            torch.cuda.set_rng_state(saved["cuda"])
    return progress


def progress_of(checkpoint: Path) -> Progress:
    """The progress saved in a checkpoint.

    Raises:
        LinearizeError: an earlier version wrote it.
    """
    told = manifest(checkpoint) or {}
    if "step" not in told:
        raise LinearizeError(f"{checkpoint}: an earlier version of linearize wrote it; start again without --resume")
    return Progress(**{name: told[name] for name in asdict(Progress())})


def checkpoint_of(folder: Path, step: int) -> Path:
    """The folder of a stage's checkpoint after `step` steps."""
    return folder / f"{_PREFIX}{step}"


def _with_best(checkpoint: Path) -> set[Path]:
    """A checkpoint and the earlier one with the best weights, which the stage may end with."""
    best = (manifest(checkpoint) or {}).get("best_step", 0)
    return {checkpoint, checkpoint_of(checkpoint.parent, best)} if best else {checkpoint}


def is_done(checkpoint: Path) -> bool:
    """True if the stage ended with this checkpoint."""
    return bool((manifest(checkpoint) or {}).get("done"))


def _random_numbers() -> dict[str, Tensor]:
    states = {"cpu": torch.get_rng_state()}
    return {**states, "cuda": torch.cuda.get_rng_state()} if torch.cuda.is_available() else states


def whole_trained(model: nn.Module) -> dict[str, Tensor]:
    """The trained parameters, unsharded and on the CPU; all processes must call it."""
    return {n: whole(p.detach()).cpu().contiguous() for n, p in model.named_parameters() if p.requires_grad}


def set_trained(model: nn.Module, values: dict[str, Tensor]) -> None:
    """Set the trained parameters."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                parameter.copy_(part_like(values[name], parameter))


def load_trained(model: nn.Module, folder: Path) -> None:
    """Load the trained parameters of a checkpoint.

    Raises:
        LinearizeError: they do not fit the model.
    """
    saved = load_file(folder / _TRAINED)
    trained = {n: p.shape for n, p in model.named_parameters() if p.requires_grad}
    if {n: x.shape for n, x in saved.items()} != trained:
        raise LinearizeError(f"{folder}: the checkpoint is of another recipe; start again without --resume")
    set_trained(model, saved)


def seal(staging: Path, target: Path, **facts: Any) -> None:
    """Turn a finished checkpoint in `staging` into `target`: manifest, sync, rename, sync.

    Args:
        facts: further entries of the manifest.
    """
    files = {
        path.name: {"bytes": path.stat().st_size, "sha256": sha256(path)}
        for path in sorted(staging.iterdir())
        if path.is_file()
    }
    (staging / MANIFEST).write_text(json.dumps({**facts, "files": files}, indent=1) + "\n", encoding="utf-8")
    for path in staging.iterdir():
        flush(path)
    flush(staging)
    shutil.rmtree(target, ignore_errors=True)
    os.replace(staging, target)
    flush(target.parent)


def manifest(checkpoint: Path) -> dict[str, Any] | None:
    """A checkpoint's manifest; None if it cannot be read."""
    try:
        found = json.loads((checkpoint / MANIFEST).read_text(encoding="utf-8"))
        return found if isinstance(found["files"], dict) else None
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return None


def checkpoints(folder: Path) -> list[Path]:
    """The complete checkpoints in a stage's folder, oldest first, by the sizes of their files."""
    found = [
        path
        for path in folder.glob(f"{_PREFIX}*")
        if path.name.removeprefix(_PREFIX).isdigit() and _fits(path, digests=False)
    ]
    return sorted(found, key=step_of)


def newest(folder: Path) -> Path | None:
    """The newest checkpoint in a stage's folder whose files, and those of its best weights, have their digests."""
    complete = reversed(checkpoints(folder))
    return next((one for one in complete if all(_fits(each, digests=True) for each in _with_best(one))), None)


def step_of(checkpoint: Path) -> int:
    """The optimizer step after which it was written."""
    return int(checkpoint.name.removeprefix(_PREFIX))


def _fits(checkpoint: Path, *, digests: bool) -> bool:
    told = manifest(checkpoint)
    if told is None or not told["files"]:
        return False
    try:
        return all(
            (checkpoint / name).stat().st_size == file["bytes"]
            and (not digests or sha256(checkpoint / name) == file["sha256"])
            for name, file in told["files"].items()
        )
    except (OSError, KeyError, TypeError):
        return False


def stage_to_resume(work: Path, stages: int) -> int:
    """The last stage that has a checkpoint.

    Raises:
        LinearizeError: an earlier version wrote it.
    """
    found = [(number, one) for number in range(stages) for one in checkpoints(work / f"stage-{number}")]
    for _, one in found:
        progress_of(one)
    return max((number for number, _ in found), default=0)
