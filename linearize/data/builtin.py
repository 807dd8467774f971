"""The text that comes with the package: parts of six works in the public domain, which `texts/README.md` names.

A row is continuous text of one work. Rows come from the works in turn, so any six in a row hold every kind of text:
prose, dialogue, a play, science and reference works. No row is empty, padded, or joined from two places.
"""

from __future__ import annotations

import lzma
import random
from functools import lru_cache
from itertools import islice, zip_longest
from pathlib import Path
from typing import TYPE_CHECKING

from linearize.data.documents import encode
from linearize.data.rows import Document

if TYPE_CHECKING:
    from collections.abc import Iterator

    from transformers import PreTrainedTokenizerBase

_FILE = Path(__file__).with_name("texts") / "works.xz"
QUESTIONS = Path(__file__).with_name("texts") / "questions.json"
"""Facts and questions that `linearize demo` hides in a work."""
_PAGES = 16_000
"""Characters."""


@lru_cache(maxsize=1)
def works() -> dict[str, str]:
    """Name of each work -> its text."""
    whole = lzma.decompress(_FILE.read_bytes()).decode("utf-8")
    return dict(work.split("\n", 1) for work in whole.split("\f"))


def builtin_rows(tokenizer: PreTrainedTokenizerBase, length: int, *, seed: int, passed: int = 0) -> Iterator[Document]:
    """Rows of exactly `length` tokens, until all works are read.

    Args:
        seed: shuffles the works; each is read from its beginning, whatever the seed.
        passed: tokens at the beginning of each work that are passed over.
    """
    bare = encode([("a", True)], tokenizer, begins=False, ends=False).ids
    opening = encode([("a", True)], tokenizer, begins=True, ends=False).ids[: -len(bare)]
    room = length - len(opening)
    names = list(works())
    random.Random(seed).shuffle(names)  # noqa: S311 - a shuffle, not a secret

    def rows(text: str) -> Iterator[Document]:
        ids = islice(_tokens(tokenizer, text), passed, None)
        while len(row := list(islice(ids, room))) == room:
            yield Document([*opening, *row], [False] * len(opening) + [True] * room)

    for turn in zip_longest(*(rows(works()[name]) for name in names)):
        yield from (row for row in turn if row is not None)


def _tokens(tokenizer: PreTrainedTokenizerBase, text: str) -> Iterator[int]:
    """The token ids of `text`, some pages at a time, because most readers need the first pages only."""
    start = 0
    while start < len(text):
        end = text.rfind("\n", start, start + _PAGES) + 1 or len(text)
        yield from tokenizer(text[start:end], add_special_tokens=False, verbose=False).input_ids
        start = end


def passed_by(rows: int, length: int) -> int:
    """The most tokens of one work in the first `rows` rows of `length` tokens."""
    return -(-rows // len(works())) * length
