"""The teacher's place while its student trains: on the same device, in CPU memory, or on disk as stored
log-probabilities.

The files hold the k most likely next tokens of every position with loss: k int32 and k + 1 float16, 386 bytes at
k = 64. The shards' folder is named by a hash of the teacher's weights, the rows, k and the temperature, so another run
on the same rows reuses them. A shard is written atomically, so an interrupted run continues with the next one.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import time
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from linearize.data.rows import NO_LOSS
from linearize.errors import OutputError
from linearize.evaluation.tasks.hidden import logits_at
from linearize.runtime import cache, processes
from linearize.runtime.claims import claimed
from linearize.runtime.files import staged_file
from linearize.runtime.folders import cache_folder
from linearize.sources.documents import documents_apart
from linearize.sources.fingerprint import fingerprint
from linearize.sources.source import load_model
from linearize.training.objective import Counted, TopK, counted, top_k_of
from linearize.training.sharding import is_sharded
from linearize.training.sharding import shard as shard_model

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from torch import Tensor
    from transformers import PreTrainedModel

    from linearize.data.rows import Rows
    from linearize.recipe import Stage
    from linearize.sources.source import Source

FORMAT_VERSION = 2
"""Part of the cache's key: raise it when the format of the files changes."""

_SHARD_ROWS = 256


def wants_teacher(stage: Stage) -> bool:
    """True if a stage's objective needs the teacher."""
    return "sft" not in stage.weights or len(stage.weights) > 1


class KeptLogits:
    """A teacher's most likely tokens for rows, on disk.

    Args:
        folder: the folder of the shards.
        rows: the number of rows.
        held: a reference that keeps the folder in the cache.
    """

    def __init__(self, folder: Path, rows: int, held: object | None = None) -> None:
        self.folder, self.rows, self._held = folder, rows, held
        self._open: dict[int, Any] = {}

    def of(self, rows: Tensor, device: torch.device) -> TopK:
        """The teacher's stored log-probabilities at the positions with loss of `rows` `[B]`, one row after another."""
        tokens, logs = [], []
        for row in rows.tolist():
            number, place = divmod(row, _SHARD_ROWS)
            if number not in self._open:
                self._open[number] = safe_open(_shard(self.folder, number), "pt")
            file = self._open[number]
            start, stop = file.get_slice("starts")[place : place + 2].tolist()
            tokens.append(file.get_slice("tokens")[start:stop])
            logs.append(file.get_slice("log")[start:stop])
        return TopK(torch.cat(tokens).to(device, torch.int64), torch.cat(logs).to(device))


def keep_logits(
    teacher: PreTrainedModel,
    rows: Rows,
    *,
    top_k: int,
    temperature: float,
    batch: int,
    progress: Callable[[str], None],
) -> KeptLogits:
    """Write the teacher's most likely tokens on `rows`, `batch` rows at a time; existing shards are kept.

    Raises:
        OutputError: the disk has not enough space.
    """
    key = json.dumps([FORMAT_VERSION, fingerprint(teacher), _digest(rows), top_k, temperature, _SHARD_ROWS])
    folder = cache_folder() / "teacher-logits" / hashlib.sha256(key.encode()).hexdigest()[:32]
    most = cache.limit()
    folder.mkdir(parents=True, exist_ok=True)
    held = cache.hold(folder)
    starts = range(0, len(rows), _SHARD_ROWS)
    missing = [n for n in range(len(starts)) if not _shard(folder, n).is_file()]
    scored = int((rows.labels[:, 1:] != NO_LOSS).sum())
    size = scored * (2 * (top_k + 1) + 4 * top_k) * len(missing) // max(len(starts), 1)
    if size > (free := shutil.disk_usage(folder).free):
        raise OutputError(
            f"{folder}: {size / 1e9:.1f} GB of the teacher's logits do not fit into {free / 1e9:.1f} GB; lower top_k "
            "or data.tokens, or take teacher_at: device"
        )
    if size > most:
        progress(
            f"teacher: {size / 1e9:.1f} GB of logits are more than the {most / 1e9:g} GB that the cache keeps "
            f"({cache.LIMIT}): they may be removed after this run"
        )
    if not missing:
        progress(f"teacher: top {top_k} of {scored:,} tokens, written before")
    reported, began = time.monotonic(), time.monotonic()
    for done, number in enumerate(missing):
        path = _shard(folder, number)
        with claimed(path, wait=True):  # another run may be writing the same shard
            if not path.is_file():
                _write(path, teacher, rows[_part(starts[number])], top_k, temperature, batch)
                cache.make_room(folder, progress)
        now = time.monotonic()
        if now - reported > processes.seconds_between_lines() or done + 1 == len(missing):
            reported = now
            left = (now - began) / (done + 1) * (len(missing) - done - 1)
            progress(f"teacher: top {top_k}, shard {done + 1:,} of {len(missing):,}, {left:,.0f} s left")
    return KeptLogits(folder, len(rows), held)


def logits_of(teacher: PreTrainedModel, input_ids: Tensor, position_ids: Tensor, at: Counted) -> Tensor:
    """A teacher's logits `[N, V]` at N positions of packed rows `[B, T]`, without attention across documents."""
    places: dict[str, Any] = {"position_ids": position_ids, **documents_apart(teacher, position_ids)}
    return logits_at(teacher, at.rows, at.columns, input_ids=input_ids, use_cache=False, **places)


@contextmanager
def offloaded(teacher: PreTrainedModel, device: torch.device) -> Iterator[None]:
    """Run `teacher` on `device` with its weights in CPU memory; each layer's weights are copied when it runs."""
    from accelerate import cpu_offload
    from accelerate.hooks import remove_hook_from_submodules

    home = teacher.device
    teacher.to("cpu")
    cpu_offload(teacher, execution_device=device)
    try:
        yield
    finally:
        remove_hook_from_submodules(teacher)
        teacher.to(home)


class Teacher:
    """The pretrained model, loaded at its first use.

    Args:
        source: None if no stage uses a teacher.
        model: the model, if already loaded; it is then not released.
    """

    def __init__(self, source: Source | None, dtype: str, model: PreTrainedModel | None) -> None:
        self.source, self.dtype, self.model = source, dtype, model
        self.is_ours = model is None

    def __call__(self, device: str | None = None) -> PreTrainedModel:
        if self.model is None:
            assert self.source is not None  # noqa: S101 - for the type checker
            self.model = load_model(self.source, dtype=self.dtype, device=device).requires_grad_(False)
        return self.model

    @contextmanager
    def serving(
        self, stage: Stage, rows: Rows, say: Callable[[str], None], *, shard: bool = False
    ) -> Iterator[PreTrainedModel | KeptLogits | None]:
        """Provide the teacher of a stage at its `teacher_at`; None if the stage needs no teacher."""
        if not wants_teacher(stage):
            yield None
        elif stage.teacher_at == "disk" and stage.top_k is not None:
            options: dict[str, Any] = {"top_k": stage.top_k, "temperature": stage.temperature}
            with processes.first_goes_ahead():
                kept = keep_logits(self(), rows, **options, batch=stage.micro_batch, progress=say)
            if self.is_ours:
                self.model = None
            yield kept
        elif stage.teacher_at == "cpu":
            with offloaded(self(), self().device):
                yield self()
        else:
            if shard and (self.model is None or not is_sharded(self.model)):
                with processes.in_turns():
                    shard_model(self("cpu"))
            yield self()


def _part(start: int) -> slice:
    return slice(start, start + _SHARD_ROWS)


def _shard(folder: Path, number: int) -> Path:
    return folder / f"{number:06d}.safetensors"


@torch.no_grad()
def _write(path: Path, teacher: PreTrainedModel, rows: Rows, top_k: int, temperature: float, batch: int) -> None:
    tokens, logs, counts = [], [], [torch.zeros(1, dtype=torch.int64)]
    for start in range(0, len(rows), batch):
        part = rows[slice(start, start + batch)]
        ids, positions, labels = (x.to(teacher.device) for x in (part.input_ids, part.position_ids, part.labels))
        top = top_k_of(logits_of(teacher, ids, positions, counted(labels)), top_k, temperature)
        tokens.append(top.tokens.to("cpu", torch.int32))
        logs.append(top.log.to("cpu", torch.float16))
        counts.append((part.labels[:, 1:] != NO_LOSS).sum(1))
    shard = {"tokens": torch.cat(tokens), "log": torch.cat(logs), "starts": torch.cat(counts).cumsum(0)}
    with staged_file(path) as staging:
        save_file(shard, staging)


def _digest(rows: Rows) -> str:
    digest = hashlib.sha256()
    for tensor in (rows.input_ids, rows.labels, rows.position_ids):
        digest.update(f"{tuple(tensor.shape)}".encode())
        digest.update(tensor.contiguous().numpy().tobytes())
    return digest.hexdigest()
