"""Rows of tokens to train on, how documents are packed into them, and rows kept in a file.

Rows are packed without padding: documents follow one another, and one that reaches a row's end goes on in the next
row. Each stretch of one document within one row is a segment; `position_ids` restart at 0 in each, which is what tells
a model that nothing may be seen across the boundary.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from linearize.runtime.files import staged_file

if TYPE_CHECKING:
    from collections.abc import Iterable
    from pathlib import Path

NO_LOSS = -100
"""The label that cross-entropy ignores."""

Pieces = list[tuple[str, bool]]
"""Text in order, each piece with whether it carries loss."""


@dataclass(frozen=True)
class Rows:
    """Packed rows: N rows of L tokens, int64, on the CPU."""

    input_ids: Tensor
    """[N, L]"""
    labels: Tensor
    """[N, L], not shifted (logits at t-1 predict labels[t]); -100 at the first token of each segment and in prompts."""
    position_ids: Tensor
    """[N, L], 0 at the first token of each segment."""

    def __len__(self) -> int:
        return len(self.input_ids)

    def __getitem__(self, rows: slice | Tensor) -> Rows:
        """Some of the rows: a slice, or a tensor of row numbers."""
        return Rows(self.input_ids[rows], self.labels[rows], self.position_ids[rows])

    def scored(self) -> Rows:
        """Those of the rows that carry any loss; all of them where none does."""
        some = (self.labels != NO_LOSS).any(1)
        return self[some] if bool(some.any()) else self

    @staticmethod
    def joined(parts: list[Rows]) -> Rows:
        """The rows of all parts, one after another."""
        of = zip(*((part.input_ids, part.labels, part.position_ids) for part in parts), strict=True)
        return Rows(*(tensors[0] if len(tensors) == 1 else torch.cat(tensors) for tensors in of))

    @property
    def tokens(self) -> int:
        """N * L."""
        return self.input_ids.numel()


@dataclass(frozen=True)
class TrainingData:
    """Rows to train on and rows kept apart for evaluation; no document is in both."""

    train: Rows
    held_out: Rows
    source: str
    """The names of its sources, for a person."""
    documents: int
    """Documents that were read for these rows, on both sides."""
    seconds: float


class Document(NamedTuple):
    """Token ids, and for each whether it carries loss."""

    ids: Any
    loss: Any


def pack(documents: Iterable[Document], length: int) -> Rows:
    """Documents one after another in rows of `length` tokens; what does not fill a last row is dropped."""
    documents = list(documents)
    total = sum(len(d.ids) for d in documents) // length * length
    ids = _flat([d.ids for d in documents], torch.int64)[:total]
    loss = _flat([d.loss for d in documents], torch.bool)[:total]
    starts = torch.tensor([0, *(len(d.ids) for d in documents)]).cumsum(0)
    place = torch.arange(total)
    first = torch.zeros(total, dtype=torch.bool)
    first[::length] = True
    first[starts[starts < total]] = True
    position = place - torch.where(first, place, 0).cummax(0).values if total else place
    labels = torch.where(loss & ~first, ids, NO_LOSS)
    return Rows(ids.view(-1, length), labels.view(-1, length), position.view(-1, length))


def _flat(parts: list[Any], dtype: torch.dtype) -> Tensor:
    return torch.cat([torch.empty(0, dtype=dtype), *(torch.as_tensor(part, dtype=dtype) for part in parts)])


def save_data(data: TrainingData, path: Path) -> None:
    """Keeps `data` in a file, at once or not at all: a run that is resumed trains on the same rows whatever has become
    of their source."""
    tensors = {}
    for side, rows in (("train", data.train), ("held_out", data.held_out)):
        tensors[f"{side}.input_ids"] = rows.input_ids.to(torch.int32)
        tensors[f"{side}.counts"] = rows.labels != NO_LOSS
        tensors[f"{side}.position_ids"] = rows.position_ids.to(torch.int32)
    about = {"source": data.source, "documents": data.documents, "seconds": data.seconds}
    with staged_file(path) as staging:
        save_file(tensors, staging, metadata={"about": json.dumps(about)})


def read_data(path: Path) -> TrainingData:
    """Reads the file that `save_data` wrote."""
    sides = {}
    with safe_open(path, "pt") as file:
        about = json.loads(file.metadata()["about"])
        for side in ("train", "held_out"):
            ids, counts, positions = (file.get_tensor(f"{side}.{n}") for n in ("input_ids", "counts", "position_ids"))
            sides[side] = Rows(ids.long(), torch.where(counts, ids.long(), NO_LOSS), positions.long())
    return TrainingData(sides["train"], sides["held_out"], about["source"], about["documents"], about["seconds"])
