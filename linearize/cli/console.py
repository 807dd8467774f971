"""What every command shares: options, and where its output goes (data on stdout, words on stderr)."""

from __future__ import annotations

import json
import math
import os
import shlex
import sys
import time
from contextlib import contextmanager, redirect_stderr
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console

from linearize.cli.libraries import quiet_libraries
from linearize.errors import DataError
from linearize.jobs.checks import check_dtype as check
from linearize.jobs.checks import size_in_bytes
from linearize.report.formatting import readable_bytes
from linearize.runtime.folders import shipped_folder

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence
    from pathlib import Path

    from linearize.recipe import Recipe

stderr = Console(stderr=True, highlight=False)
"""For progress bars and tables that are not the command's data."""

_SECONDS_BETWEEN_LINES = 20.0

SetOption = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="Change one key of the recipe, e.g. mixer.window=128. Repeatable."),
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON on stdout.")]
QuietOption = Annotated[bool, typer.Option("--quiet", "-q", help="Say nothing on stderr but errors.")]
YesOption = Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")]
OverwriteOption = Annotated[bool, typer.Option("--overwrite", help="Replace the output if it exists.")]


def recipe_names(incomplete: str) -> list[str]:
    """Shipped recipes, for completion in a shell."""
    names = sorted(path.stem for path in shipped_folder("recipes").glob("*.yaml"))
    return [name for name in names if name.startswith(incomplete)]


RecipeOption = Annotated[
    str,
    typer.Option(
        "--recipe", "-r", metavar="NAME|FILE", help="A shipped recipe or a file.", autocompletion=recipe_names
    ),
]
RecipeArgument = Annotated[
    str,
    typer.Argument(metavar="RECIPE", help="A shipped recipe or a recipe file.", autocompletion=recipe_names),
]
ModelArgument = Annotated[str, typer.Argument(metavar="MODEL", help="A Hub id, a model's folder, or a .gguf file.")]
TrustOption = Annotated[
    bool, typer.Option("--trust-remote-code", help="Run Python code that the model brings. Off unless you say so.")
]
TeacherOption = Annotated[
    str | None,
    typer.Option("--teacher", metavar="ID|FOLDER", help="The pretrained model, if not what MODEL was converted from."),
]
DtypeOption = Annotated[str, typer.Option("--dtype", help="auto, float32, bfloat16 or float16.")]


def status(text: str) -> None:
    """Say something to the person at the terminal."""
    # Not a print: on a terminal the console keeps the line clear of a running progress bar.
    stderr.print(text, markup=False, soft_wrap=True)


@contextmanager
def silence(wanted: bool) -> Iterator[None]:
    """Keeps words and progress off stderr for a while; an error is told after it."""
    if not wanted:
        yield
        return
    with open(os.devnull, "w") as nowhere, redirect_stderr(nowhere):
        yield


@contextmanager
def status_line(doing: str) -> Iterator[Callable[[str, int, int], None]]:
    """On a terminal a line that says how far something is, written over; elsewhere a line now and then.

    Yields:
        what to call with a part's name, its steps that are done, and how many there are.
    """
    line, told = stderr.status(doing), time.monotonic()

    def tick(name: str, done: int, total: int) -> None:
        nonlocal told
        words = f"{doing}: {name}" + (f", {done:,} of {total:,} steps" if done else "")
        if not stderr.is_terminal:
            if time.monotonic() - told >= _SECONDS_BETWEEN_LINES:
                told = time.monotonic()
                status(words)
            return
        line.start()  # not before: what comes first may ask, or show bars of its own
        line.update(words)
        if done >= total:
            line.stop()

    try:
        yield tick
    finally:
        line.stop()


def print_json(value: Any) -> None:
    """Print JSON on stdout. NaN and infinities, which JSON does not have, become null."""
    sys.stdout.write(json.dumps(_finite(value), indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def memory_words(constant: int, growth: int) -> str:
    """A sequence's memory: `6.1 MB, whatever its length`, or `6.1 MB, and 1.5 kB per token`."""
    return readable_bytes(constant) + (
        f", and {readable_bytes(growth)} per token" if growth else ", whatever its length"
    )


Int8Option = Annotated[
    str,
    typer.Option(
        "--dtype", help="auto, float32, bfloat16 or float16; or int8, which keeps linear layers as int8 (on a CPU)."
    ),
]


def parse_size(text: str, option: str) -> int:
    """`5GB` as bytes.

    Raises:
        BadParameter: not a size.
    """
    with _bad_option():
        return size_in_bytes(option, text)


def command_line() -> str:
    """This call, as it could be typed again; reports keep it."""
    return shlex.join(["linearize", *sys.argv[1:]])


def check_dtype(name: str, *, int8: bool = False) -> None:
    """Raises:
    BadParameter: no such dtype, or int8 where that is not offered.
    """
    with _bad_option("--"):
        check(name, int8=int8)


@contextmanager
def _bad_option(prefix: str = "") -> Iterator[None]:
    """Turns an argument that a job refuses into a wrong command line, whose exit status is 2."""
    try:
        yield
    except DataError as error:
        raise typer.BadParameter(f"{prefix}{error}") from error


def begin(
    recipe: str, overrides: Sequence[str] | None, output: Path | None = None, *, overwrite: bool = False
) -> Recipe:
    """Read the recipe and check the output early, because a job does so only after the import of torch, which takes
    seconds; then quiet the libraries.

    Raises:
        RecipeError: the recipe is not valid.
        OutputError: the output cannot be written.
    """
    from linearize.recipe import load_recipe
    from linearize.runtime.files import check_free

    settings = load_recipe(recipe, overrides or ())
    if output is not None:
        check_free(output, overwrite=overwrite)
    quiet_libraries()
    return settings


def examples(*lines: str) -> str:
    """A command's epilog of example lines, kept one to a line under `--help`."""
    return "\n".join(("Examples:", *lines))


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
