"""A process of `test_memory.py`: what trainings take over what the process held before, as the kernel counts it."""

from __future__ import annotations

import ctypes
import gc
import json
import sys
from pathlib import Path

from linearize.jobs.stages import run_stages
from linearize.recipe import load_recipe


def kilobytes(name: str) -> int:
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith(name))


def peak(recipe: str, work: Path) -> int:
    work.mkdir()
    settings = load_recipe(recipe, ())
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts again from here
    before = kilobytes("VmRSS")
    run_stages(settings, work, say=lambda _: None)
    return (kilobytes("VmHWM") - before) << 10


if __name__ == "__main__":
    # The first is for what modules and libraries take, which is there from then on.
    print(json.dumps([peak(recipe, Path(f"{recipe}.work")) for recipe in sys.argv[1:]][1:]))
