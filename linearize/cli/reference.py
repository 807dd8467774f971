"""The reference of the command line, generated from the commands:
`python -m linearize.cli.reference > docs/cli.md`."""

from __future__ import annotations

import inspect
import textwrap
from typing import TYPE_CHECKING, Any

import typer

from linearize.cli.app import build_app

if TYPE_CHECKING:
    from collections.abc import Iterator

_HEAD = """# The commands

Generated from the code by `make docs`; a test compares them. Data go to stdout, messages and progress to stderr. The
exit status is 0 on success, 1 for an error (one line, with the next step), 2 for an invalid command line, and 130 after
an interruption. `LINEARIZE_DEBUG=1` shows tracebacks.

Options that many commands share: `--output`/`-o` names the output, `--recipe`/`-r` a shipped recipe or a file,
`--set KEY=VALUE` changes one of its keys, `--json` prints data for programs, `--quiet`/`-q` prints only errors on
stderr, `--yes`/`-y` does not ask, `--overwrite` replaces an earlier result, `--trust-remote-code` runs a model's own
Python code. `linearize --install-completion` lets your shell complete commands, options and recipes.
"""


def reference() -> str:
    """The page as Markdown."""
    command = typer.main.get_command(build_app())
    parts = [_HEAD]
    for path, one in _commands(command, ("linearize",)):
        parts.append(_section(path, one))
    return "\n".join(parts)


def _commands(command: Any, path: tuple[str, ...]) -> Iterator[tuple[tuple[str, ...], Any]]:
    for name, one in getattr(command, "commands", {}).items():
        yield (*path, name), one
        yield from _commands(one, (*path, name))


def _section(path: tuple[str, ...], command: Any) -> str:
    name = " ".join(path)
    paragraphs = inspect.cleandoc(command.help or "").split("\n\n")
    about = "\n\n".join(textwrap.fill(one, 120, break_on_hyphens=False, break_long_words=False) for one in paragraphs)
    lines = ["#" * len(path) + f" {name}", "", about, ""]
    arguments = [one for one in command.params if one.param_type_name == "argument"]
    options = [one for one in command.params if one.param_type_name == "option" and one.name != "help"]
    if not hasattr(command, "commands"):
        words = [_word(one) for one in arguments]
        lines += ["```text", " ".join([name, *words, *(("[OPTIONS]",) if options else ())]), "```", ""]
        lines += ["| | |", "|---|---|"]
        lines += [f"| `{_word(one)}` | {_cell(one.help or '')} |" for one in arguments]
        lines += [f"| {_names(one)} | {_cell(one.help or '')}{_default(one)} |" for one in options]
        lines.append("")
    examples = [line for line in (command.epilog or "").splitlines() if line.startswith("linearize")]
    if examples:
        lines += ["```text", *examples, "```", ""]
    return "\n".join(lines)


def _word(argument: Any) -> str:
    name = argument.metavar or argument.name.upper()
    word = f"{name}..." if argument.nargs == -1 else name
    return word if argument.required else f"[{word}]"


def _names(option: Any) -> str:
    names = ", ".join(f"`{name}`" for name in (*option.opts, *option.secondary_opts))
    kind = (option.metavar or _kind(option)).replace("|", " or ")
    return names if option.is_flag else f"{names} `{kind}`"


def _kind(option: Any) -> str:
    # A Typer that bundles click gives the type by annotation, others by click's type.
    described = getattr(option, "type_descriptor", None)
    name = str(described.annotation.__name__ if described else option.type.name)
    return {"int": "N", "integer": "N", "float": "X"}.get(name, "TEXT")


def _default(option: Any) -> str:
    shown = option.default is not None and not option.is_flag and option.show_default
    if not shown or callable(option.default) or option.default in ("", [], ()):
        return ""
    return f" Default: `{option.default}`."


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|")


if __name__ == "__main__":
    print(reference(), end="")
