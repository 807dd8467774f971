"""Needles: texts with a hidden number, a question for it at the end, and the right answer after the question.

The words are those of RULER's S-NIAH-2 (see `evaluation.recall.texts`), the haystack is the text of the probe. The
answer is part of the input, so one forward pass gives the log-probability of each answer token and the attention to the
needle at these positions.
"""

from __future__ import annotations

import random
from dataclasses import dataclass, replace
from itertools import chain, repeat
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from linearize.errors import DataError, ModelError
from linearize.evaluation.tasks.recall import Writer
from linearize.evaluation.tasks.recall.texts import NOISE, Essay, niah_essay

if TYPE_CHECKING:
    from collections.abc import Sequence

# Longer words are addresses, or text without spaces.
_LONGEST_WORD = 24
_DRAWS = 5


@dataclass(frozen=True)
class Needle:
    """A text with a needle.

    Attributes:
        ids: its token ids, the answer included.
        value: the positions of the hidden number in `ids`.
        answer: the positions of the answer, the same number.
    """

    ids: list[int]
    value: range
    answer: range

    @property
    def asking(self) -> range:
        """The positions whose next token belongs to the answer."""
        return range(self.answer.start - 1, self.answer.stop - 1)


def make_needles(
    tokenizer: Any, texts: Sequence[str], *, count: int, length: int, window: int, sinks: int, seed: int
) -> list[Needle]:
    """Texts of at most `length` tokens whose needle is outside the windows of all answer tokens, and not a sink.

    Args:
        tokenizer: a fast one, because its token offsets are needed.
        texts: the haystack; repeated if it is short, RULER's noise sentences if it has no words.
        count: the number of texts; depths are spaced evenly over the part outside the window.

    Raises:
        DataError: `length` is too short for the question, or for a needle outside the window.
    """
    words = [word for text in texts for word in text.split() if len(word) <= _LONGEST_WORD]
    words = words or " ".join(NOISE).split()
    essay = Essay.of(list(chain.from_iterable(repeat(words, 1 + 2 * length // len(words)))))
    writer, found = Writer(tokenizer, chat=False), []
    for index in range(count):
        depth = (index + 0.5) / count * max(0.0, 1 - window / length)
        for draw in range(_DRAWS):
            rng = random.Random(f"{seed} probe {index} {draw}")  # noqa: S311 - to be repeated
            needle = _needle(tokenizer, writer, essay, rng, depth * 0.7**draw, length)
            if needle.answer.start - needle.value.stop >= window and needle.value.start >= sinks:
                found.append(needle)
                break
    if len(found) < min(2, count):
        raise DataError(
            f"a length of {length:,} tokens cannot hide a needle outside a window of {window:,}: raise the length"
        )
    return found


def _needle(tokenizer: Any, writer: Writer, essay: Essay, rng: random.Random, depth: float, length: int) -> Needle:
    draft = niah_essay(rng, depth, essay, length)
    value = draft.answers[0]
    draft = replace(draft, prefix=f"{draft.prefix}: {value}")
    text = draft.build(writer.units("probe", draft, length)) + draft.prefix
    encoded = tokenizer(text, return_offsets_mapping=True)

    def tokens(at: int) -> range:
        offsets = enumerate(encoded.offset_mapping)
        inside = [index for index, (start, end) in offsets if end > at and start < at + len(value)]
        return range(inside[0], inside[-1] + 1)

    return Needle(encoded.input_ids, tokens(text.index(value)), tokens(text.rindex(value)))


def answer_log_probability(model: Any, needle: Needle) -> float:
    """Mean log-probability of the answer's tokens, in nats; `model` must be in eval mode, without gradients.

    Raises:
        ModelError: the result is NaN.
    """
    ids = torch.tensor([needle.ids], device=model.device)
    kept = len(needle.ids) - needle.asking.start
    logits: Tensor = model(input_ids=ids, use_cache=False, logits_to_keep=kept).logits[0, : len(needle.answer)]
    answer = ids[0, needle.answer.start : needle.answer.stop, None]
    mean = float(logits.float().log_softmax(-1).gather(1, answer).double().mean())
    if mean != mean:
        raise ModelError("the model gives logits that are not finite on a text with a needle: nothing to probe")
    return mean
