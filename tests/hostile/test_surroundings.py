"""A hostile place to run in: no home, closed streams, a cache that cannot be written, no network."""

from __future__ import annotations

import json
import pwd
import re
import socket
import subprocess
import sys
from typing import TYPE_CHECKING, Any, NoReturn

import pytest
import yaml

from linearize.checkpoint.card import model_card
from linearize.cli.app import run
from tests.conftest import random_llama

if TYPE_CHECKING:
    from pathlib import Path


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return random_llama(tmp_path_factory.mktemp("plain"))


@pytest.fixture
def texts(tmp_path: Path) -> Path:
    path = tmp_path / "texts.txt"
    path.write_text("\n\n".join(f"Once upon a time there were {n} small cats and a dog." for n in range(200)))
    return path


def one_line(capfd: pytest.CaptureFixture[str], *arguments: object) -> str:
    """What the command says on its way out; it has to be one line."""
    capfd.readouterr()
    assert run([str(argument) for argument in arguments]) == 1
    text, words = capfd.readouterr()
    errors = [line for line in words.splitlines() if line.startswith("error: ")]
    assert text == "" and len(errors) == 1 and words.endswith(f"{errors[0]}\n"), words
    assert "unexpected" not in errors[0], errors[0]
    return errors[0]


@pytest.mark.parametrize("closed", [">&-", "2>&-", ">&- 2>&-"])
def test_closed_streams_end_it_before_any_work(closed: str) -> None:
    shell = f'"{sys.executable}" -m linearize recipes ls {closed}'
    done = subprocess.run(["bash", "-c", shell], capture_output=True, text=True)
    assert done.returncode == 1 and done.stdout == ""
    told = "error: stdout is closed, so there is nowhere to print to; leave it open, or pass > /dev/null\n"
    assert done.stderr == ("" if "2>" in closed else told)


def test_without_a_home_the_user_is_told_what_to_set(capfd, plain, tmp_path, monkeypatch):
    def nobody(_: int) -> NoReturn:
        raise KeyError("getpwuid(): uid not found")

    for name in ("HOME", "XDG_CACHE_HOME", "LINEARIZE_CACHE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(pwd, "getpwuid", nobody)
    told = one_line(capfd, "eval", plain, "--tasks", "passkey", "--lengths", "64", "--samples", "1", "--data", tmp_path)
    assert "there is no home folder to keep results in; set HOME, or LINEARIZE_CACHE" in told
    # What keeps nothing does not need one.
    assert run(["convert", str(plain), "-o", str(tmp_path / "out"), "-r", "window-gla"]) == 0


def test_a_cache_that_cannot_be_written_is_told(capfd, plain, texts, monkeypatch):
    monkeypatch.setenv("LINEARIZE_CACHE", str(texts / "cache"))
    (texts.parent / "wikitext2").mkdir()
    (texts.parent / "wikitext2" / "wiki.test.raw").write_text(" = A dog = \n\n Once upon a time , a dog .\n" * 9)
    told = one_line(capfd, "eval", plain, "--tasks", "wikitext2", "--data", texts.parent)
    assert "results cannot be kept there: Not a directory; set LINEARIZE_CACHE" in told


@pytest.fixture
def no_network(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Sockets cannot be made, and names not be resolved; the list gets what was tried."""
    tried: list[str] = []

    def refuse(*arguments: Any, **_: Any) -> NoReturn:
        tried.append(str(arguments))
        raise OSError(101, "Network is unreachable")

    for name in ("connect", "connect_ex", "sendto", "bind"):
        monkeypatch.setattr(socket.socket, name, refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    monkeypatch.setattr(socket, "create_connection", refuse)
    return tried


@pytest.mark.check
def test_every_local_command_works_without_a_network(capfd, plain, texts, tmp_path, monkeypatch, no_network):
    monkeypatch.setenv("LINEARIZE_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    changes = (
        f"model={plain}", "mixer.window=16", f"stages.0.data.source={texts}", "stages.0.data.tokens=256",
        "stages.0.data.held_out=1", "stages.0.length=64", "stages.0.batch_tokens=128",
    )  # fmt: skip
    settings = [word for change in changes for word in ("--set", change)]
    converted, tuned, state = tmp_path / "converted", tmp_path / "tuned", tmp_path / "a.state"
    lines: list[list[object]] = [
        ["doctor"],
        ["recipes", "ls", "--model", plain],
        ["inspect", plain, "--recurrence", "all"],
        ["convert", plain, "-o", converted, "-r", "window-gla", "--set", "mixer.window=16"],
        ["finetune", "window-gla", "-o", tuned, *settings],
        ["eval", tuned, "--baseline", "all", "--report", tmp_path / "report"],
        ["eval", tuned, "--baseline", "none", "--report", tmp_path / "again"],
        ["compare", tmp_path / "report", tmp_path / "again"],
        ["finetune", "window-gla", "--dry-run", *settings],
        ["export", tuned, tmp_path / "shared", "--base", "acme/tiny"],
        ["push", "me/tiny", tmp_path / "shared", "--dry-run"],
        ["generate", tuned, "Once", "-n", "3", "--save-state", state],
        ["generate", tuned, "upon", "-n", "3", "--load-state", state],
        ["verify", converted, "--tokens", "64", "--steps", "40"],
        ["bench", converted, "--lengths", "64", "--steps", "2", "--repeats", "1"],
        ["run", "window-gla", "-o", tmp_path / "run", *settings],
    ]
    for line in lines:
        assert run([str(word) for word in line]) == 0, (line, capfd.readouterr().err)
    assert no_network == []


UNREACHED = (
    "owner/model: no local folder or file of this name, and the Hub cannot be reached to look for it there; check the "
    "name, or the network, or fetch it where there is one (hf download) and name the folder"
)
SHORT = [
    "--set", "model={plain}", "--set", "mixer.window=16", "--set", "stages.0.length=64", "--set",
    "stages.0.batch_tokens=128", "--set", "stages.0.data.tokens=256",
]  # fmt: skip


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        *(([*command, "owner/model", *more], UNREACHED) for command, *more in (
            [["inspect"]], [["generate"], "x"], [["convert"], "-o", "out"], [["probe"]], [["eval"]], [["verify"]],
            [["bench"]],
        )),
        (["finetune", "window-gla", "-o", "out", "--set", "model=owner/model"], UNREACHED),
        (["run", "window-gla", "-o", "out", "--set", "model=owner/model"], UNREACHED),
        (
            ["finetune", "window-gla", "-o", "out", *SHORT, "--set", "stages.0.data.source=owner/texts"],
            "check the name and the network, or name a .txt, .jsonl or .parquet file",
        ),
        (
            ["eval", "{plain}", "--tasks", "wikitext2"],
            "check the network, or give a folder that holds wikitext2/wiki.test.raw with --data DIR",
        ),
        (["push", "me/model", "{plain}", "--yes"], "has no linearize.json, so it is not a checkpoint that linearize"),
    ],
)  # fmt: skip
def test_what_needs_the_hub_says_what_is_missing_and_how_to_get_it(
    capfd, plain, no_network, monkeypatch, tmp_path, arguments, told
):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("LINEARIZE_CACHE", str(tmp_path / "cache"))
    assert told in one_line(capfd, *(argument.format(plain=plain) for argument in arguments))
    assert not (tmp_path / "out").exists()


def test_the_hub_is_tried_once_and_the_line_stands_once(capfd, no_network, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("time.sleep", lambda seconds: pytest.fail(f"waits {seconds} s"))
    assert run(["eval", "owner/other"]) == 1
    assert capfd.readouterr().err == f"error: {UNREACHED.replace('owner/model', 'owner/other')}\n"
    assert no_network


HOSTILE = [
    "<script>alert(1)</script>",
    "a\n---\nlicense: mit\n---",
    "![x](http://tracker/x.png)",
    'x"); import os; os.system("true',
    "`id`",
    "| a | b |",
    "a\n```\nrm -rf /\n```",
]


def card(name: str) -> str:
    base = {"model": name, "name": name, "kind": "hub"}
    stage = {"objective": "1 sft", "tokens": 1, "data": name}
    provenance = {"base": base, "stages": [stage], "versions": {"linearize": "0"}}
    return model_card(name, provenance, [{"layers": [0], "window": None}], 1, 0)


@pytest.mark.parametrize("name", HOSTILE)
def test_names_mean_nothing_in_a_card(name):
    _, front, body = card(name).split("---\n", 2)
    assert yaml.safe_load(front)["base_model"] == name
    # No new line, so no fence, heading or front matter of its own; no tag, no image.
    assert card(name).count("\n") == card("n").count("\n")
    words, code = body.split("```python")
    assert "<script" not in words and "![x]" not in words and not re.search(r"(?<!\\)\]\(", words)
    loaded = [line for line in code.splitlines() if "from_pretrained(" in line]
    model, tokenizer = (line.partition("from_pretrained")[2] for line in loaded)
    assert model == f"({json.dumps(name)})"
    assert tokenizer == f"({json.dumps(name)}, trust_remote_code=False)  # needs no code"
