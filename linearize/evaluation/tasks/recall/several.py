"""The texts of RULER's tasks that ask for several things at once: many values of one key, the variables of a chain, the
most common words of a list.

The words are RULER's (arXiv 2404.06654; github.com/NVIDIA/RULER, scripts/data/synthetic). Variables and words come with
one solved example in front, as RULER gives them; answers begin without its trailing space, which many tokenizers would
turn into a token of its own.
"""

from __future__ import annotations

import itertools
import random
from string import ascii_uppercase
from typing import TYPE_CHECKING

from linearize.evaluation.tasks.recall.texts import NIAH_NEEDLE, NOISE, Draft, Essay, number_of
from linearize.evaluation.tasks.recall.words import ADJECTIVES, NOUNS, unique_keys

if TYPE_CHECKING:
    from random import Random

VALUES_BODY = (
    "Some special magic numbers are hidden within the following text. Make sure to memorize it. I will quiz you about "
    "the numbers afterwards.\n{context}\nWhat are all the special magic numbers for {key} mentioned in the provided "
    "text?"
)
VALUES_PREFIX = " The special magic numbers for {key} mentioned in the provided text are"
VALUES = 4

VARIABLES_BODY = (
    "Memorize and track the chain(s) of variable assignment hidden in the following text.\n\n{context}\nQuestion: Find "
    "all variables that are assigned the value {value} in the text above."
)
VARIABLES_PREFIX = (
    " Answer: According to the chain(s) of variable assignment in the text above, {count} variables are assigned the "
    "value {value}, they are:"
)
HOPS = 4

WORDS_BODY = (
    "Below is a numbered list of words. In these words, some appear more often than others. Memorize the ones that "
    "appear most often.\n{context}\nQuestion: What are the 10 most common words in the above list?"
)
WORDS_PREFIX = " Answer: The top 10 words that appear most often in the list are:"
COMMON = 10
_LONG = 4096
_EXAMPLE_LINES = 8


def multivalue(rng: Random, essay: Essay, length: int) -> Draft:
    """MV-NIAH: several numbers of one word, between the sentences of a book.

    Args:
        length: how many words the text may come to need.
    """
    key = unique_keys(rng, 1)[0]
    values = [number_of(rng) for _ in range(VALUES)]
    depths = [rng.random() for _ in values]
    needles = [
        (at, NIAH_NEEDLE.format(type="number", key=key, value=value)) for at, value in zip(depths, values, strict=True)
    ]
    start = essay.start(rng, length)
    return Draft(
        build=lambda count: VALUES_BODY.format(context=essay.place(start, count, needles), key=key),
        prefix=VALUES_PREFIX.format(key=key),
        answers=values,
        depths=depths,
    )


def variables(rng: Random) -> Draft:
    """VT: a chain of variables that all come to one number, in noise; each unit of filling is a line."""
    shown, names = (_names(rng, letters) for letters in (3, 5))
    depths = sorted(rng.random() for _ in names)
    value, example = (str(rng.randrange(10_000, 100_000)) for _ in range(2))
    places = sorted(rng.random() for _ in shown)
    solved = f"{_chain(shown, example, places, _EXAMPLE_LINES)}{_prefix(example)} {' '.join(shown)}"
    return Draft(
        build=lambda count: f"{solved}\n\n{_chain(names, value, depths, count)}",
        prefix=_prefix(value),
        answers=names,
        depths=depths,
    )


def common_words(rng: Random, length: int) -> Draft:
    """CWE: a numbered list in which ten words come more often than the others; each unit of filling is another word.

    Args:
        length: of the prompt in tokens; RULER repeats words more often in longer ones.
    """
    repeats, rare, first, few, size = (30, 3, 10, 3, 40) if length >= _LONG else (6, 1, 3, 1, 20)
    seed = rng.random()
    shown, words = _words(rng, size), _words(rng, COMMON + length)

    def listed(chosen: list[str], often: int, seldom: int) -> str:
        entries = chosen[:COMMON] * often + chosen[COMMON:] * seldom
        random.Random(seed).shuffle(entries)  # noqa: S311 - to be repeated
        return WORDS_BODY.format(context=" ".join(f"{index + 1}. {word}" for index, word in enumerate(entries)))

    solved = f"{listed(shown, first, few)}{WORDS_PREFIX} {_numbered(shown[:COMMON])}"
    return Draft(
        build=lambda count: f"{solved}\n{listed(words[: COMMON + count], repeats, rare)}",
        prefix=WORDS_PREFIX,
        answers=words[:COMMON],
        depths=[0.5] * COMMON,
        written=_numbered(words[:COMMON]),
    )


def _prefix(value: str) -> str:
    return VARIABLES_PREFIX.format(count=HOPS + 1, value=value)


def _chain(names: list[str], value: str, depths: list[float], lines: int) -> str:
    """The text and question, with each assignment at its depth among `lines` lines of noise."""
    said = [f"VAR {names[0]} = {value}"]
    said += [f"VAR {name} = VAR {before}" for before, name in itertools.pairwise(names)]
    text = [" ".join(NOISE)] * lines
    for after, (depth, line) in enumerate(zip(depths, said, strict=True)):
        text.insert(int(lines * depth) + after, line)
    return VARIABLES_BODY.format(context="\n".join(text), value=value)


def _names(rng: Random, letters: int) -> list[str]:
    names: dict[str, None] = {}
    while len(names) < HOPS + 1:
        names["".join(rng.choices(ascii_uppercase, k=letters))] = None
    return list(names)


def _words(rng: Random, count: int) -> list[str]:
    """`count` different words; pairs of them once the words run out."""
    known = sorted({*ADJECTIVES, *NOUNS})
    single = rng.sample(known, min(count, len(known)))
    return [*single, *unique_keys(rng, max(count - len(single), 0))]


def _numbered(words: list[str]) -> str:
    return " ".join(f"{index + 1}. {word}" for index, word in enumerate(words))
