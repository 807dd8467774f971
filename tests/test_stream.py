"""Text as it comes: pieces add up to the text, characters are whole, and stop strings end it."""

from __future__ import annotations

import pytest
from tokenizers import Tokenizer, decoders, models
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from linearize.errors import DataError
from linearize.generation.decoding import Decoding
from linearize.generation.stream import TextStream


class Octets:
    """A tokenizer of single bytes; token 256 is special."""

    def decode(self, tokens: list[int], skip_special_tokens: bool = False) -> str:
        return bytes(token for token in tokens if token < 256).decode("utf-8", "replace")


def streamed(text: bytes, stop: tuple[str, ...] = ()) -> tuple[list[str], TextStream]:
    pieces: list[str] = []
    stream = TextStream(Octets(), stop, pieces.append)
    for token in text:
        stream.put(token)
        if stream.stopped:
            break
    stream.end()
    return pieces, stream


def test_characters_are_whole() -> None:
    pieces, stream = streamed("a ü 🙂 z".encode())
    assert pieces == ["a", " ", "ü", " ", "🙂", " ", "z"] and stream.text == "a ü 🙂 z"
    assert streamed("🙂".encode()[:3])[1].text == "\ufffd"  # the text ended in the middle of a character


@pytest.mark.parametrize(
    ("stop", "text"),
    [
        ((), "one END two ENDING"),
        (("END",), "one "),
        (("ENDING",), "one END two "),  # what only began like it is passed on
        (("x", "o E", "D"), "one EN"),
        (("e E", "END"), "on"),
        (("ENDINGS",), "one END two ENDING"),
    ],
)
def test_a_stop_string_is_no_part_of_the_text(stop: tuple[str, ...], text: str) -> None:
    pieces, stream = streamed(b"one END two ENDING", stop)
    assert "".join(pieces) == stream.text == text
    assert stream.stopped == (text != "one END two ENDING")


def test_special_tokens_are_left_out() -> None:
    stream = TextStream(Octets())
    assert [stream.put(token) for token in (256, ord("a"), 256, 256, ord("b"))] == ["", "a", "", "", "b"]


def test_pieces_add_up_to_what_the_tokenizer_decodes(tiny_folder) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny_folder)
    ids = tokenizer("Once upon a time, there was a dog. It ran home!").input_ids
    stream = TextStream(tokenizer)
    for token in ids:
        stream.put(token)
    stream.end()
    assert stream.text == tokenizer.decode(ids, skip_special_tokens=True)


def test_a_text_that_goes_on_keeps_its_first_space() -> None:
    """The decoder of SentencePiece's tokenizers drops a space at the start of what it decodes."""
    tokenizer = Tokenizer(models.WordLevel({"\u2581to": 0, "\u2581a": 1, "\u2581tree": 2}))
    tokenizer.decoder = decoders.Metaspace()
    wrapped = PreTrainedTokenizerFast(tokenizer_object=tokenizer)
    for before, text in (([], "a tree"), ([0], " a tree"), ([0] * 9, " a tree")):
        stream = TextStream(wrapped, before=before)
        assert "".join(stream.put(token) for token in (1, 2)) + stream.end() == stream.text == text
    stream = TextStream(wrapped, (" tree",), before=[0])
    assert stream.put(1) + stream.put(2) == " a" and stream.stopped


@pytest.mark.parametrize(
    ("wrong", "told"),
    [
        ({"temperature": float("inf")}, "temperature inf: expected a finite number"),
        ({"temperature": -1.0}, "temperature -1.0: expected 0 or more"),
        ({"top_k": -1}, "top_k -1: expected 0 or more"),
        ({"top_p": 1.5}, "top_p 1.5: expected 0 to 1"),
        ({"min_p": float("nan")}, "min_p nan: expected a finite number"),
        ({"repetition_penalty": 0.0}, "repetition_penalty 0.0: expected 0.01 to 100"),
        ({"presence_penalty": 3.0}, "presence_penalty 3.0: expected -2 to 2"),
        ({"frequency_penalty": -3.0}, "frequency_penalty -3.0: expected -2 to 2"),
        ({"stop": ("",)}, "none of them empty"),
        ({"stop": ("x",) * 17}, "up to 16 strings"),
        ({"seed": 2**64}, "seed"),
    ],
)
def test_a_setting_out_of_range_is_refused(wrong: dict, told: str) -> None:
    with pytest.raises(DataError, match=told.replace(".", r"\.")):
        Decoding(**wrong)
