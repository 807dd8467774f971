"""The weights of a model during calibration: all in memory, or in files with one block loaded at a time.

A block is opened and changed, and its fitted parts are stored separately. The next opening restores the converted block
and applies the `chosen` parts. So a part is dropped by not choosing it, and the whole model is never needed in memory.
"""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from linearize.conversion.streaming import put_weight
from linearize.families import family_of
from linearize.model.attention import LinearizedAttention
from linearize.sources.source import check_finite, default_device

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from pathlib import Path

    from linearize.conversion.streaming import Streamer, Unit
    from linearize.model import LinearizedForCausalLM


MIXER, OUTPUT = "mixer", "output"
PARTS = (MIXER, OUTPUT)
"""Fitted parts of a block: the mixer's own parameters, and the weight of the output projection."""


class Weights:
    """The weights of a model in memory.

    Args:
        model: the converted model.

    Attributes:
        device: the device that blocks compute on.
        chosen: the parts that are applied to a converted block when it is opened.
    """

    def __init__(self, model: LinearizedForCausalLM) -> None:
        self.model, self.device = model, model.device
        self.chosen: list[str] = []
        self._attentions = [x for x in model.named_modules() if isinstance(x[1], LinearizedAttention)]
        self._kept: dict[tuple[str, int], dict[str, Tensor]] = {}
        self._converted: dict[int, dict[str, Tensor]] = {}

    @property
    def fitted_nbytes(self) -> int:
        """Bytes of all parts of all blocks: the maximum that is stored."""
        every = (self._parameters(part, index) for part in PARTS for index in range(len(self._attentions)))
        return sum(x.nbytes for parameters in every for x in parameters.values())

    @contextmanager
    def outside(self) -> Iterator[None]:
        """In this context the weights outside of blocks are loaded: embeddings, the last norm, the head."""
        yield

    @contextmanager
    def block(self, index: int) -> Iterator[None]:
        """In this context the weights of block `index` are loaded and may be changed."""
        if index in self._converted:
            self._load(self._converted[index])
        else:
            parameters = (self._parameters(part, index) for part in PARTS)
            self._converted[index] = {name: _copy(x) for part in parameters for name, x in part.items()}
        self._lay_over(index)
        yield

    def keep(self, part: str, index: int) -> None:
        """Store a part of the open block with its present values."""
        self._kept[part, index] = {name: _copy(x) for name, x in self._parameters(part, index).items()}

    def kept(self, part: str, index: int) -> dict[str, Tensor]:
        """The values stored last for a part, by parameter name; empty if none were."""
        return self._kept.get((part, index), {})

    def _lay_over(self, index: int) -> None:
        for part in self.chosen:
            self._load(self.kept(part, index))

    def _parameters(self, part: str, index: int) -> dict[str, nn.Parameter]:
        name, attention = self._attentions[index]
        assert isinstance(attention, LinearizedAttention)  # noqa: S101 - for the type checker
        if attention.mixer is None:
            return {}
        if part == MIXER:
            return {f"{name}.mixer.{own}": x for own, x in attention.mixer.named_parameters()}
        o = output_projection(attention)
        own = next(own for own, module in attention.named_children() if module is o)
        return {f"{name}.{own}.weight": o.weight}

    @torch.no_grad()
    def _load(self, values: dict[str, Tensor]) -> None:
        for name, value in values.items():
            self.model.get_parameter(name).copy_(value)


class FileWeights(Weights):
    """The weights of a model in its safetensors files.

    Args:
        streamer: its model is on the meta device.
        folder: an existing folder for the fitted parts.
    """

    def __init__(self, streamer: Streamer, folder: Path) -> None:
        super().__init__(streamer.model)
        self.streamer, self.folder, self.device = streamer, folder, torch.device(default_device())
        self._blocks_of: dict[str, int] = {}
        self._units: dict[int | None, list[Unit]] = {}
        blocks = family_of(self.model.config.text_config).blocks + "."
        for unit in streamer.units:
            inside = unit.names[0].startswith(blocks)
            index = int(unit.names[0].removeprefix(blocks).split(".")[0]) if inside else None
            self._units.setdefault(index, []).append(unit)
            if index is not None:
                self._blocks_of |= dict.fromkeys(unit.names, index)
        _compute_buffers(self.model, self.device)

    @contextmanager
    def outside(self) -> Iterator[None]:
        with self._in_memory(self._units[None]):
            yield

    @contextmanager
    def block(self, index: int) -> Iterator[None]:
        with self._in_memory(self._units[index]):
            self._lay_over(index)
            yield

    def keep(self, part: str, index: int) -> None:
        values = {name: x.detach().cpu().contiguous() for name, x in self._parameters(part, index).items()}
        if values:
            save_file(values, self._file(part, index))

    def kept(self, part: str, index: int) -> dict[str, Tensor]:
        file = self._file(part, index)
        return load_file(file) if file.is_file() else {}

    def fitted(self, name: str) -> Tensor | None:
        """The fitted weight of that name; None if no chosen part has it."""
        files = [self._file(part, self._blocks_of[name]) for part in self.chosen if name in self._blocks_of]
        for file in files:
            if file.is_file():
                with safe_open(file, "pt") as opened:
                    if name in opened.keys():  # noqa: SIM118 - not a mapping
                        found: Tensor = opened.get_tensor(name)
                        return found
        return None

    def _file(self, part: str, index: int) -> Path:
        return self.folder / f"{index:05d}.{part}.safetensors"

    @contextmanager
    def _in_memory(self, units: Sequence[Unit]) -> Iterator[None]:
        without: list[tuple[str, Any]] = []
        try:
            for unit in units:
                for name, value in self.streamer.load(unit).items():
                    check_finite(value, name, self.streamer.reference)
                    empty: Any = self.model.get_parameter_or_buffer(name)
                    tensor = value.to(self.device)
                    if isinstance(empty, nn.Parameter):
                        tensor = nn.Parameter(tensor, requires_grad=empty.requires_grad)
                    for place in self.streamer.aliases[name]:
                        without.append((place, empty))
                        put_weight(self.model, place, tensor)
            yield
        finally:
            for place, empty in without:
                put_weight(self.model, place, empty)


def _copy(tensor: Tensor) -> Tensor:
    return tensor.detach().clone()


@torch.no_grad()
def _compute_buffers(model: Any, device: torch.device) -> None:
    """Compute the buffers that no file contains, such as rotary frequencies."""
    for module in model.modules():
        names = [name for name in module._non_persistent_buffers_set if module._buffers.get(name) is not None]
        if names:
            for name in names:
                setattr(module, name, torch.empty_like(module._buffers[name], device="cpu"))
            model._init_weights(module)
            for name in names:
                setattr(module, name, module._buffers[name].to(device))


def output_projection(attention: LinearizedAttention) -> Any:
    """The module that maps the heads back to the model's width."""
    return getattr(attention, attention.family.projections["o"].rsplit(".", 1)[-1])
