"""A second job on an output."""

from __future__ import annotations

import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path

CLAIM = """
import sys
from pathlib import Path
from linearize.runtime.claims import claimed
with claimed(Path(sys.argv[1])):
    print("held", flush=True)
    sys.stdin.read()
"""


@contextmanager
def another_job(target: Path, script: str = CLAIM):
    """A process that runs `script` on `target`, once it has said "held"; it is killed afterwards."""
    process = subprocess.Popen(
        [sys.executable, "-c", script, str(target)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    try:
        assert process.stdout.readline() == "held\n"
        yield process
    finally:
        process.kill()
        process.communicate()
