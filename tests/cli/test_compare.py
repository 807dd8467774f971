"""`linearize compare`: what it shows, and what it refuses."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from linearize.cli import app as cli
from linearize.evaluation.results.report import write_report
from linearize.evaluation.results.results import SystemScores, read_results

from ..evaluation.results_kit import accuracy, answers, results
from ..evaluation.test_report_pages import check_page


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("reports")
    digests = {name: name for name in ("piqa", "arc_easy", "books", "needle", "held-out")}
    write_report(results(digests=digests), folder / "before")
    better = results(digests=digests)
    better.scores["model"] = SystemScores([accuracy("piqa", answers(29, 40))])
    write_report(better, folder / "after")
    return folder


@pytest.fixture
def folders(written: Path, tmp_path: Path) -> tuple[Path, Path]:
    shutil.copytree(written, tmp_path, dirs_exist_ok=True)
    return tmp_path / "before", tmp_path / "after"


def show(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str, str]:
    status = cli.run(["compare", *map(str, arguments)])
    captured = capsys.readouterr()
    return status, captured.out, captured.err


def test_the_same_items_are_paired(folders: tuple[Path, Path], capsys: pytest.CaptureFixture[str]) -> None:
    status, out, _ = show(capsys, *folders, "--json")
    assert status == 0
    data = json.loads(out)
    assert [one["label"] for one in data["results"]] == ["before", "after"]
    piqa = next(task for task in data["tasks"] if task["task"] == "piqa")
    pair = next(pair for pair in piqa["differences"] if pair["system"] == "model")
    assert (pair["result"], pair["minus_result"], pair["minus_system"]) == ("after", "before", "model")
    # Four more of 40 are right, none fewer.
    assert pair["difference"]["value"] == pytest.approx(0.1)
    assert pair["difference"]["p"] == pytest.approx(2 / 16)
    assert piqa["notes"] == []


def test_tables_and_pages(folders: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    status, out, err = show(capsys, *folders, "--report", tmp_path / "out")
    assert status == 0
    assert "+10.0 ± 4.8" in out
    assert "report.html" in err
    shown = check_page(tmp_path / "out")
    assert "+10.0 ± 4.8" in shown
    assert "+10.0 ± 4.8" in (tmp_path / "out" / "report.md").read_text()
    assert json.loads((tmp_path / "out" / "comparison.json").read_text())["left_out"] == []


def test_other_items_are_shown_but_not_paired(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_report(results(digests={"piqa": "a", "arc_easy": "b"}), tmp_path / "a")
    other = results(digests={"piqa": "a", "arc_easy": "c"}, limit=10)
    other.scores = {"model": SystemScores([accuracy("piqa", answers(5, 10)), accuracy("arc_easy", answers(5, 40))])}
    write_report(other, tmp_path / "b")
    _, out, _ = show(capsys, tmp_path / "a", tmp_path / "b")
    assert "piqa acc: a has 40 items and b 10: not comparable item by item." in out
    assert "arc_easy acc: a and b differ in texts or settings: not comparable." in out
    assert "Differences" not in out
    assert "50.0 ± 16.7" in out


def test_without_digests_it_says_what_it_assumes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in "ab":
        write_report(results(), tmp_path / name)
    _, out, _ = show(capsys, tmp_path / "a", tmp_path / "b")
    assert "a and b are taken to have the same items" in out
    assert "0.0 ± 0.0" in out


def test_a_system_of_another_name_is_compared_with_the_last(
    folders: tuple[Path, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    other = read_results(folders[1])
    other.systems[2] = replace(other.systems[2], name="tuned")
    other.scores["tuned"] = other.scores.pop("model")
    write_report(other, folders[1])
    _, out, _ = show(capsys, *folders, "--json")
    piqa = json.loads(out)["tasks"][0]
    assert ("tuned", "model") in {(pair["system"], pair["minus_system"]) for pair in piqa["differences"]}


def test_two_folders_of_one_name(folders: tuple[Path, Path], capsys: pytest.CaptureFixture[str]) -> None:
    other = folders[1] / folders[0].name
    write_report(read_results(folders[1]), other)
    _, out, _ = show(capsys, folders[0], other, "--json")
    assert [one["label"] for one in json.loads(out)["results"]] == ["before", "before (2)"]


def test_errors(folders: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    other = results(scores={"model": SystemScores([accuracy("copa", answers(1, 4))])})
    write_report(other, tmp_path / "other")
    (tmp_path / "broken.json").write_text('{"schema":\n\n oops}')
    (tmp_path / "list.json").write_text("[]")
    for second, status, said in (
        (tmp_path / "other", 1, "before and other have no task in common: nothing to compare"),
        (tmp_path / "broken.json", 1, "broken.json: line 3: not JSON"),
        (tmp_path / "list.json", 1, "list.json: not a results file"),
        (tmp_path / "none", 1, "no such file"),
        (folders[0] / "results.json", 1, "is given twice: results compared with themselves differ nowhere"),
        ("", 2, "give two or more results to compare"),
    ):
        found, out, err = show(capsys, folders[0], *([second] if second else []))
        assert (found, out) == (status, "")
        assert said in err
        assert err.count("\n") == 1


def test_json_needs_no_torch_and_no_plots(folders: tuple[Path, Path]) -> None:
    program = (
        "import sys; from linearize.cli.app import run; status = run(sys.argv[1:]); "
        "loaded = {'torch', 'matplotlib', 'jinja2'} & set(sys.modules); sys.exit(str(loaded) if loaded else status)"
    )
    arguments = ["compare", *map(str, folders), "--json"]
    done = subprocess.run([sys.executable, "-c", program, *arguments], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
