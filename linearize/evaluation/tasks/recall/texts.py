"""The texts of the recall tasks: hidden facts, their places and the questions.

A `Draft` is a text of any size: `build(n)` has n units of filling, so that a caller can fill a length of its own
tokens. Depth is the place of the queried fact in the filling: 0 is its beginning, 1 its end.
"""

from __future__ import annotations

import bisect
import json
import re
import uuid
from dataclasses import dataclass
from typing import TYPE_CHECKING

from linearize.errors import DataError
from linearize.evaluation.tasks.names import ESSAY
from linearize.evaluation.tasks.recall.words import NOUNS, unique_keys

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path
    from random import Random

# Mohtashami and Jaggi, arXiv 2305.16300, and RULER's noise.
NOISE = ("The grass is green.", "The sky is blue.", "The sun is yellow.", "Here we go.", "There and back again.")

# RULER, arXiv 2404.06654: github.com/NVIDIA/RULER, scripts/data/synthetic/{constants,niah}.py, with what niah.py puts
# into the singular where one value is asked for.
NIAH_BODY = (
    "A special magic {type} is hidden within the following text. Make sure to memorize it. I will quiz you about the "
    "{type} afterwards.\n{context}\nWhat is the special magic {type} for {key} mentioned in the provided text?"
)
NIAH_PREFIX = " The special magic {type} for {key} mentioned in the provided text is"
NIAH_NEEDLE = "One of the special magic {type}s for {key} is: {value}."

# Landmark Attention, arXiv 2305.16300: github.com/epfml/landmark-attention, llama/run_test.py.
PASSKEY_BODY = (
    "There is an important info hidden inside a lot of irrelevant text. Find it and memorize them. I will quiz you "
    "about the important information there.\n{before}\nThe pass key is {value}. Remember it. {value} is the pass key.\n"
    "{after}\nWhat is the pass key?"
)
PASSKEY_PREFIX = " The pass key is"

# Lost in the Middle, arXiv 2307.03172: github.com/nelson-liu/lost-in-the-middle, prompts/kv_retrieval.prompt.
KV_BODY = (
    "Extract the value corresponding to the specified key in the JSON object below.\n\nJSON data:\n{context}\n\n"
    'Key: "{key}"'
)
KV_PREFIX = "\nCorresponding value:"

# Zoology, arXiv 2312.04927, has bare tokens; these words explain the task to a model that was not trained on it.
MQAR_BODY = "Memorize the value of every key.\n\n{context}\n\nThe values of some of these keys:"


@dataclass(frozen=True)
class Draft:
    """A text that is yet to be given its size.

    Attributes:
        build: units of filling -> the text up to and with the question.
        prefix: how the answer begins.
        answers: the right answer to each question.
        depths: for each question, where its answer stands.
        is_answered: `prefix` contains the answers, in lines `key: answer`.
        least: the smallest n that `build` takes.
        written: how a model writes all answers, if not as a list with commas.
    """

    build: Callable[[int], str]
    prefix: str
    answers: list[str]
    depths: list[float]
    is_answered: bool = False
    least: int = 1
    written: str = ""


@dataclass(frozen=True)
class Essay:
    """A book as words, and where its sentences begin.

    Attributes:
        words: all of them, in order.
        starts: indices into `words`, ascending.
    """

    words: Sequence[str]
    starts: Sequence[int]

    @classmethod
    def read(cls, data: Path | None, task: str) -> Essay:
        """The book of the data folder, without Gutenberg's header and licence and without headings.

        Raises:
            DataError: no folder, or the file is missing, unreadable or empty.
        """
        if data is None:
            raise DataError(f"task {task} reads its haystack from {ESSAY}: give --data DIR a folder that holds it")
        path = data / ESSAY
        try:
            text = path.read_text(encoding="utf-8-sig")
        except FileNotFoundError as error:
            raise DataError(f"task {task} needs {ESSAY}, which is not in {data}: put a long text there") from error
        except (OSError, UnicodeDecodeError) as error:
            raise DataError(f"cannot read {path} for task {task}: {error}") from error
        marked = re.search(r"^\*\*\* ?START OF.*?$(.*)^\*\*\* ?END OF", text, re.MULTILINE | re.DOTALL)
        # Headings and the table of contents are in capitals.
        lines = (marked.group(1) if marked else text).splitlines()
        words = " ".join(line for line in lines if not line.isupper()).split()
        if not words:
            raise DataError(f"{path} is empty: task {task} needs a long text there")
        return cls.of(words)

    @classmethod
    def of(cls, words: Sequence[str]) -> Essay:
        """These words; their punctuation ends the sentences."""
        ends = [index + 1 for index, word in enumerate(words[:-1]) if _SENTENCE_END.search(word)]
        return cls(words, [0, *ends])

    def place(self, start: int, count: int, needles: Sequence[tuple[float, str]]) -> str:
        """`count` words from `start` on, with each needle put between two sentences at its depth, as RULER does it."""
        first = bisect.bisect_left(self.starts, start)
        last = bisect.bisect_left(self.starts, start + count)
        bounds = [*self.starts[first:last], start + count]
        text, at = list[str](), start
        for depth, needle in sorted(needles):
            cut = bounds[int((len(bounds) - 1) * depth)]
            text += [*self.words[at:cut], needle]
            at = cut
        return " ".join([*text, *self.words[at : start + count]])

    def start(self, rng: Random, count: int) -> int:
        """Start of the sentence that has `count` words after it.

        Raises:
            DataError: the book is shorter.
        """
        places = bisect.bisect_right(self.starts, len(self.words) - count)
        if not places:
            raise DataError(f"{ESSAY} has {len(self.words):,} words, too few for a length of {count:,} tokens")
        return self.starts[rng.randrange(places)]


_SENTENCE_END = re.compile(r"(?<!\bMr)(?<!\bMrs)(?<!\bDr)(?<!\bSt)[.!?][\"'”’)_]*$")


def niah_noise(rng: Random, depth: float) -> Draft:
    """S-NIAH-1: a number in lines that repeat; each unit is one sentence, so the last line may be cut short."""
    key, value = unique_keys(rng, 1)[0], number_of(rng)

    def context(count: int) -> str:
        whole, rest = divmod(count, len(NOISE))
        lines = [" ".join(NOISE)] * whole + [" ".join(NOISE[:rest])] * bool(rest)
        lines.insert(int(len(lines) * depth), _needle("number", key, value))
        return "\n".join(lines)

    return _niah("number", key, value, context, depth)


def niah_essay(rng: Random, depth: float, essay: Essay, length: int, *, uuids: bool = False, keys: int = 1) -> Draft:
    """S-NIAH-2 and -3 and MK-NIAH-1: needles between the sentences of a book, from a place drawn at random. RULER's
    essay begins at its beginning for every sample; the depths of the needles not asked for are drawn as in RULER.

    Args:
        length: how many words the text may come to need.
        keys: needles in all, one of which is asked for.
    """
    kind = "uuid" if uuids else "number"
    names = unique_keys(rng, keys)
    values = [_uuid(rng) if uuids else number_of(rng) for _ in names]
    depths = [depth, *(rng.random() for _ in names[1:])]
    needles = [(at, _needle(kind, name, value)) for at, name, value in zip(depths, names, values, strict=True)]
    start = essay.start(rng, length)
    return _niah(kind, names[0], values[0], lambda count: essay.place(start, count, needles), depth)


def passkey(rng: Random, depth: float) -> Draft:
    """A number of five digits (the original draws 1 to 50000, of which some are part of others) in noise."""
    value = str(rng.randrange(10_000, 100_000))

    def build(count: int) -> str:
        before = int(count * depth)
        return PASSKEY_BODY.format(before=_noise(before), after=_noise(count - before), value=value)

    return Draft(build, PASSKEY_PREFIX, [value], [depth])


def kv_retrieval(rng: Random, depth: float) -> Draft:
    """JSON of uuid pairs, one of which is asked for."""
    pairs = list[tuple[str, str]]()

    def drawn(count: int) -> list[tuple[str, str]]:
        while len(pairs) < count:
            pairs.append((_uuid(rng), _uuid(rng)))
        # The pair that is asked for is the first one drawn, so that it does not depend on the size.
        rest = pairs[1:count]
        rest.insert(round((count - 1) * depth), pairs[0])
        return rest

    def build(count: int) -> str:
        lines = ",\n ".join(f"{json.dumps(key)}: {json.dumps(value)}" for key, value in drawn(count))
        return KV_BODY.format(context=f"{{{lines}}}", key=pairs[0][0])

    return Draft(build, KV_PREFIX, [drawn(1)[0][1]], [depth])


def mqar(rng: Random, depths: Sequence[float], length: int) -> Draft:
    """Pairs of a key and a word, then some of the keys again, each with its value.

    Args:
        depths: of the pairs that are asked for.
        length: how many pairs the text may come to need.
    """
    most = max(length, 2 * len(depths))
    keys, values = unique_keys(rng, most), rng.choices(NOUNS, k=most)
    order = rng.sample(range(len(depths)), len(depths))

    def placed(count: int) -> list[int]:
        """Pairs in the order of the text: the first ones drawn are asked for, the others fill."""
        asked = {round((count - 1) * depth): index for index, depth in enumerate(depths)}
        rest = iter(range(len(depths), count))
        return [asked[at] if at in asked else next(rest) for at in range(count)]

    def lines(pairs: Sequence[int]) -> str:
        return "\n".join(f"{keys[index]}: {values[index]}" for index in pairs)

    return Draft(
        build=lambda count: MQAR_BODY.format(context=lines(placed(count))),
        prefix="\n\n" + lines(order),
        answers=[values[index] for index in order],
        depths=[depths[index] for index in order],
        is_answered=True,
        # Fewer pairs would let two depths fall on one pair.
        least=2 * len(depths),
    )


def _niah(kind: str, key: str, value: str, context: Callable[[int], str], depth: float) -> Draft:
    return Draft(
        build=lambda count: NIAH_BODY.format(type=kind, context=context(count), key=key),
        prefix=NIAH_PREFIX.format(type=kind, key=key),
        answers=[value],
        depths=[depth],
    )


def _needle(kind: str, key: str, value: str) -> str:
    return NIAH_NEEDLE.format(type=kind, key=key, value=value)


def _noise(count: int) -> str:
    return " ".join(NOISE[index % len(NOISE)] for index in range(count))


def number_of(rng: Random) -> str:
    """A number of seven digits."""
    return str(rng.randrange(10**6, 10**7))


def _uuid(rng: Random) -> str:
    return str(uuid.UUID(int=rng.getrandbits(128), version=4))
