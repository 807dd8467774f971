"""Trackers that a recipe's `report_to` names; accelerate sends a stage's figures to them, besides `metrics.jsonl`."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from accelerate.tracking import get_available_trackers

from linearize.errors import RecipeError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from accelerate import Accelerator

PROJECT = "linearize"


@dataclass(frozen=True)
class Trackers:
    """Trackers of one stage's run.

    Attributes:
        names: a subset of `tensorboard`, `wandb` and `trackio`.
        run: the run's name.
        folder: the folder of TensorBoard's files; `TENSORBOARD_LOGGING_DIR` overrides it.
    """

    names: Sequence[str]
    run: str
    folder: str

    def start(self, accelerator: Accelerator) -> None:
        """Begin the run. A trackio run is local by default; only the user's environment can publish it."""
        named: dict[str, Any] = {name: {"name": self.run} for name in ("wandb", "trackio") if name in self.names}
        folder = Path(os.environ.get("TENSORBOARD_LOGGING_DIR") or self.folder)
        project = PROJECT if named else folder.name
        accelerator.project_configuration.logging_dir = str(folder.parent if not named else folder)
        accelerator.init_trackers(project, init_kwargs=named)


def check_trackers(names: Sequence[str]) -> None:
    """Raises:
    RecipeError: accelerate does not find a tracker's package.
    """
    installed = {one.value for one in get_available_trackers()}
    for name in names:
        if name not in installed:
            raise RecipeError(
                f"report_to: {name} is not installed; pip install {name}, or take it out: metrics.jsonl is always there"
            )
