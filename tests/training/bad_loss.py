"""A process of `test_processes.py`: the second one's loss is no number at the second and the fourth step. Run under
torch.distributed.run."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch

from linearize.errors import LinearizeError
from linearize.jobs.stages import run_stages
from linearize.recipe import load_recipe
from linearize.runtime import processes
from linearize.training.loop import StageLoop
from linearize.training.workfolder import shared_work_folder


def main(recipe: str, target: str) -> None:
    processes.join()
    first, step, said, weights = processes.is_first(), StageLoop.train_step, [], []

    def planted(self):
        weights.append([float(p.detach().double().sum()) for p in self.model.parameters() if p.requires_grad])
        bad = not first and self.progress.step in (1, 3)
        layer = next(
            module for name, module in self.model.named_modules() if name.endswith("layers.1.self_attn.o_proj")
        )
        hook = layer.register_forward_hook(lambda _, __, y: y * torch.nan if bad else y)
        try:
            return step(self)
        finally:
            hook.remove()

    StageLoop.train_step = planted
    error = ""
    try:
        with shared_work_folder(Path(target), load_recipe(recipe, ()), resume=False) as work:
            run_stages(load_recipe(recipe, ()), work, say=said.append)
    except LinearizeError as stopped:
        error = str(stopped)
    told = {"said": [line for line in said if "skipped" in line], "weights": weights, "error": error}
    Path(f"{target}.{0 if first else 1}").write_text(json.dumps(told))
    processes.leave()


if __name__ == "__main__":
    main(*sys.argv[1:])
