"""The texts that all systems read: RULER's tasks, WikiText-2 and a book, as tokens, each in two parts."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from linearize.evaluation.tasks.excerpts import PAGES, book_rows
from linearize.evaluation.tasks.names import MORE_RECALL, RECALL
from linearize.evaluation.tasks.recall import DEPTHS, recall_tasks

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

RULER = {
    "niah_single_1": "S-NIAH-1",
    "niah_single_2": "S-NIAH-2",
    "niah_single_3": "S-NIAH-3",
    "niah_multikey_1": "MK-NIAH-1",
    "niah_multivalue": "MV-NIAH",
    "vt": "variables",
    "cwe": "common words",
}
READING = {"wikitext2": "WikiText-2", "book": "a book"}
TASKS = RULER | READING
WHOLE = {f"{task}_whole": f"{title}, whole texts" for task, title in READING.items()}
"""Columns of the loss of all tokens of the texts of `READING`, which a press does not have."""
TAIL = 256
"""Tokens at the end of a text whose loss counts; a press cuts the tokens before them."""
ROWS = 16
"""Stretches of WikiText-2 and of the book; the most that can be measured."""
# A question begins with the last of these.
_QUESTIONS = ("\nWhat ", "\nQuestion: ")


@dataclass(frozen=True)
class Text:
    """A text in two parts.

    Attributes:
        context: what comes first; a press reads and cuts it before it sees the rest.
        question: the rest: a question and the beginning of its answer, or text whose loss counts from its second token.
        answers: what has to be written; empty where the loss counts.
        new_tokens: tokens that may be written.
    """

    context: list[int]
    question: list[int]
    answers: tuple[str, ...] = ()
    new_tokens: int = 0

    @property
    def ids(self) -> list[int]:
        return self.context + self.question

    @property
    def key(self) -> str:
        """The same for the same text and question, so that results are kept for what they were measured on."""
        return hashlib.sha256(json.dumps([self.ids, self.answers]).encode()).hexdigest()[:12]


def texts_of(tokenizer: Any, task: str, length: int, limit: int, data: Path) -> list[Text]:
    """The first `limit` texts of a task, each of at most `length` tokens; more texts begin with those of fewer.

    Raises:
        DataError: a file is missing, or a length is too short for the task.
    """
    if task in READING:
        read = _pages(tokenizer, data, length) if task == "wikitext2" else _book(tokenizer, data, length)
        # Neighbours are far apart in this order, and more rows begin with those of fewer.
        order = sorted(range(ROWS), key=lambda row: f"{row:04b}"[::-1])
        return [Text(row[: -TAIL - 1], row[-TAIL - 1 :]) for row in (read[place] for place in order[:limit])]
    samples = limit if task in MORE_RECALL else -(-limit // DEPTHS)
    (built,) = recall_tasks(tokenizer, [task], data=data, lengths=[length], samples=samples)
    assert task in RECALL | MORE_RECALL  # noqa: S101 - so they are to be written
    return [
        Text(*_cut(tokenizer, row.ids), tuple(row.answers), built.new_tokens)  # type: ignore[attr-defined]
        for row in built.rows[:limit]
    ]


def _pages(tokenizer: Any, data: Path, tokens: int) -> list[list[int]]:
    """Stretches of WikiText-2 (test) at even distances."""
    ids: list[int] = tokenizer((data / PAGES).read_text(encoding="utf-8"), verbose=False).input_ids
    if len(ids) < tokens:
        raise ValueError(f"{PAGES} has {len(ids):,} tokens: choose shorter lengths")
    starts = [(len(ids) - tokens) * place // ROWS for place in range(ROWS)]
    return [ids[start : start + tokens] for start in starts]


def _book(tokenizer: Any, data: Path, tokens: int) -> list[list[int]]:
    return book_rows(tokenizer, data, rows=ROWS, tokens=tokens, seed=0)


def _cut(tokenizer: Any, ids: Sequence[int]) -> tuple[list[int], list[int]]:
    """A prompt cut before its last question."""
    for first in range(len(ids) - 1, 0, -1):
        said = tokenizer.decode(ids[first:])
        if any(question in said for question in _QUESTIONS):
            return list(ids[:first]), list(ids[first:])
    raise ValueError("no question in the prompt")
