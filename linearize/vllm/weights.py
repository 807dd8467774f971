"""A converted checkpoint's weights as vLLM's own models read them."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from linearize.model.quantized import Quantization, QuantizedLinear

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping

    from linearize.model.configuration import LinearizedConfig

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
