"""Shapes of records and kinds of files: which tokens they come to, which carry loss, and what is said of the rest."""

from __future__ import annotations

import bz2
import csv
import gzip
import json
import re
from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer

from linearize.data.load import load_data, preview_data, reserved_tokens
from linearize.errors import DataError
from linearize.recipe import DataSpec, Stage
from tests.conftest import random_llama

# Laid out as Qwen2.5's: a default system prompt, tools in the system turn, calls and answers of tools.
QWEN = """\
{%- if tools %}
    {{- '<|im_start|>system\\n' }}
    {%- if messages[0]['role'] == 'system' %}{{- messages[0]['content'] }}{%- else %}{{- 'Be kind.' }}{%- endif %}
    {{- '\\n# Tools\\n<tools>' }}
    {%- for tool in tools %}{{- '\\n' }}{{- tool | tojson }}{%- endfor %}
    {{- '\\n</tools><|im_end|>\\n' }}
{%- else %}
    {%- if messages[0]['role'] == 'system' %}
        {{- '<|im_start|>system\\n' + messages[0]['content'] + '<|im_end|>\\n' }}
    {%- else %}{{- '<|im_start|>system\\nBe kind.<|im_end|>\\n' }}{%- endif %}
{%- endif %}
{%- for message in messages %}
    {%- if message.role == 'user' or (message.role == 'system' and not loop.first)
        or (message.role == 'assistant' and not message.tool_calls) %}
        {{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' }}
    {%- elif message.role == 'assistant' %}
        {{- '<|im_start|>assistant' }}
        {%- if message.content %}{{- '\\n' + message.content }}{%- endif %}
        {%- for call in message.tool_calls %}
            {%- if call.function is defined %}{%- set call = call.function %}{%- endif %}
            {{- '\\n<tool_call>\\n{"name": "' + call.name + '", "arguments": ' + (call.arguments | tojson) }}
            {{- '}\\n</tool_call>' }}
        {%- endfor %}
        {{- '<|im_end|>\\n' }}
    {%- elif message.role == 'tool' %}
        {{- '<|im_start|>user\\n<tool_response>\\n' + message.content + '\\n</tool_response><|im_end|>\\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}
"""
# Takes no tools, needs no first message, and renders every role alike.
PLAIN = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
TOOLS = [{"type": "function", "function": {"name": "weather", "parameters": {"city": {"type": "string"}}}}]
CALL = {"type": "function", "function": {"name": "weather", "arguments": {"city": "Oslo"}}}
ASKED = {"role": "user", "content": "Is it warm in Oslo?"}
TOLD = {"role": "tool", "name": "weather", "content": '{"celsius": 21}'}
SAID = {"role": "assistant", "content": "It is 21 degrees."}
USED = [ASKED, {"role": "assistant", "content": "", "tool_calls": [CALL]}, TOLD, SAID]
CALLED = '\n<tool_call>\n{"name": "weather", "arguments": {"city": "Oslo"}}\n</tool_call>'


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return random_llama(tmp_path_factory.mktemp("llama"))


@pytest.fixture
def tokenizer(folder):
    """A tokenizer of bytes."""
    return AutoTokenizer.from_pretrained(folder)


@pytest.fixture
def qwen(tokenizer):
    tokenizer.chat_template = QWEN
    tokenizer.add_special_tokens({"eos_token": "<|im_end|>"})
    return tokenizer


def write(path: Path, records) -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return path


def load(source, tokenizer, *, length=1, lines=None, reserved=None, **spec):
    spec = DataSpec.model_validate({"source": str(source), "held_out": 0, **spec})
    said = [] if lines is None else lines
    return load_data(
        spec, tokenizer=tokenizer, length=length, seed=0, teacher=None, progress=said.append, reserved=reserved or {}
    )


def read(path: Path, records, tokenizer, **spec) -> tuple[str, str, list[str]]:
    """The text of the records, the part of it that carries loss (spans apart), and the lines that are said."""
    write(path, records)
    said: list[str] = []
    tokens = load(path, tokenizer, **spec).train.tokens
    rows = load(path, tokenizer, length=tokens, lines=said, **spec).train
    ids, labels = rows.input_ids[0].tolist(), rows.labels[0].tolist()
    marked = re.sub(
        "\x01\x02",
        "",
        "".join(
            f"\x02{tokenizer.decode([i])}\x01" if n != -100 else tokenizer.decode([i])
            for i, n in zip(ids, labels, strict=True)
        ),
    )
    return tokenizer.decode(ids), "|".join(re.findall("\x02([^\x01]*)\x01", marked)), said


def error(source, tokenizer, **spec) -> str:
    with pytest.raises(DataError) as caught:
        load(source, tokenizer, **spec)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def summary(lines: list[str]) -> str:
    """The line that says what was read."""
    (line,) = [line for line in lines if line.startswith("data: ") and "(" in line]
    return line.partition(".jsonl: ")[2]


@pytest.mark.parametrize(
    "turns",
    [
        {"messages": [ASKED, SAID]},
        {"conversations": [ASKED, SAID]},
        {"conversation": [{"from": "human", "value": ASKED["content"]}, {"from": "gpt", "value": SAID["content"]}]},
        {"conversations": json.dumps([ASKED, SAID])},
        {"messages": [{"role": "User", "content": ASKED["content"]}, {"role": "bot", "content": SAID["content"]}]},
        {"conversations": [{"from": "Human", "value": ASKED["content"]}, {"from": "model", "value": SAID["content"]}]},
        {"messages": [{"role": "human", "value": ASKED["content"]}, {"role": "gpt", "content": SAID["content"]}]},
        {"messages": [{"role": "user", "content": [{"type": "text", "text": ASKED["content"]}]}, SAID]},
        {"instruction": ASKED["content"], "output": SAID["content"]},
        {"prompt": [ASKED], "completion": [SAID]},
        {"prompt": ASKED["content"], "completion": [SAID]},
    ],
)
def test_every_spelling_of_a_conversation_is_one(tmp_path, qwen, turns):
    record = {"id": "identity_0", "source": "a subset", **turns}
    text, learned, lines = read(tmp_path / "a.jsonl", [record], qwen)
    assert text == qwen.apply_chat_template([ASKED, SAID], tokenize=False).rstrip()
    assert learned == "It is 21 degrees.<|im_end|>"
    assert "; not read: id, source" in summary(lines)


def test_a_role_that_the_template_names_is_known(tmp_path, qwen):
    turns = [{"role": "moon", "content": "It shines."}, ASKED, SAID]
    qwen.chat_template = f"{{% set moon = 'moon' %}}{PLAIN}"
    text, _, _ = read(tmp_path / "a.jsonl", [{"messages": turns}], qwen)
    assert text.startswith("<|im_start|>moon\nIt shines.<|im_end|>")
    qwen.chat_template = PLAIN
    good = {"messages": [ASKED, SAID]}
    path = write(tmp_path / "a.jsonl", [good, good, {"messages": turns}])
    assert f'{path}:3: a message has the role "moon"; expected one of system' in error(path, qwen)


def test_a_system_prompt_and_earlier_turns_are_messages(tmp_path, qwen):
    record = {"system": "Be terse.", "instruction": "Again", "input": "two", "output": 6, "history": [["One?", "1"]]}
    expected = [
        {"role": "system", "content": "Be terse."}, {"role": "user", "content": "One?"},
        {"role": "assistant", "content": "1"}, {"role": "user", "content": "Again\n\ntwo"},
        {"role": "assistant", "content": "6"},
    ]  # fmt: skip
    text, learned, lines = read(tmp_path / "a.jsonl", [record], qwen)
    assert text == qwen.apply_chat_template(expected, tokenize=False).rstrip()
    assert learned == "1<|im_end|>|6<|im_end|>"
    assert summary(lines) == "1 instructions (instruction, output, input, system, history)"
    text, _, _ = read(tmp_path / "a.jsonl", [{"system": "Be terse.", "conversations": [ASKED, SAID]}], qwen)
    assert text.startswith("<|im_start|>system\nBe terse.<|im_end|>\n<|im_start|>user")


def test_without_a_template_they_are_part_of_the_prompt(tmp_path, tokenizer):
    record = {"system": "Be terse.", "instruction": "Again", "input": "two", "output": 6, "history": [["One?", "1"]]}
    text, learned, _ = read(tmp_path / "a.jsonl", [record], tokenizer)
    assert text == (
        "Be terse.\n\n### Instruction:\nOne?\n\n### Response:\n1\n\n"
        "### Instruction:\nAgain\n\n### Input:\ntwo\n\n### Response:\n6<s>"
    )
    assert learned == "1|6<s>"
    text, learned, _ = read(tmp_path / "a.jsonl", [{"prompt": "2 + 4 =", "completion": 6}], tokenizer)
    assert (text, learned) == ("2 + 4 =6<s>", "6<s>")
    write(tmp_path / "a.jsonl", [{"messages": [ASKED, SAID]}])
    assert "a.jsonl:1: messages need a model with a chat template" in error(tmp_path / "a.jsonl", tokenizer)


@pytest.mark.parametrize("tools", [TOOLS, json.dumps(TOOLS), [json.dumps(TOOLS[0])]])
@pytest.mark.parametrize("arguments", [{"city": "Oslo"}, '{"city": "Oslo"}'])
@pytest.mark.parametrize("content", ["", None])
def test_tools_are_what_the_template_makes_of_them(tmp_path, qwen, tools, arguments, content):
    call = {"type": "function", "function": {"name": "weather", "arguments": arguments}}
    asks = {"role": "assistant", "content": content, "tool_calls": [call]}
    text, learned, lines = read(tmp_path / "a.jsonl", [{"tools": tools, "messages": [ASKED, asks, TOLD, SAID]}], qwen)
    assert text == qwen.apply_chat_template(USED, tools=TOOLS, tokenize=False).rstrip()
    assert '"name": "weather"' in text.partition("</tools>")[0]
    assert learned == f"{CALLED[1:]}<|im_end|>|It is 21 degrees.<|im_end|>"
    assert summary(lines) == "1 conversations (messages, tools)"


def test_calls_by_speakers_are_calls(tmp_path, qwen):
    spoken = [
        {"from": "human", "value": ASKED["content"]},
        {"from": "function_call", "value": json.dumps(CALL["function"])},
        {"from": "observation", "value": TOLD["content"]},
        {"from": "gpt", "value": SAID["content"]},
    ]
    text, _, _ = read(tmp_path / "a.jsonl", [{"tools": json.dumps(TOOLS), "conversations": spoken}], qwen)
    assert text == qwen.apply_chat_template(USED, tools=TOOLS, tokenize=False).rstrip()


def test_the_one_call_of_a_turn_is_a_call(tmp_path, qwen):
    old = {"role": "assistant", "content": None, "function_call": {"name": "weather", "arguments": '{"city": "Oslo"}'}}
    text, learned, _ = read(tmp_path / "a.jsonl", [{"tools": TOOLS, "messages": [ASKED, old, TOLD, SAID]}], qwen)
    assert text == qwen.apply_chat_template(USED, tools=TOOLS, tokenize=False).rstrip()
    assert learned == f"{CALLED[1:]}<|im_end|>|It is 21 degrees.<|im_end|>"


def test_a_template_that_shows_no_tools_is_told(tmp_path, qwen):
    qwen.chat_template = PLAIN
    _, learned, lines = read(tmp_path / "a.jsonl", [{"tools": TOOLS, "messages": USED}], qwen)
    assert learned == "It is 21 degrees.<|im_end|>"  # no empty answer where the call was
    assert "; 1 conversations with tools that the model's chat template does not show" in summary(lines)
    assert "; 1 tool calls that the model's chat template does not show" in summary(lines)


@pytest.mark.parametrize("template", [QWEN, PLAIN])
@pytest.mark.parametrize("system", [[], [{"role": "system", "content": "Be terse."}]])
def test_a_conversation_that_the_assistant_begins(tmp_path, qwen, template, system):
    qwen.chat_template = template
    said = [("assistant", "~ I start."), ("user", "ok"), ("assistant", "good")]
    turns = [*system, *({"role": role, "content": content} for role, content in said)]
    text, learned, _ = read(tmp_path / "a.jsonl", [{"messages": turns}], qwen)
    assert text == qwen.apply_chat_template(turns, tokenize=False).rstrip()
    assert learned == "~ I start.<|im_end|>|good<|im_end|>"


def test_a_turn_of_no_weight_and_an_empty_one_carry_no_loss(tmp_path, qwen):
    turns = [ASKED, {**SAID, "weight": 0}, ASKED, {**SAID, "content": "Yes.", "weight": 1}]
    text, learned, _ = read(tmp_path / "a.jsonl", [{"messages": turns}], qwen)
    assert "It is 21 degrees." in text and "weight" not in text
    assert learned == "Yes.<|im_end|>"
    turns = [ASKED, {**SAID, "content": ""}, ASKED, {**SAID, "content": None}, ASKED, SAID]
    _, learned, lines = read(tmp_path / "a.jsonl", [{"messages": turns}], qwen)
    assert learned == "It is 21 degrees.<|im_end|>"
    assert "; 2 empty answers, which carry no loss" in summary(lines)
    write(tmp_path / "a.jsonl", [{"messages": [ASKED, {**SAID, "weight": 0.5}]}])
    assert "a.jsonl:1: a message has the weight 0.5; expected 0 (no loss) or 1" in error(tmp_path / "a.jsonl", qwen)


def test_what_is_left_out_is_counted(tmp_path, qwen):
    good = {"instruction": "Which?", "output": "This one.", "url": "somewhere"}
    bad = [{**good, "output": None}, {**good, "output": ""}, {"text": None, "url": "x"}, {"messages": [ASKED]}]
    _, learned, lines = read(tmp_path / "a.jsonl", [good, *bad], qwen)
    assert learned == "This one.<|im_end|>"
    line = summary(lines)
    assert line.startswith("1 instructions (instruction, output); not read: url; 4 skipped: 1 because ")
    for reason in ("output is null", "output is empty"):
        assert reason in line or "for other reasons" in line


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ({"text": None, "url": "x"}, "text is null, and none of the 9 records can be used; the fields of this record"),
        ({"instruction": "i", "output": None}, "output is null, and none of the 9"),
        ({"messages": [ASKED, {**SAID, "content": ""}]}, "this conversation has no assistant turn to learn from, and"),
        ({"url": "x"}, "expected messages (or conversations or conversation), or prompt and completion, or instru"),
        ({"story": "x", "n": 1}, "data.columns names other fields, for example {text: story}"),
        ({"question": "x", "answer": "y"}, "for example {instruction: question, output: answer}"),
        ({"text": ["x"]}, 'text is ["x"]; expected text'),
        ({"conversation": "x"}, 'conversation is "x"; expected a list'),
        ({"messages": [{"from": "moon", "value": "x"}]}, 'a message has the role "moon"; expected one of system, '),
        ({"messages": [{"role": "moon", "content": "x"}]}, 'a message has the role "moon"; expected one of system, '),
        ({"messages": [{"role": "user", "content": [{"type": "image"}]}]}, 'a part that is no text ("image")'),
        ({"instruction": "i", "output": "o", "history": ["x"]}, 'history has "x"; expected pairs of a question'),
        (
            {"prompt": "x", "chosen": [SAID], "rejected": [SAID]},
            "prompt, chosen and rejected make a preference record, and there is no objective for preferences; to learn "
            "the chosen answers alone set data.columns to {completion: chosen}",
        ),
        ({"chosen": [ASKED, SAID], "rejected": [ASKED]}, "set data.columns to {messages: chosen}"),
        ({"prompt": "x", "completion": "y", "label": False}, "prompt, completion and label make a preference record"),
    ],
)
def test_an_error_of_all_records_names_the_first(tmp_path, qwen, record, message):
    path = write(tmp_path / "a.jsonl", [record] * 9)
    text = error(path, qwen)
    assert text.startswith(f"{path}:1: ") and message in text


def test_columns_name_fields(tmp_path, qwen):
    chosen = {"prompt": "x", "chosen": [SAID], "rejected": [SAID]}
    _, learned, lines = read(tmp_path / "a.jsonl", [chosen], qwen, columns={"completion": "chosen"})
    assert learned == "It is 21 degrees.<|im_end|>"
    assert summary(lines) == "1 completions (prompt, chosen); not read: rejected"
    asked = {"q": "Is it?", "a": "It is.", "text": "no"}
    names = {"instruction": "q", "output": "a", "system": "persona"}
    text, learned, lines = read(tmp_path / "a.jsonl", [asked], qwen, columns=names)
    assert "user\nIs it?<" in text and learned == "It is.<|im_end|>"
    assert summary(lines).endswith("; no record has persona (data.columns.system)")
    for spec in ({"columns": {"text": "a"}}, {"field": "a"}):
        assert read(tmp_path / "a.jsonl", [asked], qwen, **spec)[0] == "It is.<|im_end|>"
    assert "expected b, which data.columns names" in error(tmp_path / "a.jsonl", qwen, columns={"text": "b"})


RECORDS = [{"text": f"The fox number {n} saw a tree, and {n} birds."} for n in range(40)]


def files(folder: Path) -> dict[str, Path]:
    """The same records in every kind of file."""
    text = "".join(json.dumps(record) + "\n" for record in RECORDS)
    found = {name: folder / f"a.{name}" for name in ("jsonl.gz", "jsonl.bz2", "json", "csv", "tsv", "csv.gz", "JSONL")}
    found["jsonl.gz"].write_bytes(gzip.compress(text[:500].encode()) + gzip.compress(text[500:].encode()))
    found["jsonl.bz2"].write_bytes(bz2.compress(text.encode()))
    found["JSONL"].write_text("\ufeff\r\n" + text.replace("\n", "\r\n\n"))
    found["json"].write_text(json.dumps({"version": "1", "data": RECORDS}, indent=1))
    for name, delimiter in (("csv", ","), ("tsv", "\t")):
        with found[name].open("w", newline="") as file:
            rows = csv.DictWriter(file, ["n", "text"], delimiter=delimiter)
            rows.writeheader()
            rows.writerows([{"n": n, **record} for n, record in enumerate(RECORDS)])
    found["csv.gz"].write_bytes(gzip.compress(found["csv"].read_bytes()))
    return found


def test_every_kind_of_file_gives_the_same_rows(tmp_path, tokenizer):
    expected = load(write(tmp_path / "b.jsonl", RECORDS), tokenizer, length=64).train.input_ids
    for name, path in files(tmp_path).items():
        assert torch.equal(load(path, tokenizer, length=64).train.input_ids, expected), name
    shards = tmp_path / "shards"
    (shards / ".hidden").mkdir(parents=True)
    write(shards / "b-2.jsonl", RECORDS[25:])
    (shards / "b-1.jsonl.gz").write_bytes(gzip.compress(write(tmp_path / "c", RECORDS[:25]).read_bytes()))
    lines: list[str] = []
    assert torch.equal(load(shards, tokenizer, length=64, lines=lines).train.input_ids, expected)
    assert lines[1] == f"data: {shards}: 2 files, b-1.jsonl.gz to b-2.jsonl; 40 texts (text)"
    (shards / "notes.md").write_text("x")
    assert "mixes several kinds of files (2 .jsonl, 1 .md); name a file in it" in error(shards, tokenizer)


def test_what_a_data_set_says_about_itself_is_no_data(tmp_path, tokenizer):
    expected = load(write(tmp_path / "b.jsonl", RECORDS), tokenizer, length=64).train.input_ids
    hub = tmp_path / "hub"
    (hub / "data").mkdir(parents=True)
    for name in ("README.md", "LICENSE", "LICENSE-MIT.txt", "dataset_infos.json"):
        (hub / name).write_text("A card of a data set. " * 99)
    # The records lie in a folder: the card is not trained on in their place.
    assert "can be read: name one of its folders (data), or give a file of .txt" in error(hub, tokenizer)
    write(hub / "a.jsonl", RECORDS)
    lines: list[str] = []
    assert torch.equal(load(hub, tokenizer, length=64, lines=lines).train.input_ids, expected)
    assert "files not read: LICENSE, LICENSE-MIT.txt, README.md, dataset_infos.json; 40 texts" in lines[1]
    texts = tmp_path / "texts"
    texts.mkdir()
    for name in ("train.txt", "LICENSE.txt", "README", "CITATION.txt"):
        (texts / name).write_text(f"The page {name}. " * 99)
    lines.clear()
    text = tokenizer.decode(load(texts, tokenizer, length=64, lines=lines).train.input_ids.flatten())
    assert "train" in text and "LICENSE" not in text and "CITATION" not in text
    assert "1 file, train.txt; files not read: CITATION.txt, LICENSE.txt, README; " in lines[1]


@pytest.mark.parametrize(("name", "said"), [("a.csv", "\ttabs"), ("a.csv", ";semicolons"), ("a.tsv", ",commas")])
def test_cells_may_be_separated_otherwise_than_the_name_says(tmp_path, tokenizer, name, said):
    expected = load(write(tmp_path / "b.jsonl", RECORDS), tokenizer, length=64).train.input_ids
    with (tmp_path / name).open("w", newline="") as file:
        rows = csv.writer(file, delimiter=said[0])
        rows.writerows([("n", "text"), *((n, record["text"]) for n, record in enumerate(RECORDS))])
    lines: list[str] = []
    assert torch.equal(load(tmp_path / name, tokenizer, length=64, lines=lines).train.input_ids, expected)
    assert sum(f"{name}: cells separated by {said[1:]}, not " in line for line in lines) == 1
    # One column of prose is one, whatever stands in it.
    (tmp_path / name).write_text("text\n" + "\n".join(f'"{n}; {n}, {n}\t{n}"' for n in range(40)))
    lines.clear()
    load(tmp_path / name, tokenizer, lines=lines)
    assert not any("cells separated by" in line for line in lines)


def test_of_shards_of_several_splits_one_is_read(tmp_path, tokenizer):
    for name, said in {"train-0-of-2": "fox", "train-1-of-2": "fox", "test-0-of-1": "owl", "validation": "elk"}.items():
        write(tmp_path / f"{name}.jsonl", [{"text": f"The {said} number {n} saw {name}."} for n in range(9)])
    lines: list[str] = []
    text = tokenizer.decode(load(tmp_path, tokenizer, lines=lines).train.input_ids.flatten())
    assert text.count("fox") == 18 and "owl" not in text and "elk" not in text
    assert "2 files, train-0-of-2.jsonl to train-1-of-2.jsonl; files not read: test-0-of-1.jsonl, valid" in lines[1]
    text = tokenizer.decode(load(tmp_path, tokenizer, split="test").train.input_ids.flatten())
    assert text.count("owl") == 9 and "fox" not in text
    wanted = "has no file of a split dev; set data.split to one of test, train, validation"
    assert wanted in error(tmp_path, tokenizer, split="dev")
    # Among names that tell of none, the words are parts of titles.
    write(tmp_path / "more.jsonl", [{"text": "A cat."}])
    lines.clear()
    load(tmp_path, tokenizer, lines=lines)
    assert "5 files, more.jsonl to validation.jsonl; 37 texts (text)" in lines[1]


def test_numbers_that_are_none_are_null_and_half_a_character_is_skipped(tmp_path, tokenizer):
    good = {"instruction": "Which?", "input": float("nan"), "output": "This one."}
    bad = [{**good, "output": float("nan")}, {**good, "output": "Half \ud83d of it."}]
    text, _, lines = read(tmp_path / "a.jsonl", [good, *bad], tokenizer)
    assert "nan" not in text and "### Input" not in text
    assert "2 skipped: " in summary(lines) and "1 because output is null" in summary(lines)
    assert "1 because its text has half of a surrogate pair, which is no character" in summary(lines)


def test_rows_of_tables_and_saved_data_sets(tmp_path, qwen):
    datasets = pytest.importorskip("datasets")
    # The columns of a table fill in what other rows have: null keys of messages, tools and arguments.
    other = [ASKED, {**SAID, "tool_calls": [{"type": "x", "function": {"name": "f", "arguments": {"n": 1}}}]}]
    rows = [{"messages": USED, "tools": TOOLS}, {"messages": other, "tools": []}] * 3
    saved = datasets.Dataset.from_list(rows)
    saved.save_to_disk(str(tmp_path / "saved"))
    datasets.DatasetDict({"train": saved, "test": saved.select([0])}).save_to_disk(str(tmp_path / "splits"))
    saved.to_parquet(str(tmp_path / "a.parquet"))
    expected = load(write(tmp_path / "a.jsonl", rows), qwen, length=64).train.input_ids
    assert CALLED in qwen.decode(expected.flatten())
    for name in ("saved", "splits", "a.parquet"):
        assert torch.equal(load(tmp_path / name, qwen, length=64).train.input_ids, expected), name
    text = qwen.decode(load(tmp_path / "splits", qwen, split="test").train.input_ids.flatten())
    assert text == qwen.apply_chat_template(USED, tools=TOOLS, tokenize=False).rstrip()
    assert "has no split dev; set data.split to one of train, test" in error(tmp_path / "splits", qwen, split="dev")


def test_one_printed_object_is_one_record(tmp_path, qwen):
    for name in ("a.json", "a.jsonl"):
        (tmp_path / name).write_text(json.dumps({"messages": [ASKED, SAID]}, indent=2))
        ids = load(tmp_path / name, qwen).train.input_ids.flatten()
        assert qwen.decode(ids) == qwen.apply_chat_template([ASKED, SAID], tokenize=False).rstrip()
    told = "a.{}:1: the fields of this record are train, test; expected .*; if the records are in train or test, write"
    for name in ("json", "jsonl"):
        (tmp_path / f"a.{name}").write_text(json.dumps({"train": RECORDS, "test": RECORDS}))
        assert re.search(told.format(name), error(tmp_path / f"a.{name}", qwen))


@pytest.mark.parametrize("name", ["a.json", "a.jsonl"])
def test_one_object_on_one_line_may_hold_the_records(tmp_path, qwen, name):
    expected = load(write(tmp_path / "b.jsonl", RECORDS), qwen, length=64).train.input_ids
    lines: list[str] = []
    (tmp_path / name).write_text(json.dumps({"version": "1", "data": RECORDS}) + "\n")
    assert torch.equal(load(tmp_path / name, qwen, length=64, lines=lines).train.input_ids, expected)
    assert sum(f"{name}: records under the key data; 40 texts (text)" in line for line in lines) == 1
    (tmp_path / name).write_text(json.dumps({"turns": [ASKED, SAID]}) + "\n")
    assert "the fields of this record are turns; expected" in error(tmp_path / name, qwen)
    assert "for example {messages: turns}" in error(tmp_path / name, qwen)
    (tmp_path / name).write_text(json.dumps({"data": ["A fox.", "A cat."]}) + "\n")
    assert "if the records are in data, write that list to a file of its own" in error(tmp_path / name, qwen)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.csv", b"text,n\nx,1\ny\n", "a.csv:3: 1 cell under a header of 2; mend that row"),
        ("a.csv", b"text,text\nx,1\n", "a.csv:1: two columns have one name (text, text)"),
        ("a.csv", b'text\n"x" y\n', "a.csv:2: not a readable table ("),
        ("a.csv", b"text\ncaf\xe9\n", "a.csv: not UTF-8 text (byte 0xe9 at"),
        ("a.csv", b"question;answer\nx;y\n", "a.csv:2: the fields of this record are question, answer; expected"),
        ("a.csv", b"a;b\tc\nx;y\tz\n", "a.csv:2: the fields of this record are a;b\tc; expected"),
        ("a.csv", b"text\n", "a.csv: the file is empty"),
        ("a.jsonl.gz", b"nonsense", "a.jsonl.gz: is damaged or cut off ("),
        ("a.jsonl.gz", gzip.compress(b'{"text": "x"}\n' * 99, mtime=0)[:-9], "a.jsonl.gz: is damaged or cut off ("),
        ("a.jsonl", b'{"text": "x"}\n{"text": "caf\xe9"}\n', "a.jsonl:2: not UTF-8 text (byte 0xe9 at 13)"),
        ("saved/state.json", b"{}", "saved: not a readable folder of save_to_disk ("),
        ("dumps/a.bin", b"{}", "dumps: no file in this folder can be read: give a file of .txt"),
    ],
)
def test_a_file_that_cannot_be_used_says_where_and_why(tmp_path, tokenizer, name, content, message):
    path = tmp_path / name
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(content)
    assert message in error(path if path.parent == tmp_path else path.parent, tokenizer)


def tales(rows, tokenizer) -> set[str]:
    return set(re.findall(r"The fox number \d+ saw", tokenizer.decode(rows.input_ids.flatten())))


def test_no_repeated_record_is_on_both_sides(tmp_path, tokenizer):
    path, lines = write(tmp_path / "a.jsonl", RECORDS * 3), []
    data = load(path, tokenizer, length=64, held_out=8, lines=lines)
    assert len(tales(data.held_out, tokenizer)) > 5
    assert not tales(data.held_out, tokenizer) & tales(data.train, tokenizer)
    assert re.search(r"; \d+ left out of training because they equal held-out ones", summary(lines))
    # What another stage holds out is as far away, and a mixture compares its sources.
    held = {"source": str(path), "held_out": 16}
    stages = [
        Stage.model_validate({"objective": "sft", "batch_tokens": 64, "length": 64, "data": data})
        for data in ({**held, "held_out": 2}, held)
    ]
    reserved = reserved_tokens(stages)
    first, second = (load(path, tokenizer, length=64, held_out=n, reserved=reserved) for n in (2, 16))
    assert not tales(second.held_out, tokenizer) & tales(first.train, tokenizer)
    assert torch.equal(second.held_out.input_ids[:2], first.held_out.input_ids)
    mix = [{"source": str(path)}, {"source": str(write(tmp_path / "b.jsonl", RECORDS[::-1]))}]
    spec = DataSpec.model_validate({"mix": mix, "tokens": 1280, "held_out": 8})
    both = load_data(spec, tokenizer=tokenizer, length=64, seed=0, teacher=None)
    assert not tales(both.held_out, tokenizer) & tales(both.train, tokenizer)


def test_a_file_of_one_record_again_and_again_is_too_small(tmp_path, tokenizer):
    path = write(tmp_path / "a.jsonl", RECORDS[:1] * 50)
    assert "documents that equal held-out ones are too few for 2 held-out rows" in error(
        path, tokenizer, length=32, held_out=2
    )


def test_a_preview_is_of_the_rows_that_are_trained_on(tmp_path, qwen):
    path = write(tmp_path / "a.jsonl", RECORDS * 2)
    mix = [{"source": str(path)}, {"source": "recall", "sample_length": 128}, {"source": "self"}]
    spec = DataSpec.model_validate({"mix": mix, "tokens": 128 * 30, "held_out": 6})
    lines: list[str] = []
    options = {"tokenizer": qwen, "length": 128, "seed": 0}
    shown = preview_data(spec, rows=3, progress=lines.append, **options)
    assert [len(rows) for _, rows in shown] == [3, 3]
    assert any("self is written by the teacher when the stage begins" in line for line in lines)
    spec = DataSpec.model_validate({**mix[0], "tokens": 128 * 10, "held_out": 2})
    whole = load_data(spec, teacher=None, **options)
    assert torch.equal(shown[0][1].labels, whole.train.labels[:3])
