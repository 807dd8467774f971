"""Trackers that a recipe's `report_to` names; training sends its figures to them besides `metrics.jsonl`, through
transformers' own callbacks."""

from __future__ import annotations

import importlib.util
import os
import sys
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from linearize.errors import RecipeError

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from pathlib import Path

_FOLDER = "TENSORBOARD_LOGGING_DIR"
PROJECT = "linearize"


def check_trackers(names: Sequence[str]) -> None:
    """Raises:
    RecipeError: a tracker's package is not installed.
    """
    for name in names:
        if importlib.util.find_spec(name) is None:
            raise RecipeError(
                f"report_to: {name} is not installed; pip install {name}, or take it out: metrics.jsonl is always there"
            )


def tracker_arguments(names: Sequence[str], run: str) -> dict[str, Any]:
    """The Trainer's arguments for the trackers. Nothing is published: a trackio run stays on this machine unless the
    user's environment says where it goes."""
    return {"report_to": list(names), "run_name": run, "project": PROJECT, "trackio_static_space_id": False}


@contextmanager
def tracking(names: Sequence[str], folder: Path) -> Iterator[None]:
    """For a stage's training: TensorBoard's files go into `folder`, where the user's environment names no other, and
    the stage's run ends with it."""
    given = os.environ.get(_FOLDER)
    if "tensorboard" in names and given is None:
        os.environ[_FOLDER] = str(folder)
    try:
        yield
    finally:
        if given is None:
            os.environ.pop(_FOLDER, None)
        if "wandb" in names and "wandb" in sys.modules:
            sys.modules["wandb"].finish()  # or the next stage would go on in the same run
