"""Large int8 layers on processors with int8 products (VNNI), through oneDNN, with each activation as a pair of int8.

    x ≈ s (a + b / 254) ,  s = max|x| / 127        a, b in -127 .. 127, b the rounding error of a

The pair is two rows of one product, which reads the weights once. The error is that of 16 bits, below that of bfloat16
activations, which torch's own int8 kernel uses.

Dimensions: N rows, I inputs, O outputs.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import nn

from linearize.runtime.memory import digest_of

if TYPE_CHECKING:
    from torch import Tensor

    from linearize.model.quantized import QuantizedLinear

# Least number of weights at which the product saves more time than splitting activations costs.
_LARGE = 2**21
# Steps of `b` per step of `a`.
_FINER = 254


class PairedLinear(nn.Module):
    """An int8 layer with a scale per output channel, for float activations on a CPU.

    Attributes:
        packed: the integers in oneDNN's layout; not a buffer, because no other code reads this layout.
        told: the SHA-256 of the integers, which `fingerprint` reads instead of them.
    """

    scale: Tensor
    zeros: Tensor
    columns: Tensor
    kept: Tensor
    told: Tensor

    def __init__(self, layer: QuantizedLinear) -> None:
        super().__init__()
        self.in_features, self.out_features = layer.in_features, layer.out_features
        integers = layer.integers()
        self.packed = torch.ops.onednn.qlinear_prepack(integers, [2, layer.in_features])
        for name, tensor in {
            "scale": layer.scale.float().view(-1),
            "zeros": torch.zeros(layer.out_features, dtype=torch.long),
            "columns": layer.columns,
            "kept": layer.kept,
            "told": torch.frombuffer(bytearray(digest_of(integers)), dtype=torch.uint8),
        }.items():
            self.register_buffer(name, tensor)
        self.bias = layer.bias

    @property
    def packed_nbytes(self) -> int:
        """Bytes of the packed integers."""
        return self.in_features * self.out_features

    def forward(self, x: Tensor) -> Tensor:
        rows = x.reshape(-1, self.in_features).float()
        size = rows.abs().amax(1, keepdim=True).clamp_min(torch.finfo(torch.float32).tiny) / 127
        steps = rows / size
        first = steps.round()
        pair = torch.cat([first, (steps - first).mul_(_FINER).round_()]).add_(128).to(torch.uint8)
        weights = (self.packed, self.scale, self.zeros, None)
        read = torch.ops.onednn.qlinear_pointwise(pair, 1.0, 128, *weights, 1.0, 0, torch.float32, "none", [], "")
        coarse, fine = read.chunk(2)
        outputs = torch.add(coarse, fine, alpha=1 / _FINER).mul_(size).to(x.dtype)
        if self.columns.numel():
            outputs = outputs + F.linear(rows.index_select(1, self.columns).to(x.dtype), self.kept.to(x.dtype))
        if self.bias is not None:
            outputs = outputs + self.bias
        return outputs.view(*x.shape[:-1], self.out_features)


def pairs_are_fast() -> bool:
    """True if the processor has int8 products and torch uses them. Otherwise products of pairs are slow, and their sums
    may not be exact."""
    known = getattr(torch.cpu, "_is_vnni_supported", None)
    return known is not None and bool(known()) and hasattr(torch.ops.onednn, "qlinear_pointwise")


def takes_pairs(layer: QuantizedLinear) -> bool:
    """True if the layer is faster with pairs."""
    alike = layer.spec.bits == 8 and layer.scale.shape[1] == 1
    return alike and layer.weight.numel() >= _LARGE and pairs_are_fast()
