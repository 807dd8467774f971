"""A command and its function are one job: the same results, the same errors, before the same work."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

import linearize
from linearize.errors import DataError, LinearizeError

if TYPE_CHECKING:
    from collections.abc import Callable

ROOT = Path(__file__).resolve().parents[2]


ERRORS: dict[str, tuple[list[str], Callable[[str, Path], Any]]] = {
    "a taken output comes before the model": (
        ["convert", "nowhere", "-o", "TAKEN"],
        lambda _, taken: linearize.convert("nowhere", taken),
    ),
    "no stages": (
        ["finetune", "default", "-o", "out"],
        lambda _, __: linearize.finetune("default", "out"),
    ),
    "no model": (
        ["finetune", "window-gla", "-o", "out"],
        lambda _, __: linearize.finetune("window-gla", "out"),
    ),
    "nothing to resume": (
        ["finetune", "window-gla", "-o", "out", "--resume", "--set", "model=MODEL"],
        lambda model, _: linearize.finetune("window-gla", "out", model=model, resume=True),
    ),
    "a report that cannot be written comes before the model": (
        ["eval", "nowhere", "--report", "TAKEN/notes.txt/report"],
        lambda _, taken: linearize.evaluate("nowhere", report=taken / "notes.txt" / "report"),
    ),
    "an unknown suite comes before the model": (
        ["eval", "nowhere", "--suite", "recal"],
        lambda _, __: linearize.evaluate("nowhere", suites=["recal"]),
    ),
    "no chat template": (
        ["generate", "MODEL", "hello", "--chat"],
        lambda model, _: linearize.generate(model, "hello", chat=True),
    ),
    "not converted": (
        ["verify", "MODEL"],
        lambda model, _: linearize.verify(model),
    ),
    "a taken export comes before the model": (
        ["export", "nowhere", "TAKEN"],
        lambda _, taken: linearize.export("nowhere", taken),
    ),
    "no folder to push": (
        ["push", "me/x", "nowhere", "--yes"],
        lambda _, __: linearize.push("me/x", "nowhere"),
    ),
}


@pytest.mark.parametrize("case", ERRORS)
def test_a_command_and_its_function_refuse_alike(outcome, tiny_folder, tmp_path, monkeypatch, case):
    monkeypatch.chdir(tmp_path)
    taken = tmp_path / "taken"
    taken.mkdir()
    (taken / "notes.txt").write_text("mine")
    arguments, call = ERRORS[case]
    named = [part.replace("MODEL", str(tiny_folder)).replace("TAKEN", str(taken)) for part in arguments]
    status, text, words = outcome(*named)
    assert (status, text) == (1, "")
    with pytest.raises(LinearizeError) as refused:
        call(str(tiny_folder), taken)
    assert words.splitlines()[-1] == f"error: {refused.value}"
    assert [path.name for path in tmp_path.iterdir() if path.name != "cache"] == ["taken"]


WRONG: dict[str, tuple[list[str], Callable[[], Any], str]] = {
    "generate": (["MODEL", "x", "--dtype", "flaot16"], lambda: linearize.generate("m", "x", dtype="flaot16"), "dtype"),
    "eval": (["MODEL", "--dtype", "int4"], lambda: linearize.evaluate("m", dtype="int4"), "dtype"),
    "verify": (["MODEL", "--dtype", "int8"], lambda: linearize.verify("m", dtype="int8"), "dtype"),
    "export": (
        ["MODEL", "out", "--max-shard-size", "5XB"],
        lambda: linearize.export("m", "out", shard_size="5XB"),
        "expected a size",
    ),
}


@pytest.mark.parametrize("command", WRONG)
def test_a_value_that_the_command_line_refuses_is_not_guessed_in_python(outcome, command):
    arguments, call, told = WRONG[command]
    status, _, words = outcome(command, *arguments)
    assert status == 2 and told in words
    with pytest.raises(DataError, match=told):
        call()


@pytest.mark.parametrize(
    ("call", "told"),
    [
        (lambda: linearize.evaluate("m", limit=0), "limit is 0: give 1 or more items per task"),
        (lambda: linearize.evaluate("m", lengths=[256, 0]), "lengths 0: expected 1 or more"),
        (lambda: linearize.generate("m", "x", max_new_tokens=-1), "max_new_tokens -1: expected 0 or more"),
        (lambda: linearize.generate("m", "x", top_p=1.5), "top_p 1.5: expected 0 to 1"),
        (lambda: linearize.generate("m", "x", temperature=math.inf), "temperature inf: expected a finite number"),
        (lambda: linearize.generate("m", "x", min_p=math.nan), "min_p nan: expected a finite number"),
        (lambda: linearize.generate("m", "x", stop=[""]), "expected up to 16 strings, none of them empty"),
        (lambda: linearize.generate("m", "x", seed=2**64), f"seed {2**64}: expected -{2**63} to {2**64 - 1}"),
        (lambda: linearize.verify("m", steps=0), "steps 0: expected 1 or more"),
        (lambda: linearize.export("m", "out", tokens=1), "tokens 1: expected 2 or more"),
        (lambda: linearize.push("me/x", "m", steps=0), "steps 0: expected 1 or more"),
    ],
)
def test_numbers_are_bounded_in_python_as_on_the_command_line(call, told):
    with pytest.raises(DataError, match=told):
        call()


def test_a_conversion_and_a_continuation_are_the_same_either_way(outcome, tiny_folder, converted, tmp_path):
    said: list[str] = []
    linearize.convert(tiny_folder, tmp_path / "out", "window-gla", overrides=["mixer.window=16"], say=said.append)
    assert said[0] == f"converting {tiny_folder.name}"
    assert (tmp_path / "out" / "recipe.yaml").read_text() == (converted / "recipe.yaml").read_text()
    sums = [json.loads((folder / "linearize.json").read_text())["files"] for folder in (tmp_path / "out", converted)]
    assert sums[0]["model.safetensors"] == sums[1]["model.safetensors"]
    status, text, _ = outcome("generate", converted, "Once upon", "-n", "6", "--json")
    told = linearize.generate(converted, "Once upon", max_new_tokens=6)
    assert status == 0 and json.loads(text)["text"] == told.text
    assert json.loads(text)["memory_bytes"] == told.memory_bytes


def test_a_report_has_the_same_figures_either_way(outcome, converted, data_folder, tmp_path, monkeypatch):
    monkeypatch.setenv("LINEARIZE_CACHE", str(tmp_path / "cache"))
    options = ["--tasks", "piqa", "--limit", "4", "--data", data_folder, "--json"]
    status, text, words = outcome("eval", converted, *options, "--report", tmp_path / "one")
    assert status == 0, words
    said: list[str] = []
    results = linearize.evaluate(
        converted, tasks=["piqa"], limit=4, data=data_folder, report=tmp_path / "two", fresh=True, say=said.append
    )
    assert said[-1] == "evaluating model (4 of 4)" and (tmp_path / "two" / "report.html").is_file()
    assert words.splitlines()[-1] == f"report: {tmp_path / 'one' / 'report.html'}"
    rows = {row["metric"]: row["values"]["model"]["value"] for row in json.loads(text)["metrics"]}
    assert rows == pytest.approx({score.metric: score.value for score in results.scores["model"].all_tasks()})
    tasks = [json.loads((tmp_path / name / "results.json").read_text())["tasks"] for name in ("one", "two")]
    assert tasks[0] == tasks[1]
