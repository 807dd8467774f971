"""The head of a GGUF file, walked before any library believes it.

gguf's own reader and what stands on it take counts and lengths as the file has them. Here each is held against what is
left of the file first, so that a damaged file costs neither memory nor time, and its fault gets a name.

    magic, version | counts of tensors and of key/value pairs | pairs | tensors' names, shapes, types, offsets | data
"""

from __future__ import annotations

import mmap
import struct
from functools import lru_cache
from math import prod
from typing import TYPE_CHECKING, NamedTuple

from linearize.errors import ModelError

if TYPE_CHECKING:
    from pathlib import Path

MAGIC = b"GGUF"
_VERSIONS = (2, 3)
_ALIGNMENT_KEY, _ALIGNMENT = "general.alignment", 32
_LONGEST_KEY, _LONGEST_NAME, _MOST_DIMS = 65_535, 64, 4
# Of a value's type: bytes of one, by the number that stands for it; 8 is a string, 9 an array.
_SCALARS = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}
_UINT32, _STRING, _ARRAY = 4, 8, 9
_SHORTEST_PAIR, _SHORTEST_TENSOR = 8 + 4 + 1, 8 + 4 + 4 + 8


class _Fault(Exception):
    """What is wrong with the file."""


class _Tensor(NamedTuple):
    name: str
    start: int
    nbytes: int


def check_gguf(path: Path) -> None:
    """Refuses a file whose head is damaged, or that ends before its tensors do.

    Raises:
        ModelError: with what is wrong.
    """
    stat = path.stat()
    _check(path, stat.st_size, stat.st_mtime_ns)


@lru_cache(maxsize=16)
def _check(path: Path, size: int, _changed: int) -> None:
    """Once for each state of a file: a large vocabulary takes a tenth of a second."""
    if size < 4:
        raise ModelError(f"{path}: not a GGUF file; give a Hub id, a model's folder, or a .gguf file")
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        try:
            _walk(_Head(data))
        except _Fault as fault:
            raise ModelError(f"{path}: {fault}; fetch the file again") from None


class _Head:
    """The bytes of the file, read from the front; never past its end."""

    def __init__(self, data: mmap.mmap) -> None:
        self.data, self.at, self.size, self.order = data, 0, len(data), "<"

    def number(self, code: str) -> int:
        self.need(struct.calcsize(code))
        (found,) = struct.unpack_from(self.order + code, self.data, self.at)
        self.at += struct.calcsize(code)
        return int(found)

    def need(self, count: int) -> None:
        if count > self.size - self.at:
            raise _Fault(f"the GGUF file is cut off at {self.size:,} bytes, or a length in it is damaged")

    def skip(self, count: int) -> None:
        self.need(count)
        self.at += count

    def text(self, what: str, longest: int) -> str:
        length = self.number("Q")
        if length > longest:
            raise _Fault(f"the GGUF file is damaged: {what} of {length:,} bytes (at most {longest:,} are allowed)")
        self.need(length)
        octets = self.data[self.at : self.at + length]
        self.at += length
        try:
            return octets.decode()
        except UnicodeDecodeError:
            raise _Fault(f"the GGUF file is damaged: {what} that is not UTF-8") from None

    def count(self, of: str, shortest: int) -> int:
        """A number of things that follow, none of them shorter than `shortest` bytes."""
        found = self.number("Q")
        if found * shortest > self.size:
            raise _Fault(f"the GGUF file is damaged or cut off: {found:,} {of} in {self.size:,} bytes")
        return found


def _walk(head: _Head) -> None:
    if head.data[:4] != MAGIC:
        raise _Fault("not a GGUF file")
    head.at = 4
    version = head.number("I")
    if version & 0xFFFF == 0:  # written on a machine of the other byte order
        head.order, version = ">", int.from_bytes(version.to_bytes(4, "little"), "big")
    if version not in _VERSIONS:
        raise _Fault(f"the GGUF file is of version {version}, and {' and '.join(map(str, _VERSIONS))} can be read")
    tensors, pairs = head.count("tensors", _SHORTEST_TENSOR), head.count("key/value pairs", _SHORTEST_PAIR)
    alignment = _pairs(head, pairs)
    found = _tensors(head, tensors, alignment)
    if not found:
        raise _Fault("the GGUF file has no tensors")
    first = -(-head.at // alignment) * alignment
    at = 0
    for tensor in sorted(found, key=lambda one: one.start):
        if tensor.start < at:
            raise _Fault(f"the GGUF file is damaged: the tensor {tensor.name} overlaps another")
        at = tensor.start + tensor.nbytes
    if first + at > head.size:
        raise _Fault(f"the GGUF file is cut off at {head.size:,} of at least {first + at:,} bytes")


def _pairs(head: _Head, count: int) -> int:
    """Walks the key/value pairs; returns the alignment that they ask for."""
    seen: set[str] = set()
    alignment = _ALIGNMENT
    for _ in range(count):
        key = head.text("a key", _LONGEST_KEY)
        if key in seen:
            raise _Fault(f"the GGUF file is damaged: the key {_shown(key)} is there twice")
        seen.add(key)
        kind = head.number("I")
        if key == _ALIGNMENT_KEY:
            alignment = head.number("I") if kind == _UINT32 else 0
            if alignment == 0 or alignment & (alignment - 1):
                raise _Fault(f"the GGUF file is damaged: {key} is {alignment}, which is no power of two")
            continue
        _value(head, key, kind)
    return alignment


def _value(head: _Head, key: str, kind: int) -> None:
    if kind in _SCALARS:
        head.skip(_SCALARS[kind])
    elif kind == _STRING:
        head.skip(head.number("Q"))
    elif kind == _ARRAY:
        inner = head.number("I")
        if inner in _SCALARS:
            head.skip(head.number("Q") * _SCALARS[inner])
        elif inner == _STRING:
            _strings(head, head.count(f"strings of {_shown(key)}", 8))
        else:
            raise _Fault(f"the GGUF file is damaged: {_shown(key)} is an array of type {inner}, which there is not")
    else:
        raise _Fault(f"the GGUF file is damaged: {_shown(key)} is of type {kind}, which there is not")


def _strings(head: _Head, count: int) -> None:
    # A vocabulary has hundreds of thousands; calls for each would take most of the time of a check.
    data, at, size, read = head.data, head.at, head.size, struct.Struct(head.order + "Q").unpack_from
    for _ in range(count):
        if at + 8 > size:
            break
        at += 8 + read(data, at)[0]
    head.skip(at - head.at)


def _tensors(head: _Head, count: int, alignment: int) -> list[_Tensor]:
    from gguf.constants import GGML_QUANT_SIZES

    sizes = {int(kind): sizes for kind, sizes in GGML_QUANT_SIZES.items()}
    found: dict[str, _Tensor] = {}
    for _ in range(count):
        name = head.text("a tensor's name", _LONGEST_NAME)
        damaged = f"the GGUF file is damaged: the tensor {_shown(name)}"
        if name in found:
            raise _Fault(f"{damaged} is there twice")
        dims = head.number("I")
        if dims > _MOST_DIMS:
            raise _Fault(f"{damaged} has {dims:,} dimensions")
        shape = [head.number("q") for _ in range(dims)]
        kind, start = head.number("I"), head.number("Q")
        if kind not in sizes:
            raise _Fault(f"{damaged} is of type {kind}, which this version does not know")
        block, nbytes = sizes[kind]
        if min(shape, default=1) < 1 or (shape[0] if shape else 1) % block:
            raise _Fault(f"{damaged} has the shape {shape}, in blocks of {block}")
        total = prod(shape) // block * nbytes
        if total > head.size:
            raise _Fault(f"{damaged} would take {total:,} bytes, and the file is cut off at {head.size:,}")
        if start % alignment:
            raise _Fault(f"{damaged} starts at {start:,}, which is no multiple of {alignment}")
        if start > head.size:
            raise _Fault(f"{damaged} starts at {start:,}, and the file is cut off at {head.size:,}")
        found[name] = _Tensor(_shown(name), start, total)
    return list(found.values())


def _shown(name: str) -> str:
    return repr(name[:60])
