"""Bodies of requests: read as asked for, or refused with the field that is wrong."""

from __future__ import annotations

import json
from types import SimpleNamespace
from typing import Any

import pytest
from torch import nn
from transformers import AutoConfig, AutoTokenizer, GenerationConfig

from linearize.serving.protocol import Answer, Protocol, RequestError
from tests.serving.conftest import TEMPLATE


class Model(nn.Module):
    """A model with the attributes that the protocol reads."""

    def __init__(self, config: Any, positions: int | None, **settings: Any) -> None:
        super().__init__()
        self.config = SimpleNamespace(get_text_config=lambda: config)
        config.max_position_embeddings = positions or 512
        self.generation_config = GenerationConfig(**settings)
        self.words = nn.Embedding(config.vocab_size, 1)
        self.positions = nn.Embedding(positions, 1) if positions else None

    def get_input_embeddings(self) -> nn.Embedding:
        return self.words


@pytest.fixture(scope="module")
def made(tiny_folder):
    tokenizer = AutoTokenizer.from_pretrained(tiny_folder)
    tokenizer.chat_template = TEMPLATE

    def protocol(positions: int | None = None, most: int | None = None, **settings: Any) -> Protocol:
        model = Model(AutoConfig.from_pretrained(tiny_folder), positions, **settings)
        return Protocol(model, tokenizer, "tiny", max_tokens=100, most_tokens=most)

    return protocol


def body(**fields: Any) -> bytes:
    return json.dumps(fields).encode()


MESSAGES = [{"role": "user", "content": "Why ?"}]


def test_a_request_is_read(made) -> None:
    protocol = made()
    asked = protocol.read("text", body(prompt="Once upon", max_tokens=7, stop="x", seed=4, top_k=-1, stream=True))
    assert asked.decoding.max_new_tokens == 7 and asked.decoding.stop == ("x",) and asked.decoding.seed == 4
    assert asked.decoding.temperature == 1.0 and asked.decoding.top_k == 0 and asked.stream
    assert protocol.read("text", body(prompt=asked.ids)).ids == protocol.read("text", body(prompt=["Once upon"])).ids
    parts = [
        {
            "role": "user",
            "content": [{"type": "text", "text": "Wh"}, {"type": "text", "text": "y ?"}],
            "tool_calls": None,
        }
    ]
    one, two = (
        protocol.read("chat", body(messages=messages, model="tiny", user="me")) for messages in (MESSAGES, parts)
    )
    assert one.ids == two.ids and one.decoding.max_new_tokens == 100
    assert "assistant" in protocol.tokenizer.decode(one.ids) and one.decoding.seed != two.decoding.seed
    streamed = body(prompt="a", stream_options={"include_usage": True, "include_obfuscation": False})
    assert protocol.read("text", streamed).include_usage and not asked.include_usage
    own = made(temperature=0.3, top_k=20).read("chat", body(messages=MESSAGES, max_completion_tokens=3))
    assert (own.decoding.temperature, own.decoding.top_k, own.decoding.max_new_tokens) == (0.3, 20, 3)


@pytest.mark.parametrize(
    ("kind", "content", "told"),
    [
        ("text", b"{", "the body is not JSON"),
        ("text", b"\xff", "the body is not JSON"),
        ("text", b"[" * 100_000, "the body is not JSON"),
        ("text", b'{"prompt": "a", "temperature": NaN}', "NaN is not a number of JSON"),
        ("text", b'{"prompt": "a", "temperature": 1e999}', "temperature: is too large"),
        ("text", b"[]", "not a JSON object"),
        ("text", body(), "prompt: expected one string"),
        ("text", body(prompt=["a", "b"]), "prompt: expected one string"),
        ("text", body(prompt=[True]), "prompt: expected one string"),
        ("text", body(prompt=[10**9]), "prompt: has a token outside"),
        ("text", body(prompt=[-1]), "prompt: has a token outside"),
        ("text", body(prompt=[]), "prompt: expected one string"),
        ("text", body(prompt="a", temprature=1), "not a field that is known here; did you mean temperature"),
        ("text", b'{"prompt": "a", "\\ud800": 1}', "is not a field that is known here"),
        ("text", b'{"prompt": "a\\ud800"}', "prompt: "),
        ("text", body(prompt="a", temperature="1"), "temperature: expected a number"),
        ("text", body(prompt="a", temperature=-1), "temperature -1: expected 0 or more"),
        ("text", body(prompt="a", max_tokens=True), "max_tokens: expected a whole number"),
        ("text", body(prompt="a", max_tokens=0), "max_tokens 0: expected 1 or more"),
        ("text", body(prompt="a", max_tokens=1.5), "max_tokens: expected a whole number"),
        ("text", body(prompt="a", stream="yes"), "stream: expected true or false"),
        ("text", body(prompt="a", stop=[1]), "stop: expected a string"),
        ("text", body(prompt="a", stop=""), "none of them empty"),
        ("text", body(prompt="a", n=2), "n: is not supported"),
        ("text", body(prompt="a", n=True), "n: is not supported"),
        ("text", body(prompt="a", echo=True), "echo: is not supported"),
        ("text", body(prompt="a", logprobs=0), "logprobs: is not supported"),
        ("text", body(prompt="a", model="gpt"), "there is no model 'gpt' here; there is 'tiny'"),
        ("text", body(prompt="a", model=3), "model: expected a string"),
        ("text", body(messages=MESSAGES), "'messages' is not a field"),
        ("chat", body(), "messages: expected a list"),
        ("chat", body(messages="Why?"), "messages: expected a list"),
        ("chat", body(messages=["Why?"]), "messages[0]: expected an object"),
        ("chat", body(messages=[{"role": "user"}]), "messages[0].content: expected a text"),
        ("chat", body(messages=[{"role": "tool", "content": "x"}]), "messages[0].role 'tool'"),
        ("chat", body(messages=[{"role": "user", "content": [{"type": "image_url"}]}]), "only parts of text"),
        ("chat", body(messages=[{"role": "user", "content": [{"type": "file", "text": "x"}]}]), "only parts of text"),
        ("chat", body(messages=[{**MESSAGES[0], "tool_calls": [{}]}]), "messages[0].tool_calls: is not supported"),
        ("chat", body(messages=[{**MESSAGES[0], "prefix": True}]), "messages[0].prefix: is not supported"),
        ("chat", body(messages=[{**MESSAGES[0], "name": 3}]), "name: expected a string"),
        ("chat", body(messages=[{"role": "system", "content": "refuse"}]), "the chat template refuses them: no system"),
        ("chat", body(messages=MESSAGES, tools=[{}]), "tools: is not supported"),
        ("chat", body(messages=MESSAGES, response_format={"type": "json_object"}), "response_format: is not supported"),
        ("chat", body(messages=MESSAGES, stream_options=3), "stream_options: expected an object"),
        ("chat", body(messages=MESSAGES, stream_options=[]), "stream_options: expected an object"),
        ("chat", body(messages=MESSAGES, stream_options={"include_usage": 1}), "include_usage: expected true or false"),
        ("chat", body(messages=MESSAGES, stream_options={"usage": True}), "'usage' is not a stream option"),
        ("text", b'{"prompt": "a", "stream_options": {"\\ud800": 1}}', "is not a stream option that is known here"),
    ],
)  # fmt: skip
def test_a_wrong_request_is_refused(made, kind: str, content: bytes, told: str) -> None:
    with pytest.raises(RequestError) as refused:
        made().read(kind, content)
    assert told in str(refused.value) and 400 <= refused.value.status < 500
    told_as = json.dumps(refused.value.body(), ensure_ascii=False).encode()  # also with half a character in it
    assert json.loads(told_as)["error"]["type"] == "invalid_request_error"


def test_a_text_ends_at_the_last_position(made) -> None:
    learned = made(positions=32)
    assert learned.read("text", body(prompt="a " * 10)).decoding.max_new_tokens < 32
    with pytest.raises(RequestError, match="tokens, and the model has learned 32; shorten it") as refused:
        learned.read("text", body(prompt="the dog " * 40))
    assert refused.value.code == "context_length_exceeded"
    with pytest.raises(RequestError, match="and the memory holds 8; shorten it"):
        made(most=8).read("text", body(prompt="the dog " * 40))


def test_a_stream_begins_with_the_role_and_ends_with_the_reason(made) -> None:
    protocol = made()
    answer = Answer(protocol.read("chat", body(messages=MESSAGES)), "tiny")
    first, second, last = answer.piece(""), answer.piece("Yes"), answer.piece("", "stop")
    assert first["choices"][0]["delta"] == {"role": "assistant", "content": ""}
    assert second["choices"][0]["delta"] == {"content": "Yes"} and second["object"] == "chat.completion.chunk"
    assert last["choices"][0] == {"index": 0, "delta": {}, "logprobs": None, "finish_reason": "stop"}
    assert answer.whole("Yes", "stop", 2)["usage"]["completion_tokens"] == 2
