"""Check a model's folder before any library opens it: only files inside the folder are read, and no pickle.

The checks cover harmful input and input that a library would ignore silently: absurd sizes, an index with paths outside
the folder, a header that does not fit its file, weights that exist only as a pickle.
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError, safe_open

from linearize.errors import ModelError

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
_PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl")
_LARGEST_CONFIG, _LARGEST_INDEX = 16_000_000, 256_000_000
_MOST_LAYERS = 4_096
_SIZES = ("hidden_size", "vocab_size", "num_attention_heads", "num_key_value_heads", "head_dim", "n_embd", "n_head")
_LAYERS = ("num_hidden_layers", "num_layers", "n_layer", "n_layers")


def check_config(folder: Path) -> None:
    """Refuse a `config.json` that is not a JSON object, has an impossible number of layers, or has a size below 1.

    Raises:
        ModelError: describes the fault.
    """
    config = _json(folder / "config.json", _LARGEST_CONFIG)
    for section in (config, *(part for part in config.values() if isinstance(part, dict))):
        for name in _LAYERS:
            count = section.get(name)
            if isinstance(count, int) and not 0 < count <= _MOST_LAYERS:
                raise ModelError(f"{folder / 'config.json'}: {name} is {count}; expected 1 to {_MOST_LAYERS:,}")
        for name in _SIZES:
            size = section.get(name)
            if isinstance(size, int) and size < 1:
                raise ModelError(f"{folder / 'config.json'}: {name} is {size}; expected 1 or more")


def check_weights(folder: Path) -> None:
    """Refuse unsafe or incomplete weight files before they are read.

    Raises:
        ModelError: no safetensors, shards missing or outside the folder, a damaged header, or an adapter beside the
            weights.
    """
    if (folder / "adapter_config.json").exists():
        raise ModelError(
            f"{folder}: has an adapter (adapter_config.json) beside the model; merge it first, in Python with peft: "
            "AutoPeftModelForCausalLM.from_pretrained(...).merge_and_unload().save_pretrained(...)"
        )
    if (folder / WEIGHTS).exists() or not (folder / INDEX).exists():
        names: Sequence[str] = [WEIGHTS]
    else:
        names = read_index(folder / INDEX)
    for name in names:
        if not (folder / name).is_file():
            raise ModelError(_missing(folder, name))
        _check_header(folder / name)


def read_index(path: Path) -> list[str]:
    """The shard names in an index; each is a file name in the index's own folder.

    Raises:
        ModelError: the file is not such an index, or names a file in another folder.
    """
    weights = _json(path, _LARGEST_INDEX).get("weight_map")
    if not isinstance(weights, dict) or not weights:
        raise ModelError(f"{path}: has no weight_map; fetch the file again")
    names = set()
    for tensor, name in weights.items():
        if not isinstance(name, str) or not name.endswith(".safetensors"):
            raise ModelError(f"{path}: {tensor[:80]!r} is in {str(name)[:80]!r}, which is no safetensors file")
        if "/" in name or "\\" in name or "\0" in name or ":" in name:
            raise ModelError(
                f"{path}: {tensor[:80]!r} is in {name[:80]!r}, outside the folder; do not use this model, its index "
                "reads files that are none of its business"
            )
        names.add(name)
    return sorted(names)


def _missing(folder: Path, name: str) -> str:
    if (folder / name).is_symlink():
        return f"{folder / name}: is a link that leads nowhere; fetch the file again"
    if name != WEIGHTS:
        return f"{folder / name}: the shard is missing; fetch it again"
    pickles = sorted(path.name for pattern in _PICKLES for path in folder.glob(pattern))
    if pickles:
        return (
            f"{folder}: its weights are a pickle ({pickles[0]}), which could run any code and is not read; convert "
            "them to safetensors where you trust them, with save_pretrained"
        )
    return f"{folder}: has no weights ({WEIGHTS}); fetch them again"


def _check_header(path: Path) -> None:
    try:
        with safe_open(path, framework="pt"):
            pass
    except (OSError, SafetensorError) as error:
        reason = " ".join(str(error).split()).removeprefix("Error while deserializing header: ")[:120]
        raise ModelError(f"{path}: is damaged or cut off ({reason}); fetch the file again") from error


def _json(path: Path, largest: int) -> dict[str, Any]:
    try:
        if path.stat().st_size > largest:
            raise ModelError(f"{path}: is larger than {largest // 1_000_000} MB; this is no such file")
        found = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ModelError(f"{path}: cannot be read: {(error.strerror or str(error)).lower()}") from error
    except RecursionError:
        raise ModelError(f"{path}: cannot be read: nested too deeply") from None
    except ValueError as error:
        reason = str(error).splitlines()[0][:120]
        raise ModelError(f"{path}: cannot be read: not JSON ({reason}); fetch the file again") from error
    if not isinstance(found, dict):
        raise ModelError(f"{path}: cannot be read: expected a JSON object; fetch the file again")
    return found
