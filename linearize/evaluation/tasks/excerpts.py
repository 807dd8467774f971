"""Stretches of local texts as tokens: prompts from encyclopedia pages, and long rows from a book."""

from __future__ import annotations

import random
import re
from typing import TYPE_CHECKING

from linearize.errors import DataError

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from transformers import PreTrainedTokenizerBase

PAGES = "wikitext2/wiki.test.raw"
BOOK = "books/war_and_peace_pg2600.txt"
"""Both are relative to the data folder."""

# More characters than a token has on average, in any tokenizer: so much text is cut before it is tokenized.
_CHARACTERS = 8
# Chapter headings and the table of contents are shorter.
_SHORTEST_PARAGRAPH = 200


def page_prompts(
    tokenizer: PreTrainedTokenizerBase, data: Path | None, *, samples: int, tokens: int, seed: int
) -> list[list[int]]:
    """Starts of paragraphs of WikiText-2 (test), `samples` lists of exactly `tokens` ids.

    Each page gives one before any gives a second; more samples with one seed add to those of fewer. What the tokenizer
    puts before every text is part of a prompt.

    Raises:
        DataError: the file is not there, or has too few texts of that length.
    """
    rng = random.Random(seed)  # noqa: S311 - a choice of texts, not a secret
    pages = [_paragraphs(page) for page in re.split(r"(?m)^ = [^=\n]+ = $", _read(data, PAGES, "prompts"))]
    # Each page's paragraphs take their turns in any order, and so do the pages within a turn.
    places = sorted(
        (turn, rng.random(), page, paragraph)
        for page, paragraphs in enumerate(pages)
        for turn, paragraph in enumerate(rng.sample(range(len(paragraphs)), len(paragraphs)))
    )
    prompts: list[list[int]] = []
    for _, _, page, paragraph in places:
        if len(prompts) == samples:
            break
        ids = _cut(tokenizer, "\n".join(pages[page][paragraph:]), tokens)
        if ids is not None:
            prompts.append(ids)
    if len(prompts) < samples:
        raise DataError(
            f"{PAGES} has only {len(prompts)} prompts of {tokens:,} tokens and {samples:,} are asked for: "
            "ask for fewer, or shorter ones"
        )
    return prompts


def book_rows(
    tokenizer: PreTrainedTokenizerBase, data: Path | None, *, rows: int, tokens: int, seed: int
) -> list[list[int]]:
    """Stretches of War and Peace from a paragraph's start, `rows` lists of exactly `tokens` ids.

    The book is divided into as many parts as there are rows, and a row starts somewhere in each, so that rows are far
    apart; those of many or long rows overlap. What the tokenizer puts before every text is part of a row.

    Raises:
        DataError: the file is not there, or is too short.
    """
    rng = random.Random(seed)  # noqa: S311 - a choice of texts, not a secret
    text = _read(data, BOOK, "long texts")
    text = text.partition("*** START OF")[2].partition("*** END OF")[0] or text
    # Lines are wrapped at 72 characters; a paragraph ends at a blank one.
    paragraphs = [" ".join(paragraph.split()) for paragraph in re.split(r"\n\s*\n", text)]
    room = sum(map(len, paragraphs)) - _CHARACTERS * tokens
    starts, before = [], 0
    for index, paragraph in enumerate(paragraphs):
        if len(paragraph) >= _SHORTEST_PARAGRAPH and before <= room:
            starts.append(index)
        before += len(paragraph)
    chosen = [starts[len(starts) * row // rows : len(starts) * (row + 1) // rows] for row in range(rows)]
    found = [_cut(tokenizer, "\n\n".join(paragraphs[rng.choice(part) :]), tokens) if part else None for part in chosen]
    cut = [row for row in found if row is not None]
    if len(cut) < rows:
        raise DataError(
            f"{BOOK} is too short for {rows} rows of {tokens:,} tokens: ask for fewer "
            "(--samples) or shorter ones (--lengths)"
        )
    return cut


def _read(data: Path | None, name: str, what: str) -> str:
    if data is None:
        raise DataError(f"{what} are read from local files: give --data DIR a folder that holds {name}")
    try:
        return (data / name).read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8"
        raise DataError(f"{what} cannot be read from {data / name} ({reason}): put the file there") from error


def _paragraphs(page: str) -> list[str]:
    """The paragraphs of a page, headings left out, spaced as they were before WikiText took punctuation apart."""
    lines = [line.strip() for line in page.split("\n")]
    return [_joined(line) for line in lines if line and not line.startswith("=")]


def _joined(line: str) -> str:
    line = re.sub(r" @([-,.])@ ", r"\1", line)
    line = re.sub(r'" ([^"]*) "', r'"\1"', line)
    line = re.sub(r"([(\[]) ", r"\1", line)
    return re.sub(r" ([,.;:!?)\]]|'s\b|n't\b)", r"\1", line)


def _cut(tokenizer: PreTrainedTokenizerBase, text: str, tokens: int) -> list[int] | None:
    """The first `tokens` ids of a text; None if it has fewer."""
    ids: Sequence[int] = tokenizer(text[: _CHARACTERS * tokens], verbose=False).input_ids
    return list(ids[:tokens]) if len(ids) >= tokens else None
