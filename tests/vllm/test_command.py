"""`linearize serve` with vLLM installed: the command line that users type, and OpenAI's client against it."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

pytest.importorskip("vllm")

from tests.serving.conftest import chatting

if TYPE_CHECKING:
    from collections.abc import Iterator

pytestmark = pytest.mark.vllm
STORY = "Once upon a time there was a little dog"


@pytest.fixture(scope="module")
def folder(tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return chatting(tmp_path_factory.mktemp("served") / "model", tiny_folder)


@pytest.fixture(scope="module")
def client(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    openai = pytest.importorskip("openai")
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "linearize", "serve", str(folder), "--port", str(port), "--served-name", "tiny"]
    command += ["--dtype", "float32", "--", "--enforce-eager", "--max-model-len", "256"]
    log = tmp_path_factory.mktemp("log") / "vllm.log"
    environment = {**os.environ, "VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind"}
    with log.open("w") as words:
        server = subprocess.Popen(command, stdout=words, stderr=words, env=environment, start_new_session=True)
    try:
        while not answers(f"http://127.0.0.1:{port}/health"):
            assert server.poll() is None, log.read_text()[-3000:]
            time.sleep(1)
        assert "vLLM serves the model" in log.read_text()
        yield openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="none", timeout=300, max_retries=0)
    finally:
        if server.poll() is None:
            os.killpg(server.pid, signal.SIGTERM)
            server.wait(timeout=120)


def answers(url: str) -> bool:
    try:
        with urllib.request.urlopen(url, timeout=5) as answer:  # noqa: S310
            return bool(answer.status == 200)
    except OSError:
        return False


def complete(client: Any, prompt: str = STORY, tokens: int = 12, body: dict | None = None, **options: Any) -> Any:
    """Greedy text that goes on at the tokenizer's end token, as this model's generation settings have it."""
    body = {"ignore_eos": True, **(body or {})}
    return client.completions.create(
        model="tiny", prompt=prompt, max_tokens=tokens, temperature=0, extra_body=body, **options
    )


def test_clients_get_the_models_own_text(client, folder: Path) -> None:
    """Eight at once, streamed or whole; one that went away before, a long prompt and a wrong body leave no trace."""
    import openai

    import linearize
    from linearize.sources.source import open_model

    stream = complete(client, tokens=200, stream=True)
    next(iter(stream))
    stream.close()
    with pytest.raises(openai.BadRequestError, match="maximum context length"):
        complete(client, "dog " * 300)
    with pytest.raises(openai.BadRequestError):
        complete(client, body={"temperature": "warm"})
    prompts = [f"{STORY} {'and a cat ' * n}" for n in range(8)]

    def one(n: int) -> str:
        if n % 2:
            return "".join(x.choices[0].text for x in complete(client, prompts[n], 6 + 2 * n, stream=True))
        return complete(client, prompts[n], 6 + 2 * n).choices[0].text

    with ThreadPoolExecutor(8) as pool:
        written = list(pool.map(one, range(8)))
    model, tokenizer, _ = open_model(str(folder))
    for n, text in enumerate(written):
        alone = linearize.generate(model, prompts[n], tokenizer=tokenizer, max_new_tokens=6 + 2 * n)
        assert text == alone.text
    messages = [{"role": "user", "content": "Tell me a story ."}]
    answer = client.chat.completions.create(
        model="tiny", messages=messages, max_tokens=12, temperature=0, extra_body={"ignore_eos": True}
    )
    alone = linearize.generate(model, "Tell me a story .", tokenizer=tokenizer, max_new_tokens=12, chat=True)
    assert answer.choices[0].message.content == alone.text
