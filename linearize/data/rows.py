"""Rows of tokens to train on: their packing from documents, and their file format.

Rows are packed without padding: documents follow one another, and a document that reaches a row's end continues in the
next row. A segment is the part of one document within one row. `position_ids` restart at 0 in each segment, which keeps
attention within a segment.
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
"""Pieces of text in order, each with True if it carries loss."""


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
        """Select rows by a slice or a tensor of row numbers."""
        return Rows(self.input_ids[rows], self.labels[rows], self.position_ids[rows])

    def scored(self) -> Rows:
        """The rows with any loss; all rows if none has any."""
        some = (self.labels != NO_LOSS).any(1)
        return self[some] if bool(some.any()) else self

    @staticmethod
    def joined(parts: list[Rows]) -> Rows:
        """Concatenate the rows of all parts."""
        of = zip(*((part.input_ids, part.labels, part.position_ids) for part in parts), strict=True)
        return Rows(*(tensors[0] if len(tensors) == 1 else torch.cat(tensors) for tensors in of))

    @property
    def tokens(self) -> int:
        """N * L."""
        return self.input_ids.numel()


@dataclass(frozen=True)
class TrainingData:
    """Training rows and held-out rows; they share no document."""

    train: Rows
    held_out: Rows
    source: str
    """The names of its sources, for messages."""
    documents: int
    """Number of documents that were read, training and held-out."""
    seconds: float


class Document(NamedTuple):
    """Token ids, and a loss mask."""

    ids: Any
    loss: Any


def pack(documents: Iterable[Document], length: int) -> Rows:
    """Pack documents into rows of `length` tokens; an incomplete last row is dropped."""
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
    """Write `data` to a file atomically. A resumed run trains on the same rows even if their source has changed."""
    tensors = {}
    for side, rows in (("train", data.train), ("held_out", data.held_out)):
        tensors[f"{side}.input_ids"] = rows.input_ids.to(torch.int32)
        tensors[f"{side}.counts"] = rows.labels != NO_LOSS
        tensors[f"{side}.position_ids"] = rows.position_ids.to(torch.int32)
    about = {"source": data.source, "documents": data.documents, "seconds": data.seconds}
    with staged_file(path) as staging:
        save_file(tensors, staging, metadata={"about": json.dumps(about)})


def read_data(path: Path) -> TrainingData:
    """Read a file written by `save_data`."""
    sides = {}
    with safe_open(path, "pt") as file:
        about = json.loads(file.metadata()["about"])
        for side in ("train", "held_out"):
            ids, counts, positions = (file.get_tensor(f"{side}.{n}") for n in ("input_ids", "counts", "position_ids"))
            sides[side] = Rows(ids.long(), torch.where(counts, ids.long(), NO_LOSS), positions.long())
    return TrainingData(sides["train"], sides["held_out"], about["source"], about["documents"], about["seconds"])
