"""Read and write safetensors files tensor by tensor: their headers, tensor offsets and raw bytes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor
from transformers.utils import cached_file

from linearize.errors import ModelError
from linearize.sources.modelfiles import INDEX, WEIGHTS, check_weights, read_index
from linearize.sources.source import Source, load_config, reading

if TYPE_CHECKING:
    from collections.abc import Iterable

BLOCK = 1 << 24
"""Block size of reads and writes, in bytes."""
_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
_NAMES = {dtype: name for name, dtype in _DTYPES.items()}


class NotStreamable(Exception):
    """The model cannot be converted by streaming; the message gives the reason, and the caller converts in memory."""


class Slot(NamedTuple):
    """The location of a tensor: bytes `start` to `end` of `file`."""

    file: Path
    start: int
    end: int
    dtype: torch.dtype
    shape: tuple[int, ...]

    def read(self) -> Tensor:
        """Read the tensor into its own memory, because a memory-mapped file counts as process memory until it is
        closed."""
        raw = torch.empty(self.end - self.start, dtype=torch.uint8)
        view = bytes_of(raw)
        with self.file.open("rb", buffering=0) as file:
            file.seek(self.start)
            done = 0
            while done < len(view):
                got = file.readinto(view[done : done + BLOCK])
                if not got:
                    raise ModelError(f"{self.file}: ends before its tensors do; fetch it again")
                done += got
        return raw.view(self.dtype).reshape(self.shape)


def weight_files(source: Source) -> list[Path]:
    """The safetensors files of a model.

    Raises:
        NotStreamable: there are none, or some are missing.
    """
    if source.kind == "gguf":
        raise NotStreamable("it is a GGUF file")

    def find(name: str) -> Path | None:
        with reading(source):
            found = cached_file(source.reference, name, _raise_exceptions_for_missing_entries=False)
        return None if found is None else Path(found)

    if find("adapter_config.json") is not None:
        raise NotStreamable("adapters lie over its weights")
    if getattr(load_config(source), "transformers_weights", None) is not None:
        raise NotStreamable("its configuration names weights of its own")
    if source.kind == "folder":
        check_weights(Path(source.reference))
    if (single := find(WEIGHTS)) is not None:
        return [single]
    if (index := find(INDEX)) is None:
        raise NotStreamable("it has no safetensors files")
    files = {name: find(name) for name in read_index(index)}
    if absent := [name for name, file in files.items() if file is None]:
        raise ModelError(f"{source.reference}: {absent[0]} is missing, which {INDEX} names; fetch it again")
    return [file for file in files.values() if file is not None]


def read_header(file: Path) -> dict[str, Slot]:
    """Name -> location of each tensor in a safetensors file.

    Raises:
        NotStreamable: a tensor has a dtype that models do not compute in.
        ModelError: the file is damaged or cut off.
    """
    with file.open("rb") as opened:
        length = int.from_bytes(opened.read(8), "little")
        try:
            if length > file.stat().st_size:
                raise ValueError("longer than the file")
            header = json.loads(opened.read(length))
        except ValueError as error:
            raise ModelError(f"{file}: not a safetensors file, or damaged; fetch it again") from error
    slots = {}
    for name, entry in header.items():
        if name == "__metadata__":
            continue
        if entry["dtype"] not in _DTYPES:
            raise NotStreamable(f"{name} is stored as {entry['dtype']}, whose values are taken as they are")
        start, end = (8 + length + offset for offset in entry["data_offsets"])
        slots[name] = Slot(file, start, end, _DTYPES[entry["dtype"]], tuple(entry["shape"]))
    there, expected = file.stat().st_size, max((slot.end for slot in slots.values()), default=0)
    if there < expected:
        raise ModelError(f"{file}: is cut off at {there:,} of {expected:,} bytes; fetch it again")
    return slots


def header_of(tensors: Iterable[dict[str, Tensor]]) -> bytes:
    """The header of a safetensors file with `tensors` in this order.

    Raises:
        NotStreamable: a tensor's offset would not be aligned to its dtype.
    """
    entries: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    at = 0
    for saved in tensors:
        for name, tensor in saved.items():
            size = tensor.numel() * tensor.element_size()
            if at % tensor.element_size() or tensor.dtype not in _NAMES:
                raise NotStreamable(f"{name} cannot be laid out in a file of mixed dtypes")
            offsets = [at, at + size]
            entries[name] = {"dtype": _NAMES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": offsets}
            at += size
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def bytes_of(tensor: Tensor) -> memoryview:
    """A tensor's raw bytes in the file's order."""
    array: Any = tensor.contiguous().reshape(-1).view(torch.uint8).numpy()
    return memoryview(array)
