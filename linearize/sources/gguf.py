"""The header of a GGUF file: checked before any library opens the file, and read without its vocabulary.

gguf's own reader trusts the counts and lengths in the file. `read_head` compares each one with the remaining bytes
first, so a damaged file costs neither memory nor time, and the error names the fault. gguf's reader also makes numpy
arrays of every token and merge; `GgufHead` stores only their number. For SmolLM2-135M `gguf.GGUFReader` takes 5.7 s of
CPU time, `read_head` 0.03 s.

    magic, version | counts of tensors and of key/value pairs | pairs | tensors' names, shapes, types, offsets | data
"""

from __future__ import annotations

import mmap
import re
import struct
from functools import lru_cache
from math import prod
from typing import TYPE_CHECKING, Any, NamedTuple

from linearize.errors import ModelError

if TYPE_CHECKING:
    from pathlib import Path

MAGIC = b"GGUF"
_VERSIONS = (2, 3)
_ALIGNMENT_KEY, _ALIGNMENT = "general.alignment", 32
_SPLIT_COUNT, _SPLIT_NUMBER = "split.count", "split.no"
_TOKENS = "tokenizer.ggml.tokens"
_LONGEST_KEY, _LONGEST_NAME, _MOST_DIMS = 65_535, 64, 4
# `struct` codes of scalar types, by their number in the file; 8 is a string, 9 an array.
_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_WIDTHS = {kind: struct.calcsize(code) for kind, code in _SCALARS.items()}
_UINT32, _STRING, _ARRAY = 4, 8, 9
_FLOAT32 = 0
_SHORTEST_PAIR, _SHORTEST_TENSOR = 8 + 4 + 1, 8 + 4 + 4 + 8


class _Fault(Exception):
    """A fault in the file, described by its message."""


class _Split(Exception):
    """The file is one part of a split model: `number`, counted from 1, of `count`."""

    def __init__(self, number: int, count: int) -> None:
        super().__init__(number, count)
        self.number, self.count = number, count


class Tensor(NamedTuple):
    """A tensor in a GGUF file.

    Attributes:
        shape: in the file's order, fastest axis first.
        kind: number of the ggml type.
        start: offset of its data in the file, in bytes.
    """

    shape: tuple[int, ...]
    kind: int
    start: int
    nbytes: int


class GgufHead(NamedTuple):
    """The checked header of a GGUF file.

    Attributes:
        order: `<` or `>`, the file's byte order for `struct`.
        values: key -> scalar or string, or the number of elements of an array.
        pairs: key -> first and end byte of the key/value pair in the file.
        arrays: keys whose value is an array.
        tensors: name -> tensor.
    """

    path: Path
    order: str
    values: dict[str, Any]
    pairs: dict[str, tuple[int, int]]
    arrays: frozenset[str]
    tensors: dict[str, Tensor]

    def floats(self, name: str) -> list[float]:
        """The values of the float32 tensor `name`.

        Raises:
            ModelError: it has another type.
        """
        tensor = self.tensors[name]
        if tensor.kind != _FLOAT32:
            raise ModelError(f"{self.path}: the tensor {name} is of type {tensor.kind}, and only float32 can be read")
        with self.path.open("rb") as file:
            file.seek(tensor.start)
            return list(struct.unpack(f"{self.order}{tensor.nbytes // 4}f", file.read(tensor.nbytes)))

    def without_vocabulary(self, vocabulary: str) -> bytes:
        """A small GGUF file with the same keys and tensor names, for libraries that read a configuration from it.

        It leaves out the tokenizer's arrays, and each tensor is one float32.

        Args:
            vocabulary: the key for the number of tokens; added if the file has tokens and lacks this key.
        """
        kept = [span for key, span in self.pairs.items() if not (key in self.arrays and key.startswith("tokenizer."))]
        tokens = self.values.get(_TOKENS) if vocabulary not in self.values else None
        number = struct.Struct(self.order + "Q").pack
        with self.path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            parts = [data[:8], number(len(self.tensors)), number(len(kept) + (tokens is not None))]
            parts += [data[start:end] for start, end in kept]
        if tokens is not None:
            parts += [self._name(vocabulary), struct.pack(self.order + "II", _UINT32, tokens)]
        for name in self.tensors:
            parts += [self._name(name), struct.pack(self.order + "IQIQ", 1, 1, _FLOAT32, 0)]
        head = b"".join(parts)
        alignment = self.values.get(_ALIGNMENT_KEY, _ALIGNMENT)
        return head + bytes(-len(head) % alignment + 4)

    def _name(self, text: str) -> bytes:
        octets = text.encode()
        return struct.pack(self.order + "Q", len(octets)) + octets


def read_head(path: Path) -> GgufHead:
    """Read and check the header of a GGUF file.

    Raises:
        ModelError: the header is damaged, the file ends before its tensors do, or it is a part of a split model.
    """
    stat = path.stat()
    return _read(path, stat.st_size, stat.st_mtime_ns)


@lru_cache(maxsize=16)
def _read(path: Path, size: int, _changed: int) -> GgufHead:
    """Cached by the file's size and modification time, because a large vocabulary takes 0.1 s."""
    if size < 4:
        raise ModelError(f"{path}: not a GGUF file; give a Hub id, a model's folder, or a .gguf file")
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        try:
            return _walk(path, _Head(data))
        except _Split as part:
            raise ModelError(_split(path, part.number, part.count)) from None
        except _Fault as fault:
            raise ModelError(f"{path}: {fault}; fetch the file again") from None


def _split(path: Path, number: int, count: int) -> str:
    """The error message for a part of a split model, with llama.cpp's command that merges the parts."""
    name = re.fullmatch(r"(.+)-\d{5}-of-(\d{5})\.gguf", path.name)
    first = f"{name[1]}-00001-of-{name[2]}.gguf" if name else "FIRST-PART.gguf"
    whole = f"{name[1]}.gguf" if name else "WHOLE.gguf"
    return (
        f"{path}: part {number:,} of {count:,} of a split GGUF model, and only whole files can be read; merge the "
        f"parts with llama.cpp: llama-gguf-split --merge {first} {whole}"
    )


class _Head:
    """A cursor over the file's bytes that refuses to read past the end."""

    def __init__(self, data: mmap.mmap) -> None:
        self.data, self.at, self.size, self.order = data, 0, len(data), "<"

    def number(self, code: str) -> int:
        return int(self.scalar(code))

    def scalar(self, code: str) -> Any:
        self.need(struct.calcsize(code))
        (found,) = struct.unpack_from(self.order + code, self.data, self.at)
        self.at += struct.calcsize(code)
        return found

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
        """Read the number of items that follow; refuse it if `shortest` bytes per item exceed the file's size."""
        found = self.number("Q")
        if found * shortest > self.size:
            raise _Fault(f"the GGUF file is damaged or cut off: {found:,} {of} in {self.size:,} bytes")
        return found


def _walk(path: Path, head: _Head) -> GgufHead:
    if head.data[:4] != MAGIC:
        raise _Fault("not a GGUF file")
    head.at = 4
    version = head.number("I")
    if version & 0xFFFF == 0:  # the file has the other byte order
        head.order, version = ">", int.from_bytes(version.to_bytes(4, "little"), "big")
    if version not in _VERSIONS:
        raise _Fault(f"the GGUF file is of version {version}, and {' and '.join(map(str, _VERSIONS))} can be read")
    tensors, pairs = head.count("tensors", _SHORTEST_TENSOR), head.count("key/value pairs", _SHORTEST_PAIR)
    values, spans, arrays = _pairs(head, pairs)
    parts, number = values.get(_SPLIT_COUNT), values.get(_SPLIT_NUMBER, 0)
    if isinstance(parts, int) and isinstance(number, int) and parts > 1:
        raise _Split(number + 1, parts)
    alignment = values.get(_ALIGNMENT_KEY, _ALIGNMENT)
    found = _tensors(head, tensors, alignment)
    if not found:
        raise _Fault("the GGUF file has no tensors")
    first = -(-head.at // alignment) * alignment
    at = 0
    for name, tensor in sorted(found.items(), key=lambda one: one[1].start):
        if tensor.start < at:
            raise _Fault(f"the GGUF file is damaged: the tensor {_shown(name)} overlaps another")
        at = tensor.start + tensor.nbytes
    if first + at > head.size:
        raise _Fault(f"the GGUF file is cut off at {head.size:,} of at least {first + at:,} bytes")
    placed = {name: tensor._replace(start=first + tensor.start) for name, tensor in found.items()}
    return GgufHead(path, head.order, values, spans, arrays, placed)


def _pairs(head: _Head, count: int) -> tuple[dict[str, Any], dict[str, tuple[int, int]], frozenset[str]]:
    """Read the key/value pairs; returns `values`, `pairs` and `arrays` of `GgufHead`."""
    values: dict[str, Any] = {}
    spans: dict[str, tuple[int, int]] = {}
    arrays: set[str] = set()
    for _ in range(count):
        start = head.at
        key = head.text("a key", _LONGEST_KEY)
        if key in values:
            raise _Fault(f"the GGUF file is damaged: the key {_shown(key)} is there twice")
        kind = head.number("I")
        if key == _ALIGNMENT_KEY:
            alignment = head.number("I") if kind == _UINT32 else 0
            if alignment == 0 or alignment & (alignment - 1):
                raise _Fault(f"the GGUF file is damaged: {key} is {alignment}, which is no power of two")
            values[key] = alignment
        else:
            values[key] = _value(head, key, kind)
        if kind == _ARRAY:
            arrays.add(key)
        spans[key] = start, head.at
    return values, spans, frozenset(arrays)


def _value(head: _Head, key: str, kind: int) -> Any:
    if kind in _SCALARS:
        return head.scalar(_SCALARS[kind])
    if kind == _STRING:
        length = head.number("Q")
        start = head.at
        head.skip(length)
        return head.data[start : head.at].decode(errors="replace")
    if kind == _ARRAY:
        inner = head.number("I")
        if inner in _SCALARS:
            count = head.number("Q")
            head.skip(count * _WIDTHS[inner])
        elif inner == _STRING:
            count = head.count(f"strings of {_shown(key)}", 8)
            _strings(head, count)
        else:
            raise _Fault(f"the GGUF file is damaged: {_shown(key)} is an array of type {inner}, which there is not")
        return count
    raise _Fault(f"the GGUF file is damaged: {_shown(key)} is of type {kind}, which there is not")


def _strings(head: _Head, count: int) -> None:
    # One loop without method calls, because a vocabulary has hundreds of thousands of strings.
    data, at, size, read = head.data, head.at, head.size, struct.Struct(head.order + "Q").unpack_from
    for _ in range(count):
        if at + 8 > size:
            break
        at += 8 + read(data, at)[0]
    head.skip(at - head.at)


def _tensors(head: _Head, count: int, alignment: int) -> dict[str, Tensor]:
    """Name -> tensor; each start is relative to the first tensor's data."""
    from gguf.constants import GGML_QUANT_SIZES

    sizes = {int(kind): sizes for kind, sizes in GGML_QUANT_SIZES.items()}
    found: dict[str, Tensor] = {}
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
        found[name] = Tensor(tuple(shape), kind, start, total)
    return found


def _shown(name: str) -> str:
    return repr(name[:60])
