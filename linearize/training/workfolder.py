"""The work folder beside a run's output: its checkpoints, recipe and metrics, for resuming."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

from linearize.errors import OutputError
from linearize.recipe import dump_recipe, load_recipe
from linearize.runtime import processes
from linearize.runtime.claims import claimed
from linearize.runtime.files import telling

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from linearize.recipe import Recipe

WORK = ".training"
"""Suffix of a run's working folder."""
_CHECKPOINT = "stage-*/checkpoint-*"
_LISTED = 5


@contextlib.contextmanager
def shared_work_folder(target: Path, recipe: Recipe, *, resume: bool) -> Iterator[Path]:
    """`work_folder` for several processes: the first one makes and removes it.

    Raises:
        OutputError: as `work_folder`, in the first process.
    """
    if processes.is_first():
        with work_folder(target, recipe, resume=resume) as work:
            processes.wait()
            yield work
    else:
        processes.wait()
        yield _work(target)


def is_resumable(target: Path, recipe: Recipe) -> bool:
    """True if `target` has an interrupted run of this recipe."""
    kept = _work(target) / "recipe.yaml"
    return kept.is_file() and load_recipe(str(kept)) == recipe


def recipe_to_resume(
    target: Path, given: Recipe | None, overrides: Sequence[str], *, name: str | None, say: Callable[[str], None]
) -> Recipe:
    """The recipe of the unfinished run beside `target`; `given` without such a run.

    Args:
        given: the recipe `name` with `overrides`; None if the command names no recipe.
        say: called with a line if the two recipes differ.

    Raises:
        OutputError: `overrides` change the run's recipe, or there is neither such a run nor `given`.
    """
    kept = _work(target) / "recipe.yaml"
    if not kept.is_file():
        if given is None:
            raise OutputError(f"{_work(target)}: no unfinished run to resume; name a recipe and leave --resume out")
        return given
    own = load_recipe(str(kept))
    if keys := _differences(own.model_dump(), load_recipe(str(kept), overrides).model_dump()):
        raise OutputError(
            f"{kept}: --resume goes on with this recipe, and --set changes {_listed(keys)} in it; leave --set out, or "
            "begin anew with another -o"
        )
    if given is not None and (keys := _differences(own.model_dump(), given.model_dump())):
        say(f"resuming with the run's own recipe, {kept}; {name} differs from it in {_listed(keys)}")
    return own


def finished_stages(target: Path) -> list[dict[str, Any]]:
    """The stage records of the finished run that wrote `target`; empty if there is none, or if a run is unfinished."""
    try:
        stages = json.loads((target / "linearize.json").read_text(encoding="utf-8"))["stages"]
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return []
    return stages if isinstance(stages, list) and not _work(target).exists() else []


def _differences(a: Any, b: Any, key: str = "") -> list[str]:
    """Dotted keys whose values differ."""
    if isinstance(a, list) and isinstance(b, list) and len(a) == len(b):
        a, b = dict(enumerate(a)), dict(enumerate(b))
    if not (isinstance(a, dict) and isinstance(b, dict)):
        return [] if a == b else [key]
    inside = (_differences(a.get(k), b.get(k), f"{key}.{k}".lstrip(".")) for k in {**a, **b})
    return sorted(one for keys in inside for one in keys)


def _listed(keys: list[str]) -> str:
    more = f" and {len(keys) - _LISTED} more" if len(keys) > _LISTED else ""
    return ", ".join(keys[:_LISTED]) + more


def _work(target: Path) -> Path:
    target = Path(os.path.abspath(target))  # because "." has no name
    return target.with_name(f"{target.name}{WORK}")


@contextlib.contextmanager
def work_folder(target: Path, recipe: Recipe, *, resume: bool) -> Iterator[Path]:
    """Make the folder beside `target` for a run's checkpoints, and remove it when the run is done.

    If the run fails and has a checkpoint, the folder stays for `resume`.

    Raises:
        OutputError: an unfinished run exists without `resume`, or none exists with it, or it has another recipe.
    """
    with claimed(target):
        yield from _working(_work(target), recipe, resume)


def _working(work: Path, recipe: Recipe, resume: bool) -> Iterator[Path]:
    kept = work / "recipe.yaml"
    if not resume and kept.is_file() and not any(work.glob(_CHECKPOINT)):
        shutil.rmtree(work, ignore_errors=True)  # of a run that was killed before its first checkpoint
    if not resume:
        if work.exists():
            raise OutputError(f"{work}: an unfinished run is there; pass --resume to go on, or remove the folder")
    elif not kept.is_file():
        raise OutputError(f"{work}: no unfinished run to resume; leave --resume out")
    elif load_recipe(str(kept)) != recipe:
        raise OutputError(f"{kept}: the unfinished run has another recipe; resume it with that one")
    try:
        work.mkdir(parents=True, exist_ok=True)
        if not resume:  # with `resume`, another process may be reading it
            kept.write_text(dump_recipe(recipe), encoding="utf-8")
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
