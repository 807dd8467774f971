"""An environment that has torch and transformers with what they require, and nothing else."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

from packaging.requirements import Requirement

ROOTS = ("torch", "transformers")


def clean_site(folder: Path) -> Path:
    """A site folder of links to the installed files of `ROOTS` and their requirements."""
    folder.mkdir()
    for name in _closure(ROOTS):
        found = distribution(name)
        for top in {file.parts[0] for file in found.files or () if file.parts[0] not in ("..", "__pycache__")}:
            target = Path(str(found.locate_file(top)))
            if target.exists() and not (folder / top).exists():
                (folder / top).symlink_to(target)
    return folder


def _closure(names: tuple[str, ...]) -> set[str]:
    waiting, found = list(names), set[str]()
    while waiting:
        name = re.sub(r"[-_.]+", "-", waiting.pop()).lower()
        if name in found:
            continue
        try:
            requirements = map(Requirement, distribution(name).requires or ())
        except PackageNotFoundError:  # not needed here
            continue
        found.add(name)
        waiting += [one.name for one in requirements if one.marker is None or one.marker.evaluate({"extra": ""})]
    return found


def run_clean(site: Path, home: Path, program: str, *arguments: object, **environment: str) -> str:
    """Runs a program there and gives its stdout; neither the working directory nor site-packages are in its sight."""
    start = f"import sys; sys.path.append({str(site)!r})\n"
    plain = {"PATH": os.environ["PATH"], "HOME": str(home), "HF_HOME": str(home / "huggingface"), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-I", "-S", "-c", start + program, *map(str, arguments)],
        capture_output=True, text=True, env={**plain, **environment}, cwd=home,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout
