"""`linearize chat`, from a pipe and in a terminal."""

from __future__ import annotations

import io
import os
import pty
import re
import select
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from linearize.cli.app import run
from tests.serving.conftest import chatty as chatty


@pytest.fixture
def talk(chatty: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch):
    """Runs a conversation; gives its status, stdout and stderr."""

    def call(lines: str, *options: object, model: Path = chatty) -> tuple[int, str, str]:
        capfd.readouterr()
        monkeypatch.setattr("sys.stdin", io.StringIO(lines))
        status = run(["chat", str(model), "-n", "12", "--stop", "\n", *map(str, options)])  # an answer is a line
        return status, *capfd.readouterr()

    return call


def test_the_history_is_kept_and_nothing_is_read_twice(talk) -> None:
    status, text, words = talk("A dog ran home .\n/stats\nAnd then ?\n/stats\n")
    assert status == 0 and text.count("\n") == 2, words
    pattern = r"(\d+) tokens in .*?; the last turn: (\d+) tokens read in .*?, (\d+) written"
    (first, one, new), (second, two, more) = (tuple(map(int, found)) for found in re.findall(pattern, words))
    memory = set(re.findall(r"memory ([\d.]+ \w+), constant", words))
    assert first == one + new and second == first + two + more and len(memory) == 1


def test_a_conversation_is_saved_and_goes_on(talk, tmp_path: Path) -> None:
    state = tmp_path / "a.state"
    whole = talk("A dog ran home .\nAnd then ?\n")[1].splitlines()
    status, text, words = talk(f"A dog ran home .\n/save {state}\n/reset\nAnd then ?\n/load {state}\nAnd then ?\n")
    assert status == 0 and "saved" in words and "a new conversation" in words, words
    assert text.splitlines()[::2] == whole
    assert talk("And then ?\n", "--load-state", state)[1].splitlines() == whole[1:]


def test_system_prompts_and_stop_strings(talk) -> None:
    plain = talk("A dog ran home .\n")[1]
    system = talk("A dog ran home .\n", "--system", "The cat is big .")[1]
    assert system != plain
    status, text, words = talk("/system The cat is big .\nA dog ran home .\n/system\nA dog ran home .\n")
    assert status == 0 and text == system + plain, words
    word = plain.split()[3]
    assert talk("A dog ran home .\n", "--stop", word)[1].rstrip("\n") == plain[: plain.index(word)]
    assert talk("A dog \\\nran home .\n")[0] == 0


def test_errors_are_lines_and_the_conversation_goes_on(talk, tmp_path: Path) -> None:
    status, text, words = talk(
        f"/sav\n/save\n/save {tmp_path / 'a'}\n/load {tmp_path / 'b'}\n/help\nA dog ran home .\n/nothing"
    )
    assert status == 1 and text.count("\n") == 1  # the last line failed
    assert "error: /sav: is not a command; did you mean /save" in words and "error: /save: name a file" in words
    assert "error: nothing was said yet" in words and "b: no such file" in words and "/quit    end" in words
    assert talk("A dog ran home .\n/quit\n/nothing")[0] == 0


def test_what_cannot_be_a_conversation_is_refused(talk, tiny_folder: Path) -> None:
    status, _, words = talk("Hi\n", model=tiny_folder)
    assert status == 1 and "its tokenizer has no chat template" in words
    assert "run linearize generate without --chat" in words
    status, _, words = talk("\udcff\n")
    assert status == 1 and "error: the prompt is not UTF-8 text" in words
    for options, told in ((("-n", 0), "-n 0 writes no answer"), (("--temperature", "nan"), "--temperature nan")):
        status, _, words = talk("Hi\n", *options)
        assert status == 2 and told in words


def test_a_model_that_was_not_converted_talks_and_saves_nothing(talk, chatty, tiny_folder, tmp_path: Path) -> None:
    plain = tmp_path / "plain"
    plain.mkdir()
    for path in tiny_folder.iterdir():
        (plain / path.name).write_bytes(path.read_bytes())
    (plain / "tokenizer_config.json").write_bytes((chatty / "tokenizer_config.json").read_bytes())
    status, text, words = talk(f"A dog ran home .\nAnd then ?\n/stats\n/save {tmp_path / 'a'}\n/quit\n", model=plain)
    assert status == 0 and text.count("\n") == 2 and "and growing" in words
    assert "is not a converted model, so it has no state" in words and not (tmp_path / "a").exists()


class Terminal:
    """A conversation in a terminal of its own."""

    def __init__(self, *arguments: str) -> None:
        self.end, own = pty.openpty()
        command = [sys.executable, "-m", "linearize", "chat", *arguments]
        environment = {**os.environ, "TERM": "dumb"}
        # A shell's background job, and so a test run in one, ignores interrupts.
        heed = signal.signal(signal.SIGINT, signal.default_int_handler)
        self.process = subprocess.Popen(
            command, stdin=own, stdout=own, stderr=own, env=environment, start_new_session=True
        )
        signal.signal(signal.SIGINT, heed)
        os.close(own)
        self.shown = ""

    def close(self) -> None:
        self.process.kill()
        self.process.wait()
        os.close(self.end)

    def type(self, text: str) -> None:
        os.write(self.end, text.encode())

    def interrupt(self) -> None:
        """Interrupt until it is heeded: readline misses a signal between its last output and its wait for a key."""
        ready = False
        while not ready:
            os.kill(self.process.pid, signal.SIGINT)
            ready = bool(select.select([self.end], [], [], 10)[0])

    def until(self, what: str, seconds: float = 300) -> str:
        """The output up to `what`, a pattern."""
        deadline = time.monotonic() + seconds
        while not (found := re.search(what, self.shown)):
            ready, _, _ = select.select([self.end], [], [], max(deadline - time.monotonic(), 0))
            assert ready, f"{what!r} is not in {self.shown!r}"
            self.shown = (self.shown + os.read(self.end, 4096).decode()).replace("\r\n", "\n")
        seen, self.shown = self.shown[: found.end()], self.shown[found.end() :]
        return seen


@pytest.fixture
def terminal_of():
    """Starts conversations in terminals, and ends them."""
    opened: list[Terminal] = []

    def start(*arguments: str) -> Terminal:
        opened.append(Terminal(*arguments))
        return opened[-1]

    yield start
    for one in opened:
        one.close()


@pytest.mark.check
def test_a_conversation_in_a_terminal(chatty: Path, tmp_path: Path, talk, terminal_of) -> None:
    expected = talk("A dog ran home .\n")[1]
    terminal = terminal_of(str(chatty), "-n", "12", "--stop", "\n")
    terminal.until("/help lists the commands, /quit ends\n> ")
    terminal.type("A dog ran home .\n")
    assert expected in terminal.until("> ")
    terminal.type("/stats\n")
    assert "tok/s" in terminal.until("> ") and terminal.process.poll() is None
    terminal.type(f"/save {tmp_path / 'a.state'}\n")
    terminal.until("saved: .*\n> ")
    terminal.type("And then ?\n")
    second = terminal.until("> ")
    terminal.type("/reset\n")
    terminal.until("a new conversation.*\n> ")
    terminal.type("A dog ran home .\n")
    assert expected in terminal.until("> ")
    terminal.type(f"/load {tmp_path / 'a.state'}\n")
    terminal.until("> ")
    terminal.type("And then ?\n")
    assert terminal.until("> ") == second
    terminal.type("/system The cat is big .\n")
    terminal.until("> ")
    terminal.type("A dog ran home .\n")
    assert talk("A dog ran home .\n", "--system", "The cat is big .")[1] in terminal.until("> ")
    terminal.type("\x04")
    assert terminal.process.wait(timeout=120) == 0


@pytest.mark.check
def test_an_interrupt_ends_the_answer_and_not_the_conversation(chatty: Path, terminal_of) -> None:
    terminal = terminal_of(str(chatty), "-n", "100000000")
    terminal.until("> ")
    terminal.type("A dog ran home .\n")
    terminal.until(r"(?s)home \.\n.{20}")  # the echo, and the beginning of the answer
    terminal.interrupt()
    terminal.until("interrupted; the conversation goes on\n> ")
    terminal.type("/stats\n")
    assert int(re.search(r"([\d,]+) tokens in the", terminal.until("> "))[1].replace(",", "")) > 8
    terminal.type("a line that is not sent")
    terminal.until("not sent")
    terminal.interrupt()
    terminal.until("/quit or Ctrl-D ends\n> ")
    terminal.type("/quit\n")
    assert terminal.process.wait(timeout=120) == 0
