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
        """The model as `load_model` gives it, without data."""
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
            raise NotStreamable(f"its files lack {counted(len(missing), 'weight', 'weights')}, {missing[0]} among them")
        check_taken(found["unexpected_keys"], source)
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
        files = [WEIGHTS if count == 1 else f"model-{n:05d}-of-{count:05d}.safetensors" for n in range(1, count + 1)]

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


def _is_own(name: str) -> bool:
    return ".mixer." in name


def put_weight(model: nn.Module, name: str, weight: Any) -> None:
    """Puts a parameter or buffer of a model into its place."""
    owner, _, leaf = name.rpartition(".")
    setattr(model.get_submodule(owner), leaf, weight)
