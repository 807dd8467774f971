"""The optimizer steps of a stage, and the rows of each step.

Rows are shuffled in each epoch. The last step of an epoch may have fewer rows. All processes compute the same plan, so
splitting a step's rows needs no communication.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from linearize.runtime import processes

if TYPE_CHECKING:
    from linearize.recipe import Stage

_EVALUATIONS = 10
# Rows that all evaluations of a stage may read, as a share of the rows that it trains on.
_EVALUATED = 0.1


class Batch(NamedTuple):
    """Packed rows on the model's device.

    Attributes:
        rows: `[B]`, their indexes in the training data.
        real: `[B]`, False for a repeated row, which has no loss.
        input_ids, labels, position_ids: `[B, T]`.
    """

    rows: Tensor
    real: Tensor
    input_ids: Tensor
    labels: Tensor
    position_ids: Tensor

    def split(self, size: int) -> list[Batch]:
        return [Batch(*parts) for parts in zip(*(x.split(size) for x in self), strict=True)]


@dataclass(frozen=True)
class Steps:
    """The plan of a stage over `rows` packed rows."""

    stage: Stage
    rows: int
    seed: int = 0

    @property
    def per_step(self) -> int:
        """Rows of a full step, in all processes together."""
        return self.stage.batch_tokens // self.stage.length

    @property
    def per_epoch(self) -> int:
        """Steps of an epoch."""
        return math.ceil(self.rows / self.per_step)

    @property
    def total(self) -> int:
        """Steps of the stage, at least one."""
        whole, part = divmod(self.stage.epochs, 1)
        return max(1, round(whole) * self.per_epoch + math.ceil(round(part * self.rows, 6) / self.per_step))

    def tokens_after(self, steps: int) -> int:
        """Tokens read in the first `steps` steps; a token read in two epochs counts twice."""
        epochs, rest = divmod(steps, self.per_epoch)
        return (epochs * self.rows + min(rest * self.per_step, self.rows)) * self.stage.length

    def rows_of(self, step: int) -> Tensor:
        """Indexes of the rows that step `step`, counted from 0, reads in all processes together."""
        epoch, place = divmod(step, self.per_epoch)
        return _order(self.rows, self.seed + epoch)[place * self.per_step : (place + 1) * self.per_step]

    def share_of(self, step: int) -> tuple[Tensor, Tensor]:
        """This process's rows of a step, and False for rows that are repeated.

        Shares are equally long, because collective operations need the same number of passes in all processes; a
        repeated row has no loss.
        """
        rows, count = self.rows_of(step), processes.count()
        even = torch.arange(math.ceil(len(rows) / count) * count)[processes.rank() :: count]
        return rows[even.clamp(max=len(rows) - 1)], even < len(rows)

    @property
    def save_every(self) -> int:
        """Steps between checkpoints."""
        return self.stage.save_every or math.ceil(self.total / 10)

    def eval_every(self, held_out: int) -> int:
        """Steps between evaluations on `held_out` rows; 0 for none."""
        if not held_out:
            return 0
        if self.stage.eval_every is not None:
            return self.stage.eval_every
        read = self.tokens_after(self.total) // self.stage.length
        needed = self.stage.keep == "best" or self.stage.patience is not None
        times = _EVALUATIONS if needed else min(_EVALUATIONS, int(_EVALUATED * read / held_out))
        return math.ceil(self.total / times) if times else 0


@lru_cache(maxsize=2)
def _order(rows: int, seed: int) -> Tensor:
    return torch.randperm(rows, generator=torch.Generator().manual_seed(seed))
