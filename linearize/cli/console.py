"""The shared part of the commands: options, and output (data on stdout, messages on stderr)."""

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
from linearize.runtime.processes import seconds_between_lines
from linearize.sources.names import on_disk

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence
    from pathlib import Path

    from linearize.recipe import Recipe

stderr = Console(stderr=True, highlight=False)
"""For progress bars and for tables that are not the command's data."""


SetOption = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="Change one key of the recipe, e.g. mixer.window=128. Repeatable."),
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON on stdout.")]
QuietOption = Annotated[bool, typer.Option("--quiet", "-q", help="Print only errors on stderr.")]
YesOption = Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")]
OverwriteOption = Annotated[bool, typer.Option("--overwrite", help="Replace the output if it exists.")]


def recipe_names(incomplete: str) -> list[str]:
    """Shipped recipes, for shell completion."""
    names = sorted(path.stem for path in shipped_folder("recipes").glob("*.yaml"))
    return [name for name in names if name.startswith(incomplete)]


def _there(model: str) -> str:
    on_disk(model)  # a wrong path is told before anything heavy is imported
    return model


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


ModelArgument = Annotated[
    str, typer.Argument(metavar="MODEL", help="A Hub id, a model's folder, or a .gguf file.", callback=_there)
]
TrustOption = Annotated[
    bool, typer.Option("--trust-remote-code", help="Run Python code from the model's repository. Off by default.")
]
TeacherOption = Annotated[
    str | None,
    typer.Option("--teacher", metavar="ID|FOLDER", help="The pretrained model, if it is not the base of MODEL."),
]
DtypeOption = Annotated[str, typer.Option("--dtype", help="auto, float32, bfloat16 or float16.")]


def status(text: str) -> None:
    """Print a message on stderr."""
    # The console keeps the line clear of a running progress bar, unlike `print`.
    stderr.print(text, markup=False, soft_wrap=True)


def write_text(text: str) -> None:
    """Write a piece of text on stdout at once."""
    sys.stdout.write(text)
    sys.stdout.flush()


@contextmanager
def silence(wanted: bool) -> Iterator[None]:
    """In this context nothing is printed on stderr; errors are printed after it."""
    if not wanted:
        yield
        return
    with open(os.devnull, "w") as nowhere, redirect_stderr(nowhere):
        yield


@contextmanager
def status_line(doing: str) -> Iterator[Callable[[str, int, int], None]]:
    """On a terminal a status line that is overwritten; elsewhere a line a minute.

    Yields:
        a function of a part's name, its steps done, and its number of steps.
    """
    line, told = stderr.status(doing), time.monotonic()

    def tick(name: str, done: int, total: int) -> None:
        nonlocal told
        words = f"{doing}: {name}" + (f", {done:,} of {total:,} steps" if done else "")
        if not stderr.is_terminal:
            if time.monotonic() - told >= seconds_between_lines():
                told = time.monotonic()
                status(words)
            return
        line.start()  # not earlier, because earlier code may ask a question or show its own bars
        line.update(words)
        if done >= total:
            line.stop()

    try:
        yield tick
    finally:
        line.stop()


def print_json(value: Any, *, lines: bool = True) -> None:
    """Print JSON on stdout. NaN and infinities become null, because JSON has neither.

    Args:
        lines: over several lines; one line is for programs that read the output of a command that goes on.
    """
    indent = 2 if lines else None
    write_text(json.dumps(_finite(value), indent=indent, ensure_ascii=False, allow_nan=False) + "\n")


def memory_words(constant: int, growth: int) -> str:
    """The memory of a sequence: `6.1 MB, whatever its length`, or `6.1 MB, and 1.5 kB per token`."""
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
        BadParameter: `text` is not a size.
    """
    with _bad_option():
        return size_in_bytes(option, text)


def command_line() -> str:
    """This call as a shell command, for reports."""
    return shlex.join(["linearize", *sys.argv[1:]])


def check_dtype(name: str, *, int8: bool = False) -> None:
    """Raises:
    BadParameter: the dtype is unknown, or int8 is not supported here.
    """
    with _bad_option("--"):
        check(name, int8=int8)


@contextmanager
def _bad_option(prefix: str = "") -> Iterator[None]:
    """Turn a `DataError` about an argument into a usage error, whose exit status is 2."""
    try:
        yield
    except DataError as error:
        raise typer.BadParameter(f"{prefix}{error}") from error


def begin(
    recipe: str, overrides: Sequence[str] | None, output: Path | None = None, *, overwrite: bool = False
) -> Recipe:
    """Read the recipe, check the output and quiet the libraries. The job makes the same checks, but only after it has
    imported torch, which takes seconds.

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
    """A command's epilog of example lines; `--help` keeps one per line."""
    return "\n".join(("Examples:", *lines))


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
