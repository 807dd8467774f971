"""The readers of untrusted files, each with valid files as seeds."""

from __future__ import annotations

import gzip
import json
import struct
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import save

from linearize.data.records import open_records
from linearize.errors import LinearizeError
from linearize.evaluation.results.results import read_results
from linearize.generation import statefile
from linearize.generation.state import State
from linearize.model import LinearizedForCausalLM, MixerConfig
from linearize.recipe import load_recipe, shipped_recipes
from linearize.recipe.schema import DataSpec
from linearize.sources.gguf import read_head
from linearize.sources.modelfiles import INDEX, WEIGHTS, check_config, check_weights, read_index

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path


class Slipped(Exception):
    """A reader accepted an invalid file."""


@dataclass(frozen=True)
class Reader:
    """A reader and its files.

    Attributes:
        file: the name of the file that it reads.
        seeds: valid files.
        read: reads the file in a folder; raises `LinearizeError` if it is not valid.
    """

    file: str
    seeds: Sequence[bytes]
    read: Callable[[Path], object]

    def takes(self, folder: Path, content: bytes) -> bool:
        """True if the reader accepts the content; any exception but a one-line error propagates."""
        path = folder / self.file
        path.write_bytes(content)
        try:
            self.read(path)
            return True
        except LinearizeError as error:
            if "\n" in str(error) or len(str(error)) > 1_000:
                raise Slipped(f"an error that is not one line: {str(error)[:200]!r}") from error
            return False
        finally:
            path.unlink()


def readers() -> dict[str, Reader]:
    """All readers by name."""
    model = _tiny()
    recipes = [recipe.path.read_bytes() for recipe in shipped_recipes()]
    recipes += [b"a: &a [x, x]\nb: *a\n", b"seed: !!python/name:os.system\n", b"mixer: {keep: {heads: {0: [1]}}}\n"]
    config = json.dumps({"model_type": "llama", "num_hidden_layers": 2, "text_config": {"hidden_size": 8}}).encode()
    index = json.dumps(
        {"metadata": {}, "weight_map": {"a": "model-1.safetensors", "b": "model-2.safetensors"}}
    ).encode()
    lines = b'{"text": "a dog"}\n{"messages": [{"role": "user", "content": "Why?"}]}\n'
    return {
        "recipe": Reader("r.yaml", recipes, lambda path: load_recipe(str(path))),
        "gguf": Reader("m.gguf", _ggufs(), _gguf),
        "config": Reader("config.json", [config], lambda path: check_config(path.parent)),
        "index": Reader(INDEX, [index], _index),
        "safetensors": Reader(WEIGHTS, [_weights()], lambda path: check_weights(path.parent)),
        "state": Reader("a.state", [_state(model)], lambda path: _same_state(path, model)),
        "records": Reader("d.jsonl", [lines], _records),
        "table": Reader("d.csv", [b'text,n\n"a, dog",1\nb,2\n'], _records),
        "compressed": Reader("d.jsonl.gz", [gzip.compress(lines, mtime=0)], _records),
        "results": Reader("results.json", [_results()], read_results),
    }


def _gguf(path: Path) -> None:
    """A file that we accept must also be accepted by gguf's reader, which transformers uses."""
    from gguf import GGUFReader

    read_head(path)
    try:
        GGUFReader(path)
    except Exception as error:
        raise Slipped(f"gguf's reader refuses it: {type(error).__name__}: {error}") from error


def _index(path: Path) -> None:
    for name in read_index(path):
        if (path.parent / name).resolve().parent != path.parent.resolve():
            raise Slipped(f"{name!r} is outside the folder")


def _same_state(path: Path, model: LinearizedForCausalLM) -> None:
    """An accepted state must equal the saved one, whatever else was changed in the file."""
    layers, last = statefile.read(path, model)
    if int(last) != 4 or layers[0].counts.tolist() != [23]:
        raise Slipped("another state is taken for the one that was saved")


def _records(path: Path) -> None:
    with open_records(DataSpec(source=str(path)), seed=0) as records:
        list(records)


def _tiny() -> LinearizedForCausalLM:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_attention_heads": 2, "num_key_value_heads": 1}
    config = LlamaConfig(vocab_size=19, num_hidden_layers=1, bos_token_id=0, eos_token_id=0, **sizes)
    return LinearizedForCausalLM.from_teacher(LlamaForCausalLM(config), [MixerConfig(layers=[0], window=4)]).eval()


def _state(model: LinearizedForCausalLM) -> bytes:
    import tempfile
    from pathlib import Path

    with tempfile.TemporaryDirectory() as folder:
        State.read(model, torch.arange(1, 25)[None] % 10).save(Path(folder) / "a.state", model)
        return (Path(folder) / "a.state").read_bytes()


def _weights() -> bytes:
    return save({"a": torch.zeros(4, 4), "b": torch.ones(3), "c": torch.zeros(2, dtype=torch.int64)}, {"format": "pt"})


def _ggufs() -> list[bytes]:
    def text(value: bytes) -> bytes:
        return struct.pack("<Q", len(value)) + value

    pairs = [
        text(b"general.architecture") + struct.pack("<i", 8) + text(b"llama"),
        text(b"general.alignment") + struct.pack("<iI", 4, 32),
        text(b"llama.rope") + struct.pack("<if", 6, 1e4),
        text(b"tokens") + struct.pack("<iiQ", 9, 8, 3) + text(b"a") + text(b"bc") + text(b""),
        text(b"scores") + struct.pack("<iiQ", 9, 6, 2) + bytes(8),
        text(b"flag") + struct.pack("<ib", 7, 1),
    ]
    made = []
    for kind, shape, nbytes in ((0, (8, 2), 64), (2, (32, 1), 18), (8, (64,), 68)):
        head = b"GGUF" + struct.pack("<IQQ", 3, 2, len(pairs)) + b"".join(pairs)
        step = -(-nbytes // 32) * 32
        for number, name in enumerate((b"token_embd.weight", b"blk.0.attn_q.weight")):
            head += text(name) + struct.pack("<I", len(shape)) + b"".join(struct.pack("<q", n) for n in shape)
            head += struct.pack("<iQ", kind, number * step)
        made.append(head + bytes(-len(head) % 32) + bytes(2 * step))
    return made


def _results() -> bytes:
    score: dict[str, Any] = {"value": 0.5, "stderr": None, "n": 2, "total": 2, "seed": None, "items": [0.0, 1.0]}
    task = {"task": "t", "suite": "s", "metric": "acc", "higher_is_better": True, "axis": [], "digest": None}
    document = {
        "schema": "linearize.results/1", "model": "m", "command": "", "date": "2026-01-01T00:00:00+00:00",
        "versions": {}, "limit": None,
        "systems": [{"name": "model", "description": "", "state_bytes": None, "growth_bytes_per_token": None}],
        "tasks": [{**task, "systems": {"model": {**score, "tags": [], "curves": []}}}],
    }  # fmt: skip
    return json.dumps(document).encode()
