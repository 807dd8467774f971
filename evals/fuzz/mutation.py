"""Mutations of valid files: bytes flipped; runs cut, doubled or moved; counts replaced by huge ones."""

from __future__ import annotations

import struct
from typing import TYPE_CHECKING

from hypothesis import strategies as st

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

_HUGE = [0, 1, 2**31 - 1, 2**32 - 1, 2**40, 2**63 - 1, 2**63, 2**64 - 1]
_PIECES = [
    b"\0", b"\xff", b"\xef\xbb\xbf", b"\xed\xa0\x80", b"{", b"[", b"}", b'"', b"\n", b"\r", b"../", b"/", b"&a ", b"*a",
    b"!!x ", b"<<: ", b"- ", b": ", b"#", b"NaN", b"1e999", b"-0", b"null", b"[" * 3000, b"9" * 5000, b"{\"a\":" * 2000,
    b"\xf4\x8f\xbf\xbf", b"\xe2\x80\xa8", b"\t", b"---\n", b"%YAML 9\n", b"?", b"|\n", b"base: r.yaml\n",
]  # fmt: skip


def mutated(seeds: Sequence[bytes]) -> st.SearchStrategy[bytes]:
    """One of `seeds` after a few changes, or random bytes."""
    change = st.one_of(
        st.tuples(st.just(_flip), _AT, st.integers(1, 255)),
        st.tuples(st.just(_insert), _AT, st.sampled_from(_PIECES)),
        st.tuples(st.just(_insert), _AT, st.binary(max_size=8)),
        st.tuples(st.just(_cut), _AT, st.integers(1, 64)),
        st.tuples(st.just(_end), _AT, st.none()),
        st.tuples(st.just(_double), _AT, st.integers(1, 64)),
        st.tuples(st.just(_count), _AT, st.tuples(st.sampled_from("<>"), st.sampled_from(_HUGE))),
    )
    changed = st.tuples(st.sampled_from(list(seeds)), st.lists(change, max_size=6)).map(_apply)
    return st.one_of(changed, changed, changed, st.binary(max_size=200))


_AT = st.floats(0, 1, exclude_max=True)


def _apply(drawn: tuple[bytes, list[tuple[Callable[..., bytes], float, object]]]) -> bytes:
    content, changes = drawn
    for change, at, how in changes:
        content = change(content, int(at * (len(content) + 1)), how)
    return content


def _flip(content: bytes, at: int, mask: int) -> bytes:
    return content[:at] + bytes(byte ^ mask for byte in content[at : at + 1]) + content[at + 1 :]


def _insert(content: bytes, at: int, piece: bytes) -> bytes:
    return content[:at] + piece + content[at:]


def _cut(content: bytes, at: int, length: int) -> bytes:
    return content[:at] + content[at + length :]


def _end(content: bytes, at: int, _: None) -> bytes:
    return content[:at]


def _double(content: bytes, at: int, length: int) -> bytes:
    return content[: at + length] + content[at:]


def _count(content: bytes, at: int, how: tuple[str, int]) -> bytes:
    order, value = how
    return content[:at] + struct.pack(f"{order}Q", value) + content[at + 8 :]
