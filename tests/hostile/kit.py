"""What hostile rows are made of: a model to damage, files to write, and a GGUF file with any one fault."""

from __future__ import annotations

import json
import shutil
import struct
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import load_file, save_file

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

WEIGHTS = "model.safetensors"


@dataclass(frozen=True)
class Kit:
    """Of one row.

    Attributes:
        folder: the row's own; what it makes goes there, and nothing else may be in it afterwards.
        plain: a tiny Llama. Not to be changed: `model` copies it.
        converted: the same, converted.
        state: a state of `converted`.
    """

    folder: Path
    plain: Path
    converted: Path
    state: Path

    @property
    def out(self) -> list[str]:
        """Where a command is told to write."""
        return ["-o", str(self.folder / "out")]

    def write(self, name: str, content: str | bytes) -> Path:
        """A file of the row's folder."""
        path = self.folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content.encode() if isinstance(content, str) else content)
        return path

    def model(self, source: Path | None = None) -> Path:
        """A copy of the tiny model, to be damaged."""
        return shutil.copytree(source or self.plain, self.folder / "model")

    def config(self, **changes: Any) -> Path:
        """A copy with other settings."""
        model = self.model()
        path = model / "config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
        return model

    def weights(self, change: Callable[[dict[str, torch.Tensor]], object]) -> Path:
        """A copy with other weights."""
        model = self.model()
        tensors = load_file(model / WEIGHTS)
        change(tensors)
        save_file(tensors, model / WEIGHTS, {"format": "pt"})
        return model

    def shards(self, change: Callable[[dict[str, str], Path], object]) -> Path:
        """A copy in two shards, whose index `change` gets to change, as a mapping and with the folder."""
        model = self.model()
        tensors = load_file(model / WEIGHTS)
        (model / WEIGHTS).unlink()
        names = sorted(tensors)
        index = {}
        for number, part in enumerate((names[::2], names[1::2]), 1):
            shard = f"model-0000{number}-of-00002.safetensors"
            save_file({name: tensors[name] for name in part}, model / shard, {"format": "pt"})
            index |= dict.fromkeys(part, shard)
        change(index, model)
        (model / f"{WEIGHTS}.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))
        return model

    def header(self, change: Callable[[dict[str, Any]], object], *, length: int | None = None) -> Path:
        """A copy whose safetensors header says something else than its data, or states another length."""
        model = self.model()
        octets = (model / WEIGHTS).read_bytes()
        (old,) = struct.unpack("<Q", octets[:8])
        head = json.loads(octets[8 : 8 + old])
        change(head)
        written = json.dumps(head).encode()
        size = struct.pack("<Q", len(written) if length is None else length)
        (model / WEIGHTS).write_bytes(size + written + octets[8 + old :])
        return model


def gguf(
    *,
    magic: bytes = b"GGUF",
    version: int = 3,
    tensor_count: int | None = None,
    pair_count: int | None = None,
    pairs: tuple[bytes, ...] = (),
    names: tuple[str, ...] = ("a", "b"),
    shape: tuple[int, ...] = (32, 2),
    dims: int | None = None,
    kind: int = 0,
    offset: Callable[[int], int] = lambda number: 256 * number,
    alignment: int = 32,
    data: int | None = None,
) -> bytes:
    """A GGUF file of float32 tensors, sound if nothing else is asked for."""
    head = magic + struct.pack("<I", version)
    head += struct.pack("<QQ", len(names) if tensor_count is None else tensor_count, len(pairs))
    if pair_count is not None:
        head = head[:-8] + struct.pack("<Q", pair_count)
    head += b"".join(pairs)
    for number, name in enumerate(names):
        head += struct.pack("<Q", len(name)) + name.encode()
        head += struct.pack("<I", len(shape) if dims is None else dims)
        head += b"".join(struct.pack("<q", n) for n in shape)
        head += struct.pack("<iQ", kind, offset(number) % 2**64)
    head += bytes(-len(head) % alignment)
    return head + bytes(256 * len(names) if data is None else data)


def pair(key: str, kind: int, value: bytes, *, length: int | None = None) -> bytes:
    """One key and its value."""
    size = len(key) if length is None else length
    return struct.pack("<Q", size) + key.encode() + struct.pack("<i", kind) + value
