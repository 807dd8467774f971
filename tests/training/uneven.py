"""A process of `test_processes.py`: trainings whose epochs end in a step that is not full, cut off before it and
resumed, and one by the command. Run under torch.distributed.run."""

from __future__ import annotations

import contextlib
import sys
from pathlib import Path
from typing import Any, NoReturn

import torch

from linearize.cli.app import run
from linearize.jobs import stages as module
from linearize.recipe import load_recipe
from linearize.runtime import processes
from linearize.training.loop import StageLoop


class Cut(Exception):
    pass


def main(folder: Path) -> None:
    processes.join()
    step, cuts = StageLoop.train_step, True

    def cut(self: StageLoop) -> dict[str, Any]:
        if cuts and self.progress.step == 1:
            raise Cut
        return step(self)

    def stale(_: Path) -> NoReturn:
        raise AssertionError("a process that is not the first looks for checkpoints")

    StageLoop.train_step = cut
    if not processes.is_first():
        module.newest = module.checkpoints = stale
    for recipe in sorted(folder.glob("*.yaml")):
        settings, work = load_recipe(str(recipe)), folder / f"{recipe.stem}-two"
        for cuts in (True, False):
            with contextlib.suppress(Cut):
                module.run_stages(settings, work, say=lambda _: None, resume=not cuts)
    # A command ends the process group itself: threads of it that outlive the interpreter abort the process.
    assert run(["finetune", str(folder / "align.yaml"), "-o", str(folder / "out")]) == 0
    assert not torch.distributed.is_initialized()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
