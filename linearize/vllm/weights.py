"""A converted checkpoint's weights as vLLM's own models read them."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from linearize.model.quantized import Quantization, QuantizedLinear

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping

    from linearize.model.configuration import LinearizedConfig
    from linearize.model.mixer.base import MixerBase

_PARTS = ("weight", "scale", "columns", "kept")


def bare_weights(
    weights: Iterable[tuple[str, Tensor]], config: LinearizedConfig, tied: Mapping[str, str]
) -> Iterator[tuple[str, Tensor]]:
    """The weights without linearize's quantization, and with the embedding that an output head is tied to.

    Args:
        tied: the name of a tied weight -> the name of its source. A file may hold the first alone. vLLM then takes the
            two for untied and leaves the second as it is.
    """
    seen: set[str] = set()
    heads: dict[str, Tensor] = {}
    for name, weight in _unquantized(weights, config):
        seen.add(name)
        if name in tied:
            heads[name] = weight
        yield name, weight
    for name, weight in heads.items():
        if tied[name] not in seen:
            yield tied[name], weight


def of_rank(mixer: MixerBase, name: str, weight: Tensor, rank: int) -> Tensor:
    """A mixer's parameter as a tensor-parallel rank has it.

    Args:
        mixer: the rank's mixer.
        name: of the parameter in the mixer.
        weight: the parameter of all heads.
    """
    if name != "score_weight":
        heads = len(mixer.get_parameter(name))  # query heads or key/value heads
        return weight[rank * heads : (rank + 1) * heads]
    # The terms of all heads' scores that come from the rank's own keys and values; the constants are the first rank's.
    layer, heads = mixer.layer, len(weight)
    *read, constants = weight.split([heads * layer.key_width, heads * layer.value_width, 1], 1)
    first = rank * layer.key_value_heads
    own = [x.unflatten(1, (heads, -1))[:, first : first + layer.key_value_heads].flatten(1) for x in read]
    return torch.cat([*own, constants * (rank == 0)], 1)


def _unquantized(weights: Iterable[tuple[str, Tensor]], config: LinearizedConfig) -> Iterator[tuple[str, Tensor]]:
    if not config.quantized:
        yield from weights
        return
    spec, waiting = Quantization(**config.quantized), dict[str, dict[str, Tensor]]()
    for name, weight in weights:
        module, _, part = name.rpartition(".")
        if part not in _PARTS or (part == "weight" and weight.dtype not in (torch.int8, torch.uint8)):
            yield name, weight
            continue
        parts = waiting.setdefault(module, {})
        parts[part] = weight
        if len(parts) == len(_PARTS):
            yield f"{module}.weight", _dense(waiting.pop(module), spec)


def _dense(parts: Mapping[str, Tensor], spec: Quantization) -> Tensor:
    """The weights `[O, I]` of a `QuantizedLinear` with these buffers."""
    outputs, columns = parts["weight"].shape
    like = nn.Linear(columns * 8 // spec.bits, outputs, bias=False, device="meta")
    layer = QuantizedLinear(like, spec)
    for name, tensor in parts.items():
        setattr(layer, name, tensor)
    dense = layer.dequantized(layer.kept.dtype)
    dense[:, layer.columns.long()] = layer.kept
    return dense
