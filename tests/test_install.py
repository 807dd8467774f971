"""The wheel without a checkout beside it, and the notebook."""

from __future__ import annotations

import json
import re
import subprocess
import sysconfig
import venv
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]

# Runs where the checkout cannot be imported.
_INSTALLED = """
import sys
from pathlib import Path
import linearize
from linearize.data.builtin import QUESTIONS, works
from linearize.recipe import recipe_names
assert Path(linearize.__file__).is_relative_to(sys.argv[3]), linearize.__file__
assert recipe_names()[0] == "default" and len(works()) == 6 and QUESTIONS.is_file()
assert (Path(linearize.__file__).parent / "py.typed").is_file()
small = ["mixer.window=16", "mixer.landmarks=48", "mixer.landmark_score=novelty", "mixer.landmarks_by=null"]
linearize.convert(sys.argv[1], sys.argv[2], overrides=small)
print(linearize.generate(sys.argv[2], "Once upon a time", max_new_tokens=4).new_tokens)
"""


@pytest.mark.check
def test_a_wheel_works_without_the_checkout(tiny_folder, tmp_path):
    hatch = pytest.importorskip("hatchling.builders.wheel")
    wheel = Path(next(iter(hatch.WheelBuilder(str(ROOT)).build(directory=str(tmp_path), versions=["standard"]))))
    names = zipfile.ZipFile(wheel).namelist()
    assert {"linearize/_data/recipes/default.yaml", "linearize/_data/tasks/piqa.yaml", "linearize/py.typed"} <= {*names}
    venv.create(tmp_path / "venv", with_pip=False)
    site = next((tmp_path / "venv" / "lib").glob("python*/site-packages"))
    assert {"linearize_kernels/native/prompt.c", "linearize_kernels/native/vectors.h"} <= set(names)
    zipfile.ZipFile(wheel).extractall(site)
    # The dependencies of this environment, without what its .pth files add: the checkout.
    run = f"import sys; sys.path.append({sysconfig.get_path('purelib')!r})\n" + _INSTALLED
    python = tmp_path / "venv" / "bin" / "python"
    arguments = [str(python), "-I", "-c", run, str(tiny_folder), str(tmp_path / "out"), str(tmp_path / "venv")]
    done = subprocess.run(arguments, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split()[-1] == "4"


def test_links_of_the_package_hold_outside_the_checkout():
    """Pages of an installed package have no files beside them: no message or docstring of a command links to one."""
    for path in (ROOT / "linearize" / "cli").glob("*.py"):
        assert not re.search(r"\]\([\w./-]+\.(md|json)", path.read_text(encoding="utf-8")), path


def _cells() -> list[str]:
    cells = json.loads((ROOT / "notebooks" / "linearize.ipynb").read_text(encoding="utf-8"))["cells"]
    assert all(cell["outputs"] == [] for cell in cells if cell["cell_type"] == "code")
    return ["".join(cell["source"]) for cell in cells if cell["cell_type"] == "code"]


def test_the_notebook_begins_with_its_installation():
    install, *rest = _cells()
    assert "%pip install" in install and not any(
        line.startswith(("%", "!")) for cell in rest for line in cell.split("\n")
    )


@pytest.mark.check
def test_the_notebook_runs_on_a_tiny_model(tiny_folder, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    cells = _cells()[1:]
    cells[0] = cells[0].replace('"HuggingFaceTB/SmolLM2-135M-Instruct"', repr(str(tiny_folder)))
    small = ["mixer.window=16", "mixer.landmarks=48", "mixer.landmark_score=novelty", "mixer.landmarks_by=null"]
    cells[0] = cells[0].replace("CHANGES = []", f"CHANGES = {small}")
    space: dict[str, object] = {}
    for cell in cells:
        exec(compile(cell, "notebook", "exec"), space)  # noqa: S102
    told = capsys.readouterr().out
    assert "bytes of memory, whatever the length" in told and "FAILED" not in told and told.count("|") == 8
