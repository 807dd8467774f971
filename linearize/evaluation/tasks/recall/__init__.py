"""Recall over a distance: a question at the end of a long text about a fact somewhere in it.

Benchmarks of short texts hardly notice what a recurrence forgets; these tasks do. Needles and questions are RULER's
(arXiv 2404.06654) word for word, and those of passkey and kv_retrieval their papers'; `texts.py` names the sources.
What differs:

- A length L counts the prompt alone, in tokens of the tokenizer given, and is filled as close from below as the filling
  allows (RULER leaves room for 128 new tokens, and fills in steps of hundreds of words); the answer comes on top.
- Depths are swept evenly (RULER draws them), so that there is a result for each of them.
- The essay is War and Peace, from a place drawn for each item: RULER downloads essays by Paul Graham and always begins
  at their beginning.
- As many tokens are written as the longest answer has, and eight (RULER: 128).
- Keys are drawn from a list of our own, pass keys have five digits, and mqar has words where Zoology
  (arXiv 2312.04927) has bare tokens.

With `twice`, each task has a variant whose text and question come twice (Just Read Twice, arXiv 2407.05483): the same
items, so that the two pair up, in up to 2 L tokens.
"""

from __future__ import annotations

import itertools
import random
from typing import TYPE_CHECKING, Any

from linearize.errors import DataError, hint_for
from linearize.evaluation.tasks.names import MORE_RECALL, RECALL, TWICE
from linearize.evaluation.tasks.recall import several, texts
from linearize.evaluation.tasks.recall.tasks import ExpectedRecall, RecallTask, Row, WrittenRecall
from linearize.evaluation.tasks.recall.texts import Draft, Essay

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

__all__ = ["DEPTHS", "LENGTHS", "SAMPLES", "RecallTask", "Writer", "recall_tasks"]

LENGTHS = (256, 512, 1024, 2048)
DEPTHS = 5
SAMPLES = 5

_ESSAY_TASKS: dict[str, dict[str, Any]] = {
    "niah_single_2": {},
    "niah_single_3": {"uuids": True},
    "niah_multikey_1": {"keys": 4},
}
_IN_ESSAY = {*_ESSAY_TASKS, "niah_multivalue"}
_ONCE = {"mqar", *MORE_RECALL}
"""Tasks whose rows ask for several things, so that a row is not of one depth."""
_KNOWN = RECALL | MORE_RECALL
_PLAIN_TASKS: dict[str, Callable[[random.Random, float], Draft]] = {
    "niah_single_1": texts.niah_noise,
    "passkey": texts.passkey,
    "kv_retrieval": texts.kv_retrieval,
}


def recall_tasks(
    tokenizer: Any,
    names: Sequence[str],
    *,
    data: Path | None = None,
    lengths: Sequence[int] = LENGTHS,
    depths: int = DEPTHS,
    samples: int = SAMPLES,
    seed: int = 0,
    twice: bool = False,
    chat: bool = False,
) -> list[RecallTask]:
    """Builds tasks, in the order of the names; the items depend on the arguments alone, not on a model.

    Args:
        tokenizer: the teacher's, which its converted models share; it counts lengths and makes the prompts.
        names: of `RECALL` or `MORE_RECALL`, or with `_twice` at the end for that variant alone; a repeated name counts
            once.
        data: the folder with the essay; tasks in noise and of pairs need none.
        lengths: of the prompts in tokens; a text that comes twice may take twice as many.
        depths: how many places, evenly from 0 (the beginning) to 1; a single one is 0.5.
        samples: items per length and depth.
        seed: of everything that is drawn.
        twice: add each task's variant.
        chat: put the text into the tokenizer's chat template as the user's turn, and begin the answer as the
            assistant's. Plain text is what RULER gives base models, and an instructed model such as
            SmolLM2-135M-Instruct finds needles as well in it; set this for a model that does not.

    Raises:
        DataError: an unknown name; the essay is missing or too short; a length that does not hold the question; a
            count below 1; a chat that the tokenizer has no template for.
    """
    for what, count in (("depths", depths), ("samples", samples), *(("a length", length) for length in lengths)):
        if count < 1:
            raise DataError(f"recall: {what} is {count}: give 1 or more")
    if not lengths:
        raise DataError(f"recall: no lengths given: choose some, such as {', '.join(map(str, LENGTHS))}")
    if chat and not getattr(tokenizer, "chat_template", None):
        raise DataError("recall: the tokenizer has no chat template: leave out chat for plain prompts")
    chosen: dict[tuple[str, bool], None] = {}
    for name in names:
        base = name if name in _KNOWN else name.removesuffix(TWICE)
        if base not in _KNOWN:
            hint = hint_for(name, [*_KNOWN, *(one + TWICE for one in _KNOWN)])
            raise DataError(f"no recall task called '{name}': {hint}")
        chosen[base, name != base] = None
        if twice:
            chosen[base, True] = None
    grid = sorted(set(lengths)), [index / (depths - 1) if depths > 1 else 0.5 for index in range(depths)], samples
    writer = Writer(tokenizer, chat)
    essay = next((Essay.read(data, name) for name, _ in chosen if name in _IN_ESSAY), None)
    variants: dict[str, list[bool]] = {}
    for base, again in chosen:
        variants.setdefault(base, []).append(again)
    built = {base: _build(writer, base, essay, seed, grid, wanted) for base, wanted in variants.items()}
    return [built[base][again] for base, again in chosen]


def _build(
    writer: Writer,
    base: str,
    essay: Essay | None,
    seed: int,
    grid: tuple[list[int], list[float], int],
    variants: Sequence[bool],
) -> dict[bool, RecallTask]:
    """By whether the text comes twice, the variants of one task: the same drafts at the same size."""
    lengths, depths, samples = grid
    rows: dict[bool, list[Row]] = {twice: [] for twice in variants}
    written = list[str]()
    for sample, length in itertools.product(range(samples), lengths):
        for asked in [depths] if base in _ONCE else [[depth] for depth in depths]:
            rng = random.Random(f"{seed} {base} {sample} {length} {asked}")  # noqa: S311 - to be repeated
            if base == "mqar":
                draft = texts.mqar(rng, asked, length)
            elif essay is not None and base in _IN_ESSAY:
                if base in _ONCE:
                    draft = several.multivalue(rng, essay, length)
                else:
                    draft = texts.niah_essay(rng, asked[0], essay, length, **_ESSAY_TASKS[base])
            elif base in MORE_RECALL:
                draft = several.variables(rng) if base == "vt" else several.common_words(rng, length)
            else:
                draft = _PLAIN_TASKS[base](rng, asked[0])
            units = writer.units(base, draft, length)
            written.append(draft.written or ", ".join(draft.answers))
            for twice, found in rows.items():
                found.append(writer.row(draft, units, length, twice))
    settings = {"seed": seed, "samples": samples, "depths": depths, "lengths": lengths, "chat": writer.chat}
    tasks = dict[bool, RecallTask]()
    longest = max(map(writer.count, written))
    for twice, found in rows.items():
        name, about = base + TWICE * twice, _KNOWN[base] + ", the text given twice" * twice
        kind = ExpectedRecall if base == "mqar" else WrittenRecall
        tasks[twice] = kind(name, about, found, twice=twice, settings=settings, answer_tokens=longest)
    return tasks


class Writer:
    """Drafts as tokens: filled to a length, plain or as a chat, once or twice."""

    def __init__(self, tokenizer: Any, chat: bool) -> None:
        self.tokenizer, self.chat = tokenizer, chat

    def count(self, text: str) -> int:
        return len(self.tokenizer(text, add_special_tokens=False).input_ids)

    def units(self, task: str, draft: Draft, length: int) -> int:
        """Units of filling that make the longest text of at most `length` tokens; cached.

        Raises:
            DataError: not even the least filling fits.
        """

        def size(units: int) -> int:
            return len(self._encoded(self._text(draft, units, twice=False)).input_ids)

        fits, tokens = draft.least, size(draft.least)
        if tokens > length:
            raise DataError(
                f"task {task}: a length of {length:,} tokens does not hold the question, which takes {tokens:,} "
                "with the least text around it: choose greater lengths"
            )
        # A unit has at least one token. Sizes are all but linear, so a line through two of them soon finds the place.
        too_many, per_unit = length + 1, 4.0
        while too_many - fits > 1:
            guess = fits + int((length - tokens) / per_unit)
            guess = min(max(guess, fits + 1), too_many - 1)
            guessed = size(guess)
            per_unit = max((guessed - tokens) / (guess - fits), 0.5)
            if guessed <= length:
                fits, tokens = guess, guessed
            else:
                too_many = guess
        return fits

    def row(self, draft: Draft, units: int, length: int, twice: bool) -> Row:
        text = self._text(draft, units, twice)
        encoded, spans = self._encoded(text, return_offsets_mapping=draft.is_answered), list[tuple[int, int]]()
        at = text.rindex(draft.prefix.lstrip())
        for answer in draft.answers if draft.is_answered else ():
            first = text.index(f": {answer}", at) + 2
            at = first + len(answer)
            places = enumerate(encoded.offset_mapping)
            inside = [index for index, (start, end) in places if end > first and start < at]
            spans.append((inside[0], inside[-1] + 1))
        return Row(encoded.input_ids, length, draft.depths, draft.answers, spans)

    def _text(self, draft: Draft, units: int, twice: bool) -> str:
        body = draft.build(units)
        if twice:
            body = f"{body}\n\n{body}"
        if not self.chat:
            return body + draft.prefix
        turn: str = self.tokenizer.apply_chat_template(
            [{"role": "user", "content": body}], tokenize=False, add_generation_prompt=True
        )
        return turn + draft.prefix.lstrip()

    def _encoded(self, text: str, **options: Any) -> Any:
        # The chat template has the special tokens already.
        return self.tokenizer(text, add_special_tokens=not self.chat, **options)
