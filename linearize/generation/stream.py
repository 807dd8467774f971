"""Decode tokens to text as they come, up to a stop string."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

CONTEXT = 5
"""Tokens before a text that its first piece may depend on: a character of four bytes, and a whole token before it."""
_UNFINISHED = "\ufffd"  # a decoder writes it for bytes that are no whole character yet


class TextStream:
    """The text of one row's tokens. Special tokens are left out.

    Args:
        stop: strings that end the text; neither they nor text after them are passed on.
        write: called with each new piece of text.
        before: tokens that the text goes on from. The decoders of some tokenizers drop a space at the start of what
            they decode, and it is no start then.

    Attributes:
        stopped: True once a stop string was found.
    """

    def __init__(
        self,
        tokenizer: Any,
        stop: Sequence[str] = (),
        write: Callable[[str], object] | None = None,
        before: Sequence[int] = (),
    ) -> None:
        self.tokenizer, self.stop, self.write = tokenizer, tuple(stop), write
        self._tokens = list(before[-CONTEXT:])
        self.stopped = False
        self._pieces: list[str] = []
        self._held = ""  # the end of the text that may be the beginning of a stop string
        # Only a window of tokens is decoded: those of the last piece, because the text of a token depends on the token
        # before it, and those without text yet.
        self._before, self._read = 0, len(self._tokens)

    @property
    def text(self) -> str:
        """The text that was passed on."""
        return "".join(self._pieces)

    def put(self, token: int) -> str:
        """Add a token; returns the new piece of text, which may be empty."""
        self._tokens.append(token)
        before, whole = self._decode(self._before, self._read), self._decode(self._before, len(self._tokens))
        if len(whole) <= len(before) or whole.endswith(_UNFINISHED):
            return ""
        self._before, self._read = self._read, len(self._tokens)
        return self._pass_on(whole[len(before) :])

    def end(self) -> str:
        """Pass on what was held back: unfinished characters, and the beginning of a stop string."""
        before, whole = self._decode(self._before, self._read), self._decode(self._before, len(self._tokens))
        self._before = self._read = len(self._tokens)
        return self._pass_on(whole[len(before) :], last=True)

    def _decode(self, start: int, end: int) -> str:
        text: str = self.tokenizer.decode(self._tokens[start:end], skip_special_tokens=True) if end > start else ""
        return text

    def _pass_on(self, piece: str, *, last: bool = False) -> str:
        if self.stopped:
            return ""
        text = self._held + piece
        found = [at for at in (text.find(stop) for stop in self.stop) if at >= 0]
        if found:
            self.stopped, self._held, text = True, "", text[: min(found)]
        elif last:
            self._held = ""
        else:
            kept = max((_overlap(text, stop) for stop in self.stop), default=0)
            self._held, text = text[len(text) - kept :], text[: len(text) - kept]
        if text:
            self._pieces.append(text)
            if self.write is not None:
                self.write(text)
        return text


def _overlap(text: str, stop: str) -> int:
    """The length of the longest end of `text` that begins `stop`."""
    return next((n for n in range(min(len(stop) - 1, len(text)), 0, -1) if text.endswith(stop[:n])), 0)
