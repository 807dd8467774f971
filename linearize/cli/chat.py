"""`linearize chat`: a conversation in the terminal."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from linearize.cli.console import (
    Int8Option,
    ModelArgument,
    TrustOption,
    check_dtype,
    examples,
    status,
    write_text,
)
from linearize.cli.decoding import SystemOption, decodes
from linearize.cli.libraries import quiet_libraries
from linearize.errors import DataError, LinearizeError, hint_for
from linearize.generation.decoding import Decoding
from linearize.report.formatting import readable_bytes
from linearize.runtime.interruption import Interrupted, Postponed

if TYPE_CHECKING:
    from linearize.jobs.chat import Conversation

EPILOG = examples(
    "linearize chat ./tuned",
    'linearize chat ./tuned --system "Answer in one sentence." --temperature 0.7 --top-p 0.9',
    "linearize chat ./tuned --load-state manual.state",
)

_COMMANDS = {
    "/save": "FILE: save the state of the conversation",
    "/load": "FILE: go on with a saved state",
    "/reset": "begin a new conversation",
    "/system": "TEXT: begin a new conversation with this system prompt, or with none",
    "/stats": "tokens, memory and speed",
    "/help": "this list",
    "/quit": "end; so does Ctrl-D",
}


@decodes
def chat(
    model: ModelArgument,
    system: SystemOption = None,
    decoding: Decoding = Decoding(),  # noqa: B008 - frozen; its options come from `decodes`
    load_state: Annotated[
        Path | None,
        typer.Option("--load-state", metavar="FILE", help="Go on with the conversation, or the text, of a state."),
    ] = None,
    dtype: Int8Option = "auto",
    trust_remote_code: TrustOption = False,
) -> None:
    """Talk with a model. Answers go to stdout as they are written.

    The history is kept in the model's state, so a turn reads its own text
    alone and memory stays constant. A model that was not converted keeps its
    growing cache instead, and cannot save it.

    Lines come from the terminal, or from a pipe: one turn per line; a
    backslash at its end goes on to the next. Ctrl-C ends an answer, and the
    conversation goes on. /help lists the commands: /save, /load, /reset,
    /system, /stats, /quit.
    """
    check_dtype(dtype, int8=True)
    if decoding.max_new_tokens == 0:
        raise typer.BadParameter("-n 0 writes no answer")
    quiet_libraries()
    from linearize.jobs.chat import Conversation

    with_model = Conversation(model, decoding, system=system, dtype=dtype, trust_remote_code=trust_remote_code)
    if load_state is not None:
        status(f"state of {with_model.load(load_state):,} tokens loaded: {load_state}")
    if sys.stdin.isatty():
        status("/help lists the commands, /quit ends")
        import readline  # noqa: F401 - gives `input` a history and keys to edit a line
    failed = False
    while (text := _turn()) is not None:
        try:
            failed = False
            if text.startswith("/"):
                if _command(with_model, *text.partition(" ")[::2]):
                    break
            elif text:
                _answer(with_model, text)
        except LinearizeError as error:
            status(f"error: {error}")
            failed = True
    if failed and not sys.stdin.isatty():
        raise typer.Exit(1)


def _turn() -> str | None:
    """The next turn of the user; None at the end of the input."""
    lines: list[str] = []
    while True:
        try:
            line = _line("> " if not lines else "... ")
        except EOFError:
            return "\n".join(lines) or None
        except KeyboardInterrupt:
            if not sys.stdin.isatty():
                raise
            # One that comes after the answer's last token must not end the conversation.
            sys.stderr.write("\n")
            status("/quit or Ctrl-D ends")
            lines.clear()
            continue
        if not line.endswith("\\"):
            return "\n".join([*lines, line]).strip()
        lines.append(line[:-1])


def _line(prompt: str) -> str:
    if not sys.stdin.isatty():
        prompt = ""
    elif not sys.stdout.isatty():  # stdout is data then
        sys.stderr.write(prompt)
        sys.stderr.flush()
        prompt = ""
    try:
        return input(prompt)
    except UnicodeDecodeError as error:
        raise DataError("the input is not UTF-8 text") from error


def _answer(conversation: Conversation, text: str) -> None:
    with Postponed() as stop:
        conversation.say(text, write_text, lambda: stop.signum is not None)
    sys.stdout.write("\n")
    sys.stdout.flush()
    last = conversation.last
    if last is not None and last.last_position is not None:
        status(f"stopped at position {last.last_position:,}, the last that the model has learned")
    if stop.signum is not None:
        import signal

        if stop.signum != signal.SIGINT or not sys.stdin.isatty():
            raise Interrupted(stop.signum)
        status("interrupted; the conversation goes on")


def _command(conversation: Conversation, name: str, rest: str) -> bool:
    """Run a command of the conversation; True ends it."""
    rest = rest.strip()
    if name not in _COMMANDS:
        raise DataError(f"{name}: is not a command; {hint_for(name, _COMMANDS)}")
    if name in ("/save", "/load"):
        if not rest:
            raise DataError(f"{name}: name a file, {name} FILE")
        path = Path(rest).expanduser()
        if name == "/save":
            status(f"state of {conversation.tokens:,} tokens, {readable_bytes(conversation.save(path))} saved: {path}")
        else:
            status(f"state of {conversation.load(path):,} tokens loaded: {path}")
    elif name == "/reset":
        conversation.reset(conversation.system)
        status("a new conversation")
    elif name == "/system":
        conversation.reset(rest or None)
        status("a new conversation with " + ("this system prompt" if rest else "no system prompt"))
    elif name == "/stats":
        _stats(conversation)
    elif name == "/help":
        for command, about in _COMMANDS.items():
            status(f"{command:8} {about}")
    return name == "/quit"


def _stats(conversation: Conversation) -> None:
    words = f"{conversation.tokens:,} tokens in the conversation, memory {readable_bytes(conversation.memory_bytes)}"
    if (last := conversation.last) is not None:
        words += (
            f", {'constant' if last.constant else 'and growing'}; the last turn: {last.prompt_tokens:,} tokens read "
        )
        words += f"in {last.prefill_seconds:.2f} s, {last.new_tokens:,} written at {last.tokens_per_second:.1f} tok/s"
    status(words)
