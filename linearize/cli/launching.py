"""Options that run a command in several processes: each process runs the same command without these options."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

LaunchOption = Annotated[
    int | None,
    typer.Option("--launch", metavar="N", min=1, help="Run in N processes on this machine, one to a GPU."),
]
AccelerateOption = Annotated[
    Path | None,
    typer.Option(
        "--accelerate-config",
        metavar="FILE",
        help="Start by `accelerate launch` with this configuration; run it on each of several machines.",
    ),
]


def launched(processes: int | None, configuration: Path | None) -> int:
    """Run this command in several processes, and return their exit status."""
    from linearize.runtime.processes import count, launch, launch_with

    if processes is not None and configuration is not None:
        raise typer.BadParameter("--launch and --accelerate-config: give one of them")
    if count() > 1:
        raise typer.BadParameter("--launch: this is one of several processes already; leave it out")
    rest = _without(sys.argv[1:], "--launch", "--accelerate-config")
    if configuration is None:
        return launch(processes or 1, rest)
    if not configuration.is_file():
        raise typer.BadParameter(f"--accelerate-config {configuration}: no such file; `accelerate config` writes one")
    return launch_with(configuration, rest)


def _without(arguments: list[str], *options: str) -> list[str]:
    """A command line without these options and their values."""
    kept: list[str] = []
    skip = False
    for argument in arguments:
        if skip:
            skip = False
        elif argument in options:
            skip = True
        elif not argument.startswith(tuple(f"{option}=" for option in options)):
            kept.append(argument)
    return kept
