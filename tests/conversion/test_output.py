"""Results appear whole or not at all."""

from __future__ import annotations

import errno
from pathlib import Path

import pytest

from linearize.errors import OutputError
from linearize.runtime.files import staged_folder


def leftovers(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_a_failure_leaves_nothing(tmp_path):
    with pytest.raises(RuntimeError), staged_folder(tmp_path / "out") as folder:
        (folder / "half").write_text("half")
        raise RuntimeError
    assert leftovers(tmp_path) == []


def test_a_failure_while_overwriting_leaves_the_old(tmp_path):
    with staged_folder(tmp_path / "out") as folder:
        (folder / "linearize.json").write_text("old")
    with pytest.raises(RuntimeError), staged_folder(tmp_path / "out", overwrite=True) as folder:
        (folder / "linearize.json").write_text("new")
        raise RuntimeError
    assert leftovers(tmp_path) == ["out"]
    assert (tmp_path / "out" / "linearize.json").read_text() == "old"


def test_overwriting_replaces_all_of_the_old(tmp_path):
    with staged_folder(tmp_path / "out") as folder:
        (folder / "linearize.json").write_text("old")
        (folder / "extra").write_text("old")
    with staged_folder(tmp_path / "out", overwrite=True) as folder:
        (folder / "linearize.json").write_text("new")
    assert leftovers(tmp_path / "out") == ["linearize.json"]
    assert leftovers(tmp_path) == ["out"]


@pytest.mark.parametrize("name", ["one.jpg", "config.json"])  # the latter: a pretrained model, maybe the only copy
def test_what_is_not_ours_is_never_overwritten(tmp_path, name):
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / name).write_text("x")
    with (
        pytest.raises(OutputError, match="does not look like a result"),
        staged_folder(tmp_path / "photos", overwrite=True),
    ):
        pass
    told = "pass --overwrite" if name == "one.jpg" else "a model that linearize did not write; name another folder"
    with pytest.raises(OutputError, match=told), staged_folder(tmp_path / "photos"):
        pass
    with pytest.raises(OutputError, match="is a file"), staged_folder(tmp_path / "photos" / name):
        pass
    assert leftovers(tmp_path / "photos") == [name]


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EROFS, errno.EACCES])
def test_a_disk_that_gives_out_is_one_line(tmp_path, code):
    with pytest.raises(OutputError) as caught, staged_folder(tmp_path / "out"):
        raise OSError(code, "the reason")
    assert "\n" not in str(caught.value) and "nothing was left there" in str(caught.value)
    assert leftovers(tmp_path) == []


def test_a_place_that_cannot_be_made_is_found_before_the_work(tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(OutputError, match="cannot be written"), staged_folder(tmp_path / "file" / "below" / "out"):
        pytest.fail("the block must not run")


def test_a_result_can_be_read_by_whom_the_umask_lets(tmp_path):
    with staged_folder(tmp_path / "out") as folder:
        (folder / "weights").touch(mode=0o600)
    expected = (tmp_path / "out").stat().st_mode & 0o444
    assert (tmp_path / "out" / "weights").stat().st_mode & 0o444 == expected | 0o400
