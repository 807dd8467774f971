"""Few-shot answers that only the examples in the prompt determine, because labels are drawn anew for each prompt.
lm-eval has no such task."""

from __future__ import annotations

import hashlib
import json
import random
from typing import TYPE_CHECKING, Any, NamedTuple

from linearize.errors import DataError
from linearize.evaluation.tasks.continuations import BatchedTask
from linearize.evaluation.tasks.names import GENERATION
from linearize.evaluation.tasks.reading import greedy, write
from linearize.evaluation.tasks.task import Item

if TYPE_CHECKING:
    from collections.abc import Sequence

    from transformers import PreTrainedModel, PreTrainedTokenizerBase

_KINDS = (
    "lion horse sheep rabbit tiger monkey goat wolf bear mouse camel zebra",
    "red blue green yellow purple orange white black brown pink gray silver",
    "bread cheese rice soup cake butter pasta salad pizza honey meat sugar",
    "France Japan Brazil Egypt Canada India Spain Peru Kenya China Norway Italy",
    "seven three nine four twelve eight twenty five six eleven two ten",
)
LABELS = "ABCDE"
PER_KIND = 8
"""Examples of each kind in a prompt."""
FAR = 16
"""In every second prompt so many examples, more than a window of 64 tokens, follow those that determine the answer."""
# A space, the letter and the end of the line, in tokens of single characters.
_NEW_TOKENS = 3
_VERSION = 1


class Question(NamedTuple):
    """A prompt with 40 examples, the letter that should follow it, and how many examples, counted from the end, the
    last one of that letter lies back (1: it is the last example)."""

    prompt: str
    answer: str
    back: int


class FewShot(BatchedTask):
    """Words are labelled with letters, `lion -> C`, by their kind: animal, colour, food, country or number. Which
    letter means which kind is drawn anew for each prompt, so it has to be learned from the 40 examples in it, about 180
    tokens of SmolLM2. In every second prompt the examples of the kind that is asked for all stand before the last 16,
    out of sight of a window of 64 tokens; in the others they stand anywhere. An answer is right if the
    rest of the line, decoded greedily, is exactly the letter; chance is 0.2.

    Tags: `back`, see `Question`.
    """

    name = "few_shot_exact"
    metric = "exact_match"
    about = GENERATION["few_shot_exact"]

    def __init__(self, tokenizer: PreTrainedTokenizerBase, *, samples: int, seed: int) -> None:
        """Args:
        tokenizer: of all models that are scored.
        samples: prompts.
        seed: of words, letters and their order; more samples with one seed add to those of fewer.

        Raises:
            DataError: fewer than 1 sample.
        """
        if samples < 1:
            raise DataError(f"samples is {samples}: give 1 or more")
        self.questions = questions(samples, seed)
        self._prompts: list[list[int]] = [list(tokenizer(question.prompt).input_ids) for question in self.questions]
        content = [_VERSION, self.name, _NEW_TOKENS, self.questions, self._prompts]
        self.digest = hashlib.sha256(json.dumps(content).encode()).hexdigest()

    def __len__(self) -> int:
        return len(self.questions)

    def tags(self, index: int) -> dict[str, Any]:
        """`back`, see `Question`."""
        return {"back": self.questions[index].back}

    def longest(self, indices: Sequence[int]) -> int:
        return max(len(self._prompts[index]) for index in indices) + _NEW_TOKENS

    def items(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, batch: Sequence[int]) -> list[Item]:
        texts = write(model, [self._prompts[index] for index in batch], _NEW_TOKENS, greedy).tolist()
        found = []
        for index, text in zip(batch, texts, strict=True):
            if min(text) < 0:
                raise self.not_finite(index, len(self._prompts[index]) + text.index(-1))
            answer = tokenizer.decode(text, skip_special_tokens=True)
            found.append(Item(float(is_right(answer, self.questions[index].answer))))
        return found


def questions(samples: int, seed: int) -> list[Question]:
    """Prompts and answers: the kinds take turns to be asked for, every second time with far examples only."""
    return [
        _question(random.Random(f"{seed} {item}"), item % len(_KINDS), far=item % 2 == 1)  # noqa: S311
        for item in range(samples)
    ]


def is_right(written: str, answer: str) -> bool:
    """True if the rest of the line is exactly the answer."""
    return written.split("\n")[0].strip() == answer


def _question(rng: random.Random, asked: int, *, far: bool) -> Question:
    words = [rng.sample(kind.split(), PER_KIND + 1) for kind in _KINDS]
    labels = rng.sample(LABELS, len(_KINDS))
    examples = [(word, label) for shown, label in zip(words, labels, strict=True) for word in shown[1:]]
    rng.shuffle(examples)
    if far:
        last = [example for example in examples if example[1] != labels[asked]][-FAR:]
        examples = [example for example in examples if example not in last] + last
    back = next(back for back, (_, label) in enumerate(reversed(examples), start=1) if label == labels[asked])
    lines = "".join(f"{word} -> {label}\n" for word, label in examples)
    return Question(f"{lines}{words[asked][0]} ->", labels[asked], back)
