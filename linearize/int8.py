"""Weights as int8, for decoding on a CPU: there every token reads all weights once, so a quarter of the
bytes is close to a quarter of the time.

Each output channel has one scale, its largest weight / 127, and no zero point (symmetric, per channel). Products run in
torch's own kernel on bfloat16 activations. Many tokens at once (a prompt) are limited by arithmetic instead, and their
weights are unpacked on the way. Embeddings and norms stay as they are; the output head is a linear layer like others.

Large layers, where a processor multiplies int8 by itself (VNNI), run on oneDNN with activations as pairs of int8:

    x ≈ s (a + b / 254) ,  s = max|x| / 127        a, b in -127 .. 127, b what rounding leaves of a

Both are rows of one product, which reads the weights once, and the error is that of 16 bits.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import nn

from linearize.errors import ModelError

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel

# From so many tokens on, unpacking the weights costs less than the kernel, which multiplies them row by row.
_MANY = 32
# The kernel reads so many inputs at a time and looks at no end.
_ALIGNED = 32
# Weights from which on taking activations apart costs less than it saves.
_LARGE = 2**21
# A pair's second row, in the steps of its first.
_FINER = 254


class Int8Linear(nn.Module):
    """A linear layer of int8 weights `[out, in]` with a scale per output channel."""

    weight: Tensor
    scale: Tensor

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        weight = linear.weight.detach().float()
        # The kernel wants scales in the activations' dtype. Weights are rounded to multiples of what it will read.
        scale = (weight.abs().amax(1).clamp_min(torch.finfo(torch.float32).tiny) / 127).bfloat16()
        steps = (weight / scale[:, None].float()).round().clamp(-127, 127)
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.register_buffer("weight", steps.to(torch.int8))
        self.register_buffer("scale", scale)
        self.bias = linear.bias

    def forward(self, x: Tensor) -> Tensor:
        rows = x.view(-1, self.in_features) if x.is_contiguous() else x.reshape(-1, self.in_features)
        if rows.shape[0] < _MANY:
            outputs = torch._weight_int8pack_mm(rows.to(torch.bfloat16), self.weight, self.scale).to(x.dtype)
        else:
            outputs = F.linear(rows, self.weight.to(x.dtype)) * self.scale
        if self.bias is not None:
            outputs = outputs + self.bias
        return outputs.view(*x.shape[:-1], self.out_features)


class PairedInt8Linear(nn.Module):
    """The same for a large layer, with activations as pairs of int8.

    Attributes:
        packed: the weights as oneDNN lays them out; not among the buffers, for nobody else can read them.
    """

    scale: Tensor
    zeros: Tensor

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        weight = linear.weight.detach().float()
        scale = weight.abs().amax(1).clamp_min(torch.finfo(torch.float32).tiny) / 127
        steps = (weight / scale[:, None]).round().to(torch.int8)
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.packed = torch.ops.onednn.qlinear_prepack(steps, [2, linear.in_features])
        self.register_buffer("scale", scale)
        self.register_buffer("zeros", torch.zeros(linear.out_features, dtype=torch.long))
        self.bias = linear.bias

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
        if self.bias is not None:
            outputs = outputs + self.bias
        return outputs.view(*x.shape[:-1], self.out_features)


def pairs_are_fast() -> bool:
    """Whether the processor multiplies int8 by itself, and torch has what uses it: without, products of these pairs
    are slow, and their sums may not be exact."""
    known = getattr(torch.cpu, "_is_vnni_supported", None)
    return known is not None and bool(known()) and hasattr(torch.ops.onednn, "qlinear_pointwise")


def to_int8(model: PreTrainedModel) -> PreTrainedModel:
    """Replaces the linear layers of `model`, where it stands; those of a width that the kernel cannot read stay.

    Raises:
        ModelError: the model is not on a CPU, or none of its layers can be replaced.
    """
    if model.device.type != "cpu":
        raise ModelError("--dtype int8 is for decoding on a CPU; on a GPU use bfloat16")
    found = [
        (parent, name, child)
        for parent in model.modules()
        for name, child in parent.named_children()
        if type(child) is nn.Linear and child.in_features % _ALIGNED == 0
    ]
    if not found:
        raise ModelError(f"no linear layer has a width that is a multiple of {_ALIGNED}, which int8 weights need")
    pairs = pairs_are_fast()
    for parent, name, child in found:
        large = pairs and child.weight.numel() >= _LARGE
        setattr(parent, name, PairedInt8Linear(child) if large else Int8Linear(child))
    return model
