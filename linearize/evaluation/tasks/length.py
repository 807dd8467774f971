"""Loss along long texts, which a state that fills up or positions beyond those of training raise."""

from __future__ import annotations

import hashlib
import json
import math
import warnings
from abc import abstractmethod
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from linearize.errors import DataError, ModelError, hint_for, is_out_of_memory
from linearize.evaluation.tasks.excerpts import book_rows
from linearize.evaluation.tasks.names import LENGTH
from linearize.evaluation.tasks.reading import Kept, losses
from linearize.evaluation.tasks.task import Item, Task, evaluating
from linearize.sources.limits import learned_positions

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from transformers import PreTrainedModel, PreTrainedTokenizerBase

DEFAULT_LENGTH = 8192
SHORTEST_LENGTH = 64
FIRST_BUCKET = 64
_VERSION = 1


def length_tasks(
    tokenizer: PreTrainedTokenizerBase,
    names: Sequence[str],
    *,
    data: Path | None,
    length: int | None = None,
    documents: int = 8,
    seed: int = 0,
) -> list[Task]:
    """Tasks of this suite, in the order of the names; a repeated name counts once.

    Args:
        tokenizer: of all models that are scored.
        names: of `LENGTH`.
        data: the folder that holds `excerpts.BOOK`.
        length: tokens that are read of each text; None for 8192. Texts longer than those of training show
            how the loss goes on from there. A model with a table of learned positions reads up to its last one: its
            curve is shorter, with a warning.
        documents: how many texts.
        seed: of the places in the book where they start.

    Raises:
        DataError: an unknown task, settings that make no sense, or no book.
    """
    for name in names:
        if name not in LENGTH:
            raise DataError(f"no length task called '{name}': {hint_for(name, LENGTH, most=1)}")
    length = DEFAULT_LENGTH if length is None else length
    if length < SHORTEST_LENGTH:
        raise DataError(f"length is {length}: give {SHORTEST_LENGTH} tokens or more")
    if documents < 1:
        raise DataError(f"documents is {documents}: give 1 or more")
    texts = LongTexts(book_rows(tokenizer, data, rows=documents, tokens=length + 1, seed=seed))
    return [_TASKS[name](texts) for name in dict.fromkeys(names)]


class LongTexts:
    """Rows of T + 1 tokens, and the losses of the model that is being scored: each row is read once for all tasks.

    Attributes:
        rows: token ids.
    """

    def __init__(self, rows: list[list[int]]) -> None:
        self.rows = rows
        self._losses = Kept()

    @property
    def length(self) -> int:
        """T: the tokens that are read; the last one of a row is only predicted."""
        return len(self.rows[0]) - 1

    def losses(self, model: PreTrainedModel, item: int, task: str) -> Tensor:
        """`[T]` float64, entry p - 1 being the cross entropy in nats after p tokens; shorter where the model has
        learned fewer positions.

        Raises:
            ModelError: a loss that is not finite, or a text that memory does not hold.
        """
        limit = learned_positions(model) or self.length
        if limit < self.length:
            warnings.warn(
                f"the model has learned {limit:,} positions: of texts of {self.length:,} tokens it reads so many",
                stacklevel=2,
            )
        row = torch.tensor([self.rows[item][: min(limit, self.length) + 1]])

        def read(_: Sequence[int]) -> list[Tensor]:
            found: list[Tensor] = []
            try:
                found.extend(piece[0] for piece in losses(model, row))
            except Exception as error:
                if not is_out_of_memory(error):
                    raise
                reached = sum(map(len, found))
                advice = f"{reached:,} fit: choose a length up to that" if reached else "choose a shorter one"
                raise ModelError(
                    f"task {task}: memory does not hold a text of {self.length:,} tokens; {advice}"
                ) from error
            return [torch.cat(found)]

        nats = self._losses.get(model, [item], 1, read)[0]
        broken = (~torch.isfinite(nats)).nonzero()
        if len(broken):
            raise ModelError(
                f"task {task}, item {item + 1}: the model's loss after {int(broken[0]) + 1:,} tokens is not finite: "
                "nothing to score; try another dtype, or look at the weights"
            )
        return nats


class LengthTask(Task):
    """A task whose items are the rows of `LongTexts`, read one at a time: a long row keeps a device busy, and what
    memory does not hold is then a length, whatever the batch size."""

    suite = "length"
    metric = "loss"
    higher_is_better = False
    about: str

    def __init__(self, texts: LongTexts) -> None:
        self.texts, self.about = texts, LENGTH[self.name]
        content = [_VERSION, self.name, FIRST_BUCKET, texts.rows]
        self.digest = hashlib.sha256(json.dumps(content).encode()).hexdigest()

    def __len__(self) -> int:
        return len(self.texts.rows)

    def score(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        indices: Sequence[int],
        batch_size: int,
    ) -> list[Item]:
        """See `Task.score`. Memory is the model's own (constant, or a cache of the text) and the logits of one piece.

        Raises:
            ModelError: a loss that is not finite, or a text that memory does not hold.
        """
        with evaluating(model), torch.inference_mode():
            return [self.item(self.texts.losses(model, index, self.name)) for index in indices]

    @abstractmethod
    def item(self, nats: Tensor) -> Item:
        """The result from the losses `[T]` of a row."""


class LossByPosition(LengthTask):
    """Mean loss in nats per token; the curve is the mean of each bucket, the axis the last position of each: positions
    1 to 64, 65 to 128, 129 to 256, ..., where position p means that p tokens have been read."""

    name = "loss_by_position"

    def __init__(self, texts: LongTexts) -> None:
        super().__init__(texts)
        self.axis = [float(edge) for edge in bucket_edges(texts.length)]

    def item(self, nats: Tensor) -> Item:
        edges = bucket_edges(len(nats))
        curve = [float(nats[start:stop].mean()) for start, stop in zip([0, *edges], edges, strict=False)]
        return Item(float(nats.mean()), tuple(curve))


class LossRise(LengthTask):
    """Mean loss over the last eighth of a text minus that over its second sixteenth (of 8192 tokens: the last 1024
    minus positions 513 to 1024).

    Both are well behind the start, where every model lacks context. A model that uses what it remembers predicts late
    tokens at least as well as early ones, so that about zero, or less, is sound; a memory that saturates, or positions
    that break down, show as a rise. One text's own ups and downs are larger than that, but the same for all systems:
    compare them item by item.
    """

    name = "loss_rise"
    metric = "loss_rise"

    def item(self, nats: Tensor) -> Item:
        length = len(nats)
        late, early = nats[length - length // 8 :], nats[length // 16 : length // 8]
        return Item(float(late.mean() - early.mean()))


def bucket_edges(length: int) -> list[int]:
    """64, 128, 256, ... below `length`, and `length`."""
    doublings = max(0, math.ceil(math.log2(length / FIRST_BUCKET)))
    return [*(FIRST_BUCKET << doubling for doubling in range(doublings)), length]


_TASKS: dict[str, type[LengthTask]] = {task.name: task for task in (LossByPosition, LossRise)}
