"""OpenAI's requests and answers: `/v1/chat/completions` and `/v1/completions`.

A field that could change the answer and is not supported is refused with status 4xx, and so is a field with a wrong
type or an unknown name.
"""

from __future__ import annotations

import json
import secrets
import threading
import time
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from linearize.errors import DataError, counted, hint_for
from linearize.generation.decoding import Decoding
from linearize.sources.limits import learned_positions

if TYPE_CHECKING:
    from collections.abc import Mapping

_SAMPLING = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty", "presence_penalty", "frequency_penalty")
_COMMON = {"model", "stream", "stream_options", "max_tokens", "stop", "seed", *_SAMPLING}
_OWN = {"chat": {"messages", "max_completion_tokens"}, "text": {"prompt"}}
# Fields whose neutral values pass.
_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "n": (1,), "best_of": (1,), "echo": (False,), "logprobs": (False,), "top_logprobs": (0,), "suffix": ("",),
    "logit_bias": ({},), "tools": ([],), "functions": ([],), "tool_choice": ("none", "auto"),
    "function_call": ("none",), "response_format": ({"type": "text"},), "modalities": (["text"],), "audio": (),
    "prediction": (), "web_search_options": (), "parallel_tool_calls": (True, False), "ignore_eos": (False,),
}  # fmt: skip
# Fields that are accepted and have no effect.
_SILENT = {
    "user", "metadata", "store", "service_tier", "safety_identifier", "prompt_cache_key", "prompt_cache_retention",
    "reasoning_effort", "verbosity",
}  # fmt: skip

_STREAM = ("include_obfuscation", "include_usage")


class RequestError(Exception):
    """A request that is answered by an error.

    Attributes:
        status: of HTTP.
        field: the field of the body that is wrong, if it is one.
        code: OpenAI's code of the error, if it has one.
    """

    def __init__(self, message: str, *, status: int = 400, field: str | None = None, code: str | None = None) -> None:
        super().__init__(message)
        self.status, self.field, self.code = status, field, code

    def body(self) -> dict[str, Any]:
        kind = "invalid_request_error" if self.status < 500 else "server_error"
        message, field = (None if x is None else x.encode("utf-8", "replace").decode() for x in (str(self), self.field))
        return {"error": {"message": message, "type": kind, "param": field, "code": self.code}}


@dataclass(frozen=True)
class Request:
    """A request that can be served.

    Attributes:
        kind: `chat` or `text`.
        ids: the prompt's tokens.
        stream: send the text as it is written.
        include_usage: end a stream with the numbers of tokens.
    """

    kind: str
    ids: list[int]
    decoding: Decoding
    stream: bool
    include_usage: bool


class Protocol:
    """Reads requests for one model.

    Args:
        name: the model's name in requests and answers.
        max_tokens: the maximum number of new tokens if a request sets none.
        most_tokens: the most tokens of a text that the memory at hand holds; None for any number.
    """

    def __init__(self, model: Any, tokenizer: Any, name: str, *, max_tokens: int, most_tokens: int | None) -> None:
        self.tokenizer, self.name, self.max_tokens = tokenizer, name, max_tokens
        self.learned, self.most_tokens = learned_positions(model), most_tokens
        self._rows = model.config.get_text_config().vocab_size
        settings = model.generation_config
        found = {field: getattr(settings, field, None) for field in ("temperature", "top_k", "top_p", "min_p")}
        # OpenAI's default is a temperature of 1; a checkpoint may have its own.
        self.defaults = {"temperature": 1.0, **{field: value for field, value in found.items() if value is not None}}
        self._one = threading.Lock()  # a tokenizer's truncation settings are not for several threads

    def read(self, kind: str, content: bytes) -> Request:
        """Read the body of a request.

        Raises:
            RequestError: the request is malformed, or cannot be served.
        """
        body = _object(content)
        _check_fields(body, kind)
        named = _text(body, "model", self.name)
        if named != self.name:
            message = f"there is no model {named!r} here; there is {self.name!r}"
            raise RequestError(message, status=404, field="model", code="model_not_found")
        include_usage = _include_usage(body.get("stream_options"))
        decoding = self._decoding(body)
        ids = self._chat_ids(body) if kind == "chat" else self._text_ids(body)
        decoding = self._fitted(decoding, len(ids))
        return Request(kind, ids, decoding, _flag(body, "stream"), include_usage)

    def _decoding(self, body: Mapping[str, Any]) -> Decoding:
        stop = body.get("stop")
        stops = [stop] if isinstance(stop, str) else [] if stop is None else stop
        if not isinstance(stops, list) or not all(isinstance(one, str) for one in stops):
            raise RequestError("stop: expected a string or a list of strings", field="stop")
        chosen = {**self.defaults}
        for field in _SAMPLING:
            if (value := _number(body, field, whole=field == "top_k")) is not None:
                chosen[field] = 0 if field == "top_k" and value == -1 else value  # -1 means all in vLLM
        limit = "max_completion_tokens" if body.get("max_completion_tokens") is not None else "max_tokens"
        most, seed = _number(body, limit, whole=True), _number(body, "seed", whole=True)
        if most is not None and most < 1:
            raise RequestError(f"{limit} {most}: expected 1 or more", field=limit)
        try:
            return Decoding(
                max_new_tokens=self.max_tokens if most is None else most,
                seed=secrets.randbits(63) if seed is None else seed,
                stop=tuple(stops),
                **chosen,
            )
        except DataError as error:
            raise RequestError(str(error), field=str(error).partition(" ")[0]) from error

    def _chat_ids(self, body: Mapping[str, Any]) -> list[int]:
        messages = [_message(one, index) for index, one in enumerate(_list(body, "messages"))]
        if not getattr(self.tokenizer, "chat_template", None):
            raise RequestError(f"{self.name} has no chat template; use /v1/completions", field="messages")
        try:
            text = self.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        except Exception as error:  # a template can raise any exception
            reason = str(error).strip().partition("\n")[0] or type(error).__name__
            raise RequestError(f"messages: the chat template refuses them: {reason}", field="messages") from error
        return self._ids(text, "messages", special=False)

    def _text_ids(self, body: Mapping[str, Any]) -> list[int]:
        prompt = body.get("prompt")
        if isinstance(prompt, list) and len(prompt) == 1 and isinstance(prompt[0], (str, list)):
            prompt = prompt[0]
        if isinstance(prompt, str):
            return self._ids(prompt, "prompt", special=True)
        if isinstance(prompt, list) and prompt and all(type(token) is int for token in prompt):
            return self._checked(prompt, "prompt")
        raise RequestError("prompt: expected one string, or one list of tokens", field="prompt")

    def _ids(self, text: str, field: str, *, special: bool) -> list[int]:
        try:
            with self._one:
                ids = self.tokenizer(text, add_special_tokens=special).input_ids
        except (UnicodeError, TypeError) as error:  # half of a surrogate pair, which JSON can write
            raise RequestError(f"{field}: is not valid Unicode", field=field) from error
        return self._checked([int(token) for token in ids], field)

    def _checked(self, ids: list[int], field: str) -> list[int]:
        if not ids:
            raise RequestError(f"{field}: is empty; give some text to continue", field=field)
        if min(ids) < 0 or max(ids) >= self._rows:
            raise RequestError(f"{field}: has a token outside of the model's 0 to {self._rows - 1:,}", field=field)
        return ids

    def _fitted(self, decoding: Decoding, read: int) -> Decoding:
        """`decoding` with a limit that ends the text at the last position there is."""
        for most, why in ((self.learned, "the model has learned"), (self.most_tokens, "the memory holds")):
            if most is not None and read >= most:
                message = f"the prompt has {counted(read, 'token', 'tokens')}, and {why} {most:,}; shorten it"
                raise RequestError(message, code="context_length_exceeded")
            if most is not None:
                decoding = replace(decoding, max_new_tokens=min(decoding.max_new_tokens, most - read))
        return decoding


class Answer:
    """The bodies that answer one request."""

    def __init__(self, request: Request, name: str) -> None:
        self.request = request
        chat = request.kind == "chat"
        self._head: dict[str, Any] = {
            "id": f"{'chatcmpl' if chat else 'cmpl'}-{secrets.token_hex(12)}",
            "object": "chat.completion" if chat else "text_completion",
            "created": int(time.time()),
            "model": name,
        }
        self._first = True

    def whole(self, text: str, finish: str | None, new_tokens: int) -> dict[str, Any]:
        content = {"message": {"role": "assistant", "content": text}} if self.request.kind == "chat" else {"text": text}
        choice = {"index": 0, **content, "logprobs": None, "finish_reason": finish}
        return {**self._head, "choices": [choice], "usage": self._usage(new_tokens)}

    def piece(self, text: str, finish: str | None = None) -> dict[str, Any]:
        """One event of a stream."""
        chat = self.request.kind == "chat"
        role, self._first = {"role": "assistant"} if self._first else {}, False
        content: dict[str, Any] = (
            {"delta": {**role, "content": text} if text or role else {}} if chat else {"text": text}
        )
        kind = {"object": "chat.completion.chunk"} if chat else {}
        return {**self._head, **kind, "choices": [{"index": 0, **content, "logprobs": None, "finish_reason": finish}]}

    def usage(self, new_tokens: int) -> dict[str, Any]:
        """The last event of a stream with `include_usage`."""
        kind = {"object": "chat.completion.chunk"} if self.request.kind == "chat" else {}
        return {**self._head, **kind, "choices": [], "usage": self._usage(new_tokens)}

    def _usage(self, new_tokens: int) -> dict[str, int]:
        read = len(self.request.ids)
        return {"prompt_tokens": read, "completion_tokens": new_tokens, "total_tokens": read + new_tokens}


def _object(content: bytes) -> dict[str, Any]:
    try:
        body = json.loads(content, parse_constant=_no_constant)
    except (ValueError, RecursionError) as error:
        raise RequestError(f"the body is not JSON: {str(error).partition(chr(10))[0][:200]}") from error
    if not isinstance(body, dict):
        raise RequestError("the body is not a JSON object")
    return body


def _no_constant(name: str) -> float:
    raise ValueError(f"{name} is not a number of JSON")


def _check_fields(body: Mapping[str, Any], kind: str) -> None:
    known = _COMMON | _OWN[kind]
    for field, value in body.items():
        if field in known or field in _SILENT or value is None:
            continue
        if field not in _NEUTRAL:
            hint = hint_for(field, sorted(known))
            raise RequestError(f"{field[:80]!r} is not a field that is known here; {hint}", field=field[:80])
        if not any(type(value) is type(one) and value == one for one in _NEUTRAL[field]):
            raise RequestError(f"{field}: is not supported here; leave it out", field=field)


def _include_usage(options: Any) -> bool:
    """`include_usage` of `stream_options`."""
    if options is None:
        return False
    if not isinstance(options, dict):
        raise RequestError("stream_options: expected an object", field="stream_options")
    for option in options:
        if option not in _STREAM:
            message = f"{option[:80]!r} is not a stream option that is known here; {hint_for(option, _STREAM)}"
            raise RequestError(message, field="stream_options")
    _flag(options, "include_obfuscation")  # of the type alone; pieces are never padded
    return _flag(options, "include_usage")


def _message(message: Any, index: int) -> dict[str, Any]:
    """A message for the chat template: its parts of text are joined."""
    field = f"messages[{index}]"
    if not isinstance(message, dict) or not isinstance(message.get("role"), str):
        raise RequestError(f"{field}: expected an object with a role and a content", field=field)
    for key, value in message.items():
        # Clients send an earlier answer's empty fields back.
        if key not in ("role", "content", "name") and value not in (None, "", [], {}, False):
            raise RequestError(f"{field}.{str(key)[:80]}: is not supported here; leave it out", field=field)
    name = _text(message, "name", "")
    content = message.get("content")
    if isinstance(content, list):
        if not all(
            isinstance(part, dict) and part.get("type", "text") == "text" and isinstance(part.get("text"), str)
            for part in content
        ):
            raise RequestError(f"{field}.content: only parts of text are supported", field=field)
        content = "".join(part["text"] for part in content)
    if not isinstance(content, str):
        raise RequestError(f"{field}.content: expected a text", field=field)
    role = "system" if message["role"] == "developer" else message["role"]
    if role not in ("system", "user", "assistant"):
        raise RequestError(f"{field}.role {role[:40]!r}: expected system, user or assistant", field=field)
    return {"role": role, "content": content, **({"name": name} if name else {})}


def _list(body: Mapping[str, Any], field: str) -> list[Any]:
    value = body.get(field)
    if not isinstance(value, list) or not value:
        raise RequestError(f"{field}: expected a list with one entry or more", field=field)
    return value


def _text(body: Mapping[str, Any], field: str, default: str) -> str:
    value = body.get(field)
    if value is not None and not isinstance(value, str):
        raise RequestError(f"{field}: expected a string", field=field)
    return default if value is None else value


def _flag(body: Mapping[str, Any], field: str) -> bool:
    value = body.get(field)
    if value is not None and not isinstance(value, bool):
        raise RequestError(f"{field}: expected true or false", field=field)
    return bool(value)


def _number(body: Mapping[str, Any], field: str, *, whole: bool) -> Any:
    value = body.get(field)
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int if whole else (int, float)):
        raise RequestError(f"{field}: expected a {'whole ' if whole else ''}number", field=field)
    if abs(value) >= 2**64:
        raise RequestError(f"{field}: is too large", field=field)
    return value
