"""The command line: collects the commands, and turns exceptions into an exit status and at most one line."""

from __future__ import annotations

import errno
import functools
import inspect
import os
import re
import sys
import traceback
from importlib import import_module
from typing import TYPE_CHECKING, Annotated, Any

import typer

from linearize import __version__
from linearize.cli.console import QuietOption, examples, silence
from linearize.errors import LinearizeError
from linearize.runtime.interruption import Interrupted, unwinding

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

COMMANDS = {
    "inspect": "inspect",
    "probe": "probe",
    "convert": "convert",
    "finetune": "finetune",
    "eval": "evaluate",
    "compare": "compare",
    "generate": "generate",
    "chat": "chat",
    "serve": "serve",
    "verify": "verify",
    "export": "export",
    "push": "push",
    "bench": "bench",
    "recipes": "recipes",
    "data": "data",
    "run": "run",
    "demo": "demo",
    "cache": "cache",
    "doctor": "doctor",
}
"""Each command and its module in this package.

The module has a Typer `app` (a group of commands), or a function with the module's name and optionally an `EPILOG`.
"""

# Depending on its version, Typer bundles click or depends on it; this is the base of their errors in both cases.
_CommandLineError: type[Exception] = next(
    kind for kind in typer.BadParameter.__mro__ if kind.__name__ == "ClickException"
)

_DISK_HINTS = {
    errno.ENOSPC: "free some space, or name a folder on another disk",
    errno.EDQUOT: "free some space, or name a folder on another disk",
    errno.EROFS: "name a folder that can be written to",
    errno.EACCES: "check the permissions, or name another path",
    errno.EPERM: "check the permissions, or name another path",
    errno.ENAMETOOLONG: "give a shorter name",
}


def build_app() -> typer.Typer:
    """The whole command line."""
    app = typer.Typer(
        name="linearize",
        help="Turn a pretrained transformer language model into a gated linear-recurrent one.",
        epilog=examples(
            "linearize demo",
            "linearize run default --set model=HuggingFaceTB/SmolLM2-135M-Instruct",
            "linearize COMMAND --help",
        ),
        no_args_is_help=True,
        pretty_exceptions_enable=False,
        context_settings={"help_option_names": ["-h", "--help"]},
    )
    app.callback()(_options)
    for name, module_name in COMMANDS.items():
        module = import_module(f"linearize.cli.{module_name}")
        group = getattr(module, "app", None)
        if isinstance(group, typer.Typer):
            for command in group.registered_commands:
                command.callback = _with_quiet(command.callback)
                command.help = _paragraphs(command.callback.__doc__)
            app.add_typer(group, name=name)
        else:
            callback = _with_quiet(getattr(module, module_name))
            app.command(name, help=_paragraphs(callback.__doc__), epilog=getattr(module, "EPILOG", None))(callback)
    return app


def _paragraphs(docstring: str | None) -> str:
    """A docstring with one line per paragraph, because Typer prints line breaks unchanged."""
    paragraphs = inspect.cleandoc(docstring or "").split("\n\n")
    return "\n\n".join(" ".join(paragraph.split()) for paragraph in paragraphs)


def _with_quiet(command: Callable[..., Any] | None) -> Callable[..., Any]:
    """The command with the option `--quiet`, which all commands have."""
    assert command is not None  # noqa: S101 - registered commands have one
    if hasattr(command, "__wrapped__"):  # a group keeps its wrapped commands when `build_app` runs again
        return command

    @functools.wraps(command)
    def run(*arguments: Any, quiet: bool = False, **options: Any) -> Any:
        with silence(quiet):
            return command(*arguments, **options)

    signature = inspect.signature(command, eval_str=True)
    option = inspect.Parameter("quiet", inspect.Parameter.KEYWORD_ONLY, default=False, annotation=QuietOption)
    run.__signature__ = signature.replace(parameters=[*signature.parameters.values(), option])  # type: ignore[attr-defined]
    run.__annotations__ = {**command.__annotations__, "quiet": QuietOption}
    return run


def _show_version(wanted: bool) -> None:
    if wanted:
        print(f"linearize {__version__}")
        raise typer.Exit


def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    """Options of the command line itself; `--version` acts in its callback."""


def run(arguments: Sequence[str] | None = None) -> int:
    """Run one command line (default: the process's own) and return its exit status.

    0 success; 1 an error, printed as one line on stderr; 2 an invalid command line; 130 interrupted, 143 terminated.
    """
    if sys.stdout is None or sys.stderr is None:
        return _closed_streams()
    try:
        with unwinding():
            status = build_app()(
                args=None if arguments is None else list(arguments), prog_name="linearize", standalone_mode=False
            )
        # Flush here, so that a closed pipe raises BrokenPipeError while it can still be handled.
        sys.stdout.flush()
    except SystemExit as exit_:
        # Typer exits with 1 when the reader of stdout has closed the pipe; a library may exit with a message.
        if isinstance(exit_.code, str):
            _say(exit_.code)
            return 1
        return _status(exit_.code)
    except BrokenPipeError:
        return _closed_pipe()
    except KeyboardInterrupt:
        return 130
    except Interrupted as stop:
        if str(stop):
            print(f"interrupted: {stop}", file=sys.stderr)
        return stop.status
    except Exception as error:
        return _report(error)
    return _status(status)


def _status(returned: object) -> int:
    # Outside standalone mode Typer returns the status of an Exit, or otherwise the command's return value.
    return returned if isinstance(returned, int) else 0


def _closed_streams() -> int:
    # With `>&-` the next opened file would get the descriptor of stdout, and prints would go into it.
    if sys.stderr is not None:
        _say("stdout is closed, so there is nowhere to print to; leave it open, or pass > /dev/null")
    return 1


def _closed_pipe() -> int:
    # Redirect the buffered rest to devnull, because Python otherwise prints an error at shutdown.
    with open(os.devnull, "w") as nowhere:
        os.dup2(nowhere.fileno(), sys.stdout.fileno())
    return 1


def _report(error: Exception) -> int:
    if os.environ.get("LINEARIZE_DEBUG") == "1":
        print(_without_secrets("".join(traceback.format_exception(error))), end="", file=sys.stderr)
    if isinstance(error, typer.Abort):
        _say("aborted")
        return 130 if isinstance(error.__cause__, KeyboardInterrupt) else 1
    if isinstance(error, _CommandLineError):
        return _report_usage(error)
    # The kernels package cannot import our errors, so its user error is recognised by name.
    if isinstance(error, LinearizeError) or type(error).__name__ == "UnknownKernelsError":
        _say(str(error))
    elif isinstance(error, OSError) and error.errno in _DISK_HINTS:
        where = f"{error.filename}: " if error.filename else ""
        _say(f"{where}{error.strerror}; {_DISK_HINTS[error.errno]}")
    elif isinstance(error, RuntimeError) and "by peer" in str(error):  # Gloo: "Connection closed by peer"
        _say("another process of this run ended, and this one cannot go on without it; see the error of that one")
    else:
        first = next(iter(str(error).strip().splitlines()), "")
        message = f": {first}" if first else ""
        _say(f"unexpected {type(error).__name__}{message}; set LINEARIZE_DEBUG=1 for the traceback")
    return 1


def _report_usage(error: Exception) -> int:
    message = error.format_message()  # type: ignore[attr-defined]
    context = getattr(error, "ctx", None)
    if type(error).__name__ != "NoArgsIsHelpError":
        command = context.command_path if context else "linearize"
        sentence = message if message.endswith("?") else message.rstrip(".") + ";"
        _say(f"{sentence} run '{command} --help' for the options")
    elif message:
        print(message, file=sys.stderr)
    return int(getattr(error, "exit_code", 2))


def _say(message: str) -> None:
    # File names can contain escape sequences, which a terminal would execute.
    line = "".join(char if char.isprintable() else "?" for char in _without_secrets(" ".join(message.split())))
    print(f"error: {line}", file=sys.stderr)


# Access tokens, and the parts of signed storage URLs that grant access.
_SECRETS = re.compile(r"\bhf_[A-Za-z0-9]{8,}|(?<=[?&])(?i:[\w-]*(?:signature|credential|token))=[^&\s'\"]+")


def _without_secrets(text: str) -> str:
    token = os.environ.get("HF_TOKEN")
    return _SECRETS.sub("***", text.replace(token, "***") if token else text)
