"""Conversion shard by shard: the weights go from the base model's safetensors files into the checkpoint's without ever
being in memory together.

The model is built on the meta device by `from_pretrained` itself, from the files' headers, so names, shapes, dtypes,
tied weights and what is missing are the library's own findings. Then one unit after the other is read, cast and
written: a single tensor, or the experts of a block where transformers stores them otherwise than it computes with
them. What cannot be done this way is refused with a reason before anything is written, and the caller converts in
memory.
"""

from __future__ import annotations

import hashlib
import json
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, GenerationConfig
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    WeightConverter,
    WeightRenaming,
    convert_and_load_state_dict_in_model,
    rename_source_key,
    revert_weight_conversion,
)
from transformers.modeling_utils import LoadStateDictConfig, remove_tied_weights_from_state_dict
from transformers.utils import cached_file

from linearize.conversion.modelfiles import check_weights, read_index
from linearize.conversion.output import check_space
from linearize.conversion.source import DTYPES, Source, check_finite, load_config, reading
from linearize.errors import ModelError
from linearize.model.mixer import Mixer
from linearize.model.modeling import family_of

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

    from transformers import PreTrainedModel

    from linearize.model import LinearizedForCausalLM

_SINGLE, _INDEX = "model.safetensors", "model.safetensors.index.json"
_BLOCK = 1 << 24
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
    """Why a model has to be converted in memory."""


class Slot(NamedTuple):
    """Where a tensor lies: bytes `start` to `end` of `file`."""

    file: Path
    start: int
    end: int
    dtype: torch.dtype
    shape: tuple[int, ...]

    def read(self) -> Tensor:
        """The tensor, in memory of its own: a mapped file would count as the process's until it is closed."""
        raw = torch.empty(self.end - self.start, dtype=torch.uint8)
        view = _bytes(raw)
        with self.file.open("rb", buffering=0) as file:
            file.seek(self.start)
            done = 0
            while done < len(view):
                got = file.readinto(view[done : done + _BLOCK])
                if not got:
                    raise ModelError(f"{self.file}: ends before its tensors do; fetch it again")
                done += got
        return raw.view(self.dtype).reshape(self.shape)


@dataclass(frozen=True)
class Unit:
    """Weights that are read and written together.

    Attributes:
        keys: their names in the base model's files; none for the mixers' own.
        names: their names in the model.
        saved: name in the checkpoint -> the tensor, without data.
        fused: whether the library makes the one from the other by more than a new name.
    """

    keys: tuple[str, ...]
    names: tuple[str, ...]
    saved: dict[str, Tensor]
    fused: bool

    @property
    def nbytes(self) -> int:
        return sum(tensor.numel() * tensor.element_size() for tensor in self.saved.values())


def weight_files(source: Source) -> list[Path]:
    """The safetensors files of a model.

    Raises:
        NotStreamable: there are none, or they are not all of it.
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
    if (single := find(_SINGLE)) is not None:
        return [single]
    if (index := find(_INDEX)) is None:
        raise NotStreamable("it has no safetensors files")
    files = {name: find(name) for name in read_index(index)}
    if absent := [name for name, file in files.items() if file is None]:
        raise ModelError(f"{source.reference}: {absent[0]} is missing, which {_INDEX} names; fetch it again")
    return [file for file in files.values() if file is not None]


def read_header(file: Path) -> dict[str, Slot]:
    """Where the tensors of a safetensors file are.

    Raises:
        NotStreamable: one of them has a dtype that models are not computed in.
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
            raise NotStreamable(f"{name} is stored as {entry['dtype']}")
        start, end = (8 + length + offset for offset in entry["data_offsets"])
        slots[name] = Slot(file, start, end, _DTYPES[entry["dtype"]], tuple(entry["shape"]))
    there, expected = file.stat().st_size, max((slot.end for slot in slots.values()), default=0)
    if there < expected:
        raise ModelError(f"{file}: is cut off at {there:,} of {expected:,} bytes; fetch it again")
    return slots


class Streamer:
    """A model whose weights are still in its files.

    Args:
        source: of kind `folder` or `hub`.
        dtype: a key of `DTYPES`, or `auto`.
        convert: swaps the attention of a teacher where it stands.
        most: bytes of a file that is written.

    Attributes:
        model: converted, without data.
        revision: of the base model on the Hub.
        units: all its weights.
        aliases: for each name of a unit all names in the model that stand for the same weight, itself among them.

    Raises:
        NotStreamable: it has to be converted in memory.
        ModelError: it cannot be read.
    """

    def __init__(
        self, source: Source, dtype: str, convert: Callable[[PreTrainedModel], LinearizedForCausalLM], *, most: int
    ) -> None:
        self.reference = source.reference
        files = weight_files(source)
        self.slots = {name: slot for file in files for name, slot in read_header(file).items()}
        teacher = self._teacher(source, dtype)
        self.revision = getattr(teacher.config, "_commit_hash", None)
        self.conversions = get_model_conversion_mapping(teacher)
        self.lock = threading.Lock()
        origins = self._origins(teacher)
        self._settle_tied(teacher, origins)
        self.model = convert(teacher)
        self.aliases: dict[str, list[str]] = {}
        self.units = list(self._units(origins))
        self.shards = [(_header(unit.saved for unit in shard), shard) for shard in self._shards(most)]

    @property
    def nbytes(self) -> int:
        """Of all weights."""
        return sum(unit.nbytes for unit in self.units)

    def _teacher(self, source: Source, dtype: str) -> PreTrainedModel:
        """The model as `load_model` gives it, without data."""
        config = load_config(source)
        if getattr(config, "quantization_config", None) is not None:
            raise NotStreamable("its weights are quantized")
        if source.trust_remote_code and hasattr(config, "auto_map"):
            raise NotStreamable("it brings code of its own")
        empty = {name: torch.empty(slot.shape, dtype=slot.dtype, device="meta") for name, slot in self.slots.items()}
        kinds = {tensor.dtype for tensor in empty.values() if tensor.is_floating_point()}
        if dtype == "auto" and getattr(config, "dtype", None) is None and len(kinds) > 1:
            raise NotStreamable("its weights are of several dtypes, and its configuration names none")
        build: Any = AutoModelForCausalLM._model_mapping[type(config)]
        with reading(source):
            # By their names on disk, not from the files: mapped, these would count against a limit on memory.
            teacher, found = build.from_pretrained(
                None,
                config=config,
                state_dict=empty,
                dtype=DTYPES.get(dtype, "auto"),
                device_map="meta",
                output_loading_info=True,
            )
            teacher.generation_config = _generation_config(source)
        missing = sorted(found["missing_keys"])
        if missing:
            raise NotStreamable(f"its files lack {len(missing)} weights, {missing[0]} among them")
        model: PreTrainedModel = teacher.eval()
        return model

    def _origins(self, teacher: PreTrainedModel) -> dict[str, list[tuple[str, bool]]]:
        """For each of the model's names the keys it comes from, and whether by more than a new name."""
        renamings = [entry for entry in self.conversions if isinstance(entry, WeightRenaming)]
        converters = [entry for entry in self.conversions if isinstance(entry, WeightConverter)]
        names, prefix = teacher.state_dict(), teacher.base_model_prefix
        origins: dict[str, list[tuple[str, bool]]] = {}
        for key in self.slots:
            name, pattern = rename_source_key(key, renamings, converters, prefix, names)
            if name not in names and key in names:
                name, pattern = rename_source_key(key, [], [], base_model_prefix=prefix, meta_state_dict=names)
            if name in names:
                origins.setdefault(name, []).append((key, pattern is not None))
        for name, keys in origins.items():
            if len(keys) > 1 and not all(fused for _, fused in keys):
                raise NotStreamable(f"its files have {name} under several names")
        return origins

    def _settle_tied(self, teacher: PreTrainedModel, origins: dict[str, list[tuple[str, bool]]]) -> None:
        """Ties what the configuration calls tied and the files have twice, if it is the same twice, as the library
        does where it sees the data."""
        for target, kept in list(teacher.all_tied_weights_keys.items()):
            if teacher.get_parameter(target) is teacher.get_parameter(kept):
                continue
            (one,), (other,) = origins[target], origins[kept]
            if torch.equal(self.slots[one[0]].read(), self.slots[other[0]].read()):
                put_weight(teacher, target, teacher.get_parameter(kept))
            else:
                teacher.all_tied_weights_keys.pop(target)

    def _units(self, origins: dict[str, list[tuple[str, bool]]]) -> Iterable[Unit]:
        model = self.model
        state = dict(model.state_dict())
        for ignored in model._keys_to_ignore_on_save or ():
            state.pop(ignored, None)
        aliases: dict[int, list[str]] = {}
        for name in state:
            aliases.setdefault(id(model.get_parameter_or_buffer(name)), []).append(name)
        blocks = family_of(model.config.text_config).blocks + "."
        units: dict[str, list[str]] = {}
        keys: dict[str, list[tuple[str, bool]]] = {}
        for name in remove_tied_weights_from_state_dict(dict(state), model):
            same = self.aliases[name] = aliases[id(model.get_parameter_or_buffer(name))]
            keys[name] = next((origins[alias] for alias in (name, *same) if alias in origins), [])
            unit = name
            if any(fused for _, fused in keys[name]):
                # A fused tensor can be one of several that the same keys make, all within a block.
                inside = name.startswith(blocks)
                unit = blocks + name.removeprefix(blocks).split(".")[0] if inside else "outside of blocks"
            units.setdefault(unit, []).append(name)
        for names in units.values():
            origin = [key for name in names for key in keys[name]]
            fused = any(converted for _, converted in origin)
            if not origin and not _is_own(names[0]):
                raise NotStreamable(f"nothing in its files is {names[0]}")
            saved = revert_weight_conversion(model, {name: state[name] for name in names})
            yield Unit(tuple(key for key, _ in origin), tuple(names), saved, fused)

    def _shards(self, most: int) -> list[list[Unit]]:
        """The units by file, none of more than `most` bytes unless one unit is. Within a file wider numbers come
        first, so that each tensor stands where its dtype can be read."""
        shards: list[list[Unit]] = [[]]
        size = 0
        for unit in self.units:
            if shards[-1] and size + unit.nbytes > most:
                shards.append([])
                size = 0
            shards[-1].append(unit)
            size += unit.nbytes
        for shard in shards:
            shard.sort(key=lambda unit: -max(tensor.element_size() for tensor in unit.saved.values()))
        return shards

    def write(
        self, folder: Path, *, workers: int = 1, fitted: Callable[[str], Tensor | None] = lambda name: None
    ) -> dict[str, str]:
        """Writes the weights into `folder`.

        Args:
            workers: how many files are written at once; each holds a unit in memory.
            fitted: what is written in the place of the weight of that name; None leaves it.

        Returns:
            the SHA-256 of each file.

        Raises:
            ModelError: weights that are no numbers.
            OutputError: the disk has no room for them.
        """
        check_space(folder, self.nbytes)
        count = len(self.shards)
        files = [_SINGLE if count == 1 else f"model-{n:05d}-of-{count:05d}.safetensors" for n in range(1, count + 1)]

        def write(file: str, shard: tuple[bytes, list[Unit]]) -> str:
            return self._write_shard(folder / file, *shard, fitted)

        if workers == 1:  # a thread's stack and heap would be memory of their own
            hashes = list(map(write, files, self.shards))
        else:
            with ThreadPoolExecutor(workers) as pool:
                hashes = list(pool.map(write, files, self.shards))
        digests = dict(zip(files, hashes, strict=True))
        if count > 1:
            pairs = zip(files, self.shards, strict=True)
            held = {name: file for file, (_, shard) in pairs for unit in shard for name in unit.saved}
            total = {"total_parameters": self.model.num_parameters(), "total_size": self.nbytes}
            index = {"metadata": total, "weight_map": dict(sorted(held.items()))}
            (folder / _INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
        return digests

    def _write_shard(
        self, path: Path, header: bytes, units: Sequence[Unit], fitted: Callable[[str], Tensor | None]
    ) -> str:
        digest = hashlib.sha256(header)
        with path.open("wb", buffering=0) as file:
            file.write(header)
            for unit in units:
                weights = self._saved(unit, fitted)
                for name in unit.saved:
                    weight = weights.pop(name)
                    check_finite(weight, name, self.reference)
                    raw = _bytes(weight)
                    for start in range(0, len(raw), _BLOCK):
                        block = raw[start : start + _BLOCK]
                        file.write(block)
                        digest.update(block)
        return digest.hexdigest()

    def _saved(self, unit: Unit, fitted: Callable[[str], Tensor | None]) -> dict[str, Tensor]:
        """The unit's weights under their names in the checkpoint."""
        changed = {name: value for name in unit.names if (value := fitted(name)) is not None}
        if unit.fused:
            weights = self.load(unit) | changed
            with self.lock:  # loading leaves other rules on the model for a moment
                saved: dict[str, Tensor] = revert_weight_conversion(self.model, weights)
            return saved
        (name,) = unit.names
        (only,) = unit.saved
        return {only: changed[name] if changed else self.load(unit)[name]}

    def load(self, unit: Unit) -> dict[str, Tensor]:
        """The unit's weights as converted, under their names in the model."""
        if unit.fused:
            with self.lock:
                return self._load_fused(unit)
        (name,) = unit.names
        dtype = next(iter(unit.saved.values())).dtype
        if not unit.keys:
            owner, _, own = name.rpartition(".mixer.")
            mixer = self.model.get_submodule(f"{owner}.mixer")
            assert isinstance(mixer, Mixer)  # noqa: S101 - for the type checker
            return {name: mixer.initial_values()[own].to(dtype)}
        return {name: self.slots[unit.keys[0]].read().to(dtype)}

    def _load_fused(self, unit: Unit) -> dict[str, Tensor]:
        model: Any = self.model
        empty = {name: model.get_parameter_or_buffer(name) for name in unit.names}
        load = LoadStateDictConfig(dtype=model.dtype, weight_mapping=self.conversions)
        convert_and_load_state_dict_in_model(model, {key: self.slots[key].read() for key in unit.keys}, load)
        model.__dict__.pop("_weight_conversions", None)  # see LinearizedForCausalLM.from_teacher
        weights = {name: model.get_parameter_or_buffer(name).detach() for name in unit.names}
        for name, parameter in empty.items():
            put_weight(model, name, parameter)
        return weights


def _generation_config(source: Source) -> GenerationConfig:
    try:
        return GenerationConfig.from_pretrained(source.reference)
    except OSError:
        return GenerationConfig.from_pretrained(
            source.reference, config_file_name="config.json", _from_model_config=True
        )


def _bytes(tensor: Tensor) -> memoryview:
    array: Any = tensor.contiguous().reshape(-1).view(torch.uint8).numpy()
    return memoryview(array)


def _is_own(name: str) -> bool:
    return ".mixer." in name


def put_weight(model: nn.Module, name: str, weight: Any) -> None:
    """Puts a parameter or buffer of a model into its place."""
    owner, _, leaf = name.rpartition(".")
    setattr(model.get_submodule(owner), leaf, weight)


def _header(tensors: Iterable[dict[str, Tensor]]) -> bytes:
    """What a safetensors file begins with.

    Raises:
        NotStreamable: a tensor would stand where its dtype cannot be read.
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
