"""The folder beside a run's output where its checkpoints are, so that it can be resumed."""

from __future__ import annotations

import contextlib
import os
import shutil
from pathlib import Path
from typing import TYPE_CHECKING

from linearize.conversion.claims import claimed
from linearize.conversion.output import telling
from linearize.errors import OutputError
from linearize.recipe import dump_recipe
from linearize.training import processes

if TYPE_CHECKING:
    from collections.abc import Iterator

    from linearize.recipe import Recipe

WORK = ".training"
"""What the name of a run's working folder ends in."""
_CHECKPOINT = "stage-*/checkpoint-*"


@contextlib.contextmanager
def shared_work_folder(target: Path, recipe: Recipe, *, resume: bool) -> Iterator[Path]:
    """`work_folder`, kept by the first of several processes for all of them.

    Raises:
        OutputError: as `work_folder`, in the first.
    """
    if processes.is_first():
        with work_folder(target, recipe, resume=resume) as work:
            processes.wait()
            yield work
    else:
        processes.wait()
        yield _work(target)


def is_resumable(target: Path, recipe: Recipe) -> bool:
    """Whether an interrupted run of this very recipe is waiting beside `target`."""
    kept = _work(target) / "recipe.yaml"
    return kept.is_file() and kept.read_text(encoding="utf-8") == dump_recipe(recipe)


def _work(target: Path) -> Path:
    target = Path(os.path.abspath(target))  # "." has no name
    return target.with_name(f"{target.name}{WORK}")


@contextlib.contextmanager
def work_folder(target: Path, recipe: Recipe, *, resume: bool) -> Iterator[Path]:
    """The folder beside `target` where a run keeps its checkpoints; it goes when the run is done.

    If the run fails it stays for `resume`, unless there is no checkpoint in it yet.

    Raises:
        OutputError: an unfinished run is there and `resume` is not set, or the other way round, or of another recipe.
    """
    with claimed(target):
        yield from _working(_work(target), dump_recipe(recipe), resume)


def _working(work: Path, text: str, resume: bool) -> Iterator[Path]:
    kept = work / "recipe.yaml"
    if not resume and kept.is_file() and not any(work.glob(_CHECKPOINT)):
        shutil.rmtree(work, ignore_errors=True)  # of a run that was killed before it had anything to keep
    if not resume:
        if work.exists():
            raise OutputError(f"{work}: an unfinished run is there; pass --resume to go on, or remove the folder")
    elif not kept.is_file():
        raise OutputError(f"{work}: no unfinished run to resume; leave --resume out")
    elif kept.read_text(encoding="utf-8") != text:
        raise OutputError(f"{kept}: the unfinished run has another recipe; resume it with that one")
    try:
        work.mkdir(parents=True, exist_ok=True)
        kept.write_text(text, encoding="utf-8")
    except OSError as error:
        raise OutputError(f"{work}: cannot be written: {(error.strerror or str(error)).lower()}") from error
    done = False
    try:
        with telling(work, "earlier checkpoints are kept, and --resume goes on from the last one"):
            yield work
        done = True
    finally:
        if done or not any(work.glob(_CHECKPOINT)):
            shutil.rmtree(work, ignore_errors=True)
