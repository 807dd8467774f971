"""Training data: documents from a file, a Hub data set or the teacher, as rows of tokens of one length.

    records -> documents (token ids, and which of them carry loss) -> held-out | train -> rows

Rows are packed without padding: documents follow one another, and one that reaches a row's end goes on in the next
row. Each stretch of one document within one row is a segment; `position_ids` restart at 0 in each, which is what tells
a model that nothing may be seen across the boundary.
"""

from __future__ import annotations

import json
import math
import time
from dataclasses import dataclass
from itertools import chain
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from jinja2 import TemplateError

from linearize.errors import DataError
from linearize.training.records import Record, read_records
from linearize.training.selftext import self_written_documents

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

    from torch import Tensor
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from linearize.recipe.schema import DataSpec

NO_LOSS = -100
"""The label that cross-entropy ignores."""

# The prompts of Stanford Alpaca (github.com/tatsu-lab/stanford_alpaca), word for word.
_ALPACA = (
    "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Response:\n"
)
_ALPACA_INPUT = (
    "Below is an instruction that describes a task, paired with an input that provides further context. "
    "Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Input:\n{input}\n\n### Response:\n"
)

Pieces = list[tuple[str, bool]]
"""Text in order, each piece with whether it carries loss."""


@dataclass(frozen=True)
class Rows:
    """Packed rows: N rows of L tokens, int64, on the CPU."""

    input_ids: Tensor
    """[N, L]"""
    labels: Tensor
    """[N, L], not shifted (logits at t-1 predict labels[t]); -100 at the first token of each segment and in prompts."""
    position_ids: Tensor
    """[N, L], 0 at the first token of each segment."""

    def __len__(self) -> int:
        return len(self.input_ids)

    def __getitem__(self, rows: slice | Tensor) -> Rows:
        """Some of the rows: a slice, or a tensor of row numbers."""
        return Rows(self.input_ids[rows], self.labels[rows], self.position_ids[rows])

    @property
    def tokens(self) -> int:
        """N * L."""
        return self.input_ids.numel()


@dataclass(frozen=True)
class TrainingData:
    """Rows to train on and rows kept apart for evaluation; no document is in both."""

    train: Rows
    held_out: Rows
    source: str
    """Where it came from, for a person."""
    documents: int
    """Documents that were read for these rows, on both sides."""
    seconds: float


class Document(NamedTuple):
    """Token ids, and for each whether it carries loss."""

    ids: list[int]
    loss: list[bool]


def load_data(
    spec: DataSpec,
    *,
    tokenizer: PreTrainedTokenizerBase,
    length: int,
    seed: int,
    teacher: Callable[[], PreTrainedModel] | None,
    progress: Callable[[str], None] = lambda line: None,
) -> TrainingData:
    """Read what `spec` names into rows of `length` tokens.

    Documents are shuffled with `seed`; the first of them fill `spec.held_out` rows, the following the training rows, up
    to `spec.tokens` tokens (rounded up to a whole row). Only as many as that takes are tokenised. What does not fill a
    last row is dropped. `teacher` is called only if the source is "self".

    Raises:
        DataError: the source cannot be found or read, or is too small.
        ModelError: the teacher cannot write text.
    """
    started = time.monotonic()
    rows = None if spec.tokens is None else math.ceil(spec.tokens / length)
    if spec.source == "self":
        if teacher is None or rows is None:
            raise DataError("data.source is self: the teacher writes the text, so set data.tokens to how much of it")
        model = teacher()
        longest = spec.sample_length or length
        # The last held-out document may be needed for one token only, and what is left of it is not trained on.
        spare = longest if spec.held_out else 0
        ids = self_written_documents(
            model,
            tokenizer,
            tokens=(spec.held_out + rows) * length + spare,
            seed=seed,
            temperature=spec.temperature,
            sample_length=longest,
            progress=progress,
        )
        source = "text written by the teacher"
        documents = (Document(i, [True] * len(i)) for i in ids)
    else:
        source = spec.source
        progress(f"data: reading {source}")
        documents = (_document(record, spec, tokenizer) for record in read_records(spec, seed=seed, length=length))
    stream = (document for document in documents if any(document.loss))
    held = _take(stream, spec.held_out * length)
    train = _take(stream, math.inf if rows is None else rows * length)
    held_out, train_rows = pack(held, length)[: spec.held_out], pack(train, length)[:rows]
    if len(held_out) < spec.held_out or not len(train_rows):
        found, needed = sum(len(d.ids) for d in held + train), (spec.held_out + 1) * length
        told = f"{source}: {found:,} tokens in {len(held + train):,} documents are too few for"
        if not spec.held_out:
            raise DataError(f"{told} a row of {length} tokens: lower the length, or use more text")
        raise DataError(
            f"{told} {spec.held_out} held-out rows and a training row of {length} tokens that share no document (at "
            f"least {needed:,}): lower data.held_out or the length, or use more text"
        )
    split = f" to train on, {held_out.tokens:,} held out," if spec.held_out else ""
    progress(f"data: {train_rows.tokens:,} tokens{split} from {source}")
    if rows is not None and len(train_rows) < rows:
        progress(f"data: {spec.tokens:,} tokens were asked for; {source} has no more")
    return TrainingData(train_rows, held_out, source, len(held) + len(train), time.monotonic() - started)


def pack(documents: Iterable[Document], length: int) -> Rows:
    """Documents one after another in rows of `length` tokens; what does not fill a last row is dropped."""
    documents = list(documents)
    total = sum(len(d.ids) for d in documents) // length * length
    ids = torch.tensor(list(chain.from_iterable(d.ids for d in documents)), dtype=torch.int64)[:total]
    loss = torch.tensor(list(chain.from_iterable(d.loss for d in documents)), dtype=torch.bool)[:total]
    starts = torch.tensor([0, *(len(d.ids) for d in documents)]).cumsum(0)
    place = torch.arange(total)
    first = torch.zeros(total, dtype=torch.bool)
    first[::length] = True
    first[starts[starts < total]] = True
    position = place - torch.where(first, place, 0).cummax(0).values if total else place
    labels = torch.where(loss & ~first, ids, NO_LOSS)
    return Rows(ids.view(-1, length), labels.view(-1, length), position.view(-1, length))


def _take(stream: Iterator[Document], tokens: float) -> list[Document]:
    """The next documents, until they hold `tokens` tokens or there are no more."""
    taken: list[Document] = []
    while tokens > 0 and (document := next(stream, None)) is not None:
        taken.append(document)
        tokens -= len(document.ids)
    return taken


def _document(record: Record, spec: DataSpec, tokenizer: PreTrainedTokenizerBase) -> Document:
    """The record's tokens; without any loss if it holds nothing to learn (an empty text, an empty answer)."""
    where, fields, ends = record
    if not isinstance(fields, dict):
        raise DataError(f"{where}: each record must be an object with named fields, not {json.dumps(fields)[:40]}")
    named = fields.get(spec.field) if spec.field else None
    messages = named if isinstance(named, list) else fields.get("messages")
    instruction, output = fields.get("instruction"), fields.get("output")
    text = named if spec.field else fields.get("text")
    strings = [value for value in fields.values() if isinstance(value, str)]
    if not isinstance(text, str) and not spec.field and len(strings) == 1:
        text = strings[0]
    may_instruct = spec.format != "text" and not isinstance(named, str)
    templated = False
    if may_instruct and isinstance(messages, list):
        templated = bool(tokenizer.chat_template)
        pieces = _chat(where, messages, tokenizer)
    elif may_instruct and isinstance(instruction, str) and isinstance(output, str):
        templated = bool(tokenizer.chat_template)
        pieces = (
            _alpaca(where, instruction, str(fields.get("input") or ""), output, tokenizer) if output.strip() else []
        )
    elif spec.format != "instruction" and isinstance(text, str):
        pieces = [(text, True)] if text.strip() else []
    else:
        wanted = {
            "text": f"a string in {spec.field or 'text'}",
            "instruction": "messages, or instruction and output",
            "auto": f"a string in {spec.field or 'text'}, messages, or instruction and output",
        }[spec.format]
        has = ", ".join(map(str, fields)) or "none"
        raise DataError(
            f"{where}: the fields of this record are {has}; expected {wanted} (data.field names another field)"
        )
    return _encode(pieces, tokenizer, begins=not templated, ends=ends)


def _encode(pieces: Pieces, tokenizer: PreTrainedTokenizerBase, *, begins: bool, ends: bool) -> Document:
    """Tokenise piece by piece, so that the boundaries of the loss are boundaries of tokens.

    A prompt is tokenised as it is at inference, on its own. What follows it is what the whole text has beyond it: a
    tokenizer that puts a space before each text it is given would otherwise put one into the middle.
    """
    ids: list[int] = []
    loss: list[bool] = []
    text = ""
    for piece, has_loss in pieces:
        text += piece
        whole = tokenizer(text, add_special_tokens=False, verbose=False).input_ids
        if whole[: len(ids)] != ids:
            whole = ids + tokenizer(piece, add_special_tokens=False, verbose=False).input_ids
        loss += [has_loss] * (len(whole) - len(ids))
        ids = whole
    if ids and ends and tokenizer.eos_token_id is not None and ids[-1] != tokenizer.eos_token_id:
        ids, loss = [*ids, tokenizer.eos_token_id], [*loss, loss[-1]]
    # A chat template writes its own BOS.
    if (
        ids
        and begins
        and tokenizer.bos_token_id is not None
        and tokenizer("").input_ids[:1] == [tokenizer.bos_token_id]
    ):
        ids, loss = [tokenizer.bos_token_id, *ids], [False, *loss]
    return Document(ids, loss)


def _alpaca(where: str, instruction: str, more: str, output: str, tokenizer: PreTrainedTokenizerBase) -> Pieces:
    """An Alpaca record in the tokenizer's chat template, or in Alpaca's own prompt if it has none."""
    if tokenizer.chat_template:
        question = f"{instruction}\n\n{more}" if more else instruction
        turns = [{"role": "user", "content": question}, {"role": "assistant", "content": output}]
        return _chat(where, turns, tokenizer)
    prompt = (_ALPACA_INPUT if more else _ALPACA).format(instruction=instruction, input=more)
    return [(prompt, False), (output, True)]


def _chat(where: str, messages: list[Any], tokenizer: PreTrainedTokenizerBase) -> Pieces:
    """A conversation cut around its assistant turns, each with its end token; what follows the last one is left out.

    The template is rendered up to each turn and its text compared, so that no family's tags have to be known here.
    """
    if not all(
        isinstance(m, dict) and isinstance(m.get("role"), str) and isinstance(m.get("content"), str) for m in messages
    ):
        raise DataError(f"{where}: each message must be an object with a role and a content, both strings")
    answers = [number for number, message in enumerate(messages) if message["role"] == "assistant"]
    pieces: Pieces = []
    if not tokenizer.chat_template:
        raise DataError(
            f"{where}: messages need a model with a chat template; this one takes instruction and output, or text"
        )
    try:
        whole = tokenizer.apply_chat_template(messages, tokenize=False)
        done = 0
        for number in answers:
            opening = tokenizer.apply_chat_template(messages[:number], tokenize=False, add_generation_prompt=True)
            closed = tokenizer.apply_chat_template(messages[: number + 1], tokenize=False).rstrip()
            # Templates that drop the reasoning of earlier turns render those differently: no loss there.
            if whole.startswith(opening) and whole.startswith(closed) and done <= len(opening) < len(closed):
                pieces += [(whole[done : len(opening)], False), (whole[len(opening) : len(closed)], True)]
                done = len(closed)
    except TemplateError as problem:
        raise DataError(f"{where}: the model's chat template refuses this conversation: {problem}") from problem
    if not pieces:
        raise DataError(f"{where}: this conversation has no assistant turn to learn from; remove the record")
    return pieces
