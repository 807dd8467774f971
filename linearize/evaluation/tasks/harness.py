"""lm-eval's tasks as `Task`, on a model that is already in memory."""

from __future__ import annotations

import contextlib
import copy
import hashlib
import json
import logging
import math
from bisect import bisect_right
from dataclasses import dataclass
from itertools import accumulate
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

import lm_eval
from lm_eval.models.huggingface import HFLM

from linearize.errors import ModelError
from linearize.evaluation.tasks.prefix import Query, common_length, log_likelihoods
from linearize.evaluation.tasks.task import Item, Task
from linearize.evaluation.tasks.tasks import build_tasks, task_definitions

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence
    from pathlib import Path

    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from linearize.evaluation.tasks.tasks import TaskDefinition


@dataclass(frozen=True)
class Answer:
    """A model's answer on one item.

    Attributes:
        arguments: what was asked, as lm-eval words it: (context, continuation) of each choice, or one whole document.
        responses: (nats, whether greedy decoding gives it) of each, or the nats of the document.
        metrics: lm-eval's metrics of the item.
    """

    arguments: list[tuple[str, ...]]
    responses: list[Any]
    metrics: Mapping[str, Any]


class LmEvalTask(Task):
    """A task whose prompts and metrics are lm-eval's.

    Args:
        definition: its task file.
        groups: lm-eval's task objects by group, see `build_tasks`.
        plain: score every continuation by itself, as lm-eval does, instead of reading what they share once.
        max_length: tokens of context; None asks the model's configuration, as lm-eval does. Perplexities of two models
            can only be compared at the same length.
    """

    def __init__(
        self,
        definition: TaskDefinition,
        groups: Mapping[str, Any],
        *,
        plain: bool = False,
        max_length: int | None = None,
    ) -> None:
        self.definition, self.plain, self.max_length = definition, plain, max_length
        self.name, self.suite, self.metric = definition.name, definition.suite, definition.headline
        self._groups = list(groups.items())
        self._ends = list(accumulate(len(task.task_docs) for _, task in self._groups))
        self.higher_is_better = bool(self._groups[0][1].higher_is_better()[self.metric])
        self.digest = self._digest()

    def _digest(self) -> str:
        # Prompts, metrics and the rule by which text becomes tokens are lm-eval's, so its version counts.
        settings = {"lm_eval": lm_eval.__version__, "config": self.definition.config, "max_length": self.max_length}
        digest = hashlib.sha256(json.dumps(settings, sort_keys=True, default=str).encode())
        for group, task in self._groups:
            shots = list(task.fewshot_docs()) if task.config.num_fewshot else []
            documents = [group, task.task_docs.to_list(), shots]
            digest.update(json.dumps(documents, sort_keys=True, default=str).encode())
        return digest.hexdigest()

    def __len__(self) -> int:
        return self._ends[-1]

    def _place(self, index: int) -> tuple[str, Any, Any]:
        """The group of item `index`, its task object and its document."""
        number = bisect_right(self._ends, index)
        group, task = self._groups[number]
        return group, task, task.task_docs[index - (self._ends[number - 1] if number else 0)]

    def tags(self, index: int) -> Mapping[str, Any]:
        """The document's words as `weight` for a perplexity; the group, e.g. the subject, where there are groups."""
        group, task, document = self._place(index)
        if self.metric == "word_perplexity":
            # lm-eval's items for it: (log-likelihood of the document in nats, number of words).
            return {"weight": int(task.process_results(document, (0.0,))[self.metric][1])}
        return {self.definition.group: group} if self.definition.group else {}

    def score(
        self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, indices: Sequence[int], batch_size: int
    ) -> list[Item]:
        """As `Task.score`. An item's value is 1.0 or 0.0 for an accuracy, and for a perplexity the log-likelihood in
        nats of the whole document."""
        items = []
        for answer in self.answers(model, tokenizer, indices, batch_size):
            value = answer.metrics[self.metric]
            items.append(Item(float(value[0] if isinstance(value, tuple) else value)))
        return items

    def answers(
        self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, indices: Sequence[int], batch_size: int
    ) -> list[Answer]:
        """All that a model answers on some items, in that order.

        Raises:
            ModelError: the model gives log-likelihoods that are not finite.
        """
        places = [self._place(index) for index in indices]
        asked = [_requests(task, document) for _, task, document in places]
        kind = asked[0][0].request_type
        with _quiet():
            harness = _Harness(model, tokenizer, batch_size, self.max_length, self.plain)
            flat = [request for requests in asked for request in requests]
            responses = iter(getattr(harness, kind)(flat, disable_tqdm=True))
        answers = []
        for index, (_, task, document), requests in zip(indices, places, asked, strict=True):
            found = [next(responses) for _ in requests]
            if not all(math.isfinite(one[0] if isinstance(one, tuple) else one) for one in found):
                raise ModelError(
                    f"the model's log-likelihoods on item {index + 1} of {self.name} are not finite: nothing to score"
                )
            metrics = task.process_results(document, found)
            answers.append(Answer([request.args for request in requests], found, metrics))
        return answers

    def summary(self, values: Sequence[float], tags: Sequence[Mapping[str, Any]]) -> tuple[float, float | None]:
        """As `Task.summary`."""
        if self.metric == "word_perplexity":
            return _perplexity(values, [int(tag["weight"]) for tag in tags])
        return super().summary(values, tags)


def lm_eval_tasks(names: Sequence[str], data: Path | None = None, **options: Any) -> list[LmEvalTask]:
    """Tasks by name, in that order.

    Args:
        names: of `linearize.evaluation.tasks.tasks.available_tasks`.
        data: the folder with the tasks' files; None reads them from the Hub.
        options: of `LmEvalTask`.

    Raises:
        DataError: an unknown task, or data that cannot be read.
    """
    with _quiet():
        built = build_tasks(names, data)
    return [LmEvalTask(task_definitions()[name], groups, **options) for name, groups in built.items()]


def _requests(task: Any, document: Any) -> list[Any]:
    """The requests of lm-eval's `build_all_requests` for a document."""
    context = task.fewshot_context(
        document, num_fewshot=task.config.num_fewshot, gen_prefix=task.doc_to_prefix(document)
    )
    built = task.construct_requests(doc=document, ctx=context, metadata=(task.config.task, 0, 1))
    return built if isinstance(built, list) else [built]


# lm-eval gives tokenizers without a pad token one, so it gets a copy, which is costly to make for every few items.
_copies: WeakKeyDictionary[Any, Any] = WeakKeyDictionary()


class _Harness(HFLM):
    """lm-eval's Hugging Face model, which reads what continuations share once."""

    def __init__(self, model: Any, tokenizer: Any, batch_size: int, max_length: int | None, plain: bool) -> None:
        if tokenizer not in _copies:
            _copies[tokenizer] = copy.deepcopy(tokenizer)
        super().__init__(
            pretrained=model,
            tokenizer=_copies[tokenizer],
            backend="causal",
            batch_size=batch_size,
            max_length=max_length,
            # Sums of log-probabilities in bfloat16 would lose more than the models differ by.
            softmax_dtype="float32",
        )
        self._plain = plain

    def _encode_pair(self, context: str, continuation: str) -> tuple[list[int], list[int]]:
        pair: tuple[list[int], list[int]] = super()._encode_pair(context, continuation)
        if pair[1]:
            return pair
        # The text as a whole takes no more tokens than its context: one of them spans both. lm-eval stops here; the
        # continuation is then what follows the tokens that the two have in common.
        whole = self.tok_encode(context + continuation)
        common = common_length([tuple(pair[0]), tuple(whole)])
        return whole[:common] or [self.prefix_token_id], whole[common:]

    def _loglikelihood_tokens(
        self, requests: Any, disable_tqdm: bool = False, override_bs: int | None = None
    ) -> list[tuple[float, bool]]:
        # `override_bs` marks the windows of a document, which share nothing.
        if not self._plain and override_bs is None:
            queries = [
                Query(tuple((context + continuation)[-(self.max_length + 1) :][:-1]), tuple(continuation))
                for _, context, continuation in requests
            ]
            shared = log_likelihoods(self.model, queries, batch_size=self.batch_size, max_length=self.max_length)
            if shared is not None:
                return shared
        answers: list[tuple[float, bool]] = super()._loglikelihood_tokens(
            requests, disable_tqdm=True, override_bs=override_bs
        )
        return answers


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """lm-eval warns of every model that is handed over in memory, and of local data sets."""
    logger = logging.getLogger("lm_eval")
    before = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(before)


def _perplexity(nats: Sequence[float], words: Sequence[int]) -> tuple[float, float | None]:
    """exp(-Σ nats / Σ words) and its standard error over documents.

    The error is that of a ratio of two sums, linearised at their means (lm-eval bootstraps it, which costs minutes and
    agrees to a few percent).
    """
    n, total = len(nats), sum(words)
    mean = sum(nats) / total
    value = math.exp(-mean)
    if n < 2:
        return value, None
    squares = sum((nat - mean * count) ** 2 for nat, count in zip(nats, words, strict=True))
    return value, value * math.sqrt(squares * n / (n - 1)) / total
