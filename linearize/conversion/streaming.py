"""Convert shard by shard: copy the weights from the base model's safetensors files into the checkpoint's files without
ever holding all of them in memory.

`from_pretrained` builds the model on the meta device from the files' headers, so transformers itself determines names,
shapes, dtypes, tied weights and missing weights. Then each unit is read, cast and written in turn. A unit is a single
tensor, or the experts of a block if transformers stores them in another layout than it computes with. A model that
cannot be streamed raises `NotStreamable` with the reason before any file is written, and the caller converts in memory.
"""

from __future__ import annotations

import hashlib
import json
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

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

from linearize.errors import counted
from linearize.families import family_of
from linearize.model.mixer.mixer import Mixer
from linearize.runtime.files import check_space
from linearize.sources.modelfiles import INDEX, WEIGHTS
from linearize.sources.source import DTYPES, Source, check_finite, check_taken, load_config, reading
from linearize.sources.weightfiles import (
    BLOCK,
    NotStreamable,
    bytes_of,
    header_of,
    read_header,
    weight_files,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence
    from pathlib import Path

    from transformers import PreTrainedModel

    from linearize.model import LinearizedForCausalLM


@dataclass(frozen=True)
class Unit:
    """Weights that are read and written together.

    Attributes:
        keys: names in the base model's files; empty for the mixers' own weights.
        names: names in the model.
        saved: name in the checkpoint -> tensor on the meta device.
        fused: True if transformers transforms the tensors, not only their names.
    """

    keys: tuple[str, ...]
    names: tuple[str, ...]
    saved: dict[str, Tensor]
    fused: bool

    @property
    def nbytes(self) -> int:
        return sum(tensor.numel() * tensor.element_size() for tensor in self.saved.values())


class Streamer:
    """A converted model whose weights are still in the base model's files.

    Args:
        source: of kind `folder` or `hub`.
        dtype: a key of `DTYPES`, or `auto`.
        convert: swaps the attention of a teacher in place.
        most: maximum bytes per output file.

    Attributes:
        model: the converted model on the meta device.
        revision: of the base model on the Hub.
        units: all weights.
        aliases: for each name in a unit, all names in the model of the same weight, itself included.

    Raises:
        NotStreamable: the model has to be converted in memory.
        ModelError: the model cannot be read.
    """

    def __init__(
        self, source: Source, dtype: str, convert: Callable[[PreTrainedModel], LinearizedForCausalLM], *, most: int
    ) -> None:
        self.reference = source.reference
        config = load_config(source)
        if getattr(config, "quantization_config", None) is not None:
            raise NotStreamable("its weights are quantized")
        files = weight_files(source)
        self.slots = {name: slot for file in files for name, slot in read_header(file).items()}
        teacher = self._teacher(source, config, dtype)
        self.revision = getattr(teacher.config, "_commit_hash", None)
        self.conversions = get_model_conversion_mapping(teacher)
        self.lock = threading.Lock()
        origins = self._origins(teacher)
        self._settle_tied(teacher, origins)
        self.model = convert(teacher)
        self.aliases: dict[str, list[str]] = {}
        self.units = list(self._units(origins))
        self.shards = [(header_of(unit.saved for unit in shard), shard) for shard in self._shards(most)]

    @property
    def nbytes(self) -> int:
        """Bytes of all weights."""
        return sum(unit.nbytes for unit in self.units)

    def _teacher(self, source: Source, config: Any, dtype: str) -> PreTrainedModel:
        """Build the model of `load_model` on the meta device."""
        if source.trust_remote_code and hasattr(config, "auto_map"):
            raise NotStreamable("it brings code of its own")
        empty = {name: torch.empty(slot.shape, dtype=slot.dtype, device="meta") for name, slot in self.slots.items()}
        kinds = {tensor.dtype for tensor in empty.values() if tensor.is_floating_point()}
        if dtype == "auto" and getattr(config, "dtype", None) is None and len(kinds) > 1:
            raise NotStreamable("its weights are of several dtypes, and its configuration names none")
        build: Any = AutoModelForCausalLM._model_mapping[type(config)]
        with reading(source):
            # Pass a state dict of meta tensors instead of the files: memory-mapped files would count against a memory
            # limit.
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
            raise NotStreamable(f"its files lack {counted(len(missing), 'weight', 'weights')}, {missing[0]} among them")
        check_taken(found["unexpected_keys"], source)
        model: PreTrainedModel = teacher.eval()
        return model

    def _origins(self, teacher: PreTrainedModel) -> dict[str, list[tuple[str, bool]]]:
        """Model name -> the file keys it is made from, each with True if transformers transforms the tensor, not only
        its name."""
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
        """Compare weights that the configuration ties and the files store twice: tie them if they are equal, else untie
        them. `from_pretrained` does the same when it has the data."""
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
                # One set of keys can make several fused tensors, all within a block, so the block is one unit.
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
        """Group the units into files of at most `most` bytes; a larger unit gets a file to itself. Wider dtypes come
        first in a file, so every tensor's offset is aligned to its dtype."""
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
        """Write the weights into `folder`.

        Args:
            workers: number of files written in parallel; each holds one unit in memory.
            fitted: weight name -> replacement tensor, or None to keep the weight.

        Returns:
            file name -> SHA-256.

        Raises:
            ModelError: a weight has values that are not finite.
            OutputError: the disk has too little space.
        """
        check_space(folder, self.nbytes)
        count = len(self.shards)
        files = [WEIGHTS if count == 1 else f"model-{n:05d}-of-{count:05d}.safetensors" for n in range(1, count + 1)]

        def write(file: str, shard: tuple[bytes, list[Unit]]) -> str:
            return self._write_shard(folder / file, *shard, fitted)

        if workers == 1:  # no pool, because a thread's stack and heap add memory
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
            (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
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
                    raw = bytes_of(weight)
                    for start in range(0, len(raw), BLOCK):
                        block = raw[start : start + BLOCK]
                        file.write(block)
                        digest.update(block)
        return digest.hexdigest()

    def _saved(self, unit: Unit, fitted: Callable[[str], Tensor | None]) -> dict[str, Tensor]:
        """The unit's weights by their names in the checkpoint."""
        changed = {name: value for name in unit.names if (value := fitted(name)) is not None}
        if unit.fused:
            weights = self.load(unit) | changed
            with self.lock:  # loading replaces the model's conversion rules temporarily
                saved: dict[str, Tensor] = revert_weight_conversion(self.model, weights)
            return saved
        (name,) = unit.names
        (only,) = unit.saved
        return {only: changed[name] if changed else self.load(unit)[name]}

    def load(self, unit: Unit) -> dict[str, Tensor]:
        """Read or build the unit's converted weights, by their names in the model."""
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


def _is_own(name: str) -> bool:
    return ".mixer." in name


def put_weight(model: nn.Module, name: str, weight: Any) -> None:
    """Set a parameter or buffer of `model` by its full name."""
    owner, _, leaf = name.rpartition(".")
    setattr(model.get_submodule(owner), leaf, weight)
