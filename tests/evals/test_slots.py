"""The table of slots beside presses: texts are cut before their question, a run goes on where it was, a missing cell is
told, and the worker without a press is the teacher."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
from transformers import AutoTokenizer

import evals.slots.__main__ as slots
from evals.slots import texts as texts_module
from evals.slots.presses import Presses
from evals.slots.systems import ABLATIONS, TEACHER, Ours, System, ablations_of, ask, load, score, systems_of
from evals.slots.telling import average, plots, table
from evals.slots.texts import TAIL, texts_of
from tests.conftest import random_llama
from tests.made import LANDMARKS, LANDMARKS_EXACT

ROOT = Path(__file__).resolve().parents[2]
ARGUMENTS = ["--recipe", LANDMARKS, "--set", "mixer.window=16", "--set", "mixer.landmarks_by=null"]


@pytest.fixture(scope="module")
def tokenizer(tiny_folder):
    return AutoTokenizer.from_pretrained(tiny_folder)


def run(monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", ["evals.slots", *map(str, arguments)])
    slots.main()


@pytest.fixture(scope="module")
def of_bytes(tmp_path_factory):
    return AutoTokenizer.from_pretrained(random_llama(tmp_path_factory.mktemp("bytes")))


@pytest.mark.parametrize(("task", "begins"), [("niah_single_1", "What is"), ("vt", "Question:"), ("cwe", "Question:")])
def test_a_prompt_is_cut_before_its_question(of_bytes, tmp_path, task, begins):
    long, short = (texts_of(of_bytes, task, 4000, limit, tmp_path) for limit in (3, 2))
    assert [one.key for one in long[:2]] == [one.key for one in short] and len({one.key for one in long}) == 3
    for one in long:
        said = of_bytes.decode(one.question, skip_special_tokens=True)
        assert said.strip().startswith(begins) and said.count(begins) == 1
        assert one.new_tokens > len(one.answers) and one.question[0] != one.context[0]
    assert {len(one.answers) for one in long} == {{"niah_single_1": 1, "vt": 5, "cwe": 10}[task]}


def test_all_have_the_bytes_of_ours(tiny_folder):
    teacher, *others = systems_of(tiny_folder, Ours(LANDMARKS_EXACT), [16, 64])
    assert teacher.nbytes == 0 and len({one.name for one in others}) == len(others) == 20
    for count in (16, 64):
        ours, *rest = [one for one in others if one.slots == count]
        assert all(0 <= ours.nbytes - one.nbytes < ours.nbytes / ours.tokens * 1.1 for one in rest)
        assert ours.name == f"landmarks-exact@{count}" and ours.tokens > count + 64


def test_ablations_have_the_bytes_of_ours(tiny_folder):
    ours = Ours("default")
    (whole,) = (system for system in systems_of(tiny_folder, ours, [300]) if system.kind == ours.name)
    found = ablations_of(tiny_folder, ours, 300)
    assert len({one.kind for one in found}) == len(ABLATIONS)
    for one in found:
        assert one.ours is not None and one.kind == one.ours.name != ours.name
        assert 0 <= whole.nbytes - one.nbytes < whole.nbytes / whole.tokens * 2


def test_a_run_goes_on_where_it_was(tiny_folder, data_folder, tmp_path, monkeypatch, capsys):
    figures = tmp_path / "figures.json"
    given = [tiny_folder, "--data", data_folder, "--work", tmp_path, "--figures", figures, "--slots", "16"]
    given += ["--lengths", "400", "--tasks", "niah_single_1,wikitext2", *ARGUMENTS]
    ours = "landmarks+mixer.window=16+mixer.landmarks_by=null@16"
    run(monkeypatch, *given, "--limit", "1", "--systems", "teacher,land*,window@*,SnapKV@*")
    found = json.loads(figures.read_text())
    assert found["values"]["wikitext2 400"].keys() == {TEACHER, "window@16", ours}
    assert "SnapKV@16: not run" in capsys.readouterr().out
    monkeypatch.setattr(slots, "load", lambda *_: pytest.fail("nothing is to be measured"))
    run(monkeypatch, *given, "--limit", "1", "--systems", "teacher,land*,window@*")
    assert json.loads(figures.read_text()) == found
    for column in ("wikitext2 400", "wikitext2_whole 400"):
        losses = {name: next(iter(found["values"][column][name].values())) for name in (TEACHER, ours)}
        assert losses[TEACHER] > 0 and losses[ours] == pytest.approx(losses[TEACHER], abs=1)
    del found["values"]["niah_single_1 400"]["window@16"]
    told = table(found)
    assert "| window@16 | " in told and "not run" in told and "grows" in told
    assert average(found, TEACHER) is not None and average(found, "window@16") is None
    assert {plot.name for plot in plots(found)} == {"recall", "loss"} and "<svg" in plots(found)[0].alone


@pytest.mark.check
def test_the_worker_without_a_press_is_the_teacher(tiny_folder, data_folder, tokenizer, tmp_path):
    teacher = System(TEACHER, 0, 0, 0)
    model = load(teacher, tiny_folder, tmp_path, "float32", print)
    presses = Presses(sys.executable, tiny_folder, "float32")
    try:
        for task in ("wikitext2", "niah_single_1"):
            (text,) = texts_of(tokenizer, task, 400, 1, data_folder)
            asked, own = ask(presses, tokenizer, teacher, text), score(model, tokenizer, text)
            assert asked.value == pytest.approx(own.value, abs=1e-4) and asked.whole is None
        reply = presses.ask(None, 0, text.context, text.question, new_tokens=4)
        assert len(reply["ids"]) <= 4 and reply["kept"] == len(text.context)
        with pytest.raises(RuntimeError, match="NoSuch"):
            presses.ask("NoSuch", 1, text.context, text.question, new_tokens=4)
    finally:
        presses.close()


def test_reading_texts_are_apart(tokenizer, data_folder):
    found = texts_of(tokenizer, "wikitext2", 300, texts_module.ROWS, data_folder)
    assert all(len(one.ids) == 300 and len(one.question) == TAIL + 1 and not one.answers for one in found)
    assert len({one.key for one in found}) == texts_module.ROWS
