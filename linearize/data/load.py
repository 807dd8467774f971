"""Load training data: documents from files, Hub data sets, a model or a generator, packed into rows of equal length.

records -> documents (token ids, and a loss mask) -> held-out | train -> rows
"""

from __future__ import annotations

import hashlib
import itertools
import json
import math
import time
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING

import torch

from linearize.data.builtin import builtin_rows, passed_by
from linearize.data.documents import Tally, encode, read_documents
from linearize.data.recalltext import SHORTEST, recall_documents
from linearize.data.records import open_records
from linearize.data.rows import Document, Pieces, Rows, TrainingData, pack
from linearize.data.selftext import self_written_documents
from linearize.errors import DataError, counted
from linearize.recipe.schema import BUILTIN, ENDLESS, RECALL, SELF, STUDENT

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence

    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from linearize.recipe.schema import DataSpec, SourceSpec, Stage

_SPARE_ROWS = 16
"""Extra rows that a preview makes, beyond twice the requested number."""


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
    """Read the sources of `spec` into rows of `length` tokens.

    Documents are shuffled with `seed`. The first documents fill `spec.held_out` rows; the next fill the training rows,
    up to `spec.tokens` tokens (rounded up to a whole row). Only these documents are tokenised. An incomplete last row
    is dropped. A record with the same tokens as a held-out one is not trained on. In a mixture, each source gives its
    share of both. `teacher` and `student` are called only if a source is "self" or "student".

    Args:
        draw: added to the seed of endless sources; stages count up, including those of earlier runs.
        reserved: `source_key` -> least number of tokens to leave out of training; see `reserved_tokens`.
        purpose: names a use that is not a stage, such as calibration. Its text does not overlap with the stages'
            held-out rows: its held-out rows of a file follow theirs, and endless sources get another seed.

    Raises:
        DataError: a source cannot be found or read, or is too small.
        ModelError: the model that writes text fails.
    """
    started = time.monotonic()
    rows = None if spec.tokens is None else math.ceil(spec.tokens / length)
    writers = {SELF: teacher, STUDENT: student}
    opened = [
        _open(
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
        for source, wanted, held in _shares(spec, rows)
    ]
    known = _digests(opened)
    parts = [_rows(source, length, known, progress) for source in opened]
    train, held_out = (Rows.joined([getattr(part, side) for part in parts]) for side in ("train", "held_out"))
    named = parts[0].source
    if len(parts) > 1:
        named = " + ".join(f"{len(part.train) / len(train):.0%} {part.source}" for part in parts)
    documents = sum(part.documents for part in parts)
    return TrainingData(train, held_out, named, documents, time.monotonic() - started)


def preview_data(
    spec: DataSpec,
    *,
    tokenizer: PreTrainedTokenizerBase,
    length: int,
    seed: int,
    rows: int,
    draw: int = 0,
    reserved: Mapping[str, int] = MappingProxyType({}),
    progress: Callable[[str], None] = lambda line: None,
) -> list[tuple[str, Rows]]:
    """The first training rows of each source that needs no model, equal to those of `load_data` with the same
    arguments. Reads no more documents than these rows need.

    Args:
        rows: maximum number per source.

    Raises:
        DataError: as `load_data`.
    """
    whole = None if spec.tokens is None else math.ceil(spec.tokens / length)
    opened = []
    for source, share, held in _shares(spec, whole):
        if source.source in (SELF, STUDENT):
            by = "teacher" if source.source == SELF else "student"
            progress(f"data: {source.source} is written by the {by} when the stage begins; there is no row to show yet")
            continue
        # Rows without loss are left out, so make more rows than requested.
        enough = min(2 * rows + _SPARE_ROWS, share if share is not None else math.inf)
        opened.append(
            _open(
                source,
                int(enough),
                held,
                tokenizer=tokenizer,
                length=length,
                seed=seed + draw if source.source in ENDLESS else seed,
                reserved=reserved.get(source_key(source), 0),
                apart=False,
                writers={},
                progress=progress,
            )
        )
    known = _digests(opened)
    found = (_rows(source, length, known, progress, partly=True) for source in opened)
    return [(data.source, data.train[:rows]) for data in found]


def _drawn_by(seed: int, purpose: str) -> int:
    """The seed of endless text. With one seed, texts of any length have the same beginning."""
    # torch uses 32 bits of a seed.
    return int(hashlib.sha256(f"{purpose} {seed}".encode()).hexdigest()[:8], 16) if purpose else seed


def source_key(source: SourceSpec) -> str:
    """A key for a file, a folder or a data set; all paths to one file give the same key."""
    path = Path(source.source or "").expanduser()
    name = str(path.resolve()) if path.exists() else source.source
    return json.dumps([name, source.config, source.split])


def reserved_tokens(stages: Sequence[Stage]) -> dict[str, int]:
    """`source_key` -> the most tokens that any stage holds out, of the built-in text those of each work. No stage may
    train on another stage's held-out text, so all stages shuffle a file alike and leave out its first documents up to
    this number."""
    most: dict[str, int] = {}
    for stage in stages:
        for source, _, held in _shares(stage.data, None):
            if source.source not in ENDLESS:
                key = source_key(source)
                own = passed_by(held, stage.length) if source.source == BUILTIN else held * stage.length
                most[key] = max(most.get(key, 0), own)
    return most


def _shares(spec: DataSpec, rows: int | None) -> list[tuple[SourceSpec, int | None, int]]:
    """Each source with its numbers of training rows and held-out rows."""
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
    """Split `total` into integers by weight; the remainder goes to the entries that were rounded down most."""
    exact = [total * weight / sum(weights) for weight in weights]
    counts = [math.floor(x) for x in exact]
    for place in sorted(range(len(exact)), key=lambda n: counts[n] - exact[n])[: total - sum(counts)]:
        counts[place] += 1
    return counts


@dataclass
class _Opened:
    """A source positioned behind its held-out documents.

    Attributes:
        name: for messages.
        stream: the remaining documents, to train on.
        rows, held_rows: requested training rows (None: all) and held-out rows.
        held: documents for this stage's held-out rows.
        skipped: documents that other stages hold out.
        tally: counts of records; None for generated text.
    """

    name: str
    stream: Iterator[Document]
    rows: int | None
    held_rows: int
    held: list[Document]
    skipped: list[Document]
    tally: Tally | None
    started: float


def _open(
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
) -> _Opened:
    """Open a source and skip to its first training document. The held-out documents are within the first `reserved`
    tokens, or, if `apart`, follow them."""
    started = time.monotonic()
    source = spec.source or ""
    if source == BUILTIN:
        begin = reserved if apart else 0
        held_out = itertools.islice(builtin_rows(tokenizer, length, seed=seed, passed=begin), held_rows)
        held = _take(held_out, math.inf)
        begin = max(begin + passed_by(held_rows, length), reserved)
        stream = builtin_rows(tokenizer, length, seed=seed, passed=begin)
        return _Opened("the built-in text", stream, rows, held_rows, held, [], None, started)
    documents: Iterator[Document]
    tally = None
    if source in ENDLESS and rows is None:
        raise DataError(f"data.source is {source}: it has no end, so set data.tokens to how much of it")
    if source in (SELF, STUDENT):
        writer = writers.get(source)
        if writer is None or rows is None:
            raise DataError(f"data.source is {source}: there is no model here that could write it; name a file")
        longest = spec.sample_length or length
        # One extra document, because the last held-out document may be used in part, and its rest is not trained on.
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
        tally = Tally()
        documents = _read(spec, seed, tokenizer, tally)
    stream = (document for document in documents if any(document.loss))
    skipped = _take(stream, reserved) if apart else []
    if apart and tally:
        stream = _without(stream, {_digest(document) for document in skipped}, tally)
    held = _take(stream, held_rows * length)
    if not apart:
        skipped = _take(stream, reserved - sum(len(document.ids) for document in held))
    return _Opened(source, stream, rows, held_rows, held, skipped, tally, started)


def _read(spec: SourceSpec, seed: int, tokenizer: PreTrainedTokenizerBase, tally: Tally) -> Iterator[Document]:
    with open_records(spec, seed=seed) as records:
        yield from read_documents(records, spec, tokenizer, tally)


def _rows(
    opened: _Opened, length: int, known: set[bytes], progress: Callable[[str], None], *, partly: bool = False
) -> TrainingData:
    """Pack a source's training rows and held-out rows.

    Args:
        known: digests of all held-out records; equal records are left out of training.
        partly: these are only the first training rows, for a preview.
    """
    source, rows, held, held_rows = opened.name, opened.rows, opened.held, opened.held_rows
    stream = opened.stream if opened.tally is None else _without(opened.stream, known, opened.tally)
    train = _take(stream, math.inf if rows is None else rows * length)
    if opened.tally:
        progress(f"data: {source}: {opened.tally}")
    held_out, train_rows = pack(held, length)[:held_rows], pack(train, length)[:rows]
    enough, all_of_it = len(held_out) >= held_rows, len(train_rows) < (rows or 0)
    # A prompt can fill a row, which then has no tokens with loss.
    held_out, train_rows = held_out.scored(), train_rows.scored()
    if not enough or not len(train_rows):
        found, needed = sum(len(d.ids) for d in held + train), (held_rows + 1) * length
        apart = opened.skipped
        others = f", beside {sum(len(d.ids) for d in apart):,} tokens that stages hold out," if apart else ""
        if opened.tally and opened.tally.duplicates:
            others += f" and {opened.tally.duplicates:,} documents that equal held-out ones"
        documents = counted(len(held + train), "document", "documents")
        told = f"{source}: {found:,} tokens in {documents}{others} are too few for"
        if not held_rows:
            raise DataError(f"{told} a row of {length} tokens: lower the length, or use more text")
        raise DataError(
            f"{told} {held_rows} held-out rows and a training row of {length} tokens that share no document (at "
            f"least {needed:,}): lower its held_out or its length in the recipe, or use more text"
        )
    if not partly:
        split = f" to train on, {held_out.tokens:,} held out," if held_rows else ""
        progress(f"data: {train_rows.tokens:,} tokens{split} from {source}")
    if rows is not None and all_of_it and not partly:
        progress(f"data: {rows * length:,} tokens were asked for; {source} has no more")
    return TrainingData(train_rows, held_out, source, len(held) + len(train), time.monotonic() - opened.started)


def _digests(opened: list[_Opened]) -> set[bytes]:
    """Digests of all records that are kept out of training, over all sources of a mixture."""
    return {_digest(document) for one in opened if one.tally for document in itertools.chain(one.held, one.skipped)}


def _digest(document: Document) -> bytes:
    ids = torch.as_tensor(document.ids, dtype=torch.int32).numpy()
    return hashlib.blake2b(ids.tobytes(), digest_size=16).digest()


def _without(stream: Iterator[Document], known: set[bytes], tally: Tally) -> Iterator[Document]:
    """Drop and count documents whose token digest is in `known`."""
    for document in stream:
        if known and _digest(document) in known:
            tally.duplicates += 1
        else:
            yield document


def _recall(tokenizer: PreTrainedTokenizerBase, seed: int, length: int) -> Iterator[Document]:
    bare = len(encode([("a", True)], tokenizer, begins=False, ends=False).ids)
    opening = encode([("a", True)], tokenizer, begins=True, ends=False).ids[:-bare]
    closing = encode([("a", True)], tokenizer, begins=False, ends=True).ids[bare:]

    def encoded(pieces: Pieces) -> Document:
        return encode(pieces, tokenizer, begins=False, ends=False)

    written = recall_documents(tokenizer, encoded, seed=seed, length=length, ends=(opening, closing))
    return (Document(ids, loss) for ids, loss in written)


def _take(stream: Iterator[Document], tokens: float) -> list[Document]:
    """Take documents until they hold `tokens` tokens or the stream ends."""
    taken: list[Document] = []
    while tokens > 0 and (document := next(stream, None)) is not None:
        # As tensors, because lists of ints take ten times the memory and there may be hundreds of millions of tokens.
        ids, loss = torch.tensor(document.ids, dtype=torch.int32), torch.tensor(document.loss, dtype=torch.bool)
        taken.append(Document(ids, loss))
        tokens -= len(document.ids)
    return taken
