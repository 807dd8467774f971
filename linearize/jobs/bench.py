"""`linearize bench`: measure speed and memory and write the figures."""

from __future__ import annotations

from contextlib import nullcontext
from typing import TYPE_CHECKING, Any

from linearize.benchmark.bench import bench as measure
from linearize.benchmark.page import write_report
from linearize.jobs.checks import quiet
from linearize.runtime.files import check_space, staged_folder

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from linearize.benchmark.bench import Plan
    from linearize.recipe import Recipe


def bench(
    model: str | None,
    recipe: Recipe,
    plan: Plan,
    *,
    config: str | None = None,
    layers: int | None = None,
    dtype: str = "auto",
    output: Path | None = None,
    overwrite: bool = False,
    trust_remote_code: bool = False,
    say: Callable[[str], None] = quiet,
) -> dict[str, Any]:
    """Run `benchmark.bench` and return its facts; a page, figures and plots go into the folder `output`, if given.

    Raises:
        LinearizeError: as `benchmark.bench`, or the output cannot be written.
    """
    with nullcontext() if output is None else staged_folder(output, overwrite=overwrite) as folder:
        if output is not None:
            check_space(output, 0)
        facts = measure(
            model,
            recipe.mixer,
            plan,
            config=config,
            layers=layers,
            dtype=dtype,
            trust_remote_code=trust_remote_code,
            say=say,
        )
        if folder is not None:
            write_report(facts, folder)
    return facts
