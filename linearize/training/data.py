"""Training data: documents from files, Hub data sets, a model or a generator, as rows of tokens of one length.

records -> documents (token ids, and which of them carry loss) -> held-out | train -> rows
"""

from __future__ import annotations

import hashlib
import json
import math
import time
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import torch
from jinja2 import TemplateError

from linearize.errors import DataError
from linearize.recipe.schema import ENDLESS, RECALL, SELF, STUDENT
from linearize.training.recalltext import SHORTEST, recall_documents
from linearize.training.records import Record, read_records
from linearize.training.rows import Document, Pieces, Rows, TrainingData, pack
from linearize.training.selftext import self_written_documents

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence

    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from linearize.recipe.schema import DataSpec, SourceSpec, Stage

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


def load_data(
    spec: DataSpec,
    *,
    tokenizer: PreTrainedTokenizerBase,
    length: int,
    seed: int,
    teacher: Callable[[], PreTrainedModel] | None,
    student: Callable[[], PreTrainedModel] | None = None,
    draw: int = 0,
    reserved: Mapping[str, int] = MappingProxyType({}),
    purpose: str = "",
    progress: Callable[[str], None] = lambda line: None,
) -> TrainingData:
    """Read what `spec` names into rows of `length` tokens.

    Documents are shuffled with `seed`; the first of them fill `spec.held_out` rows, the following the training rows, up
    to `spec.tokens` tokens (rounded up to a whole row). Only as many as that takes are tokenised. What does not fill a
    last row is dropped. Of a mixture, each source gives its share of both. `teacher` and `student` are called only if a
    source is "self" or "student".

    Args:
        draw: which of many texts is made where a source has no end: stages count up, also those of earlier runs.
        reserved: by `source_key`, tokens that are left out of training at the least; see `reserved_tokens`.
        purpose: what the text is for, where that is no stage. None of it is what stages hold out: of a file not even
            its own held-out rows are, and what has no end is made from another seed.

    Raises:
        DataError: a source cannot be found or read, or is too small.
        ModelError: the model that is to write text cannot.
    """
    started = time.monotonic()
    rows = None if spec.tokens is None else math.ceil(spec.tokens / length)
    writers = {SELF: teacher, STUDENT: student}
    shares = _shares(spec, rows)
    parts = [
        _load(
            source,
            wanted,
            held,
            tokenizer=tokenizer,
            length=length,
            seed=_drawn_by(seed, purpose) + draw if source.source in ENDLESS else seed,
            reserved=reserved.get(source_key(source), 0),
            apart=bool(purpose),
            writers=writers,
            progress=progress,
        )
        for source, wanted, held in shares
    ]
    train, held_out = (Rows.joined([getattr(part, side) for part in parts]) for side in ("train", "held_out"))
    named = parts[0].source
    if len(parts) > 1:
        named = " + ".join(f"{len(part.train) / len(train):.0%} {part.source}" for part in parts)
    documents = sum(part.documents for part in parts)
    return TrainingData(train, held_out, named, documents, time.monotonic() - started)


def _drawn_by(seed: int, purpose: str) -> int:
    """The seed of text that has no end: texts that begin from one seed begin alike, however long each is to be."""
    # torch takes 32 bits of a seed.
    return int(hashlib.sha256(f"{purpose} {seed}".encode()).hexdigest()[:8], 16) if purpose else seed


def source_key(source: SourceSpec) -> str:
    """What tells one file or data set from another, however a file is named."""
    path = Path(source.source or "").expanduser()
    name = str(path.resolve()) if path.is_file() else source.source
    return json.dumps([name, source.config, source.split])


def reserved_tokens(stages: Sequence[Stage]) -> dict[str, int]:
    """By `source_key`, the most tokens that any stage holds out. What one stage is judged by, no other may have
    trained on: all of them shuffle a file alike and leave out as many of its first documents."""
    most: dict[str, int] = {}
    for stage in stages:
        for source, _, held in _shares(stage.data, None):
            if source.source not in ENDLESS:
                key = source_key(source)
                most[key] = max(most.get(key, 0), held * stage.length)
    return most


def _shares(spec: DataSpec, rows: int | None) -> list[tuple[SourceSpec, int | None, int]]:
    """Each source with its number of training rows and of held-out rows."""
    if not spec.mix:
        return [(spec, rows, spec.held_out)]
    weights = [source.weight for source in spec.mix]
    held = _split(spec.held_out, weights)
    if rows is None:
        return [(source, None, count) for source, count in zip(spec.mix, held, strict=True)]
    counts = [_split(rows, weights), held]
    for number, (source, wanted) in enumerate(zip(spec.mix, counts[0], strict=True)):
        if not wanted:
            raise DataError(
                f"data.mix.{number}: {source.source} has too small a weight for a single one of {rows:,} rows; raise "
                "its weight or data.tokens"
            )
    return list(zip(spec.mix, *counts, strict=True))


def _split(total: int, weights: list[float]) -> list[int]:
    """`total` in whole numbers by weight; what is left over goes to those that were rounded down most."""
    exact = [total * weight / sum(weights) for weight in weights]
    counts = [math.floor(x) for x in exact]
    for place in sorted(range(len(exact)), key=lambda n: counts[n] - exact[n])[: total - sum(counts)]:
        counts[place] += 1
    return counts


def _load(
    spec: SourceSpec,
    rows: int | None,
    held_rows: int,
    *,
    tokenizer: PreTrainedTokenizerBase,
    length: int,
    seed: int,
    reserved: int,
    apart: bool,
    writers: dict[str, Callable[[], PreTrainedModel] | None],
    progress: Callable[[str], None],
) -> TrainingData:
    """One source: `rows` training rows (None for all there are) behind the first `reserved` tokens, and `held_rows`
    among these or, where they are to be `apart`, behind them as well."""
    started = time.monotonic()
    source = spec.source or ""
    documents: Iterator[Document]
    if source in ENDLESS and rows is None:
        raise DataError(f"data.source is {source}: it has no end, so set data.tokens to how much of it")
    if source in writers:
        writer = writers[source]
        if writer is None or rows is None:
            raise DataError(f"data.source is {source}: there is no model here that could write it; name a file")
        longest = spec.sample_length or length
        # The last held-out document may be needed for one token only, and what is left of it is not trained on.
        spare = longest if held_rows else 0
        ids = self_written_documents(
            writer(),
            tokenizer,
            tokens=(held_rows + rows) * length + spare,
            seed=seed,
            temperature=spec.temperature,
            sample_length=longest,
            progress=progress,
        )
        source = f"text written by the {'teacher' if source == SELF else 'student'}"
        documents = (Document(i, [True] * len(i)) for i in ids)
    elif source == RECALL:
        longest = spec.sample_length or length
        if longest < SHORTEST:
            raise DataError(f"data.source is recall: {longest} tokens hold no question; take {SHORTEST} or more")
        source = "questions about facts and pairs"
        documents = _recall(tokenizer, seed, longest)
    else:
        progress(f"data: reading {source}")
        documents = (_document(record, spec, tokenizer) for record in read_records(spec, seed=seed))
    stream = (document for document in documents if any(document.loss))
    skipped = _take(stream, reserved) if apart else []
    held = _take(stream, held_rows * length)
    if not apart:
        skipped = _take(stream, reserved - sum(len(document.ids) for document in held))
    train = _take(stream, math.inf if rows is None else rows * length)
    held_out, train_rows = pack(held, length)[:held_rows], pack(train, length)[:rows]
    enough, all_of_it = len(held_out) >= held_rows, len(train_rows) < (rows or 0)
    # A prompt may fill a row, which then has nothing to learn or to score.
    held_out, train_rows = held_out.scored(), train_rows.scored()
    if not enough or not len(train_rows):
        found, needed = sum(len(d.ids) for d in held + train), (held_rows + 1) * length
        others = f", beside {sum(len(d.ids) for d in skipped):,} tokens that stages hold out," if skipped else ""
        told = f"{source}: {found:,} tokens in {len(held + train):,} documents{others} are too few for"
        if not held_rows:
            raise DataError(f"{told} a row of {length} tokens: lower the length, or use more text")
        raise DataError(
            f"{told} {held_rows} held-out rows and a training row of {length} tokens that share no document (at "
            f"least {needed:,}): lower data.held_out or the length, or use more text"
        )
    split = f" to train on, {held_out.tokens:,} held out," if held_rows else ""
    progress(f"data: {train_rows.tokens:,} tokens{split} from {source}")
    if rows is not None and all_of_it:
        progress(f"data: {rows * length:,} tokens were asked for; {source} has no more")
    return TrainingData(train_rows, held_out, source, len(held) + len(train), time.monotonic() - started)


def _recall(tokenizer: PreTrainedTokenizerBase, seed: int, length: int) -> Iterator[Document]:
    empty = _encode([("a", True)], tokenizer, begins=True, ends=True).ids
    bare = _encode([("a", True)], tokenizer, begins=False, ends=False).ids
    opening = empty[: empty.index(bare[0])]
    closing = empty[len(opening) + len(bare) :]

    def encode(pieces: Pieces) -> Document:
        return _encode(pieces, tokenizer, begins=False, ends=False)

    written = recall_documents(tokenizer, encode, seed=seed, length=length, ends=(opening, closing))
    return (Document(ids, loss) for ids, loss in written)


def _take(stream: Iterator[Document], tokens: float) -> list[Document]:
    """The next documents, until they hold `tokens` tokens or there are no more."""
    taken: list[Document] = []
    while tokens > 0 and (document := next(stream, None)) is not None:
        # As tensors: lists of numbers would take ten times as much, and there may be hundreds of millions.
        ids, loss = torch.tensor(document.ids, dtype=torch.int32), torch.tensor(document.loss, dtype=torch.bool)
        taken.append(Document(ids, loss))
        tokens -= len(document.ids)
    return taken


def _document(record: Record, spec: SourceSpec, tokenizer: PreTrainedTokenizerBase) -> Document:
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
    missing = spec.field is not None and spec.field not in fields
    may_instruct = spec.format != "text" and not isinstance(named, str) and not missing
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
            f"{where}: messages need a model with a chat template; this one takes instruction and output, or a field "
            "of plain text, which data.field names"
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
