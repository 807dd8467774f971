"""Continuations of prompts by the teacher and the scored model, and tasks that read texts in batches."""

from __future__ import annotations

from abc import abstractmethod
from functools import cached_property
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from linearize.errors import ModelError, is_out_of_memory
from linearize.evaluation.tasks.reading import Kept, greedy, sampled, write
from linearize.evaluation.tasks.task import Item, Task, evaluating
from linearize.sources.fingerprint import fingerprint
from linearize.sources.limits import learned_positions

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from transformers import PreTrainedModel, PreTrainedTokenizerBase


class Texts:
    """Prompts, and what is written after them by the teacher and by the model that is scored: each text is made once.

    Attributes:
        prompts: token ids, all of one length.
        new_tokens: of each continuation.
        special: tokens that end a text.
    """

    def __init__(
        self,
        prompts: list[list[int]],
        new_tokens: int,
        seed: int,
        teacher: Callable[[], PreTrainedModel] | None,
        special: frozenset[int],
    ) -> None:
        self.prompts, self.new_tokens, self.seed, self.special = prompts, new_tokens, seed, special
        self._load = teacher
        self._teachers, self._greedy, self._sampled = Kept(), Kept(), Kept()

    @cached_property
    def teacher(self) -> PreTrainedModel:
        """The teacher, in eval mode."""
        assert self._load is not None  # noqa: S101 - the suite builds no task that compares without one
        return self._load().eval()

    @cached_property
    def teacher_fingerprint(self) -> dict[str, str]:
        return fingerprint(self.teacher)

    @property
    def prompt_tokens(self) -> int:
        return len(self.prompts[0])

    def by_teacher(self, items: Sequence[int], batch_size: int) -> Tensor:
        """The teacher's greedy continuations `[len(items), N]`."""
        with evaluating(self.teacher):
            return self._written(self._teachers, self.teacher, items, batch_size, lambda _: greedy)

    def by_model(self, model: PreTrainedModel, items: Sequence[int], batch_size: int) -> Tensor:
        """A model's own greedy continuations `[len(items), N]`, -1 where its logits are not numbers."""
        return self._written(self._greedy, model, items, batch_size, lambda _: greedy)

    def sampled_by(self, model: PreTrainedModel, items: Sequence[int], batch_size: int) -> Tensor:
        """A model's own continuations, sampled at temperature 1, as `by_model`."""
        return self._written(self._sampled, model, items, batch_size, lambda batch: sampled(self.seed, batch))

    def after_prompts(self, items: Sequence[int], continuations: Tensor) -> Tensor:
        """Prompts and continuations `[len(items), P + N]`."""
        return torch.cat([torch.tensor([self.prompts[item] for item in items]), continuations], 1)

    def _written(
        self,
        kept: Kept,
        model: PreTrainedModel,
        items: Sequence[int],
        batch_size: int,
        pick: Callable[[Sequence[int]], Callable[[Tensor, int], Tensor]],
    ) -> Tensor:
        def make(batch: Sequence[int]) -> Tensor:
            return write(model, [self.prompts[item] for item in batch], self.new_tokens, pick(batch))

        with torch.inference_mode():
            return torch.stack(kept.get(model, items, batch_size, make))


class BatchedTask(Task):
    """A task whose items are texts that go through the model in batches."""

    suite = "generation"

    @abstractmethod
    def longest(self, indices: Sequence[int]) -> int:
        """Tokens of the longest text of these items, with what is written after it."""

    @abstractmethod
    def items(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, batch: Sequence[int]) -> list[Item]:
        """The results on one batch."""

    def score(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        indices: Sequence[int],
        batch_size: int,
    ) -> list[Item]:
        """See `Task.score`; `batch_size` texts at a time.

        Raises:
            ModelError: logits that are not finite, a batch that memory does not hold, more tokens than the model has
                learned positions for, or another vocabulary than the teacher's.
        """
        limit = learned_positions(model)
        if limit is not None and indices and (tokens := self.longest(indices)) > limit:
            raise ModelError(
                f"task {self.name}: its texts have up to {tokens:,} tokens and the model has learned {limit:,} "
                "positions: choose shorter ones, or leave this task out"
            )
        found: list[Item] = []
        with evaluating(model), torch.inference_mode():
            for start in range(0, len(indices), batch_size):
                batch = indices[start : start + batch_size]
                try:
                    found += self.items(model, tokenizer, batch)
                except Exception as error:
                    if not is_out_of_memory(error):
                        raise
                    raise ModelError(
                        f"task {self.name}: memory does not hold {len(batch)} texts of up to {self.longest(batch):,} "
                        "tokens at once: choose a smaller batch size, or shorter texts"
                    ) from error
        return found

    def not_finite(self, index: int, tokens: int, whose: str = "model") -> ModelError:
        """The error for logits of item `index` that are not finite after so many tokens."""
        return ModelError(
            f"task {self.name}, item {index + 1}: the {whose}'s logits after {tokens:,} tokens are not finite: nothing "
            "to score; try another dtype, or look at the weights"
        )
