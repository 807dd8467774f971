"""Needles: a number hidden in the text at hand, asked for at its end, with the right answer after the question.

The words are RULER's S-NIAH-2 (see `evaluation.recall.texts`), the haystack the text that is probed. The answer is not
written by the model but given, so that one forward pass tells both how likely the model finds each of its tokens and
which heads look at the needle while they are to be said.
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

# Longer ones are addresses or what is left of a text that has no words.
_LONGEST_WORD = 24
_DRAWS = 5


@dataclass(frozen=True)
class Needle:
    """A text with a needle.

    Attributes:
        ids: its tokens, the answer included.
        value: where in `ids` the hidden number stands.
        answer: where the same number stands as the answer.
    """

    ids: list[int]
    value: range
    answer: range

    @property
    def asking(self) -> range:
        """The positions whose next token is one of the answer."""
        return range(self.answer.start - 1, self.answer.stop - 1)


def make_needles(
    tokenizer: Any, texts: Sequence[str], *, count: int, length: int, window: int, sinks: int, seed: int
) -> list[Needle]:
    """Texts of at most `length` tokens whose needle is in none of the answer's windows, nor among the sinks.

    Args:
        tokenizer: a fast one, which tells where in the text its tokens stand.
        texts: the haystack; repeated where it is short, sentences that say nothing where it has no words.
        count: how many; depths are spread evenly over what lies outside the window.

    Raises:
        DataError: `length` does not hold the question, or no needle outside the window.
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
    """Mean log-probability of the answer's tokens, in nats; `model` in eval mode, called without gradients.

    Raises:
        ModelError: it is not a number.
    """
    ids = torch.tensor([needle.ids], device=model.device)
    kept = len(needle.ids) - needle.asking.start
    logits: Tensor = model(input_ids=ids, use_cache=False, logits_to_keep=kept).logits[0, : len(needle.answer)]
    answer = ids[0, needle.answer.start : needle.answer.stop, None]
    mean = float(logits.float().log_softmax(-1).gather(1, answer).double().mean())
    if mean != mean:
        raise ModelError("the model gives logits that are not finite on a text with a needle: nothing to probe")
    return mean
