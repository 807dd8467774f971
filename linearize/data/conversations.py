"""Turn the conversations of records into messages for chat templates, and cut the rendered text around the parts with
loss."""

from __future__ import annotations

import itertools
import json
import re
from decimal import Decimal
from typing import TYPE_CHECKING, Any

from linearize.errors import DataError

if TYPE_CHECKING:
    from collections import Counter
    from collections.abc import Callable

    from transformers import PreTrainedTokenizerBase

    from linearize.data.rows import Pieces

Message = dict[str, Any]

_ROLES = {
    "system": "system", "developer": "developer", "user": "user", "human": "user", "assistant": "assistant",
    "gpt": "assistant", "chatgpt": "assistant", "bot": "assistant", "model": "assistant", "tool": "tool",
    "observation": "tool", "function": "function",
}  # fmt: skip
"""Lower-case speaker names -> roles of chat templates."""
_CALL = "function_call"
"""The speaker name of a tool call with JSON text."""


class Skip(Exception):
    """The record has no tokens with loss; the message gives the reason."""


def text_of(where: str, name: str, value: Any) -> str:
    """Convert a string or a number to a string.

    Raises:
        Skip: the value is null.
        DataError: the value has another type.
    """
    if value is None:
        raise Skip(f"{name} is null")
    if isinstance(value, bool) or not isinstance(value, (str, int, float, Decimal)):
        raise DataError(f"{where}: {name} is {_shown(value)}; expected text")
    return value if isinstance(value, str) else str(value)


def list_of(where: str, name: str, value: Any) -> list[Any]:
    """Convert a list, or a JSON string of a list, to a list; null gives an empty list.

    Raises:
        DataError: the value has another form.
    """
    found = value
    if isinstance(value, str):
        try:
            found = json.loads(value) if value.strip() else []
        except (ValueError, RecursionError):
            raise DataError(f"{where}: {name} is {_shown(value)}; expected a list, or one as JSON") from None
    if found is None:
        return []
    if not isinstance(found, list):
        raise DataError(f"{where}: {name} is {_shown(value)}; expected a list")
    return found


def _shown(value: Any) -> str:
    text = json.dumps(value, default=str, ensure_ascii=False)
    return text if len(text) <= 40 else f"{text[:40]}..."


def messages_of(where: str, turns: list[Any], notes: Counter[str], template: str) -> tuple[list[Message], set[int]]:
    """The messages of a conversation, and the indices of those with loss: non-empty answers whose `weight` is not 0.

    Args:
        template: the chat template; an unknown role is accepted if the template contains it as a string.

    Raises:
        DataError: a turn is not a message.
        Skip: a message other than an answer is null.
    """
    messages: list[Message] = []
    learned: set[int] = set()
    for turn in turns:
        message, weighs = _message(where, turn, template)
        if message["role"] == "assistant" and weighs:
            if message["content"].strip() or message.get("tool_calls"):
                learned.add(len(messages))
            else:
                notes["empty answers, which carry no loss"] += 1
        messages.append(message)
    return messages, learned


def _message(where: str, turn: Any, template: str) -> tuple[Message, bool]:
    """Convert one turn to a message; the flag is False if its `weight` excludes it from the loss."""
    # Drop null keys as transformers does, because templates would write "None".
    given = {key: value for key, value in turn.items() if value is not None} if isinstance(turn, dict) else {}
    speaker, content = given.get("role", given.get("from")), given.get("content", given.get("value"))
    if not isinstance(speaker, str):
        raise DataError(
            f"{where}: each message must be an object with a role and a content, or with from and value, not "
            f"{_shown(turn)}"
        )
    role = _ROLES.get(speaker.lower(), speaker)
    if speaker.lower() not in (*_ROLES, _CALL) and not re.search(rf"""(["']){re.escape(speaker)}\1""", template):
        raise DataError(
            f"{where}: a message has the role {_shown(speaker)}; expected one of {', '.join((*_ROLES, _CALL))}"
        )
    weight = given.get("weight", 1)
    if weight not in (0, 1):
        raise DataError(f"{where}: a message has the weight {_shown(weight)}; expected 0 (no loss) or 1")
    kept = {k: v for k, v in given.items() if k not in ("role", "from", "content", "value", "weight")}
    if speaker.lower() == _CALL:
        spoken = _object(where, content)
        calls = [{"type": "function", "function": f} for f in (spoken if isinstance(spoken, list) else [spoken])]
        return {**kept, "role": "assistant", "content": "", "tool_calls": _calls(where, calls)}, bool(weight)
    if content is None and role in ("user", "system"):
        raise Skip(f"the content of a message by {role} is null")
    message = {**kept, "role": role, "content": _content(where, content)}
    if role == "assistant" and isinstance(old := kept.get("function_call"), dict) and "tool_calls" not in kept:
        # `function_call` is the older form of a single tool call, which templates do not support.
        del kept["function_call"], message["function_call"]
        kept["tool_calls"] = [{"type": "function", "function": old}]
    if "tool_calls" in kept:
        message["tool_calls"] = _calls(where, kept["tool_calls"])
        if not message["tool_calls"]:
            del message["tool_calls"]
    return message, bool(weight)


def _content(where: str, content: Any) -> str:
    """The text of a message; parts are concatenated."""
    if content is None:
        return ""
    if not isinstance(content, list):
        return text_of(where, "the content of a message", content)
    for part in content:
        if not isinstance(part, dict) or not isinstance(part.get("text"), str):
            kind = part.get("type") if isinstance(part, dict) else part
            raise DataError(f"{where}: a message has a part that is no text ({_shown(kind)}); leave the record out")
    return "".join(part["text"] for part in content)


def _calls(where: str, value: Any) -> list[Any]:
    """Convert tool calls. JSON arguments are parsed, as inference servers do, because a template writes objects as JSON
    and would quote a string again."""
    calls = []
    for call in list_of(where, "tool_calls", value):
        given = call.get("function", call) if isinstance(call, dict) else None
        if not isinstance(given, dict) or not isinstance(given.get("name"), str):
            raise DataError(f"{where}: a tool call is {_shown(call)}; expected an object with a name and arguments")
        function = dict(given)
        if isinstance(given.get("arguments"), str):
            function["arguments"] = _object(where, given["arguments"] or "{}")
        calls.append({**call, "function": function} if "function" in call else function)
    return calls


def _object(where: str, value: Any) -> Any:
    try:
        return json.loads(value) if isinstance(value, str) else value
    except (ValueError, RecursionError):
        raise DataError(f"{where}: a tool call is not JSON: {_shown(value)}") from None


def tools_of(where: str, value: Any) -> list[Any] | None:
    """The tools of a record from a list of objects or its JSON; None without tools."""
    tools = [_object(where, tool) for tool in list_of(where, "tools", value)]
    if wrong := [tool for tool in tools if not isinstance(tool, dict)]:
        raise DataError(f"{where}: a tool is {_shown(wrong[0])}; expected an object")
    return tools or None


def cut(
    messages: list[Message],
    learned: set[int],
    tools: list[Any] | None,
    tokenizer: PreTrainedTokenizerBase,
    notes: Counter[str],
) -> Pieces:
    """Render a conversation with the tokenizer's chat template and cut it around the answers with loss, each with its
    end token. The text after the last of them is dropped.

    The template is rendered up to each answer and the texts are compared, so the code needs no family's tags.

    Args:
        learned: indices of the messages with loss.
        notes: counts omissions of the template.

    Raises:
        Skip: the template refuses the conversation, or leaves no text with loss.
    """

    def render(upto: list[Message], *, tools: list[Any] | None = tools, opened: bool = False) -> str:
        # A template is the model's own code and can raise any exception.
        try:
            found: Any = tokenizer.apply_chat_template(upto, tools=tools, tokenize=False, add_generation_prompt=opened)
        except Exception as problem:
            reason = (str(problem).splitlines() or [type(problem).__name__])[0]
            raise Skip(f"the model's chat template refuses this conversation: {reason}") from problem
        return str(found)

    if not learned:
        raise Skip("this conversation has no assistant turn to learn from")
    whole = render(messages)
    if tools and _same(whole, lambda: render(messages, tools=None)):
        notes["conversations with tools that the model's chat template does not show"] += 1
    pieces: Pieces = []
    done = 0
    for number in sorted(learned):
        message, before = messages[number], messages[:number]
        closed = render([*before, message]).rstrip()
        if "tool_calls" in message:
            bare = {key: value for key, value in message.items() if key != "tool_calls"}
            if _same(closed, lambda before=before, bare=bare: render([*before, bare]).rstrip()):  # type: ignore[misc]
                notes["tool calls that the model's chat template does not show"] += 1
                if not message["content"].strip():
                    continue
        opening = _opening(before, message, closed, render)
        # Templates that drop the reasoning of earlier turns render them differently.
        if whole.startswith(opening) and whole.startswith(closed) and done <= len(opening) < len(closed):
            pieces += [(whole[done : len(opening)], False), (whole[len(opening) : len(closed)], True)]
            done = len(closed)
        else:
            notes["answers that the chat template changes once others follow, which carry no loss"] += 1
    if not pieces:
        raise Skip("the model's chat template leaves nothing of this conversation to learn from")
    return pieces


def _same(text: str, other: Callable[[], str]) -> bool:
    try:
        return other() == text
    except Skip:
        return False


def _opening(before: list[Message], message: Message, closed: str, render: Callable[..., str]) -> str:
    """The rendered text up to the start of an answer.

    Templates do not render an empty conversation, and some need a user's turn. In these cases the answer starts at the
    first difference between `closed` and the same conversation with another answer.
    """
    if before:
        try:
            return render(before, opened=True)
        except Skip:
            pass
    other = "#" if message["content"].lstrip().startswith("~") else "~"
    changed = {**message, "content": other}
    changed.pop("tool_calls", None)
    rendered = render([*before, changed])
    alike = itertools.takewhile(lambda pair: pair[0] == pair[1], zip(closed, rendered, strict=False))
    return closed[: sum(1 for _ in alike)]
