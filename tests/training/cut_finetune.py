"""A process of `test_processes.py`: a training that is cut off at its sixth step. Run under torch.distributed.run."""

from __future__ import annotations

import contextlib
import sys
from pathlib import Path

from linearize.recipe import load_recipe
from linearize.training import processes, trainer
from linearize.training.finetune import finetune, shared_work_folder


class Cut(Exception):
    pass


def main(recipe: str, target: str) -> None:
    processes.join()
    told = trainer._Reporter.on_log

    def on_log(self, args, state, control, logs=None, **more):
        if state.global_step == 6:
            raise Cut
        told(self, args, state, control, logs, **more)

    trainer._Reporter.on_log = on_log
    settings = load_recipe(recipe, ())
    with contextlib.suppress(Cut), shared_work_folder(Path(target), settings, resume=False) as work:
        finetune(settings, work, say=lambda _: None)


if __name__ == "__main__":
    main(*sys.argv[1:])
