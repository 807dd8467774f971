"""Questions about facts in a text of some thousand tokens, fixed in `data/texts/questions.json`, and their answers.

Each system reads the text once. For each question a copy of its cache reads the question and the first words of the
answer, and the most likely next tokens are the answer; it is right if it contains the words in the file.
"""

from __future__ import annotations

import copy
import json
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch

from linearize.data.builtin import QUESTIONS, works

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

_PIECE = 1024
_ANSWER = 8


@dataclass(frozen=True)
class Fact:
    """A sentence in the text at a share of its paragraphs, and the question about it."""

    at: float
    fact: str
    question: str
    begins: str
    answer: str


@dataclass
class Answers:
    """The answers of one system.

    Attributes:
        texts: the generated text after the first words of each answer.
        right: one entry per answer.
        read_seconds: seconds to read the text.
        written: tokens per second of all answers.
    """

    texts: list[str] = field(default_factory=list)
    right: list[bool] = field(default_factory=list)
    read_seconds: float = 0.0
    written: float = 0.0


def facts() -> list[Fact]:
    """The facts of the file."""
    return [Fact(**one) for one in _file()["facts"]]


def text_with_facts(tokenizer: Any) -> str:
    """Paragraphs of a work that comes with the package, with the facts as paragraphs of their own."""
    known = _file()
    body: list[str] = []
    tokens = 0
    for paragraph in works()[known["work"]].split("\n\n")[known["from_paragraph"] :]:
        body.append(" ".join(paragraph.split()))
        tokens += len(tokenizer(body[-1], add_special_tokens=False).input_ids) + 1
        if tokens > known["tokens"]:
            break
    for fact in sorted(facts(), key=lambda fact: -fact.at):
        body.insert(int(fact.at * len(body)), fact.fact)
    return "\n\n".join(body)


@torch.no_grad()
def ask(model: Any, tokenizer: Any, ids: Tensor, asked: Sequence[Fact]) -> Answers:
    """Read the token ids `[1, T]` and answer the questions."""
    found, started, held = Answers(), time.perf_counter(), None
    for start in range(0, ids.shape[1], _PIECE):
        piece = ids[:, start : start + _PIECE]
        held = model(piece, past_key_values=held, use_cache=True, logits_to_keep=1).past_key_values
    found.read_seconds = time.perf_counter() - started
    seconds = 0.0
    for fact in asked:
        new, cache = (
            tokenizer(_prompt(fact), add_special_tokens=False, return_tensors="pt").input_ids,
            copy.deepcopy(held),
        )
        output = model(new.to(ids.device), past_key_values=cache, use_cache=True, logits_to_keep=1)
        written = [output.logits[:, -1].argmax(-1, keepdim=True)]
        started = time.perf_counter()
        while len(written) < _ANSWER:
            output = model(written[-1], past_key_values=cache, use_cache=True)
            written.append(output.logits[:, -1].argmax(-1, keepdim=True))
        seconds += time.perf_counter() - started
        text = tokenizer.decode(torch.cat(written, 1)[0], skip_special_tokens=True)
        found.texts.append(text)
        found.right.append(fact.answer in text)
    found.written = len(asked) * (_ANSWER - 1) / seconds
    return found


def _prompt(fact: Fact) -> str:
    return f"\n\nQuestion: {fact.question}\nAnswer: {fact.begins}"


def _file() -> dict[str, Any]:
    found: dict[str, Any] = json.loads(QUESTIONS.read_text(encoding="utf-8"))
    return found
