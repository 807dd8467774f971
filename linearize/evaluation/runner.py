"""Scores systems on tasks item by item, and keeps each result."""

from __future__ import annotations

import gc
import math
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING

import torch

from linearize.errors import DataError, ModelError, is_out_of_memory
from linearize.evaluation.store import Store, model_key, whole_stamp
from linearize.evaluation.tasks.task import Item, Task, TaskScore, draw, evaluating
from linearize.runtime import processes

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

Loader = Callable[[], "PreTrainedModel"]
"""Loads a model. One with an attribute `stamp`, see `StampedLoader`, is not called where all results are kept."""
Progress = Callable[[str, str, int, int], None]
"""Called with system, task, finished items and all items: before the first item, and after every chunk."""

# Items between two writes; fewer where that takes long, since they are what an interruption costs.
CHUNK = 32
CHUNK_SECONDS = 30.0
# About what a point of a curve takes, in the store as in a report.
_POINT_BYTES = 24


class StampedLoader:
    """A loader that can tell what it would load.

    Args:
        load: loads the model.
        stamp: equal only where the model is; None if nothing but loading it can tell.
    """

    def __init__(self, load: Loader, stamp: str | None) -> None:
        self.load, self.stamp = load, stamp

    def __call__(self) -> PreTrainedModel:
        return self.load()


def run(
    systems: Mapping[str, Loader],
    tasks: Sequence[Task],
    tokenizer: PreTrainedTokenizerBase,
    *,
    limit: float | None = None,
    seed: int = 0,
    batch_size: int = 8,
    store: Store | None = None,
    progress: Progress | None = None,
) -> dict[str, list[TaskScore]]:
    """Scores systems one after the other, so that one of them is in memory at a time.

    Args:
        systems: name -> how to load it. A model is loaded once, and put back into the mode it was in.
        tasks: with different names.
        tokenizer: of all systems.
        limit: score a random subset of so many items of each task, the same for every system; a larger one with the
            same seed contains it. Below 1 it is a share of the items.
        seed: of that subset.
        batch_size: sequences per forward pass; halved where memory does not hold them.
        store: the cache of results, read before anything is scored; None caches nothing.
        progress: called as items finish.

    Returns:
        by system the scores of each task, one per metric, in the order given.

    Raises:
        DataError: a limit that is no number of items and no share, or no tasks.
        ModelError: a result that is not finite, or more memory than there is.
        OutputError: results cannot be kept.
    """
    check_limit(limit)
    chosen = {task.name: subset(task, limit, seed) for task in tasks}
    if not chosen or len(chosen) < len(tasks):
        raise DataError("give one or more tasks, each once")
    scores = {}
    for name, load in systems.items():
        system = _System(name, load, tokenizer, store, batch_size, progress)
        found = system.results(tasks, chosen)
        scores[name] = [one for task in tasks for one in _scores(task, chosen[task.name], found[task.name], seed)]
        del system
        gc.collect()  # reference cycles keep a model's memory, which the next one needs
    return scores


def nbytes_to_keep(
    systems: Mapping[str, Loader],
    tasks: Sequence[Task],
    tokenizer: PreTrainedTokenizerBase,
    *,
    limit: float | None = None,
    seed: int = 0,
    store: Store | None = None,
) -> int:
    """About how many bytes the results of `run` take that `store` does not have yet; without a store, those of all."""
    found = 0
    for name, load in systems.items():
        system = _System(name, load, tokenizer, store, 1, None)
        for task in tasks:
            kept = system.kept(task)
            new = sum(index not in kept for index in subset(task, limit, seed))
            found += new * (task.item_bytes + _POINT_BYTES * len(task.axis))
    return found


def subset(task: Task, limit: float | None, seed: int) -> list[int]:
    """The items to score, in the task's order: all, or `limit` of them at random."""
    return draw(task.name, len(task), limit, seed)


class _System:
    """One system in a run; its model is loaded when it is first needed."""

    def __init__(
        self,
        name: str,
        load: Loader,
        tokenizer: PreTrainedTokenizerBase,
        store: Store | None,
        batch_size: int,
        progress: Progress | None,
    ) -> None:
        self.name, self.load, self.tokenizer, self.store = name, load, tokenizer, store
        self.batch_size, self.progress = batch_size, progress
        stamp: str | None = getattr(load, "stamp", None)
        self.stamp = None if stamp is None else whole_stamp(stamp, tokenizer)
        self.key = store.model_of(self.stamp) if store is not None and self.stamp is not None else None
        self.model: PreTrainedModel | None = None

    def results(self, tasks: Sequence[Task], chosen: Mapping[str, Sequence[int]]) -> dict[str, dict[int, Item]]:
        """By task the result of each chosen item."""
        found = self._all_kept(tasks)
        if all(index in found[task.name] for task in tasks for index in chosen[task.name]):
            return found
        self.model = self.load()
        if self.store is not None:
            self.key = model_key(self.model, self.tokenizer)
            if self.stamp is not None:
                processes.from_the_first(partial(self.store.remember, self.stamp, self.key))
            found = self._all_kept(tasks)
        with evaluating(self.model), torch.inference_mode():
            for task in tasks:
                self._score(task, chosen[task.name], found[task.name])
        return found

    def _all_kept(self, tasks: Sequence[Task]) -> dict[str, dict[int, Item]]:
        """The results that the first of several processes reads, because some others might miss its later writes."""
        return processes.everyones({task.name: self.kept(task) for task in tasks} if processes.is_first() else {})[0]

    def kept(self, task: Task) -> dict[int, Item]:
        """The results that the store has, as far as the model is known without loading it."""
        return self.store.read(self.key, task.digest) if self.store is not None and self.key is not None else {}

    def _score(self, task: Task, chosen: Sequence[int], found: dict[int, Item]) -> None:
        """Scores what `found` lacks, and adds it there; each of several processes has its share of every chunk."""
        missing = [index for index in chosen if index not in found]
        self._tell(task, len(chosen) - len(missing), len(chosen))
        size, of = CHUNK, processes.count()
        while missing:
            chunk, missing = missing[: size * of], missing[size * of :]
            started = time.monotonic()
            share = chunk[processes.rank() :: of]
            own = dict(zip(share, self._items(task, share) if share else [], strict=True))
            seconds = time.monotonic() - started
            parts = processes.everyones((own, seconds))
            new = {index: item for part, _ in parts for index, item in part.items()}
            if self.store is not None and self.key is not None:
                processes.from_the_first(partial(self.store.write, self.key, task.digest, new))
            found |= new
            self._tell(task, len(chosen) - len(missing), len(chosen))
            if max(seconds for _, seconds in parts) > CHUNK_SECONDS:
                size = max(1, size // 2)

    def _items(self, task: Task, indices: Sequence[int]) -> list[Item]:
        assert self.model is not None  # noqa: S101 - for the type checker
        while (items := self._fitting(task, indices)) is None:
            self.batch_size //= 2
            _give_back()
        for index, item in zip(indices, items, strict=True):
            if not all(map(math.isfinite, (item.value, *item.curve))):
                raise ModelError(
                    f"{self.name}: the result on item {index + 1} of {task.name} is not finite; check its weights"
                )
        return items

    def _fitting(self, task: Task, indices: Sequence[int]) -> list[Item] | None:
        """The items' results, or None where memory does not hold so many sequences at once."""
        assert self.model is not None  # noqa: S101 - for the type checker
        try:
            return task.score(self.model, self.tokenizer, indices, self.batch_size)
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            if self.batch_size == 1:
                if isinstance(error, ModelError):
                    raise
                raise ModelError(f"{self.name}: out of memory on {task.name} with one sequence at a time") from error
            return None  # the traceback, and the tensors that it holds, go with this frame

    def _tell(self, task: Task, done: int, total: int) -> None:
        if self.progress is not None:
            self.progress(self.name, task.name, done, total)


def _give_back() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def _scores(task: Task, chosen: Sequence[int], found: Mapping[int, Item], seed: int) -> list[TaskScore]:
    items = [found[index] for index in chosen]
    drawn = len(chosen) < len(task)
    scores = []
    for measure in task.measures(chosen, items):
        tags = measure.tags
        if drawn and len(tags) == len(chosen):
            # Results of two runs pair up only where they are of the same items.
            tags = [{**tag, "item": index} for tag, index in zip(tags, chosen, strict=True)]
        scores.append(
            TaskScore(
                task=task.name,
                metric=measure.metric,
                value=measure.value,
                stderr=measure.stderr,
                higher_is_better=measure.higher_is_better,
                items=measure.items,
                suite=task.suite,
                tags=tags if any(tags) else [],
                curves=[item.curve for item in items] if any(item.curve for item in items) else [],
                axis=list(task.axis),
                total=len(task),
                seed=seed if drawn else None,
                count=measure.n,
            )
        )
    return scores


def check_limit(limit: float | None) -> None:
    """Raises:
    DataError: the limit is neither a whole number of items nor a share between 0 and 1.
    """
    if limit is not None and not (0 < limit < 1 or (limit >= 1 and limit == int(limit))):
        raise DataError(f"limit is {limit}: give 1 or more items per task, a share of them such as 0.1, or no limit")
