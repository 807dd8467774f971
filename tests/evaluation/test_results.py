"""The results document: written, read back, and refused where it is wrong."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from linearize.errors import DataError
from linearize.evaluation.results.report import write_report
from linearize.evaluation.results.results import Results, SystemScores, read_results

from .results_kit import accuracy, results


def test_what_is_written_is_read_back(tmp_path: Path) -> None:
    found = results(digests={"piqa": "abc"}, limit=40)
    write_report(found, tmp_path)
    for path in (tmp_path, tmp_path / "results.json"):
        again = read_results(path)
        assert again.tasks() == found.tasks()
        assert again.to_json() == found.to_json()
        assert (again.systems, again.limit, again.digests) == (found.systems, 40, {"piqa": "abc"})


def test_held_out_rows_are_tasks(tmp_path: Path) -> None:
    tasks = {(task["task"], task["metric"]): task for task in results().to_json()["tasks"]}
    model = tasks["held-out", "loss"]["systems"]["model"]
    assert model["items"] == pytest.approx([2.2, 3.2, 4.2, 3.2])
    assert model["value"] == pytest.approx(3.2)
    assert tasks["held-out", "perplexity"]["systems"]["model"]["value"] == pytest.approx(math.exp(0.2 + 16 / 5))
    assert {key[1] for key in tasks if key[0] == "held-out"} == {"loss", "perplexity", "kl", "agreement"}


def test_the_file_has_the_comparisons(tmp_path: Path) -> None:
    write_report(results(), tmp_path)
    data = json.loads((tmp_path / "results.json").read_text())
    rows = {(row["task"], row["metric"]): row for table in data["comparisons"] for row in table["rows"]}
    piqa = rows["piqa", "acc"]["cells"]["model"]
    assert piqa["percent_of_teacher"] == pytest.approx(100 * 25 / 30)
    assert piqa["closed"]["value"] == pytest.approx(0.5)
    assert piqa["to_teacher"]["p"] == pytest.approx(2 / 32)
    assert rows["mean of 2", "acc"]["mean_of"] == ["piqa", "arc_easy"]


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_numbers_that_are_not_finite_are_refused(tmp_path: Path, bad: float) -> None:
    tagged = [{"length": bad}, {"length": 1}]
    for score in (
        replace(accuracy("piqa", [1.0, 0.0]), value=bad),
        replace(accuracy("piqa", [1.0, 0.0]), items=[bad, 0.0]),
        replace(accuracy("piqa", [1.0, 0.0]), tags=tagged),
    ):
        found = results(scores={"model": SystemScores([score])})
        with pytest.raises(DataError, match="finite"):
            write_report(found, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def broken(change: str, value: Any) -> dict[str, Any]:
    document: dict[str, Any] = results().to_json()
    *path, last = change.split(".")
    part: Any = document
    for step in path:
        part = part[int(step) if step.isdigit() else step]
    part[last] = value
    return document


@pytest.mark.parametrize(
    ("change", "value", "said"),
    [
        ("schema", "linearize.results/2", "has the schema linearize.results/2"),
        ("schema", None, "not a results file"),
        ("model", 3, "model: input should be a valid string"),
        ("tasks.0.metric", None, "tasks.0.metric: input should be a valid string"),
        ("tasks.0.systems.model.value", "0.5", "tasks.0.systems.model.value: input should be a valid number"),
        ("tasks.0.systems.model.n", 7, "tasks.0.systems.model: 40 items for n = 7"),
        ("tasks.2.axis", [1.0], "tasks.2: a curve is longer than the axis"),
        ("systems", [], "scores of 'model', which is not among the systems"),
    ],
)
def test_what_is_wrong_with_a_document_is_said_in_a_line(change: str, value: Any, said: str) -> None:
    with pytest.raises(DataError) as error:
        Results.from_json(broken(change, value), "x.json")
    assert str(error.value).startswith("x.json: ")
    assert said in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ('{\n "schema": 1,\n oops', "line 3: not JSON"),
        ("[1, 2]", "not a results file"),
        ("{}", "not a results file"),
        ("[" * 100_000, "not"),
    ],
)
def test_files_that_are_no_results(tmp_path: Path, text: str, said: str) -> None:
    path = tmp_path / "x.json"
    path.write_text(text)
    with pytest.raises(DataError, match=said) as error:
        read_results(path)
    assert "\n" not in str(error.value)


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no such file"):
        read_results(tmp_path)
    (tmp_path / "results.json").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(DataError, match="cannot be read"):
        read_results(tmp_path)


def test_nan_in_a_file_is_refused(tmp_path: Path) -> None:
    document = broken("tasks.0.systems.model.value", math.nan)
    (tmp_path / "results.json").write_text(json.dumps(document))
    with pytest.raises(DataError, match="finite number"):
        read_results(tmp_path)
