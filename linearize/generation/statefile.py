"""The file format of a state: safetensors with `layers.N.part.tensor` and `last`, verified before use.

The head (safetensors' metadata) holds the format's version, the model's `fingerprint`, the number of tokens of each
row, and the SHA-256 of the tensors.
"""

from __future__ import annotations

import hashlib
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from linearize import __version__
from linearize.errors import OutputError, StateError
from linearize.runtime.files import check_file, staged_file
from linearize.sources.fingerprint import fingerprint

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence
    from pathlib import Path

    from linearize.model import LayerMemory, LinearizedForCausalLM

# Another way to store memories is another version.
FORMAT, VERSION = "linearize-state", "3"
_DIGITS = 12  # digits of a token count; a fixed width keeps the file size constant

_Layout = dict[str, tuple[tuple[int, ...], torch.dtype]]


def empty_memories(model: LinearizedForCausalLM, rows: int) -> list[LayerMemory]:
    """An empty memory for each layer, on the layer's device."""
    return [layer.memory(rows, model.dtype, next(layer.parameters()).device) for layer in model.attention_layers]


def write(path: Path, model: LinearizedForCausalLM, layers: Sequence[LayerMemory], last: Tensor) -> int:
    """Write memories without pads (see `LayerMemory.clone`) and the last tokens `[B, 1]`; see `State.save`."""
    check_target(path)
    tokens = [count + 1 for count in layers[0].counts.tolist()]
    tensors = {name: tensor.cpu().contiguous() for name, tensor in _named(layers, last).items()}
    expected = _expected(model, tokens)
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    if wrong := _wrong_shapes(shapes, expected) or _wrong_values(tensors, expected, tokens, model):
        raise StateError(f"{path}: the state cannot be saved with this model: {wrong}; read the text with it first")
    head = {
        "format": FORMAT,
        "version": VERSION,
        "linearize": __version__,
        **fingerprint(model),
        "tokens": ",".join(f"{count:0{_DIGITS}}" for count in tokens),
        "sha256": _digest(tensors),
    }
    with staged_file(path) as staging:
        save_file(tensors, staging, head)
    return path.stat().st_size


def read(path: Path, model: LinearizedForCausalLM) -> tuple[list[LayerMemory], Tensor]:
    """Read memories and last tokens onto the devices of `model`; see `State.load`."""
    head = header(path)
    own = fingerprint(model)
    if other := [what for what in own if head.get(what) != own[what]]:
        raise StateError(
            f"state {path} was saved by another model or configuration (not the same {' and '.join(other)}); "
            "read the text again with this model"
        )
    if not (tokens := _counted(head.get("tokens", ""))):
        raise _damaged(path, "it does not say how many tokens were read")
    expected = _expected(model, tokens)
    with _opened(path) as file:
        # Names and shapes come first, because they bound the bytes to read.
        if wrong := _wrong_shapes({name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}, expected):  # noqa: SIM118
            raise _damaged(path, wrong)
        tensors = {name: file.get_tensor(name) for name in expected}
    if wrong := _wrong_values(tensors, expected, tokens, model):
        raise _damaged(path, wrong)
    if head.get("sha256") != _digest(tensors):
        raise _damaged(path, "its content is not what was written")
    memories = [
        empty.holding({name: tensors[f"layers.{index}.{name}"].to(x.device) for name, x in empty.tensors()})
        for index, empty in enumerate(empty_memories(model, 1))
    ]
    return memories, tensors["last"].to(model.device)


def header(path: Path) -> dict[str, str]:
    """Read the head of a state's file.

    Raises:
        StateError: the file is missing, or not a state that this version reads.
    """
    head = _head(path)
    if head.get("version") != VERSION:
        raise StateError(
            f"{path}: the state's format is {head.get('version')}, which stores the memory in another way, and "
            f"linearize {__version__} reads {VERSION}; read the text again (linearize generate MODEL - -n 0 "
            f"--save-state {path} < TEXT)"
        )
    return head


def _head(path: Path) -> dict[str, str]:
    """The metadata of a state in any version of the format."""
    with _opened(path) as file:
        head: dict[str, str] = file.metadata() or {}
    if head.get("format") != FORMAT:
        raise StateError(f"{path}: is not a state; save one with --save-state or State.save")
    return head


def check_target(path: Path) -> None:
    """Refuse a path where no state can be written.

    Raises:
        OutputError: the folder is missing or not writable, or another kind of file exists at `path`.
    """
    check_file(path)
    if path.exists():
        try:
            _head(path)  # a state in another version may be overwritten
        except StateError as error:
            raise OutputError(f"{path}: is not a state and will not be overwritten; name another file") from error


@contextmanager
def _opened(path: Path) -> Iterator[Any]:
    if not path.is_file():
        raise StateError(f"{path}: no such file; save one with --save-state or State.save")
    try:
        with safe_open(path, framework="pt") as file:
            yield file
    except (OSError, SafetensorError) as error:
        reason = " ".join(str(error).split())[:200]
        raise StateError(f"{path}: is not a state, or was cut off ({reason}); read the text again") from error


def _damaged(path: Path, wrong: str) -> StateError:
    return StateError(f"{path}: the state is damaged: {wrong}; read the text again")


def _named(layers: Sequence[LayerMemory], last: Tensor) -> dict[str, Tensor]:
    tensors = {f"layers.{index}.{name}": x for index, layer in enumerate(layers) for name, x in layer.tensors()}
    return {**tensors, "last": last}


def _expected(model: LinearizedForCausalLM, tokens: list[int]) -> _Layout:
    """Name -> shape and dtype of every tensor in a state whose rows have `tokens` tokens."""
    layout: _Layout = {}
    for name, tensor in _named(empty_memories(model, 1), torch.empty(1, 1, dtype=torch.long)).items():
        shape = [len(tokens), *tensor.shape[1:]]
        if ".softmax." in name:
            shape[1] = max(tokens) - 1
        layout[name] = tuple(shape), tensor.dtype
    return layout


def _wrong_shapes(shapes: Mapping[str, tuple[int, ...]], expected: _Layout) -> str | None:
    """Describe the first tensor that is missing, unexpected or of another shape; None if there is none."""
    if missing := sorted(expected.keys() - shapes.keys()):
        return f"{missing[0]} is missing"
    if more := sorted(shapes.keys() - expected.keys()):
        return f"{more[0]!r} does not belong there"
    for name, (shape, _) in expected.items():
        if shapes[name] != shape:
            return f"{name} has the shape {list(shapes[name])}, and {list(shape)} is expected"
    return None


def _wrong_values(
    tensors: Mapping[str, Tensor], expected: _Layout, tokens: list[int], model: LinearizedForCausalLM
) -> str | None:
    """Describe the first tensor with another dtype or with impossible values; None if there is none."""
    for name, tensor in tensors.items():
        if tensor.dtype != expected[name][1]:
            return f"{name} is {tensor.dtype}, and {expected[name][1]} is expected".replace("torch.", "")
        if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
            return f"{name} has values that are not finite"
        if name.endswith(".counts") and tensor.tolist() != [count - 1 for count in tokens]:
            return f"{name} does not agree with the tokens read"
    if bool(((tensors["last"] < 0) | (tensors["last"] >= model.config.vocab_size)).any()):
        return "last is not a token of this model"
    return None


def _counted(text: str) -> list[int]:
    """The token counts in the head; empty if they are malformed."""
    counts = text.split(",")
    good = all(count.isascii() and count.isdigit() and len(count) == _DIGITS and int(count) for count in counts)
    return [int(count) for count in counts] if good else []


def _digest(tensors: Mapping[str, Tensor]) -> str:
    digest = hashlib.sha256()
    for name in sorted(tensors):
        octets: Any = tensors[name].flatten().view(torch.uint8).numpy()
        digest.update(name.encode())
        digest.update(octets)
    return digest.hexdigest()
