"""Generation beside the teacher: whose token is the most likely one, how far the distributions part, and repetition.

Prompts are stretches of WikiText-2 (test) of one length; each is continued by a fixed number of tokens, and an end
token ends nothing, so that all items weigh the same. "The teacher's text" is its own greedy continuation.
"""

from __future__ import annotations

import hashlib
import json
from abc import abstractmethod
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from linearize.errors import DataError, hint_for
from linearize.evaluation.tasks.continuations import BatchedTask, Texts
from linearize.evaluation.tasks.excerpts import page_prompts
from linearize.evaluation.tasks.fewshot import FewShot
from linearize.evaluation.tasks.names import GENERATION
from linearize.evaluation.tasks.reading import agreements, divergences
from linearize.evaluation.tasks.task import Item, Task

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

    from transformers import PreTrainedModel, PreTrainedTokenizerBase

NGRAM = 4
_VERSION = 2


def generation_tasks(
    tokenizer: PreTrainedTokenizerBase,
    names: Sequence[str],
    *,
    teacher: Callable[[], PreTrainedModel] | None,
    data: Path | None,
    samples: int = 32,
    seed: int = 0,
    prompt_tokens: int = 64,
    new_tokens: int = 128,
) -> list[Task]:
    """Tasks of this suite, in the order of the names; a repeated name counts once.

    Args:
        tokenizer: the teacher's, and that of all models that are scored.
        names: of `GENERATION`.
        teacher: loads the teacher, on its device. It is called once, when a digest or a result first needs it, and the
            teacher lives as long as the tasks; what it wrote is shared by them. None goes with `TEACHERLESS` alone.
        data: the folder that holds `excerpts.PAGES`; not needed for `few_shot_exact`.
        samples: items of each task.
        seed: of the choice of prompts and of the sampling in `kl_own_text`.
        prompt_tokens, new_tokens: of each prompt, and of each continuation.

    Raises:
        DataError: an unknown task, settings that make no sense, or no text to take prompts from.
    """
    for name in names:
        if name not in GENERATION:
            raise DataError(f"no generation task called '{name}': {hint_for(name, GENERATION, most=1)}")
    for what, value in (("samples", samples), ("prompt_tokens", prompt_tokens), ("new_tokens", new_tokens)):
        if value < 1:
            raise DataError(f"{what} is {value}: give 1 or more")
    chosen = list(dict.fromkeys(names))
    texts = None
    if set(chosen) - {FewShot.name}:
        prompts = page_prompts(tokenizer, data, samples=samples, tokens=prompt_tokens, seed=seed)
        texts = Texts(prompts, new_tokens, seed, teacher, frozenset(tokenizer.all_special_ids))
    tasks: list[Task] = []
    for name in chosen:
        if texts is not None and name in _TASKS:
            tasks.append(_TASKS[name](texts))
        else:
            tasks.append(FewShot(tokenizer, samples=samples, seed=seed))
    return tasks


class GenerationTask(BatchedTask):
    """A task whose items are the prompts of `Texts`."""

    about: str
    needs_teacher = True

    def __init__(self, texts: Texts) -> None:
        self.texts, self.about = texts, GENERATION[self.name]

    def __len__(self) -> int:
        return len(self.texts.prompts)

    @cached_property
    def digest(self) -> str:  # type: ignore[override]
        """Digest of prompts, settings and, where its texts count, the teacher's weights; the first use loads the
        teacher."""
        texts = self.texts
        content: list[Any] = [_VERSION, self.name, texts.prompts, texts.new_tokens, texts.seed, sorted(texts.special)]
        if self.needs_teacher:
            content.append(texts.teacher_fingerprint)
        return hashlib.sha256(json.dumps(content).encode()).hexdigest()

    def longest(self, indices: Sequence[int]) -> int:
        return self.texts.prompt_tokens + self.texts.new_tokens

    def checked(self, values: Tensor, batch: Sequence[int], whose: str = "model") -> Tensor:
        """`values` `[B, N]`, one per new token.

        Raises:
            ModelError: some are not finite, or (tokens) negative.
        """
        # A divergence of zero may come out a little below it.
        broken = (~torch.isfinite(values) | (values < -0.5)).nonzero()
        if len(broken):
            row, step = broken[0].tolist()
            raise self.not_finite(batch[row], self.texts.prompt_tokens + step, whose)
        return values

    def teacher_texts(self, batch: Sequence[int]) -> Tensor:
        """The teacher's texts `[B, N]`."""
        return self.checked(self.texts.by_teacher(batch, len(batch)), batch, "teacher")

    def own_texts(self, model: PreTrainedModel, batch: Sequence[int]) -> Tensor:
        """The model's greedy texts `[B, N]`."""
        return self.checked(self.texts.by_model(model, batch, len(batch)), batch)


class Agreement(GenerationTask):
    """The model reads the teacher's text: at how many places would it have written the same token?"""

    name = "agreement"
    metric = "agreement"

    def items(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, batch: Sequence[int]) -> list[Item]:
        ids = self.texts.after_prompts(batch, self.teacher_texts(batch))
        same = self.checked(agreements(model, ids, self.texts.prompt_tokens), batch)
        return [Item(value) for value in same.mean(1).tolist()]


class CommonPrefix(GenerationTask):
    """Both write on their own: the tokens before the first difference, as a share of all new tokens."""

    name = "common_prefix"
    metric = "common_prefix"

    def items(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, batch: Sequence[int]) -> list[Item]:
        same = self.own_texts(model, batch) == self.teacher_texts(batch)
        return [Item(value) for value in same.cumprod(1).double().mean(1).tolist()]


class Divergence(GenerationTask):
    """KL(teacher || model) after each new token; curves run along the continuation, from its first token."""

    metric = "kl"
    higher_is_better = False

    def __init__(self, texts: Texts) -> None:
        super().__init__(texts)
        self.axis = [float(position) for position in range(1, texts.new_tokens + 1)]

    @abstractmethod
    def continuations(self, model: PreTrainedModel, batch: Sequence[int]) -> Tensor:
        """The texts `[B, N]` to read."""

    def items(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, batch: Sequence[int]) -> list[Item]:
        ids = self.texts.after_prompts(batch, self.continuations(model, batch))
        kl = self.checked(divergences(self.texts.teacher, model, ids, self.texts.prompt_tokens), batch)
        return [Item(sum(curve) / len(curve), tuple(curve)) for curve in kl.tolist()]


class TeacherTextDivergence(Divergence):
    """Along the teacher's text."""

    name = "kl_teacher_text"

    def continuations(self, model: PreTrainedModel, batch: Sequence[int]) -> Tensor:
        return self.teacher_texts(batch)


class OwnTextDivergence(Divergence):
    """Along what the model samples itself at temperature 1: errors feed on themselves here, and a greedy text would end
    in loops that any model predicts well."""

    name = "kl_own_text"

    def continuations(self, model: PreTrainedModel, batch: Sequence[int]) -> Tensor:
        return self.checked(self.texts.sampled_by(model, batch, len(batch)), batch)


class Repetition(GenerationTask):
    """1 - distinct / all 4-grams of the model's own greedy text, up to its end token where it writes one. The teacher's
    own figure is the one of the teacher as a system: greedy texts of small models repeat themselves."""

    name = "repetition"
    metric = "repetition"
    higher_is_better = False
    needs_teacher = False

    def items(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, batch: Sequence[int]) -> list[Item]:
        return [Item(repeated(text, self.texts.special)) for text in self.own_texts(model, batch).tolist()]


def repeated(text: Sequence[int], ends: frozenset[int] = frozenset()) -> float:
    """The share of 4-grams that stood in `text` before, counted up to its first token of `ends`; 0 for fewer than four
    tokens."""
    length = next((place for place, token in enumerate(text) if token in ends), len(text))
    grams = [tuple(text[place : place + NGRAM]) for place in range(length - NGRAM + 1)]
    return 1 - len(set(grams)) / len(grams) if grams else 0.0


_TASKS: dict[str, type[GenerationTask]] = {
    task.name: task for task in (Agreement, CommonPrefix, TeacherTextDivergence, OwnTextDivergence, Repetition)
}
