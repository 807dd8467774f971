"""Runs benchmark tasks with lm-eval on a model that is already in memory."""

from __future__ import annotations

import contextlib
import copy
import logging
import math
import statistics
import sys
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any
from unittest import mock

import lm_eval.api.task
from lm_eval.evaluator import evaluate
from lm_eval.models.huggingface import HFLM

from linearize.errors import DataError, ModelError
from linearize.evaluation.tasks import build_tasks, task_definitions

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from pathlib import Path

    from transformers import PreTrainedModel, PreTrainedTokenizerBase


@dataclass(frozen=True)
class TaskScore:
    """A model's result on one task.

    Attributes:
        task: the task's name.
        metric: the metric that papers report for it (`acc`, `acc_norm` or `word_perplexity`).
        value: the metric over all items; accuracies are shares in [0, 1].
        stderr: the standard error of `value`; None with fewer than two items.
        n: the number of items scored.
        higher_is_better: how to read `value`.
        items: per item, in the task's order, 1.0 or 0.0 for an accuracy and the log-likelihood in nats of the whole
            document for a perplexity. Two models' lists pair up item by item.
        samples: lm-eval's own log of every item, where it was asked for.
    """

    task: str
    metric: str
    value: float
    stderr: float | None
    n: int
    higher_is_better: bool
    items: list[float] = field(repr=False)
    samples: list[dict[str, Any]] | None = field(default=None, repr=False)


def run_tasks(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    names: Sequence[str],
    *,
    data: Path | None = None,
    limit: int | None = None,
    batch_size: int = 8,
    log_samples: bool = False,
    max_length: int | None = None,
) -> list[TaskScore]:
    """Scores a model zero-shot on tasks, in the order of the names.

    Args:
        model: a causal LM on its device. It is put into eval mode for the run and back afterwards.
        tokenizer: its tokenizer; left as it is.
        names: of `linearize.evaluation.tasks.available_tasks`.
        data: the folder with the tasks' files; None reads them from the Hub.
        limit: only the first so many items of each task.
        batch_size: sequences per forward pass.
        log_samples: keep lm-eval's log of each item in `TaskScore.samples`.
        max_length: tokens of context; None asks the model's configuration, as lm-eval does. Perplexities of two models
            can only be compared at the same length.

    Raises:
        DataError: an unknown task, data that cannot be read, or a limit below 1.
        ModelError: the model gives log-likelihoods that are not finite.
    """
    if limit is not None and limit < 1:
        raise DataError(f"limit is {limit}: give 1 or more items per task, or no limit")
    was_training = model.training
    # lm-eval warns of every model that is handed over in memory, and of local data sets.
    with _log_level(logging.ERROR):
        tasks = build_tasks(names, data)
        harness = _Harness(
            pretrained=model,
            # lm-eval gives tokenizers without a pad token one.
            tokenizer=copy.deepcopy(tokenizer),
            backend="causal",
            batch_size=batch_size,
            max_length=max_length,
            # Sums of log-probabilities in bfloat16 would lose more than the models differ by.
            softmax_dtype="float32",
        )
    try:
        # `simple_evaluate` would also look the model up on the Hub and list the machine's packages. Nothing here is
        # drawn at random (no examples, no sampling, no bootstrap), so the caller's random state is left alone.
        with _log_level(logging.WARNING), mock.patch.object(lm_eval.api.task, "tqdm", _no_bar):
            results = evaluate(lm=harness, task_dict=tasks, limit=limit, bootstrap_iters=0, log_samples=True)
    finally:
        model.train(was_training)
    return [_score(name, task, results["samples"][name], log_samples) for name, task in tasks.items()]


class _Harness(HFLM):
    """lm-eval's Hugging Face model, with progress bars on terminals only."""

    def loglikelihood(self, requests: Any, disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        answers: list[tuple[float, bool]] = super().loglikelihood(requests, disable_tqdm or not sys.stderr.isatty())
        return answers

    def loglikelihood_rolling(self, requests: Any, disable_tqdm: bool = False) -> list[float]:
        nats: list[float] = super().loglikelihood_rolling(requests, disable_tqdm or not sys.stderr.isatty())
        return nats

    def _loglikelihood_tokens(
        self, requests: Any, disable_tqdm: bool = False, override_bs: int | None = None
    ) -> list[tuple[float, bool]]:
        # `override_bs` marks a single batch of a document, for which lm-eval would draw a bar of its own.
        answers: list[tuple[float, bool]] = super()._loglikelihood_tokens(
            requests, disable_tqdm=disable_tqdm or override_bs is not None, override_bs=override_bs
        )
        return answers


def _no_bar(iterable: Any, **_: object) -> Any:
    """Stands in for the bar over building prompts, which takes no time."""
    return iterable


@contextlib.contextmanager
def _log_level(level: int) -> Iterator[None]:
    logger = logging.getLogger("lm_eval")
    before = logger.level
    logger.setLevel(level)
    try:
        yield
    finally:
        logger.setLevel(before)


def _score(name: str, task: Any, samples: list[dict[str, Any]], keep_samples: bool) -> TaskScore:
    metric = task_definitions()[name].headline
    for number, sample in enumerate(samples, start=1):
        if not all(math.isfinite(value) for value in _log_likelihoods(sample)):
            raise ModelError(f"the model's log-likelihoods on item {number} of {name} are not finite: nothing to score")
    if metric == "word_perplexity":
        # lm-eval's items for it: (log-likelihood of the document in nats, number of words).
        items = [float(sample[metric][0]) for sample in samples]
        value, stderr = _perplexity(items, [int(sample[metric][1]) for sample in samples])
    else:
        items = [float(sample[metric]) for sample in samples]
        value = statistics.fmean(items)
        stderr = statistics.stdev(items) / math.sqrt(len(items)) if len(items) > 1 else None
    return TaskScore(
        task=name,
        metric=metric,
        value=value,
        stderr=stderr,
        n=len(items),
        higher_is_better=bool(task.higher_is_better()[metric]),
        items=items,
        samples=samples if keep_samples else None,
    )


def _log_likelihoods(sample: dict[str, Any]) -> list[float]:
    """All log-likelihoods of an item: one per choice as (nats, is greedy), or one bare number for a document."""
    return [answer[0] if isinstance(answer, tuple) else answer for answer in sample["filtered_resps"]]


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
