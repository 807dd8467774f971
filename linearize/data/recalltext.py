"""Generate training text for recall: facts and key-value pairs, with questions about them up to a whole row later.

Ordinary text seldom refers to tokens that have left the window, so it trains a state little. Here every document is one
row long and ends with questions about any part of it; only the answers carry loss. Half of the documents hide facts in
filler sentences (needles); half are lists of keys and values.

Wording, names and word lists differ from those of the evaluation's recall tasks. Keys here are made-up names of
syllables; the evaluation's are pairs of English words.
"""

from __future__ import annotations

import random
from itertools import accumulate, count
from typing import TYPE_CHECKING

from linearize.errors import DataError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from transformers import PreTrainedTokenizerBase

    from linearize.data.rows import Document, Pieces

SHORTEST = 64
"""Least tokens of a document with room for facts, questions and text between them."""

_MOST_FACTS = 8
_TOKENS_PER_FACT = 48  # a short row has fewer facts
_MOST_MISSES = 100
"""A length is refused after this number of consecutive documents without room for a question."""
_QUESTIONS = 4  # a list uses a quarter of its row for questions

_ONSETS = ("b", "br", "d", "dr", "f", "g", "gl", "k", "kl", "l", "m", "n", "p", "pl", "r", "s", "t", "tr", "v", "z")
_VOWELS = ("a", "e", "i", "o", "u")
_CODAS = ("", "", "", "l", "n", "r", "s")
_THINGS = ("account number", "code", "licence", "locker", "membership", "parcel number", "telephone", "ticket number")
_WHO = ("A clerk", "My neighbour", "The baker", "The gardener", "The nurse", "The porter", "Their aunt", "Somebody")
_DID = ("carried", "counted", "described", "forgot", "mended", "moved", "noticed", "painted", "sold", "watched")
_WHAT = ("a bench", "a bicycle", "a ladle", "an umbrella", "some envelopes", "the blinds", "the hedge", "two trolleys")
_GOODS = (
    "basket",
    "bottle",
    "bridge",
    "candle",
    "carpet",
    "engine",
    "kettle",
    "ladder",
    "orchard",
    "shovel",
    "whistle",
)
_PLACES = ("castle", "forest", "harbour", "island", "market", "museum", "station", "valley")
_KEY_LETTERS = "ABCDEFGHJKLMNPQRSTUVWXYZ23456789"
_WHERE = ("at noon", "before supper", "by the canal", "for a while", "in the attic", "near the depot", "on Tuesday")


def recall_documents(
    tokenizer: PreTrainedTokenizerBase,
    encode: Callable[[Pieces], Document],
    *,
    seed: int,
    length: int,
    ends: tuple[list[int], list[int]],
) -> Iterator[tuple[list[int], list[bool]]]:
    """Generate documents of exactly `length` tokens without end; yields token ids and loss mask.

    Args:
        encode: pieces of text with their loss flags -> tokens.
        length: at least `SHORTEST`.
        ends: the token ids that open and that close a document.

    Raises:
        DataError: `length` tokens of this tokenizer are too few for a fact and its question.
    """
    opening, closing = ends
    room = length - len(opening) - len(closing)
    misses = 0
    for number in count():
        rng = random.Random(f"recall text {seed} {number}")  # noqa: S311 - reproducible
        body, questions = (_needles if number % 2 == 0 else _pairs)(rng, tokenizer, encode, room)
        asked = [token for question in questions for token in question.ids]
        loss = [learned for question in questions for learned in question.loss]
        misses = 0 if any(loss) else misses + 1
        if misses == _MOST_MISSES:
            raise DataError(
                f"data.source is recall: {length} tokens of this tokenizer hold no question; try {2 * length}"
            )
        if misses:
            continue
        told = [token for part in body for token in part]
        yield [*opening, *told, *asked, *closing], [False] * (len(opening) + len(told)) + loss + [False] * len(closing)


def _needles(
    rng: random.Random, tokenizer: PreTrainedTokenizerBase, encode: Callable[[Pieces], Document], room: int
) -> tuple[list[list[int]], list[Document]]:
    """Facts about people between filler sentences, and questions about them in another order; empty if no fact fits."""
    names = _names(rng, rng.randint(1, max(1, min(_MOST_FACTS, room // _TOKENS_PER_FACT))))
    facts = [(name, rng.choice(_THINGS), _value(rng)) for name in names]
    told = _tokens(tokenizer, [f" {name} has the {thing} {value}." for name, thing, value in facts])
    asked = [
        encode([(f"\nWhich {thing} does {name} have?", False), (f" {value}", True)]) for name, thing, value in facts
    ]
    sizes = accumulate(len(fact) + len(question.ids) for fact, question in zip(told, asked, strict=True))
    # With byte tokens a fact is longer than `_TOKENS_PER_FACT`, so the last ones may not fit.
    fitting = [size for size in sizes if size < room]
    questions = [asked[place] for place in rng.sample(range(len(facts)), len(facts)) if place < len(fitting)]
    if not fitting:
        return [], []
    body = _filling(rng, tokenizer, room - fitting[-1])
    for fact in told[: len(fitting)]:
        body.insert(rng.randint(1, len(body)), fact)
    return body, questions


def _pairs(
    rng: random.Random, tokenizer: PreTrainedTokenizerBase, encode: Callable[[Pieces], Document], room: int
) -> tuple[list[list[int]], list[Document]]:
    """Fill the row with keys and values, then ask for some keys in another order; empty if no question fits."""
    pairs = [(name, _value(rng)) for name in _names(rng, room // _QUESTIONS)]
    lines = _tokens(tokenizer, [f"\n{name} has {value}" for name, value in pairs])
    questions = [encode([("\n\nOnce more:", False)])]
    left = room // _QUESTIONS - len(questions[0].ids)
    kept, used = 0, 0
    while kept < len(lines) and used + len(lines[kept]) < room - room // _QUESTIONS:
        used += len(lines[kept])
        kept += 1
    for name, value in rng.sample(pairs[:kept], kept):
        question = encode([(f"\n{name} has", False), (f" {value}", True)])
        if len(question.ids) > left:
            break
        questions.append(question)
        left -= len(question.ids)
    if len(questions) == 1:
        return [], []
    filling = _filling(rng, tokenizer, room - used - sum(len(q.ids) for q in questions))
    return [*filling, *lines[:kept]], questions


def facts(rng: random.Random, count: int) -> list[tuple[str, str, str]]:
    """`count` facts of eleven kinds, such as numbers, names, quotations, licence keys and table entries: how each is
    told, how it is asked for, and the answer."""
    names = _names(rng, 2 * count)
    return [rng.choice(_kinds(rng, *names[2 * number : 2 * number + 2])) for number in range(count)]


def _kinds(rng: random.Random, one: str, other: str) -> list[tuple[str, str, str]]:
    thing, place, key = rng.choice(_THINGS), rng.choice(_PLACES), one.lower()
    groups = ("".join(rng.choices(_KEY_LETTERS, k=rng.randint(4, 5))) for _ in range(rng.randint(3, 6)))
    licence = "-".join(groups)
    value, words = str(rng.randrange(10 ** rng.randint(2, 6))), " ".join(rng.sample(_GOODS, rng.randint(1, 3)))
    return [
        (f" {one} has the {thing} {value}.", f"\nWhich {thing} does {one} have?", f" {value}"),
        (f" {other} was painted by {one}.", f"\nWho painted {other}? {other} was painted by", f" {one}"),
        (f'\n{{"{key}": {value}}}\n', f'\nAgain:\n{{"{key}":', f" {value}"),
        (f' "{words}," said {one}.', f'\nWhat did {one} say? {one} said: "', words),
        (f" In {one} they sell only the {words}.", f"\nWhat do they sell in {one}? They sell only the", f" {words}"),
        (f"\n{one} - {value}\n", f"\n{one} -", f" {value}"),
        (f" The {words} in the {place} is worth {value}.", f"\nThe {words} in the {place} is worth", f" {value}"),
        (f" Remember that {one} lives in {other}.", f"\nWhere does {one} live? {one} lives in", f" {other}"),
        (f" {one} ({other}, {value})", f"\nOnce more: {one} ({other},", f" {value}"),
        (f" The licence key of {one} is {licence}.", f"\nWhich licence key does {one} have? It is", f" {licence}"),
        (f' The motto of {one} is "{words} and {other}".', f'\nThe motto of {one} is "', f"{words} and {other}"),
    ]


def _filling(rng: random.Random, tokenizer: PreTrainedTokenizerBase, tokens: int) -> list[list[int]]:
    """Filler sentences of `tokens` tokens in total; excess tokens are cut from the start."""
    sentences: list[list[int]] = []
    missing = tokens
    while missing > 0:
        said = [" ".join(map(rng.choice, (_WHO, _DID, _WHAT, _WHERE))) for _ in range(missing // 8 + 1)]
        for sentence in _tokens(tokenizer, [f" {one}." for one in said]):
            if missing > 0:
                sentences.append(sentence)
                missing -= len(sentence)
    while missing < 0:
        first = sentences.pop(0)
        if len(first) > -missing:
            sentences.insert(0, first[-missing:])
        missing += len(first)
    return sentences


def _tokens(tokenizer: PreTrainedTokenizerBase, texts: list[str]) -> list[list[int]]:
    found: list[list[int]] = tokenizer(texts, add_special_tokens=False, verbose=False).input_ids
    return found


def _names(rng: random.Random, wanted: int) -> list[str]:
    """`wanted` different names."""
    names: dict[str, None] = {}
    while len(names) < wanted:
        syllables = (rng.choice(_ONSETS) + rng.choice(_VOWELS) + rng.choice(_CODAS) for _ in range(rng.randint(2, 3)))
        names["".join(syllables).capitalize()] = None
    return list(names)


def _value(rng: random.Random) -> str:
    """A number of 4 to 6 digits."""
    return str(rng.randrange(10 ** rng.randint(3, 5), 10**6))
