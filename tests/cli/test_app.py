"""Manners of the command line: exit status, one-line errors, what goes to which stream, what is imported."""

from __future__ import annotations

import errno
import os
import re
import subprocess
import sys
from typing import TYPE_CHECKING, Any

import pytest
import typer

from linearize.cli import app as cli
from linearize.errors import ModelError
from linearize.runtime.interruption import Interrupted

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

PYTHON = [sys.executable, "-m", "linearize"]


def fail_with(monkeypatch: pytest.MonkeyPatch, error: BaseException) -> int:
    def command() -> None:
        raise error

    def build() -> typer.Typer:
        app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
        app.command("go")(command)
        return app

    monkeypatch.setattr(cli, "build_app", build)
    return cli.run([])


@pytest.mark.parametrize(
    ("error", "status", "said"),
    [
        (ModelError("no such\n model; try another"), 1, "error: no such model; try another\n"),
        (
            OSError(errno.ENOSPC, "No space left on device", "/out/x"),
            1,
            "error: /out/x: No space left on device; free some space, or name a folder on another disk\n",
        ),
        (
            OSError(errno.ENAMETOOLONG, "File name too long", "x" * 9),
            1,
            "error: xxxxxxxxx: File name too long; give a shorter name\n",
        ),
        (
            PermissionError(errno.EACCES, "Permission denied", "/out/x"),
            1,
            "error: /out/x: Permission denied; check the permissions, or name another path\n",
        ),
        (
            ValueError("first line\nsecond line"),
            1,
            "error: unexpected ValueError: first line; set LINEARIZE_DEBUG=1 for the traceback\n",
        ),
        (MemoryError(), 1, "error: unexpected MemoryError; set LINEARIZE_DEBUG=1 for the traceback\n"),
        (KeyboardInterrupt(), 130, ""),
        (Interrupted(15), 143, ""),
        (
            Interrupted(2, "SIGINT after step 5, which is saved"),
            130,
            "interrupted: SIGINT after step 5, which is saved\n",
        ),
        (ModelError("no\x1b[2Jthing\0"), 1, "error: no?[2Jthing?\n"),
        (typer.Abort(), 1, "error: aborted\n"),
        (typer.Exit(3), 3, ""),
        (SystemExit(4), 4, ""),
        (SystemExit("a library gave up"), 1, "error: a library gave up\n"),
        (typer.BadParameter("no good"), 2, "error: no good; run 'linearize --help' for the options\n"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, BaseException) else None,
)
def test_what_a_command_raises_becomes_a_status_and_a_line(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    error: BaseException,
    status: int,
    said: str,
) -> None:
    monkeypatch.delenv("LINEARIZE_DEBUG", raising=False)
    assert fail_with(monkeypatch, error) == status
    captured = capsys.readouterr()
    if not isinstance(error, typer.BadParameter):
        assert captured.err == said
    else:
        assert captured.err.startswith("error: ")
        assert "no good; run 'linearize --help' for the options" in captured.err
    assert captured.out == ""


def test_debug_shows_the_traceback(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("LINEARIZE_DEBUG", "1")
    assert fail_with(monkeypatch, ValueError("why")) == 1
    told = capsys.readouterr().err
    assert told.startswith("Traceback")
    assert "in command\n" in told
    assert "error: unexpected ValueError: why" in told


def test_an_error_shows_no_secret(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("HF_TOKEN", "a-token-of-another-form")
    address = "https://cdn.example/x?X-Amz-Signature=00abc&part=1"
    words = f"sent a-token-of-another-form and hf_abcdefghijklmnop to {address}"
    for debug in ("0", "1"):
        monkeypatch.setenv("LINEARIZE_DEBUG", debug)
        assert fail_with(monkeypatch, ValueError(words)) == 1
        told = capsys.readouterr().err
        assert "sent *** and *** to https://cdn.example/x?***&part=1" in told
        assert not any(secret in told for secret in ("another-form", "hf_abc", "00abc"))


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["bogus"], "error: No such command 'bogus'; run 'linearize --help' for the options"),
        (["finetun"], "error: No such command 'finetun'. Did you mean 'finetune'? run 'linearize --help'"),
        (["convert", "--outptu", "x"], "No such option: --outptu (Possible options: --output); run 'linearize convert"),
        (["recipes", "lss"], "Did you mean 'ls'? run 'linearize recipes --help' for the options"),
        (["recipes", "ls", "--bogus"], "run 'linearize recipes ls --help' for the options"),
        (["recipes", "show"], "run 'linearize recipes show --help' for the options"),
    ],
)
def test_a_wrong_command_line_exits_2(capsys: pytest.CaptureFixture[str], arguments: list[str], said: str) -> None:
    assert cli.run(arguments) == 2
    captured = capsys.readouterr()
    assert said in captured.err
    assert captured.err.count("\n") == 1
    assert captured.out == ""


def test_every_command_has_help(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run(["--help"]) == 0
    overview = capsys.readouterr().out
    for command in cli.COMMANDS:
        assert command in overview
        assert cli.run([command, "--help"]) == 0
        assert "Usage:" in capsys.readouterr().out


def test_examples_keep_their_lines(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run(["recipes", "--help"]) == 0
    # Typer colours its help on some CI services, terminal or not.
    plain = re.sub(r"\x1b\[[0-9;]*m", "", capsys.readouterr().out)
    lines = [line.strip() for line in plain.splitlines()]
    first = lines.index("Examples:")
    assert lines[first + 1 : first + 3] == ["linearize recipes ls", "linearize recipes show liger-gla"]


def every_command(command: Any, path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Any]]:
    """Each command with its path, groups first."""
    yield path, command
    for name, one in getattr(command, "commands", {}).items():
        yield from every_command(one, (*path, name))


def test_manners_are_the_same_everywhere(capsys: pytest.CaptureFixture[str]) -> None:
    names: dict[str, set[str]] = {}
    for path, command in every_command(typer.main.get_command(cli.build_app())):
        called = " ".join(("linearize", *path))
        examples = [line for line in (command.epilog or "").splitlines() if line.startswith(called)]
        assert len(examples) >= 2 or (not path and len(command.epilog.splitlines()) > 2), called
        assert command.help, called
        if hasattr(command, "commands"):
            continue
        options = {option for parameter in command.params for option in parameter.opts if option.startswith("-")}
        assert {"--quiet", "-q"} <= options, called
        assert "--json" in options or path in (("recipes", "cp"), ("recipes", "schema"), ("chat",)), called
        assert not any("_" in option for option in options), called
        for parameter in command.params:
            for short in (option for option in parameter.opts if len(option) == 2):
                names.setdefault(short, set()).add(max(parameter.opts, key=len))
        for example in examples:  # and they are not made up: each option is there
            given = {word.partition("=")[0] for word in example.split() if word.startswith("-") and len(word) > 1}
            assert given <= options, example
    assert names.pop("-m") == {"--model", "--message"}
    assert all(len(long) == 1 for long in names.values()), names


def test_quiet_leaves_data_and_errors(capfd: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    copied = tmp_path / "mine.yaml"
    assert cli.run(["recipes", "cp", "default", str(copied), "--quiet"]) == 0
    assert capfd.readouterr() == (f"{copied}\n", "")
    assert cli.run(["recipes", "cp", "default", str(copied), "-q"]) == 1
    told = capfd.readouterr()
    assert told.out == "" and told.err.startswith("error: ") and "exists already" in told.err


def test_piped_output_has_no_colour() -> None:
    plain = {name: value for name, value in os.environ.items() if name not in ("FORCE_COLOR", "GITHUB_ACTIONS")}
    for arguments in (["recipes", "ls"], ["verify", "--help"], ["bogus"]):
        done = subprocess.run([*PYTHON, *arguments], capture_output=True, text=True, env=plain)
        assert "\x1b" not in done.stdout + done.stderr and "\r" not in done.stdout + done.stderr


@pytest.mark.parametrize(
    ("typed", "offered"),
    [("fine", ["finetune"]), ("convert model --recipe liger-g", ["liger-gla", "liger-gla-h", "liger-gsa"])],
)
def test_a_shell_completes(typed: str, offered: list[str]) -> None:
    words = f"linearize {typed}"
    asked = {"_LINEARIZE_COMPLETE": "complete_bash", "COMP_WORDS": words, "COMP_CWORD": str(words.count(" "))}
    done = subprocess.run(PYTHON, capture_output=True, text=True, env={**os.environ, **asked})
    assert (done.returncode, done.stdout.split(), done.stderr) == (0, offered, "")


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run(["--version"]) == 0
    name, version = capsys.readouterr().out.split()
    assert name == "linearize"
    assert version[0].isdigit()


def test_light_commands_import_neither_torch_nor_transformers() -> None:
    program = (
        "import sys; from linearize.cli.app import run\n"
        "status = [run(line.split()) for line in sys.argv[1:]] != [0] * 3\n"
        "heavy = {'torch', 'transformers', 'numpy', 'datasets', 'matplotlib', 'jinja2'} & set(sys.modules)\n"
        "sys.exit(str(heavy) if heavy else status)"
    )
    lines = ("--help", "recipes ls", "recipes check train")
    done = subprocess.run([sys.executable, "-c", program, *lines], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")


def quietly(arguments: list[str], before: Callable[[], None] | None = None, **streams: int) -> tuple[int, str]:
    process = subprocess.Popen([*PYTHON, *arguments], stderr=subprocess.PIPE, text=True, **streams)
    if before:
        before()
    _, told = process.communicate(timeout=60)
    return process.returncode, told


def test_a_reader_that_leaves_early_is_no_complaint() -> None:
    reader, writer = os.pipe()
    os.close(reader)
    try:
        assert quietly(["recipes", "show", "default"], stdout=writer) == (1, "")
    finally:
        os.close(writer)


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full")
def test_output_that_cannot_be_written_is_an_error() -> None:
    with open("/dev/full", "w") as full:
        status, told = quietly(["recipes", "ls"], stdout=full.fileno())
    assert status == 1
    assert told.startswith("error: No space left on device")
    assert told.count("\n") == 1
