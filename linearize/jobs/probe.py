"""`linearize probe`: probe a pretrained model and write the figures."""

from __future__ import annotations

from contextlib import nullcontext
from typing import TYPE_CHECKING

from linearize.jobs.checks import quiet
from linearize.probe import run_probe
from linearize.probe.report import write_probe
from linearize.runtime.files import check_space, staged_folder
from linearize.sources.source import find_source

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from linearize.evaluation.runner import Progress
    from linearize.probe import Probe, ProbeOptions
    from linearize.recipe import Recipe


def probe(
    model: str,
    recipe: Recipe,
    options: ProbeOptions,
    *,
    output: Path | None = None,
    overwrite: bool = False,
    trust_remote_code: bool = False,
    progress: Progress,
    say: Callable[[str], None] = quiet,
    command: str = "",
) -> Probe:
    """`run_probe` on the model; its figures and report go into the folder `output`, if given.

    Raises:
        LinearizeError: as `run_probe`, or the output cannot be written.
    """
    source = find_source(model, trust_remote_code=trust_remote_code)
    with nullcontext() if output is None else staged_folder(output, overwrite=overwrite) as folder:
        if output is not None:
            check_space(output, 0)
        found = run_probe(source, recipe, options, progress=progress, say=say, command=command)
        if folder is not None:
            write_probe(found, folder)
    if output is not None:
        say(f"wrote {output / 'report.html'}")
    return found
