"""A process of `test_processes.py`: trainings that are cut off at their sixth step, of whole models and of split ones,
one that aligns layers, and an evaluation. Run under torch.distributed.run."""

from __future__ import annotations

import contextlib
import json
import sys
from pathlib import Path

from linearize.evaluation.runner import run
from linearize.evaluation.store import Store
from linearize.jobs.stages import run_stages
from linearize.recipe import load_recipe
from linearize.runtime import processes
from linearize.sources.source import find_source, load_tokenizer
from linearize.training.loop import StageLoop
from linearize.training.workfolder import shared_work_folder
from tests.evaluation.test_runner import Count, model


class Cut(Exception):
    pass


def main(folder: Path) -> None:
    processes.join()
    step = StageLoop.train_step

    def cut(self):
        if self.progress.step == 5:
            raise Cut
        return step(self)

    StageLoop.train_step = cut
    settings = load_recipe(str(folder / "recipe.yaml"), ())
    for name, shard in (("whole", False), ("split", True)):
        with contextlib.suppress(Cut), shared_work_folder(folder / name, settings, resume=False) as work:
            run_stages(settings, work, say=lambda _: None, shard=shard)
    run_stages(load_recipe(str(folder / "align.yaml"), ()), folder / "align-two", say=lambda _: None)
    evaluate(folder, load_tokenizer(find_source(settings.model)))
    processes.leave()


def evaluate(folder: Path, tokenizer) -> None:
    """A task of 100 items, of which some are in the store."""
    told = []
    for limit in (10, None, None):
        task = Count()
        (score,) = run({"it": model}, [task], tokenizer, limit=limit, store=Store(folder / "store"))["it"]
        told.append({"asked": task.asked, "items": score.items})
        processes.wait()
    (folder / f"evaluated.{processes.rank()}").write_text(json.dumps(told))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
