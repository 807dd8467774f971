"""The README's commands run, in its order, as they stand there."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def commands() -> list[str]:
    """The lines of the README's `sh` blocks."""
    blocks = re.findall(r"```sh\n(.*?)```", README, re.DOTALL)
    return [line.strip() for block in blocks for line in block.splitlines() if line.strip()]


def python_blocks() -> list[str]:
    return re.findall(r"```python\n(.*?)```", README, re.DOTALL)


def test_every_make_target_exists():
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    targets = [line.split()[1] for line in commands() if line.startswith("make ")]
    assert targets[:2] == ["demo", "test"]
    assert all(re.search(rf"^{target}:", makefile, re.MULTILINE) for target in targets)


def test_every_linked_file_exists():
    links = [link for link in re.findall(r"\]\(([^)#]+)\)", README) if "://" not in link]
    links += re.findall(r'(?:src|srcset)="([^"]+)"', README)
    assert links and all((ROOT / link).exists() for link in links)


@pytest.mark.real
@pytest.mark.check
def test_commands_and_python_run(tmp_path, smollm2_gguf, data_folder):
    environment = {**os.environ, "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}
    environment |= {"LINEARIZE_CACHE": str(tmp_path / "cache")}
    (tmp_path / "data").symlink_to(data_folder)
    shutil.copy(smollm2_gguf, tmp_path / "model.gguf")
    shutil.copy(ROOT / "README.md", tmp_path)

    def run(*command: str) -> None:
        done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
        assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"

    run("linearize", "demo")  # what `make demo` runs
    lines = [line for line in commands() if line.startswith("linearize ")]
    assert lines[0].startswith("linearize convert ")
    for line in lines:
        run("sh", "-c", line)
    for block in python_blocks():
        run(sys.executable, "-c", block)
