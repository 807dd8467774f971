"""Quantized linear layers: int8 with a scale per output channel, or int4 with a scale per group of inputs.

    y = x Wᵀ + b ,   W = scale ⊙ integers, except for the kept inputs, whose columns are not quantized

Quantization is symmetric (no zero point). The kept inputs are those with the largest rounding cost: inputs whose
activations have outliers, or with a large weight that would coarsen the scale of all others.
`linearize.quantization.rounding` rounds the weights. This file is copied into checkpoints.

Dimensions: N rows, I inputs, O outputs, G groups of inputs, C kept inputs.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import torch
import torch.nn.functional as F
from linearize_kernels.products import is_plain, product
from torch import nn

if TYPE_CHECKING:
    from collections.abc import Iterator

    from torch import Tensor

# From this number of rows on, unpacking the weights is faster than torch's kernel, which multiplies row by row.
_MANY = 32
# The kernel reads this many inputs at a time and does not check the end.
ALIGNED = 32
# Bytes. The kernel needs 16 for weights and 32 for activations; torch allocates at 64.
_BOUNDARY = 64


@dataclass(frozen=True)
class Quantization:
    """The format of quantized weights.

    Attributes:
        bits: bits per integer; with 4, a byte holds two.
        group: inputs that share a scale; None, or a size that does not divide a layer's inputs, means all inputs.
        kept: the share of a layer's inputs whose weights are not quantized.
    """

    bits: Literal[4, 8] = 8
    group: int | None = None
    kept: float = 0.0

    @property
    def largest(self) -> int:
        """The largest integer; the smallest is its negative."""
        return int(2 ** (self.bits - 1) - 1)

    def groups(self, inputs: int) -> int:
        """Scales per output channel."""
        return inputs // self.group if self.group and inputs % self.group == 0 else 1

    def takes(self, linear: nn.Linear) -> bool:
        """True if the layer can be quantized: 4 bits need an even number of inputs."""
        return self.bits == 8 or linear.in_features % 2 == 0


class QuantizedLinear(nn.Module):
    """A quantized linear layer; empty until a checkpoint or `linearize.quantization.rounding` fills its buffers.

    Attributes:
        weight: int8 [O, I]; or uint8 [O, I / 2] with two integers per byte, the first in the low half, 8 added to each.
        scale: bfloat16 [O, G].
        columns, kept: the kept inputs, int32 [C], whose integers are 0, and their weights [O, C] in the original dtype.
        fast: True if few rows of float32 may be rounded to bfloat16, because torch's kernel needs it.
    """

    weight: Tensor
    scale: Tensor
    columns: Tensor
    kept: Tensor

    def __init__(self, like: nn.Linear, spec: Quantization) -> None:
        super().__init__()
        inputs, outputs, device = like.in_features, like.out_features, like.weight.device
        self.in_features, self.out_features, self.spec, self.fast = inputs, outputs, spec, False
        count = math.ceil(spec.kept * inputs)
        packed = torch.empty(outputs, inputs * spec.bits // 8, dtype=torch.int8 if spec.bits == 8 else torch.uint8)
        for name, empty in {
            "weight": packed,
            "scale": torch.empty(outputs, spec.groups(inputs), dtype=torch.bfloat16),
            "columns": torch.empty(count, dtype=torch.int32),
            "kept": torch.empty(outputs, count, dtype=like.weight.dtype),
        }.items():
            self.register_buffer(name, empty.to(device))
        self.bias = like.bias

    def forward(self, x: Tensor) -> Tensor:
        rows = x.view(-1, self.in_features) if x.is_contiguous() else x.reshape(-1, self.in_features)
        if self._has_kernel(rows):
            self.weight = _aligned(self.weight)
            scale = self.scale.to(torch.bfloat16).view(-1)
            outputs = torch._weight_int8pack_mm(_aligned(rows.to(torch.bfloat16)), self.weight, scale).to(x.dtype)
        elif self.scale.shape[1] == 1:  # integers are exact in any dtype, so the scale may come last
            outputs = product(rows, self.integers().to(x.dtype)) * self.scale.to(x.dtype).view(-1)
        else:
            outputs = product(rows, self.dequantized(x.dtype))
        if self.columns.numel():
            outputs = outputs + F.linear(rows.index_select(1, self.columns), self.kept.to(x.dtype))
        if self.bias is not None:
            outputs = outputs + self.bias
        return outputs.view(*x.shape[:-1], self.out_features)

    def integers(self) -> Tensor:
        """int8 [O, I]"""
        if self.spec.bits == 8:
            return self.weight
        return torch.stack((self.weight & 15, self.weight >> 4), -1).flatten(1).to(torch.int8) - 8

    def dequantized(self, dtype: torch.dtype) -> Tensor:
        """scale ⊙ integers, [O, I]; 0 for the kept inputs."""
        weights: Tensor = self.integers().to(dtype).unflatten(1, (self.scale.shape[1], -1))
        return (weights * self.scale.to(dtype)[..., None]).flatten(1)

    def _has_kernel(self, rows: Tensor) -> bool:
        return (
            self.spec.bits == 8
            and rows.shape[0] < _MANY
            and rows.device.type == "cpu"
            and self.in_features % ALIGNED == 0
            and (self.fast or rows.dtype == torch.bfloat16)
        )

    def extra_repr(self) -> str:
        return f"{self.in_features} -> {self.out_features}, int{self.spec.bits}, {self.columns.numel()} inputs kept"


def _aligned(tensor: Tensor) -> Tensor:
    """The tensor, or a copy at an aligned address, because the kernel crashes the process at others (mapped files,
    slices)."""
    return tensor if tensor.data_ptr() % _BOUNDARY == 0 else tensor.clone()


def linear_layers(model: nn.Module, *, head: bool) -> Iterator[tuple[nn.Module, str, nn.Linear]]:
    """Linear layers of a model with their owners and names; `head` includes an output head tied to the embedding."""
    whole: Any = model
    left = None
    if not head:  # the base model's configuration says so
        config = getattr(whole.config, "text_config", whole.config)
        left = whole.get_output_embeddings() if config.tie_word_embeddings else None
    for parent in model.modules():
        for name, child in parent.named_children():
            if is_plain(child) and child is not left:
                yield parent, name, child


def install(model: nn.Module, spec: Quantization) -> None:
    """Replace linear layers by empty `QuantizedLinear`s where a checkpoint of `spec` has them."""
    for parent, name, linear in list(linear_layers(model, head=False)):
        if spec.takes(linear):
            setattr(parent, name, QuantizedLinear(linear, spec))
