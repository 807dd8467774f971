"""The interface of a task: a model is scored item by item, so that systems can be paired, results kept, and an
interrupted run resumed."""

from __future__ import annotations

import math
import random
import statistics
from abc import ABC, abstractmethod
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from transformers import PreTrainedModel, PreTrainedTokenizerBase


@dataclass(frozen=True)
class Item:
    """A model's result on one item.

    Attributes:
        value: the number to average, e.g. 1.0 or 0.0 for a right or wrong answer, or nats per token.
        curve: a value per position or bucket of the item, for tasks that look along a text.
        metrics: lm-eval's tasks have several metrics: name -> the item's value as JSON holds it. `value` is then the
            number of the first.
    """

    value: float
    curve: tuple[float, ...] = ()
    metrics: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class TaskScore:
    """A model's result on one task.

    Attributes:
        task: the task's name.
        metric: the kind of `value`: `acc`, `acc_norm`, `word_perplexity`, `loss`, ...
        value: the metric over all items; accuracies are shares in [0, 1], losses and divergences nats per token.
        stderr: the standard error of `value`; None with fewer than two items.
        higher_is_better: how to read `value`.
        items: per item its value, in the task's order: two models' lists pair up item by item. Empty where an item has
            no number of its own, e.g. a pair of texts under BLEU.
        suite: the task's suite.
        tags: per item what it is, e.g. `{"length": 1024, "depth": 0.5}`; empty where items are all alike.
        curves: per item its curve; empty where there are none.
        axis: the positions of a curve's points.
        total: how many items the task has; None where it is not known.
        seed: of the random subset that was scored; None where it was all of them. The tag `item` says which.
        count: the number of items scored, where `items` is empty.
    """

    task: str
    metric: str
    value: float
    stderr: float | None
    higher_is_better: bool
    items: list[float] = field(repr=False)
    suite: str = ""
    tags: list[dict[str, Any]] = field(default_factory=list, repr=False)
    curves: list[tuple[float, ...]] = field(default_factory=list, repr=False)
    axis: list[float] = field(default_factory=list, repr=False)
    total: int | None = None
    seed: int | None = None
    count: int = 0

    @property
    def n(self) -> int:
        """The number of items scored."""
        return len(self.items) or self.count


class Measure(NamedTuple):
    """One metric of a task over some items; the fields are those of `TaskScore`."""

    metric: str
    higher_is_better: bool
    value: float
    stderr: float | None
    items: list[float]
    tags: list[dict[str, Any]]
    n: int


class Task(ABC):
    """Items, and how a model is scored on them.

    Attributes:
        name: unique among all tasks.
        suite: the suite that it belongs to.
        metric: the kind of its value, see `TaskScore`.
        higher_is_better: how to read it.
        digest: SHA-256 over everything that the result depends on besides the model: texts, settings, scoring.
        axis: the positions of the points of its items' curves; empty for tasks without.
        item_bytes: about what an item's result takes, in the store as in a report.
    """

    name: str
    suite: str
    metric: str
    higher_is_better: bool = True
    digest: str
    axis: Sequence[float] = ()
    item_bytes: int = 64

    @abstractmethod
    def __len__(self) -> int:
        """Number of items."""

    def tags(self, index: int) -> Mapping[str, Any]:
        """Labels of item `index` for tables and plots; where items weigh differently, its `weight`; and where several
        are of one text, that text as `row`."""
        return {}

    @abstractmethod
    def score(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        indices: Sequence[int],
        batch_size: int,
    ) -> list[Item]:
        """Scores a model, in eval mode and without gradients, on some items, in that order.

        Raises:
            ModelError: results that are not finite, or a text that is too long for the memory at hand.
        """

    def summary(self, values: Sequence[float], tags: Sequence[Mapping[str, Any]]) -> tuple[float, float | None]:
        """The metric over these items, and its standard error (None with fewer than two)."""
        return mean_and_error(by_row(values, tags))

    def measures(self, indices: Sequence[int], items: Sequence[Item]) -> list[Measure]:
        """Each metric over these items, which are those at `indices`."""
        tags = [dict(self.tags(index)) for index in indices]
        values = [item.value for item in items]
        value, stderr = self.summary(values, tags)
        return [Measure(self.metric, self.higher_is_better, value, stderr, values, tags, len(values))]


@contextmanager
def evaluating(model: PreTrainedModel | None) -> Iterator[None]:
    """Eval mode inside, the mode from before outside."""
    if model is None:
        yield
        return
    was_training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(was_training)


def draw(name: str, size: int, limit: float | None, seed: int) -> list[int]:
    """Places of `limit` out of `size` items, in order; a limit below 1 is a share, rounded up to whole items."""
    everything = list(range(size))
    if limit is not None:
        limit = math.ceil(limit * size) if limit < 1 else int(limit)
    if limit is None or limit >= size:
        return everything
    # The first of a shuffled list: a larger subset contains a smaller one, and finds its results in the store.
    random.Random(f"{seed} {name}").shuffle(everything)  # noqa: S311
    return sorted(everything[:limit])


def by_row(values: Sequence[float], tags: Sequence[Mapping[str, Any]]) -> list[float]:
    """The values; but where items have a tag `row`, one value for each row, with the same mean: answers about one text
    are not independent, so they count as one value."""
    if not tags or "row" not in tags[0]:
        return list(values)
    rows: dict[Any, float] = {}
    for value, tag in zip(values, tags, strict=True):
        rows[tag["row"]] = rows.get(tag["row"], 0.0) + value
    return [total * len(rows) / len(values) for total in rows.values()]


def mean_and_error(values: Sequence[float]) -> tuple[float, float | None]:
    """Mean and standard error of the mean."""
    n = len(values)
    return statistics.fmean(values), statistics.stdev(values) / math.sqrt(n) if n > 1 else None
