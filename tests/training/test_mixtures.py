"""Mixtures of sources, text that asks to remember, text by the student, and rows that a run keeps."""

from __future__ import annotations

import itertools
import json
import re
from types import SimpleNamespace

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from linearize.conversion.swap import convert_model
from linearize.data import load as data_module
from linearize.data.load import load_data, reserved_tokens
from linearize.data.rows import read_data, save_data
from linearize.errors import DataError
from linearize.evaluation.tasks.recall import words
from linearize.recipe import DataSpec, MixerSpec, Stage
from tests.conftest import random_llama


@pytest.fixture(autouse=True)
def _cache(tmp_path, monkeypatch):
    monkeypatch.setenv("LINEARIZE_CACHE", str(tmp_path / "cache"))


@pytest.fixture(scope="module")
def tokenizer(tiny_folder):
    return AutoTokenizer.from_pretrained(tiny_folder)


def load(tokenizer, length=64, seed=0, draw=0, **spec):
    data = DataSpec.model_validate(spec)
    return load_data(data, tokenizer=tokenizer, length=length, seed=seed, teacher=None, draw=draw)


def texts(folder, tokenizer):
    """Two files, each with a word that the other has not."""
    sources = []
    for word in ("cat", "dog"):
        path = folder / f"{word}.jsonl"
        path.write_text("\n".join(json.dumps({"text": f"The {word} has number {n}. " * 6}) for n in range(60)))
        sources.append({"source": str(path)})
    return sources


def told(rows, tokenizer):
    return [tokenizer.decode(row) for row in rows.input_ids]


def test_each_source_gives_its_share_of_rows(tmp_path, tokenizer):
    cat, dog = texts(tmp_path, tokenizer)
    data = load(tokenizer, mix=[{**cat, "weight": 3.0}, {**dog, "weight": 1.0}], tokens=12 * 64, held_out=4)
    trained, held = told(data.train, tokenizer), told(data.held_out, tokenizer)
    assert [sum("cat" in row for row in side) for side in (trained, held)] == [9, 3]
    assert [sum("dog" in row for row in side) for side in (trained, held)] == [3, 1]
    assert data.source == f"75% {cat['source']} + 25% {dog['source']}"
    alone = load(tokenizer, **cat, tokens=9 * 64, held_out=3)
    assert torch.equal(data.train.input_ids[:9], alone.train.input_ids)
    assert torch.equal(data.held_out.labels[:3], alone.held_out.labels)


def test_no_stage_trains_on_what_another_holds_out(tmp_path, tokenizer):
    cat, dog = texts(tmp_path, tokenizer)
    stages = [
        Stage.model_validate({"objective": "sft", "batch_tokens": 64, **stage})
        for stage in (
            {"data": {**cat, "held_out": 0}, "length": 32},
            {"data": {"mix": [cat, dog], "tokens": 640, "held_out": 4}, "length": 64},
            {"data": {"source": "self"}, "length": 64},
        )
    ]
    reserved = reserved_tokens(stages)
    assert sorted(reserved.values()) == [128, 128]

    def numbers(rows):
        return {n for row in told(rows, tokenizer) for n in re.findall(r"cat has number (\d+)", row)}

    def read(stage, reserved):
        return load_data(stage.data, tokenizer=tokenizer, length=stage.length, seed=0, teacher=None, reserved=reserved)

    held = numbers(read(stages[1], reserved).held_out)
    assert held and not held & numbers(read(stages[0], reserved).train)
    assert held & numbers(read(stages[0], {}).train)  # what would have happened
    first, second = (load(tokenizer, source="recall", tokens=640, draw=draw).train for draw in (0, 1))
    assert not torch.equal(first.input_ids, second.input_ids)


def test_a_text_file_is_held_out_alike_at_every_length(tmp_path, tokenizer, monkeypatch):
    path = tmp_path / "cats.txt"
    path.write_text("\n\n".join(f"The cat has number {n}. They ran home." for n in range(900)))
    monkeypatch.chdir(tmp_path)
    names = ("cats.txt", str(path))  # of one file
    stages = [
        Stage.model_validate(
            {"objective": "sft", "batch_tokens": length, "length": length, "data": {"source": name, "held_out": 3}}
        )
        for name, length in zip(names, (32, 128), strict=True)
    ]
    reserved, found = reserved_tokens(stages), []
    for stage in stages:
        data = load_data(stage.data, tokenizer=tokenizer, length=stage.length, seed=0, teacher=None, reserved=reserved)
        sides = (told(data.train, tokenizer), told(data.held_out, tokenizer))
        found.append([{n for row in side for n in re.findall(r"cat has number (\d+)\.", row)} for side in sides])
    for trained, _ in found:
        assert trained and not any(trained & held for _, held in found)


def test_a_weight_too_small_for_a_row_is_told(tmp_path, tokenizer):
    cat, dog = texts(tmp_path, tokenizer)
    with pytest.raises(DataError, match=r"data.mix.1: .*dog.jsonl has too small a weight for a single one of 2 rows"):
        load(tokenizer, mix=[cat, {**dog, "weight": 0.1}], tokens=128)


def test_recall_text_asks_for_what_it_told(tokenizer):
    data = load(tokenizer, length=256, source="recall", tokens=12 * 256, held_out=2)
    assert (len(data.train), len(data.held_out)) == (12, 2)
    kinds = set()
    for ids, labels, positions in zip(data.train.input_ids, data.train.labels, data.train.position_ids, strict=True):
        assert positions.tolist() == list(range(256))  # one document a row, so nothing asked for was cut off
        answered = labels != -100
        text = tokenizer.decode(ids)
        answers = [int(n) for n in re.findall(r"\d+", tokenizer.decode(labels[answered]))]
        asked = re.findall(r"Which (.*?) does (\w+) have\? (\d+)", text)
        if asked:
            facts = {(thing, name): value for name, thing, value in re.findall(r"(\w+) has the (.*?) (\d+)\.", text)}
            assert all(facts[thing, name] == value for thing, name, value in asked)
            values = [value for _, _, value in asked]
        else:
            told_, _, again = text.partition("Once more:")
            pairs = dict(re.findall(r"(\w+) has (\d+)", told_))
            found = re.findall(r"(\w+) has (\d+)", again)
            assert len(found) >= 2 and all(pairs[name] == value for name, value in found)
            values = [value for _, value in found]
        kinds.add(bool(asked))
        assert "".join(values) == "".join(map(str, answers))
        assert 0 < int(answered.sum()) < 128
    assert kinds == {True, False}
    again = load(tokenizer, length=256, source="recall", tokens=12 * 256, held_out=2)
    other = load(tokenizer, length=256, source="recall", tokens=12 * 256, held_out=2, seed=1)
    assert torch.equal(data.train.input_ids, again.train.input_ids)
    assert not torch.equal(data.train.input_ids, other.train.input_ids)
    with pytest.raises(DataError, match="63 tokens hold no question"):
        load(tokenizer, length=63, source="recall")


@pytest.mark.parametrize(
    ("of_bytes", "length"), [(True, 96), (True, 256), (True, 400), (False, 64), (False, 96), (False, 256), (False, 400)]
)
def test_every_fact_is_told_in_full_and_asked_for_once(tokenizer, tmp_path, length, of_bytes):
    if of_bytes:
        tokenizer = AutoTokenizer.from_pretrained(random_llama(tmp_path))
    rows = load(tokenizer, length=length, source="recall", tokens=200 * length, held_out=0).train
    assert rows.input_ids.shape == (200, length) and bool((rows.position_ids == torch.arange(length)).all())
    for text in told(rows, tokenizer):
        facts = re.findall(r"(\w+) has the (.*?) (\d+)\.", text)
        asked = re.findall(r"Which (.*?) does (\w+) have\? (\d+)", text)
        assert sorted(facts) == sorted((name, thing, value) for thing, name, value in asked)
        assert asked or "Once more:" in text


def test_a_length_that_holds_no_question_is_refused(tokenizer, monkeypatch, tmp_path):
    with pytest.raises(DataError, match="64 tokens of this tokenizer hold no question; try 128"):
        load(AutoTokenizer.from_pretrained(random_llama(tmp_path)), length=64, source="recall", tokens=64)
    monkeypatch.setattr(data_module, "SHORTEST", 8)
    with pytest.raises(DataError, match="8 tokens of this tokenizer hold no question; try 16"):
        load(tokenizer, length=8, source="recall", tokens=8)


def test_nothing_of_the_evaluation_is_trained_on(tokenizer):
    data = load(tokenizer, length=512, source="recall", tokens=20 * 512, held_out=0)
    spoken = set(re.findall(r"[a-z]+", " ".join(told(data.train, tokenizer)).lower()))
    keys = set(words.ADJECTIVES) | set(words.NOUNS)
    named = {m.lower() for row in told(data.train, tokenizer) for m in re.findall(r"(\w+) has", row)}
    assert named and not named & keys
    assert not {"magic", "pass", "grass", "memorize", "key"} & spoken


def test_text_by_the_student_is_the_students(tiny_folder, tokenizer):
    torch.manual_seed(0)
    student = convert_model(AutoModelForCausalLM.from_pretrained(tiny_folder), MixerSpec(window=8)).eval()
    spec = DataSpec(source="student", tokens=320, held_out=1)

    def written(model):
        return load_data(spec, tokenizer=tokenizer, length=32, seed=0, teacher=None, student=lambda: model)

    data, again = written(student), written(student)
    assert data.source == "text written by the student" and len(data.train) == 10
    assert torch.equal(data.train.input_ids, again.train.input_ids)
    with torch.no_grad():
        for layer in student.attention_layers:
            layer.q_proj.weight.mul_(-1)
    assert not torch.equal(written(student).train.input_ids, data.train.input_ids)
    with pytest.raises(DataError, match="no model here that could write it"):
        load_data(spec, tokenizer=tokenizer, length=32, seed=0, teacher=None)


def test_text_of_another_purpose_shares_nothing_with_that_of_stages(tiny_folder, tokenizer, monkeypatch):
    teacher, seeds = AutoModelForCausalLM.from_pretrained(tiny_folder), []
    write = data_module.self_written_documents

    def writes(*arguments, seed, **options):
        seeds.append(seed)
        return write(*arguments, seed=seed, **options)

    monkeypatch.setattr(data_module, "self_written_documents", writes)

    def runs_of(seed, length, tokens=2400, **options):
        """All runs of 24 tokens."""
        spec = DataSpec(source="self", tokens=tokens, held_out=2)
        options = {"tokenizer": tokenizer, "length": length, "seed": seed, "teacher": lambda: teacher, **options}
        data = load_data(spec, **options)
        rows = [*data.train.input_ids.tolist(), *data.held_out.input_ids.tolist()]
        return {tuple(row[at : at + 24]) for row in rows for at in range(len(row) - 24)}

    stage, next_stage = runs_of(3, 32), runs_of(3, 32, draw=1)
    assert seeds == [3, 4]  # the text of stages is what it was
    fitted, chosen = (runs_of(3, 64, tokens=3600, purpose=purpose) for purpose in ("calibrate", "select"))
    assert len({*seeds}) == 4 and max(seeds) < 2**32
    assert stage & runs_of(3, 64, tokens=3600)  # texts from one seed begin alike
    for one, other in itertools.combinations((stage, next_stage, fitted, chosen), 2):
        assert not one & other
    assert fitted == runs_of(3, 64, tokens=3600, purpose="calibrate")
    assert not fitted & runs_of(4, 64, tokens=3600, purpose="calibrate")


def test_rows_come_back_from_their_file(tmp_path, tokenizer):
    cat, _ = texts(tmp_path, tokenizer)
    for held in (2, 0):
        data = load(tokenizer, **cat, held_out=held)
        save_data(data, tmp_path / "rows.safetensors")
        found = read_data(tmp_path / "rows.safetensors")
        for side in ("train", "held_out"):
            for name in ("input_ids", "labels", "position_ids"):
                one, other = (getattr(getattr(d, side), name) for d in (data, found))
                assert torch.equal(one, other) and one.dtype == other.dtype
        assert (found.source, found.documents, found.seconds) == (data.source, data.documents, data.seconds)
    assert {p.suffix for p in tmp_path.iterdir()} == {".jsonl", ".safetensors"}


def test_a_mixture_with_a_hub_data_set_streams_it(tokenizer, monkeypatch):
    read = []

    def stream(seed, buffer_size):
        for n in range(10_000):
            read.append(n)
            yield {"text": f"Story {n} of a fox that went home. " * 4}

    import sys

    hub = SimpleNamespace(load_dataset=lambda *_, **o: SimpleNamespace(shuffle=stream) if o["streaming"] else None)
    monkeypatch.setitem(sys.modules, "datasets", hub)
    mix = [{"source": "someone/stories"}, {"source": "recall"}]
    data = load(tokenizer, mix=mix, tokens=8 * 64, held_out=0)
    assert sum("fox" in row for row in told(data.train, tokenizer)) == 4
    assert 0 < len(read) < 40  # no more than was wanted
