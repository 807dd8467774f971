"""Training data: packing, labels, the split, instruction masking, and what a user is told when data is wrong."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM, AutoTokenizer

from linearize.data.load import load_data
from linearize.data.rows import Document, Rows, pack
from linearize.errors import DataError

CHAT = (
    "{{ bos_token }}{% for m in messages %}"
    "{% if m.role == 'system' %}{{ raise_exception('no system turns') }}{% endif %}"
    "{% if m.role == 'user' %}User: {{ m.content }}\n{% else %}Bot: {{ m.content }}{{ eos_token }}\n{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}Bot: {% endif %}"
)
STORIES = [f"The fox number {n} saw a tree and was very happy about it." for n in range(60)]


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LINEARIZE_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def tokenizer(tiny_folder):
    return AutoTokenizer.from_pretrained(tiny_folder)


def load(source, tokenizer, length=16, seed=0, teacher=None, progress=lambda line: None, **spec):
    spec = {
        **{"config": None, "split": "train", "field": None, "columns": None, "format": "auto", "tokens": None},
        **{"held_out": 0, "temperature": 1.0, "sample_length": None, "mix": [], "source": str(source), **spec},
    }
    return load_data(
        SimpleNamespace(**spec), tokenizer=tokenizer, length=length, seed=seed, teacher=teacher, progress=progress
    )


def jsonl(path: Path, records) -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return path


@pytest.fixture
def stories(tmp_path):
    return jsonl(tmp_path / "stories.jsonl", [{"text": story} for story in STORIES])


def error(*args, **options) -> str:
    with pytest.raises(DataError) as caught:
        load(*args, **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def documents_in(rows: Rows, tokenizer) -> list[list[int]]:
    """The documents that rows hold, told apart by the end token."""
    documents: list[list[int]] = [[]]
    for token in rows.input_ids.flatten().tolist():
        documents[-1].append(token)
        if token == tokenizer.eos_token_id:
            documents.append([])
    return [d for d in documents if d]


documents_of_any_size = st.lists(
    st.lists(st.tuples(st.integers(0, 99), st.booleans()), max_size=23).map(
        lambda pairs: Document([i for i, _ in pairs], [loss for _, loss in pairs])
    ),
    max_size=9,
)


@given(documents=documents_of_any_size, length=st.integers(1, 9))
def test_packing_loses_and_duplicates_nothing(documents, length):
    rows = pack(documents, length)
    flat = [(i, d, place) for d, doc in enumerate(documents) for place, i in enumerate(doc.ids)]
    assert rows.input_ids.shape == rows.labels.shape == rows.position_ids.shape == (len(flat) // length, length)
    assert rows.tokens == len(flat) // length * length
    loss = [has_loss for doc in documents for has_loss in doc.loss]
    position = 0
    for t, (token, _document, place) in enumerate(flat[: rows.tokens]):
        row, column = divmod(t, length)
        position = 0 if place == 0 or column == 0 else position + 1
        assert rows.input_ids[row, column] == token
        assert rows.position_ids[row, column] == position
        assert rows.labels[row, column] == (token if loss[t] and position else -100)


def test_rows_can_be_sliced_and_picked():
    rows = pack([Document(list(range(12)), [True] * 12)], 4)
    assert len(rows[1:]) == 2
    picked = rows[torch.tensor([2, 0])]
    assert picked.input_ids[:, 0].tolist() == [8, 0]
    assert picked.labels.shape == picked.position_ids.shape == (2, 4)


def test_text_documents_start_and_end_as_the_tokenizer_says(stories, tokenizer):
    data = load(stories, tokenizer)
    documents = documents_in(data.train, tokenizer)
    expected = {(*tokenizer(story).input_ids, tokenizer.eos_token_id) for story in STORIES}
    assert set(map(tuple, documents[:-1])) <= expected
    assert data.documents == len(STORIES)
    tokenizer.bos_token = tokenizer.eos_token = None
    data = load(stories, tokenizer)
    assert data.train.tokens == sum(len(d) - 2 for d in expected) // 16 * 16


def test_held_out_and_train_share_no_document_and_stay_the_same(stories, tokenizer):
    first = load(stories, tokenizer, held_out=6)
    assert first.held_out.input_ids.shape == (6, 16)
    held = set(map(tuple, documents_in(first.held_out, tokenizer)[:-1]))
    train = set(map(tuple, documents_in(first.train, tokenizer)))
    assert held
    assert not held & train
    assert torch.equal(load(stories, tokenizer, held_out=6).train.labels, first.train.labels)
    # The budget changes how much is trained on, never what is held out.
    small = load(stories, tokenizer, held_out=6, tokens=40)
    assert torch.equal(small.held_out.input_ids, first.held_out.input_ids)
    assert torch.equal(small.train.input_ids, first.train.input_ids[:3])
    assert not torch.equal(load(stories, tokenizer, held_out=6, seed=1).held_out.input_ids, first.held_out.input_ids)


def test_a_budget_stops_the_tokeniser(stories, tokenizer):
    data = load(stories, tokenizer, tokens=100, held_out=1)
    assert data.train.input_ids.shape == (7, 16)
    assert data.held_out.tokens == 16
    assert data.documents < 15


def test_a_budget_that_the_data_does_not_have(stories, tokenizer):
    lines: list[str] = []
    assert load(stories, tokenizer, tokens=10**6, progress=lines.append).train.tokens < 10**6
    assert lines[-1] == f"data: 1,000,000 tokens were asked for; {stories} has no more"


def test_a_long_text_file_is_cut_into_documents_but_ends_once(tmp_path, tokenizer):
    book = tmp_path / "book.txt"
    book.write_text("\ufeff" + "\n\n".join(STORIES), encoding="utf-8")
    data = load(book, tokenizer, held_out=2)
    assert data.documents > 10
    ids = torch.cat([data.held_out.input_ids, data.train.input_ids])
    assert (ids == tokenizer.eos_token_id).sum() <= 1
    assert "\ufeff" not in tokenizer.decode(ids.flatten())
    # Text without any space is cut too.
    book.write_text("".join(map(str, range(1500))), encoding="utf-8")
    assert load(book, tokenizer, held_out=2).documents >= 10


@pytest.mark.parametrize("kind", ["json", "parquet", "jsonl", "json-lines"])
def test_every_kind_of_records_gives_the_same_rows(tmp_path, tokenizer, stories, kind):
    records = [{"text": story} for story in STORIES]
    path = tmp_path / f"same.{kind.removesuffix('-lines')}"
    if kind == "json":
        path.write_text(json.dumps(records, indent=1))
    elif kind == "parquet":
        pyarrow = pytest.importorskip("pyarrow")
        from pyarrow import parquet

        parquet.write_table(pyarrow.Table.from_pylist(records), path)
    else:
        jsonl(path, records)
    assert torch.equal(load(path, tokenizer).train.input_ids, load(stories, tokenizer).train.input_ids)


def test_which_field_is_the_text(tmp_path, tokenizer, stories):
    expected = load(stories, tokenizer).train.input_ids
    named = jsonl(tmp_path / "named.jsonl", [{"text": "no", "story": s} for s in STORIES])
    mixed = jsonl(tmp_path / "mixed.jsonl", [{"text": s, "instruction": "i", "output": "o"} for s in STORIES])
    assert torch.equal(load(named, tokenizer, field="story").train.input_ids, expected)
    assert torch.equal(load(mixed, tokenizer, format="text").train.input_ids, expected)
    assert not torch.equal(load(mixed, tokenizer).train.input_ids, expected)


def labelled(rows: Rows, tokenizer) -> str:
    return tokenizer.decode(rows.input_ids[rows.labels != -100])


def one_row(path, record, tokenizer, **options) -> Rows:
    """The record alone, in one row that it just fills."""
    jsonl(path, [record])
    tokens = load(path, tokenizer, length=1, **options).train.tokens
    return load(path, tokenizer, length=tokens, **options).train


def test_alpaca_carries_loss_on_the_response_only(tmp_path, tokenizer):
    record = {"instruction": "Name a fox.", "input": "It is red.", "output": "The fox is Tim."}
    rows = one_row(tmp_path / "a.jsonl", record, tokenizer)
    assert labelled(rows, tokenizer) == "The fox is Tim.<|end_story|>"
    text = tokenizer.decode(rows.input_ids[0])
    assert "paired with an input" in text
    assert "Input:\nIt is red.\n\n" in text
    rows = one_row(tmp_path / "b.jsonl", {**record, "input": ""}, tokenizer)
    assert "Input" not in tokenizer.decode(rows.input_ids[0])
    assert labelled(rows, tokenizer) == "The fox is Tim.<|end_story|>"


def test_a_chat_template_is_used_where_there_is_one(tmp_path, tokenizer):
    tokenizer.chat_template = CHAT
    rows = one_row(tmp_path / "a.jsonl", {"instruction": "Go.", "input": "Now.", "output": "I go."}, tokenizer)
    assert labelled(rows, tokenizer) == "I go.<|end_story|>"
    assert (rows.input_ids == tokenizer.bos_token_id).sum() == 1
    assert "User: Go.\n\nNow.\nBot: I go." in tokenizer.decode(rows.input_ids[0])


def test_every_assistant_turn_carries_loss_and_nothing_else(tmp_path, tokenizer):
    tokenizer.chat_template = CHAT
    said = [("user", "Who?"), ("assistant", "Tim."), ("user", "Where?"), ("assistant", "In a tree."), ("user", "Oh.")]
    messages = [{"role": role, "content": content} for role, content in said]
    for record, options in (({"messages": messages}, {}), ({"talk": messages}, {"field": "talk"})):
        rows = one_row(tmp_path / "a.jsonl", record, tokenizer, **options)
        assert labelled(rows, tokenizer) == "Tim.<|end_story|>In a tree.<|end_story|>"
        assert "Oh." not in tokenizer.decode(rows.input_ids[0])


def test_records_without_an_answer_are_left_out(tmp_path, tokenizer):
    good = {"instruction": "Go.", "input": "", "output": "I go."}
    path = jsonl(tmp_path / "a.jsonl", [good, {**good, "output": " "}, {"text": ""}] * 3)
    assert load(path, tokenizer).documents == 3


def test_rows_that_a_prompt_fills_are_left_out(tmp_path, tokenizer):
    records = [{"instruction": "Name the fox. " * 20, "input": "", "output": f"The fox {n} is Tim."} for n in range(20)]
    data = load(jsonl(tmp_path / "a.jsonl", records), tokenizer, length=48, held_out=8)
    assert 0 < len(data.held_out) < 8
    assert all(bool((rows.labels != -100).any(1).all()) for rows in (data.train, data.held_out))


def test_text_written_by_the_teacher(tiny_folder, tokenizer):
    teacher = AutoModelForCausalLM.from_pretrained(tiny_folder, dtype=torch.float32)
    data = load("self", tokenizer, length=32, tokens=200, held_out=2, teacher=lambda: teacher)
    assert len(data.train) == 7
    assert len(data.held_out) == 2
    assert data.source == "text written by the teacher"
    assert (data.train.labels[data.train.position_ids > 0] != -100).all()
    again = load("self", tokenizer, length=32, tokens=200, held_out=2, teacher=lambda: teacher)
    assert torch.equal(again.train.input_ids, data.train.input_ids)
    assert "set data.tokens" in error("self", tokenizer, teacher=lambda: teacher)


def test_missing_files_name_their_neighbours(tmp_path, tokenizer, stories):
    assert error(tmp_path / "storys.jsonl", tokenizer).endswith("no such file; did you mean stories.jsonl?")
    assert error(tmp_path / "zzz.txt", tokenizer).endswith("zzz.txt: no such file in that folder")
    assert f"its folder {tmp_path / 'no'} does not exist" in error(tmp_path / "no" / "a.txt", tokenizer)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.txt", b"", "a.txt: the file is empty"),
        ("a.jsonl", b"\n \n", "a.jsonl: the file is empty"),
        ("a.json", b"[]", "a.json: the file is empty"),
        ("a.doc", b"a,b", "a.doc: cannot read .doc; give one of .txt, .md, .raw, .tokens, .jsonl, .json, .csv, .tsv"),
        ("a.txt", b"caf\xe9 au lait", "a.txt: not UTF-8 text (byte 0xe9 at 3)"),
        ("a.jsonl", b'{"text": "x"}\n{"text": \n', "a.jsonl:2: broken JSON (Expecting value at column"),
        ("a.json", b'[{"text": "x"},\n{"text" "y"}]', "a.json:2: broken JSON"),
        (
            "a.jsonl",
            b'{"text": "x"}\n\n[1, 2]\n',
            "a.jsonl:3: each record must be an object with named fields, not [1, 2]",
        ),
        (
            "a.jsonl",
            b'{"q": "x", "a": "y", "n": 1}',
            "a.jsonl:1: the fields of this record are q, a, n; expected messages",
        ),
        ("a.json", b'[{"n": 1}]', "a.json, record 1: the fields of this record are n; expected"),
        ("a.jsonl", b'{"messages": ["hi"]}', "a.jsonl:1: each message must be an object with a role and a content"),
        ("a.jsonl", b'{"messages": []}', "a.jsonl:1: messages need a model with a chat template"),
        ("a.parquet", b"nonsense", "a.parquet: not a readable Parquet file"),
    ],
)
def test_a_file_that_cannot_be_used_says_where_and_why(tmp_path, tokenizer, name, content, message):
    (tmp_path / name).write_bytes(content)
    assert message in error(tmp_path / name, tokenizer)


def test_a_conversation_that_the_template_refuses(tmp_path, tokenizer):
    tokenizer.chat_template = CHAT
    turns = [{"role": "system", "content": "s"}, {"role": "assistant", "content": "a"}]
    path = jsonl(tmp_path / "a.jsonl", [{"messages": turns}])
    assert "a.jsonl:1: the model's chat template refuses this conversation: no system turns" in error(path, tokenizer)
    path = jsonl(tmp_path / "a.jsonl", [{"messages": [{"role": "user", "content": "u"}]}])
    assert "a.jsonl:1: this conversation has no assistant turn" in error(path, tokenizer)


def test_a_format_that_the_records_do_not_have(tmp_path, tokenizer, stories):
    text = error(stories, tokenizer, format="instruction")
    assert "expected messages (or conversations or conversation), or prompt and completion, or instruction and" in text
    assert "expected body, which data.field names" in error(stories, tokenizer, format="text", field="body")
    chats = jsonl(tmp_path / "chats.jsonl", [{"messages": [], "text": "x"}])  # without the field, nothing else is taken
    assert "this record are messages, text; expected txt, which" in error(chats, tokenizer, field="txt")


def test_data_that_is_too_small_says_the_numbers(stories, tokenizer):
    text = error(stories, tokenizer, held_out=100)
    assert "in 60 documents are too few for 100 held-out rows and a training row of 16 tokens" in text
    assert "(at least 1,616)" in text
    assert "are too few for a row of 5000 tokens: lower the length" in error(stories, tokenizer, length=5000)


class FakeHub:
    """Stands for the `datasets` library; a list of records, or an error."""

    def __init__(self, records):
        self.records, self.asked = records, None

    def load_dataset(self, *asked, **options):
        self.asked = (*asked, options)
        if isinstance(self.records, Exception):
            raise self.records
        return SimpleNamespace(shuffle=lambda seed, buffer_size: iter(self.records))


def test_a_hub_data_set_is_streamed(tokenizer, monkeypatch, stories):
    hub = FakeHub([{"text": story} for story in STORIES] + [{"n": 1}])
    monkeypatch.setitem(sys.modules, "datasets", hub)
    data = load("someone/stories-2.5", tokenizer, config="en", split="validation", tokens=64)
    assert hub.asked == ("someone/stories-2.5", "en", {"split": "validation", "streaming": True})
    assert data.train.input_ids[0].tolist() == [*tokenizer(STORIES[0]).input_ids, tokenizer.eos_token_id][:16]
    assert "someone/stories-2.5 train, record 61: the fields" in error("someone/stories-2.5", tokenizer)


def test_a_hub_data_set_out_of_reach(tokenizer, monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", FakeHub(ConnectionError("Couldn't reach it\nmore words")))
    text = error("someone/stories", tokenizer)
    assert text == (
        "someone/stories (split train): no file of that name, "
        "and as a Hub data set it cannot be read: Couldn't reach it; "
        "check the name and the network, or name a .txt, .jsonl or .parquet file"
    )
