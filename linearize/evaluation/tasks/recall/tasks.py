"""Recall tasks: rows of tokens, what is to be recalled in each, and how a model's answers are scored."""

from __future__ import annotations

import hashlib
import json
from abc import abstractmethod
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from linearize.errors import ModelError, is_out_of_memory
from linearize.evaluation.tasks.hidden import PROMPTS, rows_at_once
from linearize.evaluation.tasks.recall.running import expected, written
from linearize.evaluation.tasks.task import Item, Task, evaluating
from linearize.sources.limits import learned_positions

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from transformers import PreTrainedModel, PreTrainedTokenizerBase

# Tokens beyond the longest answer, for words before it: a colon, a quotation mark, "in the text is".
LEAD = 8
_VERSION = 1


@dataclass(frozen=True)
class Row:
    """A prompt and its questions.

    Attributes:
        ids: the prompt's tokens.
        length: the tokens that were to be filled; `ids` has at most so many, or twice so many for a text given twice.
        depths: for each question, where in the text its answer stands, from 0 to 1.
        answers: for each question, what has to come.
        spans: for each question, where in `ids` its answer stands, as [first, past the last]; empty where it is to be
            written after the end.
    """

    ids: list[int]
    length: int
    depths: list[float]
    answers: list[str]
    spans: list[tuple[int, int]]


class RecallTask(Task):
    """Items are questions, of which a row may have several. The rows have all lengths and depths of the first sample
    first, then those of the second: any number of first items is spread over all of them.

    Attributes:
        about: one line on what is asked.
        rows: the prompts.
        twice: True if the text comes twice.
        answer_tokens: of the longest answer, or of all answers to a row as a model writes them.
    """

    suite = "recall"
    metric = "acc"

    def __init__(
        self,
        name: str,
        about: str,
        rows: Sequence[Row],
        *,
        twice: bool,
        answer_tokens: int,
        settings: Mapping[str, Any],
    ) -> None:
        self.name, self.about, self.rows, self.twice, self.answer_tokens = name, about, rows, twice, answer_tokens
        self._items = [(row, question) for row, found in enumerate(rows) for question in range(len(found.depths))]
        content = [_VERSION, LEAD, name, twice, dict(settings), [asdict(row) for row in rows]]
        self.digest = hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()

    def __len__(self) -> int:
        return len(self._items)

    def tags(self, index: int) -> Mapping[str, Any]:
        """`length` in tokens, `depth` from 0 to 1, and `twice`; `row` where one text has several questions."""
        row, question = self._items[index]
        of = self.rows[row]
        tags = {"length": of.length, "depth": of.depths[question], "twice": self.twice}
        return {**tags, "row": row} if len(of.depths) > 1 else tags

    def score(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        indices: Sequence[int],
        batch_size: int,
    ) -> list[Item]:
        """Items of value 1.0 or 0.0. Rows of one length go together, `batch_size` of them, or fewer if they are long or
        memory does not hold them.

        Raises:
            ModelError: logits that are not finite, a length that memory does not hold, or one beyond the positions
                that the model has learned.
        """
        wanted = sorted({self._items[index][0] for index in indices}, key=lambda row: (self.rows[row].length, row))
        self._check_positions(model, wanted)
        values: dict[int, list[bool]] = {}
        with evaluating(model):
            while wanted:
                length = self.rows[wanted[0]].length
                most = rows_at_once(length, batch_size, PROMPTS)
                batch = [row for row in wanted if self.rows[row].length == length][:most]
                while (found := self._try(model, tokenizer, batch)) is None and len(batch) > 1:
                    batch = batch[: len(batch) // 2]
                    batch_size = len(batch)
                if found is None:
                    raise ModelError(self._too_long(model, tokenizer, length))
                values.update(zip(batch, found, strict=True))
                wanted = wanted[len(batch) :]
        return [Item(float(values[row][question])) for row, question in (self._items[index] for index in indices)]

    @abstractmethod
    def answer(self, model: Any, tokenizer: Any, batch: Sequence[int]) -> list[list[bool]]:
        """For some rows, whether each question was answered right.

        Raises:
            ModelError: logits that are not finite.
        """

    @property
    def new_tokens(self) -> int:
        """Tokens that a model writes after a prompt."""
        return 0

    def check_sound(self, batch: Sequence[int], sound: Any) -> None:
        """Raises:
        ModelError: not all rows of `batch` are `sound`.
        """
        for row, fine in zip(batch, sound.tolist(), strict=True):
            if not fine:
                raise ModelError(
                    f"task {self.name}, item {self._items.index((row, 0)) + 1}: the model's logits on this text of "
                    f"{len(self.rows[row].ids):,} tokens are not finite: nothing to score"
                )

    def _try(self, model: Any, tokenizer: Any, batch: Sequence[int]) -> list[list[bool]] | None:
        """None if memory does not hold the batch. By then the failed call's tensors are gone with its frames."""
        try:
            return self.answer(model, tokenizer, batch)
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            return None

    def _too_long(self, model: Any, tokenizer: Any, length: int) -> str:
        """The error for a length that does not fit; it names the next shorter one that does."""
        shorter = {row.length: index for index, row in enumerate(self.rows) if row.length < length}
        failed = f"task {self.name}: memory does not hold a text of length {length:,} (one row at a time)"
        for fits in sorted(shorter, reverse=True):
            if self._try(model, tokenizer, [shorter[fits]]) is not None:
                return f"{failed}; {fits:,} fits: choose lengths up to that"
        return f"{failed}, nor any shorter one of this task; choose shorter lengths"

    def _check_positions(self, model: Any, rows: Sequence[int]) -> None:
        limit = learned_positions(model)
        sizes = {row: len(self.rows[row].ids) + self.new_tokens for row in rows}
        beyond = [row for row, size in sizes.items() if limit is not None and size > limit]
        if beyond:
            row = beyond[0]
            raise ModelError(
                f"task {self.name}: length {self.rows[row].length:,} needs {sizes[row]:,} positions and the model has "
                f"learned {limit:,}, beyond which it cannot read: choose shorter lengths"
            )


class WrittenRecall(RecallTask):
    """The answers are to be written after the prompt; each is right if it appears in what is written, in any case of
    letters: the mean over a row is RULER's `string_match_all`."""

    @property
    def new_tokens(self) -> int:
        return self.answer_tokens + LEAD

    def answer(self, model: Any, tokenizer: Any, batch: Sequence[int]) -> list[list[bool]]:
        rows = [self.rows[row] for row in batch]

        def right(index: int, new: list[int]) -> list[bool]:
            said: str = tokenizer.decode(new, skip_special_tokens=True).lower()
            return [answer.lower() in said for answer in rows[index].answers]

        prompts = [row.ids for row in rows]
        new, sound = written(
            model, prompts, self.new_tokens, pad_of(tokenizer), done=lambda index, new: all(right(index, new))
        )
        self.check_sound(batch, sound)
        return [right(index, tokens) for index, tokens in enumerate(new)]


class ExpectedRecall(RecallTask):
    """The prompt ends with the questions and answers. An answer is right if each of its tokens is the most likely one
    after the tokens before it: greedy decoding, given that the answers before were right. So all questions of a
    row cost one forward pass (Zoology, arXiv 2312.04927, scores its associative recall like this)."""

    def answer(self, model: Any, tokenizer: Any, batch: Sequence[int]) -> list[list[bool]]:
        rows = [self.rows[row] for row in batch]
        # Logits at t predict t + 1.
        last = max(len(row.ids) - min(start for start, _ in row.spans) + 1 for row in rows)
        tokens, sound = expected(model, [row.ids for row in rows], last, pad_of(tokenizer))
        self.check_sound(batch, sound)
        results = []
        for row, likely in zip(rows, tokens.tolist(), strict=True):
            shift = len(likely) - len(row.ids) - 1
            results.append([likely[start + shift : end + shift] == row.ids[start:end] for start, end in row.spans])
        return results


def pad_of(tokenizer: Any) -> int:
    """A token to fill rows with."""
    return int(next((pad for pad in (tokenizer.pad_token_id, tokenizer.eos_token_id) if pad is not None), 0))
