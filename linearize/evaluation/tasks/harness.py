"""lm-eval's tasks as `Task`, on a model that is already in memory.

Prompts, requests, filters, metrics and aggregations are lm-eval's. The loop over documents is that of its `evaluate`,
for any documents in any order, so that results are kept item by item.
"""

from __future__ import annotations

import copy
import hashlib
import json
import math
import statistics
from bisect import bisect_right
from dataclasses import dataclass
from itertools import accumulate
from typing import TYPE_CHECKING, Any, NamedTuple
from weakref import WeakKeyDictionary

import lm_eval
import torch
from lm_eval.api.metrics import mean

from linearize.errors import DataError, ModelError
from linearize.evaluation.results.pairing import contributions
from linearize.evaluation.tasks.index import quiet
from linearize.evaluation.tasks.leaf import Leaf, Prompting
from linearize.evaluation.tasks.lm import LinearizeLM
from linearize.evaluation.tasks.task import Item, Measure, Task, TaskScore
from linearize.evaluation.tasks.tasks import FEWSHOT_SEED

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from transformers import PreTrainedModel, PreTrainedTokenizerBase

# RULER's metrics are lengths: its value of a document under the metric of another length, which its means leave out.
_NOT_APPLICABLE = -1.0


class Average(NamedTuple):
    """A metric that a group reports of its tasks.

    Attributes:
        metric: as `metric_name` writes it.
        by_size: tasks count by their numbers of items; otherwise each counts the same.
        any_filter: report the metric under each filter that the tasks have.
    """

    metric: str
    by_size: bool
    any_filter: bool = False


@dataclass(frozen=True)
class Answer:
    """A model's answer on one item.

    Attributes:
        arguments: lm-eval's requests: (context, continuation) of each choice, one whole document, or
            (prompt, settings) of a text to write.
        responses: of each request, under the task's first filter: (nats, whether greedy decoding gives it), the nats of
            the document, or the text.
        metrics: lm-eval's metrics of the item, by name and, unless it is `none`, filter.
    """

    arguments: list[tuple[Any, ...]]
    responses: list[Any]
    metrics: Mapping[str, Any]


class LmEvalTask(Task):
    """A task of lm-eval, or a group of them that has figures of its own.

    Args:
        name: of the task or the group.
        leaves: lm-eval's task objects by name; several for a group.
        suite: its suite.
        headline: report this metric alone; empty for all.
        label: the tag that tells a group's tasks apart.
        averages: a group's metrics; empty for the headline or, without one, every metric.
        prompting: the form of the prompts.
        plain: score every continuation by itself, as lm-eval does, instead of reading what they share once.
        max_length: tokens of context; None takes it from the model's configuration, as lm-eval does. Perplexities of
            two models can only be compared at the same length.
    """

    def __init__(
        self,
        name: str,
        leaves: Mapping[str, Any],
        *,
        suite: str,
        headline: str = "",
        label: str = "task",
        averages: Sequence[Average] = (),
        prompting: Prompting | None = None,
        plain: bool = False,
        max_length: int | None = None,
    ) -> None:
        self.name, self.suite, self.metric, self.label = name, suite, headline, label
        self.prompting, self.plain, self.max_length = prompting or Prompting(), plain, max_length
        self.averages = list(averages)
        self.item_bytes = 128 if headline else 256
        self._leaves = [Leaf(leaf, task) for leaf, task in leaves.items()]
        self._ends = list(accumulate(len(leaf.documents) for leaf in self._leaves))
        if headline:
            self.higher_is_better = bool(self._leaves[0].task.higher_is_better()[headline])
        self.digest = self._digest()

    def _digest(self) -> str:
        # Prompts, metrics and the rule by which text becomes tokens are lm-eval's, so its version counts.
        settings = [lm_eval.__version__, self.max_length, list(self.prompting), FEWSHOT_SEED]
        digest = hashlib.sha256(json.dumps(settings).encode())
        for leaf in self._leaves:
            digest.update(leaf.content().encode())
        return digest.hexdigest()

    def __len__(self) -> int:
        return self._ends[-1]

    def _place(self, index: int) -> tuple[Leaf, int]:
        """The task of item `index`, and the item's place in it."""
        number = bisect_right(self._ends, index)
        return self._leaves[number], index - (self._ends[number - 1] if number else 0)

    def tags(self, index: int) -> Mapping[str, Any]:
        """The task's name, e.g. the subject, where there are several."""
        return {self.label: self._place(index)[0].name} if len(self._leaves) > 1 else {}

    def score(
        self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, indices: Sequence[int], batch_size: int
    ) -> list[Item]:
        """As `Task.score`. An item's value is the number of its first metric, e.g. 1.0 for a right answer, and for a
        perplexity the log-likelihood in nats of the whole document."""
        items = []
        for answer in self.answers(model, tokenizer, indices, batch_size):
            kept = {self.metric: answer.metrics[self.metric]} if self.metric else answer.metrics
            first = next(iter(kept.values()), None)
            items.append(Item((_numbers(first) or (0.0,))[0], metrics=kept))
        return items

    def answers(
        self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, indices: Sequence[int], batch_size: int
    ) -> list[Answer]:
        """All that a model answers on some items, in that order.

        Raises:
            ModelError: log-likelihoods that are not finite, or prompts and answers longer than the model's context.
            DataError: a metric that cannot be kept as JSON.
        """
        places = [self._place(index) for index in indices]
        with quiet(), torch.random.fork_rng():
            torch.manual_seed(FEWSHOT_SEED + indices[0])
            lm = _lm(model, tokenizer, batch_size, self.max_length, self.plain)
            asked = [leaf.requests(at, lm, self.prompting) for leaf, at in places]
            kinds: dict[str, list[Any]] = {}
            for request in (one for requests in asked for one in requests):
                kinds.setdefault(request.request_type, []).extend([request] * request.repeats)
            for kind, requests in kinds.items():
                for request, response in zip(requests, self._responses(lm, kind, requests), strict=True):
                    request.resps.append(response)
            for leaf in dict.fromkeys(leaf for leaf, _ in places):
                leaf.filter(
                    [one for (of, _), requests in zip(places, asked, strict=True) if of is leaf for one in requests]
                )
            return [
                self._answer(index, leaf, at, requests)
                for index, (leaf, at), requests in zip(indices, places, asked, strict=True)
            ]

    def _responses(self, lm: LinearizeLM, kind: str, requests: Sequence[Any]) -> list[Any]:
        try:
            found: list[Any] = getattr(lm, kind)(requests, disable_tqdm=True)
        except AssertionError as error:  # lm-eval's checks of lengths, and ours
            raise ModelError(f"task {self.name}: {' '.join(str(error).split())}") from error
        return found

    def _answer(self, index: int, leaf: Leaf, at: int, requests: Sequence[Any]) -> Answer:
        for response in (one for request in requests for one in request.resps):
            nats = response[0] if isinstance(response, tuple) else response
            if isinstance(nats, float) and not math.isfinite(nats):
                raise ModelError(
                    f"the model's log-likelihoods on item {index + 1} of {self.name} are not finite: nothing to score"
                )
        metrics = {}
        for name in requests[0].filtered_resps:
            found = leaf.results(at, [one.filtered_resps[name] for one in requests])
            for metric, value in found.items():
                metrics[metric_name(metric, name)] = _json(value, self.name, metric)
        responses = [next(iter(one.filtered_resps.values())) for one in requests]
        return Answer([request.args for request in requests], responses, metrics)

    def measures(self, indices: Sequence[int], items: Sequence[Item]) -> list[Measure]:
        """As `Task.measures`: lm-eval's aggregation of each metric over the items that have it."""
        names = dict.fromkeys(name for item in items for name in item.metrics)
        if self.averages:
            wanted = [
                (name, one.by_size)
                for one in self.averages
                for name in names
                if name == one.metric or (one.any_filter and name.partition(",")[0] == one.metric)
            ]
        else:
            wanted = [(name, True) for name in names if self.metric in ("", name)]
        # RULER's group averages one length alone, which may not be among the chosen ones.
        wanted = wanted or [(name, self.averages[0].by_size) for name in names]
        found = [self._measure(name, by_size, indices, items) for name, by_size in wanted]
        return [measure for measure in found if measure is not None]

    def _measure(self, name: str, by_size: bool, indices: Sequence[int], items: Sequence[Item]) -> Measure | None:
        metric, _, _ = name.partition(",")
        by_leaf: dict[Leaf, list[tuple[int, Any]]] = {}
        for index, item in zip(indices, items, strict=True):
            if name in item.metrics and not (metric.isdigit() and item.metrics[name] == _NOT_APPLICABLE):
                by_leaf.setdefault(self._place(index)[0], []).append((index, item.metrics[name]))
        if not by_leaf:
            return None
        sizes = {leaf: len(found) for leaf, found in by_leaf.items()}
        weights = {leaf: float(size) if by_size else 1.0 for leaf, size in sizes.items()}
        values = {leaf: self._aggregated(leaf, metric, [raw for _, raw in found]) for leaf, found in by_leaf.items()}
        total = math.fsum(weights.values())
        value = math.fsum(weights[leaf] * values[leaf] for leaf in by_leaf) / total
        count = sum(sizes.values())
        numbers, tags = [], []
        for leaf, found in by_leaf.items():
            for index, raw in found:
                number = _numbers(raw)
                numbers.append(number)
                tag = dict(self.tags(index))
                if number and len(number) == 2:
                    tag["weight"] = number[1]
                elif not by_size:
                    tag["weight"] = weights[leaf] / total * count / sizes[leaf]
                tags.append(tag)
        entries = [number[0] for number in numbers if number]
        if len(entries) < count:
            entries, tags = [], []
        higher = bool(next(iter(by_leaf)).task.higher_is_better().get(metric, True))
        parts = contributions(TaskScore(self.name, name, value, None, higher, entries, tags=tags))
        if parts is None and any(len(number or ()) == 2 for number in numbers):
            entries, tags = [], []  # two numbers that are no sum and weight, e.g. an answer and the right one under F1
        stderr = statistics.stdev(parts) / math.sqrt(len(parts)) if parts and len(parts) > 1 else None
        return Measure(name, higher, value, stderr, entries, tags, count)

    def _aggregated(self, leaf: Leaf, metric: str, values: list[Any]) -> float:
        try:
            return float(leaf.task.aggregation().get(metric, mean)(values))
        except Exception as error:  # aggregations are any task's own code
            told = " ".join(str(error).split())[:200]
            raise DataError(f"task {leaf.name}: metric {metric} cannot be computed from its items: {told}") from error


# lm-eval gives tokenizers without a pad token one, so it gets a copy, which is costly to make for every few items.
_copies: WeakKeyDictionary[Any, Any] = WeakKeyDictionary()


def _lm(model: Any, tokenizer: Any, batch_size: int, max_length: int | None, plain: bool) -> LinearizeLM:
    if tokenizer not in _copies:
        _copies[tokenizer] = copy.deepcopy(tokenizer)
    return LinearizeLM(model, tokenizer=_copies[tokenizer], batch_size=batch_size, max_length=max_length, plain=plain)


def metric_name(metric: str, filter_name: str) -> str:
    """`exact_match,strict-match`; without the filter where it is lm-eval's `none`."""
    return metric if filter_name == "none" else f"{metric},{filter_name}"


def _numbers(value: Any) -> tuple[float, ...] | None:
    """The number of an item, or the two of (sum, weight); None where it is something else."""
    if isinstance(value, (bool, int, float)):
        return (float(value),)
    pair = isinstance(value, list) and len(value) == 2 and all(type(entry) in (int, float) for entry in value)
    return (float(value[0]), float(value[1])) if pair else None


def _json(value: Any, task: str, metric: str) -> Any:
    """A metric's value on one item as JSON gives it back.

    Raises:
        DataError: it cannot be kept as JSON.
    """

    def plain(entry: Any) -> Any:
        if hasattr(entry, "tolist"):  # numpy's and torch's numbers and arrays
            return entry.tolist()
        raise TypeError

    try:
        return json.loads(json.dumps(value, default=plain))
    except TypeError:
        kind = type(value).__name__
        raise DataError(f"task {task}: metric {metric} gives a {kind} per item, which cannot be kept as JSON") from None
