"""Turn records into documents: detect a record's shape, and tokenise it with a loss mask."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from linearize.data.conversations import Message, Skip, cut, list_of, messages_of, text_of, tools_of
from linearize.data.records import CONVERSATIONS, Record, Records, listed
from linearize.data.rows import Document, Pieces
from linearize.errors import DataError
from linearize.recipe.schema import RECORD_SHAPES

if TYPE_CHECKING:
    from collections.abc import Iterator

    from transformers import PreTrainedTokenizerBase

    from linearize.recipe.schema import SourceSpec

# The prompts of Stanford Alpaca (github.com/tatsu-lab/stanford_alpaca), unchanged.
_ALPACA = (
    "Below is an instruction that describes a task. Write a response that appropriately completes the request.",
    "Below is an instruction that describes a task, paired with an input that provides further context. "
    "Write a response that appropriately completes the request.",
)

_FORMATS = {
    "auto": list(RECORD_SHAPES),
    "text": ["text"],
    "instruction": [shape for shape in RECORD_SHAPES if shape != "text"],
}
_EXPECTED = {
    "messages": f"messages (or {' or '.join(CONVERSATIONS[1:])})",
    "prompt": "prompt and completion",
    "instruction": "instruction and output",
    "text": "text",
}
_PLURALS = {"messages": "conversations", "prompt": "completions", "instruction": "instructions", "text": "texts"}


@dataclass
class Tally:
    """Counts of the records of a source, so that no record is dropped silently.

    Attributes:
        shapes: documents by the shape of their record.
        read, unread: fields that were read, and fields that were not, by shape.
        skipped: reason -> number of skipped records, and the place of one of them.
        notes: omissions of chat templates.
        duplicates: documents equal to a held-out one.
        about: remarks on the reading of the source; see `Records`.
    """

    columns: dict[str, str] = field(default_factory=dict)
    shapes: Counter[str] = field(default_factory=Counter)
    read: dict[str, dict[str, None]] = field(default_factory=dict)
    unread: dict[str, None] = field(default_factory=dict)
    skipped: Counter[str] = field(default_factory=Counter)
    places: dict[str, str] = field(default_factory=dict)
    notes: Counter[str] = field(default_factory=Counter)
    duplicates: int = 0
    plain: bool = False
    about: tuple[str, ...] = ()

    def skip(self, reason: str, where: str) -> None:
        """Count a skipped record."""
        self.skipped[reason] += 1
        self.places.setdefault(reason, where)

    def __str__(self) -> str:
        """A one-line summary."""
        parts = [*self.about]
        if self.plain:
            parts.append(f"{self.shapes.total():,} parts of plain text")
        else:
            parts += [f"{n:,} {_PLURALS[shape]} ({listed(self.read[shape])})" for shape, n in self.shapes.items()]
        if self.unread:
            parts.append(f"not read: {listed(self.unread)}")
        seen = {name for names in self.read.values() for name in names}
        if unseen := [f"{name} (data.columns.{key})" for key, name in self.columns.items() if name not in seen]:
            parts.append(f"no record has {listed(unseen)}")
        if self.skipped:
            reasons = [f"{n:,} because {why} ({self.places[why]})" for why, n in self.skipped.most_common(3)]
            if others := self.skipped.total() - sum(n for _, n in self.skipped.most_common(3)):
                reasons.append(f"{others:,} for other reasons")
            parts.append(f"{self.skipped.total():,} skipped: {', '.join(reasons)}")
        if self.duplicates:
            parts.append(f"{self.duplicates:,} left out of training because they equal held-out ones")
        parts += [f"{n:,} {what}" for what, n in self.notes.items()]
        return "; ".join(parts)


def read_documents(
    records: Records, spec: SourceSpec, tokenizer: PreTrainedTokenizerBase, tally: Tally
) -> Iterator[Document]:
    """The documents of all records that have tokens with loss.

    Raises:
        DataError: a record cannot be used. If the file's first record has an error too, that error is raised. Also
            raised if no record has tokens with loss.
    """
    tally.plain, tally.about = records.plain, tuple(records.about)
    first = None
    for record in records:
        first = first or record
        try:
            yield _document(record, spec, tokenizer, tally)
        except Skip as skip:
            tally.skip(str(skip), record[0])
        except DataError:
            # Records are shuffled; an error in all of them is reported for the first one in the file.
            if records.first is not None and records.first[0] != record[0]:
                _try(records.first, spec, tokenizer)
            raise
    if not tally.shapes and first is not None:
        where, fields, _ = records.first or first
        reason = _try((where, fields, True), spec, tokenizer)
        count = tally.skipped.total()
        others = f", and none of the {count:,} records can be used" if count > 1 else ", and there is no other record"
        has = f"; the fields of this record are {listed(map(str, fields))}" if isinstance(fields, dict) else ""
        raise DataError(f"{where}: {reason}{others}{has}")


def _try(record: Record, spec: SourceSpec, tokenizer: PreTrainedTokenizerBase) -> str:
    """The reason to skip a record, or an empty string; raises the record's error."""
    try:
        _document(record, spec, tokenizer, Tally())
    except Skip as skip:
        return str(skip)
    return "it holds nothing to learn"


def _document(record: Record, spec: SourceSpec, tokenizer: PreTrainedTokenizerBase, tally: Tally) -> Document:
    """Tokenise a record.

    Raises:
        Skip: it has no tokens with loss (an empty text, an empty answer).
    """
    where, fields, ends = record
    if not isinstance(fields, dict):
        shown = json.dumps(fields, default=str)[:40]
        raise DataError(f"{where}: each record must be an object with named fields, not {shown}")
    shape, names = _shape(where, fields, spec)
    values = {role: fields.get(name) for role, name in names.items()}
    reader = _Reader(where, names, values, tokenizer, tally)
    pieces, templated = getattr(reader, shape)()
    try:
        "".join(piece for piece, _ in pieces).encode()
    except UnicodeEncodeError:  # JSON can contain an unpaired surrogate, which tokenizers refuse
        raise Skip("its text has half of a surrogate pair, which is no character") from None
    document = encode(pieces, tokenizer, begins=not templated, ends=ends)
    if not any(document.loss):
        raise Skip("it has no token to learn")
    tally.shapes[shape] += 1
    read = {name: None for name in names.values() if name in fields}
    tally.read.setdefault(shape, {}).update(read)
    if spec.columns:
        tally.columns = spec.columns.named
    tally.unread.update({str(name): None for name in fields if name not in read})
    return document


def _shape(where: str, fields: dict[str, Any], spec: SourceSpec) -> tuple[str, dict[str, str]]:
    """The shape of a record, and shape field -> record field."""
    if spec.field is not None:
        if spec.field not in fields:
            raise _unknown(where, fields, f"{spec.field}, which data.field names")
        listed = isinstance(fields[spec.field], list)
        if spec.format == ("text" if listed else "instruction"):
            raise _unknown(where, fields, f"{'text' if listed else 'a list of messages'} in {spec.field}")
        shape = "messages" if listed else "text"
        return shape, {shape: spec.field, **({"tools": "tools", "system": "system"} if listed else {})}
    own = spec.columns.named if spec.columns else {}
    shapes = spec.columns.shapes if spec.columns else _FORMATS[spec.format]
    some = [name for name in CONVERSATIONS if fields.get(name) is not None]
    conversation = next(iter([*some, *(name for name in CONVERSATIONS if name in fields)]), "messages")

    def name(role: str) -> str:
        return own.get(role, conversation if role == "messages" else role)

    # Columnar files give every record all fields, so null fields count only if the others match no shape.
    for there in ({key for key, value in fields.items() if value is not None}, fields.keys()):
        for shape in shapes:
            must, may = RECORD_SHAPES[shape]
            if all(name(role) in there for role in must):
                _check_not_preference(where, fields, shape, bool(own))
                return shape, {role: name(role) for role in (*must, *may)}
    _check_not_preference(where, fields, "", bool(own))
    if own:
        wanted = " or ".join(" and ".join(name(role) for role in RECORD_SHAPES[shape][0]) for shape in shapes)
        raise _unknown(where, fields, f"{wanted}, which data.columns names")
    raise _unknown(where, fields, ", or ".join(_EXPECTED[shape] for shape in shapes))


def _check_not_preference(where: str, fields: dict[str, Any], shape: str, named: bool) -> None:
    """Raises:
    DataError: the record holds preference data: two ranked answers, or a rated one.
    """
    if named or shape == "messages":
        return
    if {"chosen", "rejected"} <= fields.keys():
        whole = isinstance(fields["chosen"], list) and (len(fields["chosen"]) > 1 or "prompt" not in fields)
        advice = "{messages: chosen}" if whole else "{completion: chosen}" if "prompt" in fields else "{text: chosen}"
        pair = "prompt, chosen and rejected" if "prompt" in fields else "chosen and rejected"
        raise DataError(
            f"{where}: {pair} make a preference record, and there is no objective for preferences; to learn the chosen "
            f"answers alone set data.columns to {advice}"
        )
    if shape == "prompt" and isinstance(fields.get("label"), bool):
        raise DataError(
            f"{where}: prompt, completion and label make a preference record, and there is no objective for "
            "preferences; leave out the records whose label is false, and the field label"
        )


def _unknown(where: str, fields: dict[str, Any], expected: str) -> DataError:
    has = listed(map(str, fields)) or "none"
    strings = [str(name) for name, value in fields.items() if isinstance(value, str)]
    lists = [str(name) for name, value in fields.items() if isinstance(value, list)]
    if lists and not strings and not (len(lists) == 1 and fields[lists[0]] and isinstance(fields[lists[0]][0], dict)):
        return DataError(
            f"{where}: the fields of this record are {has}; expected {expected}; if the records are in "
            f"{' or '.join(lists)}, write that list to a file of its own"
        )
    example = (
        f"text: {strings[0]}"
        if len(strings) == 1 and not lists
        else f"instruction: {strings[0]}, output: {strings[1]}"
        if len(strings) == 2 and not lists
        else f"messages: {lists[0]}"
        if len(lists) == 1
        else "text: body"
    )
    return DataError(
        f"{where}: the fields of this record are {has}; expected {expected}; data.columns names other fields, for "
        f"example {{{example}}}"
    )


@dataclass
class _Reader:
    """Read the fields of one record. Each shape has a method that returns the pieces of text, and True if they come
    from a chat template, which includes its own BOS."""

    where: str
    names: dict[str, str]
    values: dict[str, Any]
    tokenizer: PreTrainedTokenizerBase
    tally: Tally

    def _text(self, role: str, *, needed: bool = False) -> str:
        if self.values.get(role) is None and not needed:
            return ""
        name = self.names[role]
        text = text_of(self.where, name, self.values[role])
        if needed and not text.strip():
            raise Skip(f"{name} is empty")
        return text

    @property
    def _template(self) -> str:
        return str(self.tokenizer.chat_template or "")

    def _cut(self, messages: list[Message], learned: set[int], tools: list[Any] | None = None) -> tuple[Pieces, bool]:
        if not self.tokenizer.chat_template:
            raise DataError(
                f"{self.where}: messages need a model with a chat template; this one takes instruction and output, or "
                "a field of plain text, which data.columns names"
            )
        return cut(messages, learned, tools, self.tokenizer, self.tally.notes), True

    def text(self) -> tuple[Pieces, bool]:
        return [(self._text("text", needed=True), True)], False

    def messages(self) -> tuple[Pieces, bool]:
        name = self.names["messages"]
        if self.values["messages"] is None:
            raise Skip(f"{name} is null")
        turns = list_of(self.where, name, self.values["messages"])
        messages, learned = messages_of(self.where, turns, self.tally.notes, self._template)
        system = self._text("system") if "system" in self.names else ""
        if system.strip():
            if messages and messages[0]["role"] == "system":
                if messages[0]["content"] != system:
                    raise Skip(f"{self.names['system']} and the first message are two different system prompts")
            else:
                messages = [{"role": "system", "content": system}, *messages]
                learned = {number + 1 for number in learned}
        return self._cut(messages, learned, tools_of(self.where, self.values.get("tools")))

    def prompt(self) -> tuple[Pieces, bool]:
        if not any(isinstance(self.values[role], list) for role in ("prompt", "completion")):
            return [(self._text("prompt"), False), (self._text("completion", needed=True), True)], False
        prompt = self._turns("prompt", "user")
        turns = [*prompt, *self._turns("completion", "assistant")]
        messages, learned = messages_of(self.where, turns, Counter(), self._template)
        answers = {number for number in learned if number >= len(prompt)}
        return self._cut(messages, answers, tools_of(self.where, self.values.get("tools")))

    def _turns(self, role: str, speaker: str) -> list[Any]:
        value = self.values[role]
        return value if isinstance(value, list) else [{"role": speaker, "content": self._text(role, needed=True)}]

    def instruction(self) -> tuple[Pieces, bool]:
        """Render an Alpaca record with the tokenizer's chat template, or with Alpaca's own prompt if there is none."""
        instruction, output = text_of(self.where, self.names["instruction"], self.values["instruction"]), ""
        output, more, system = self._text("output", needed=True), self._text("input"), self._text("system")
        history = self._history()
        if self.tokenizer.chat_template:
            question = f"{instruction}\n\n{more}" if more else instruction
            messages = [{"role": "system", "content": system}] if system.strip() else []
            for asked, answer in [*history, (question, output)]:
                messages += [{"role": "user", "content": asked}, {"role": "assistant", "content": answer}]
            answers = (n for n, m in enumerate(messages) if m["role"] == "assistant" and m["content"].strip())
            return self._cut(messages, {*answers})
        before = system if system.strip() else _ALPACA[bool(more)]
        pieces: Pieces = []
        for asked, answer in history:
            pieces += [(f"{before}\n\n### Instruction:\n{asked}\n\n### Response:\n", False), (answer, True)]
            before = ""
        given = f"### Input:\n{more}\n\n" if more else ""
        prompt = f"{before}\n\n### Instruction:\n{instruction}\n\n{given}### Response:\n"
        return [*pieces, (prompt, False), (output, True)], False

    def _history(self) -> list[tuple[str, str]]:
        name, pairs = self.names["history"], []
        for pair in list_of(self.where, name, self.values.get("history")):
            if not isinstance(pair, (list, tuple)) or len(pair) != 2:
                shown = json.dumps(pair, default=str)[:40]
                raise DataError(f"{self.where}: {name} has {shown}; expected pairs of a question and its answer")
            asked, answer = (text_of(self.where, name, text) for text in pair)
            pairs.append((asked, answer))
        return pairs


def encode(pieces: Pieces, tokenizer: PreTrainedTokenizerBase, *, begins: bool, ends: bool) -> Document:
    """Tokenise piece by piece, so that loss boundaries are token boundaries.

    A prompt is tokenised alone, as at inference. The text after it gets the tokens that the whole text has beyond the
    prompt, because some tokenizers put a space before each separate text.
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
    # A chat template includes its own BOS.
    if (
        ids
        and begins
        and tokenizer.bos_token_id is not None
        and tokenizer("").input_ids[:1] == [tokenizer.bos_token_id]
    ):
        ids, loss = [tokenizer.bos_token_id, *ids], [False, *loss]
    return Document(ids, loss)
