"""One job at a time for each output, and nothing left of those that were killed."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest

from linearize.errors import OutputError
from linearize.runtime import files as output
from linearize.runtime.claims import claimed
from linearize.runtime.files import staged_file, staged_files, staged_folder
from tests.jobs_kit import another_job

HOLD = """
import sys
from pathlib import Path
from linearize.runtime.files import staged_folder
with staged_folder(Path(sys.argv[1]), overwrite=True) as folder:
    (folder / "linearize.json").write_text("half")
    print("held", flush=True)
    sys.stdin.read()
"""


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_a_second_job_is_refused_and_a_dead_one_is_not_in_the_way(tmp_path):
    target = tmp_path / "out"
    with another_job(target, HOLD) as process:
        told = rf"out: another job is writing there \(process {process.pid} on .*\); wait for it, or name another place"
        for claim in (claimed, staged_folder, staged_file):
            with pytest.raises(OutputError, match=told), claim(target):
                pass
        assert len(names(tmp_path)) == 2  # what the other one is making, and its lock
        process.send_signal(signal.SIGKILL)
        process.wait()
        assert len(names(tmp_path)) == 2
        with staged_folder(target) as folder:
            (folder / "linearize.json").write_text("whole")
    assert names(tmp_path) == ["out"] and (target / "linearize.json").read_text() == "whole"


def test_a_result_that_was_being_replaced_is_put_back(tmp_path):
    (tmp_path / ".out.old-4242").mkdir()
    (tmp_path / ".out.old-4242" / "linearize.json").write_text("the only one")
    (tmp_path / ".out.partial-4242").mkdir()
    (tmp_path / ".out.partial-notes").write_text("not ours")
    with pytest.raises(OutputError, match="exists and is not empty"), staged_folder(tmp_path / "out"):
        pass
    assert names(tmp_path) == [".out.partial-notes", "out"]
    assert (tmp_path / "out" / "linearize.json").read_text() == "the only one"


def test_a_claim_can_be_taken_again_inside_and_ends_with_the_outer_one(tmp_path):
    with claimed(tmp_path / "out"):
        with claimed(tmp_path / "out"), staged_folder(tmp_path / "out") as folder:
            (folder / "linearize.json").touch()
        assert names(tmp_path) == [".out.lock", "out"]
    assert names(tmp_path) == ["out"]


def test_folders_made_for_a_claim_go_again_if_nothing_is_put_there(tmp_path):
    with pytest.raises(RuntimeError), staged_folder(tmp_path / "a" / "b" / "out"):
        raise RuntimeError
    assert names(tmp_path) == []
    with staged_folder(tmp_path / "a" / "b" / "out"):
        pass
    assert names(tmp_path / "a" / "b") == ["out"]


@pytest.mark.parametrize("swaps", [True, False])
@pytest.mark.parametrize("interrupted", [False, True])
def test_replacing_never_leaves_neither(tmp_path, monkeypatch, swaps, interrupted):
    with staged_folder(tmp_path / "out") as folder:
        (folder / "linearize.json").write_text("old")
    if not swaps:
        monkeypatch.setattr(output, "_exchange", lambda *_: False)
        rename = Path.rename

        def interrupting(self: Path, target: Path) -> Path:
            if interrupted and ".partial-" in self.name:
                raise KeyboardInterrupt
            return rename(self, target)

        monkeypatch.setattr(Path, "rename", interrupting)
    elif interrupted:

        def interrupt(*_: object) -> bool:
            raise KeyboardInterrupt

        monkeypatch.setattr(output, "_exchange", interrupt)
    try:
        with staged_folder(tmp_path / "out", overwrite=True) as folder:
            (folder / "linearize.json").write_text("new")
    except KeyboardInterrupt:
        assert interrupted
    assert names(tmp_path) == ["out"]
    assert (tmp_path / "out" / "linearize.json").read_text() == ("old" if interrupted else "new")


def test_a_folder_that_vanishes_is_told(tmp_path):
    with (
        pytest.raises(OutputError, match="the folder is gone; somebody removed it"),
        staged_folder(tmp_path / "out") as f,
    ):
        f.rmdir()
        (f / "linearize.json").write_text("x")
    assert names(tmp_path) == []


def test_files_are_put_beside_others(tmp_path):
    report = tmp_path / "report"
    for content in ("one", "two"):
        with staged_files(report) as folder:
            (folder / "a").write_text(content)
        (report / "mine").write_text("mine")
    with pytest.raises(RuntimeError), staged_files(report) as folder:
        (folder / "a").write_text("three")
        raise RuntimeError
    assert {path.name: path.read_text() for path in report.iterdir()} == {"a": "two", "mine": "mine"}
    with pytest.raises(RuntimeError), staged_files(tmp_path / "new"):
        raise RuntimeError
    assert names(tmp_path) == ["report"]


def test_locks_of_the_dead_are_only_files(tmp_path):
    (tmp_path / ".out.lock").write_text("process 1 on elsewhere\n")
    with claimed(tmp_path / "out"):
        assert (tmp_path / ".out.lock").read_text().startswith(f"process {os.getpid()} on ")
    assert names(tmp_path) == []
