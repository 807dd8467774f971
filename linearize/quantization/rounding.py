"""Round weights to small integers, and choose the weights to keep.

`to_int8` is for decoding on a CPU, where each token reads all weights once: int8 weights are read almost four times as
fast as float32. It needs no text. `quantize` is for checkpoints and saves bytes. It uses text to estimate the cost of
rounding each input channel: large activations multiply the errors of a channel's weights, and a single large weight
makes the scale of its whole group coarse. The inputs with the largest estimated cost keep their weights.

Embeddings, norms and the mixers' own parameters are not rounded, nor is an output head tied to the embedding.

Dimensions: I inputs, O outputs, G groups of inputs.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import nn

from linearize.errors import ModelError
from linearize.model.quantized import ALIGNED, Quantization, QuantizedLinear, linear_layers
from linearize.quantization.pairs import PairedLinear, takes_pairs
from linearize.runtime.memory import nbytes

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel


WEIGHTS = {
    "int8": Quantization(bits=8, kept=1 / 64),
    "int4": Quantization(bits=4, group=32, kept=1 / 64),
}
"""Values of `linearize export --weights`."""
# Candidate clip factors for a group's largest weight: clipping it can pay off because the other weights get a finer
# scale.
_CUTS = (1.0, 0.95, 0.9, 0.85, 0.8, 0.7)
_LEAST = torch.finfo(torch.float32).tiny


def to_int8(model: PreTrainedModel) -> PreTrainedModel:
    """Replace the linear layers of `model` in place, for decoding on a CPU. Layers with a width that the kernel does
    not support stay.

    Raises:
        ModelError: the model is not on a CPU, or none of its layers can be replaced.
    """
    if model.device.type != "cpu":
        raise ModelError("--dtype int8 is for decoding on a CPU; on a GPU use bfloat16")
    stored = [module for module in model.modules() if isinstance(module, QuantizedLinear)]
    found = [one for one in linear_layers(model, head=True) if one[2].in_features % ALIGNED == 0]
    if not found and not stored:
        raise ModelError(f"no linear layer has a width that is a multiple of {ALIGNED}, which int8 weights need")
    for parent, name, linear in found:
        layer = rounded(linear, Quantization())
        setattr(parent, name, layer)
        stored.append(layer)
    for layer in stored:
        layer.fast = True
    large = [
        (parent, name, child)
        for parent in model.modules()
        for name, child in parent.named_children()
        if isinstance(child, QuantizedLinear) and takes_pairs(child)
    ]
    for parent, name, layer in large:
        setattr(parent, name, PairedLinear(layer))
    return model


def nbytes_after(model: nn.Module, spec: Quantization) -> int:
    """Bytes of the checkpoint after `quantize`."""
    found = nbytes(model)
    for _, _, linear in linear_layers(model, head=False):
        if spec.takes(linear):
            shape = linear.in_features, linear.out_features
            like = nn.Linear(*shape, bias=False, dtype=linear.weight.dtype, device="meta")
            found -= linear.weight.nbytes - sum(tensor.nbytes for tensor in QuantizedLinear(like, spec).buffers())
    return found


@torch.no_grad()
def rounded(linear: nn.Linear, spec: Quantization, power: Tensor | None = None) -> QuantizedLinear:
    """Quantise `linear`.

    Args:
        power: mean square of each input [I], the weight of its errors; by default equal for all inputs. Without it no
            weight is clipped.
    """
    weight = linear.weight.detach().float()
    layer = QuantizedLinear(linear, spec)
    cuts = (1.0,) if power is None else _CUTS
    count = layer.columns.numel()
    if count:
        costs = torch.ones_like(weight[0]) if power is None else power
        layer.columns.copy_(costliest(weight, spec, costs)[:count].sort().values)
        layer.kept.copy_(linear.weight.detach()[:, layer.columns])
        weight = weight.index_fill(1, layer.columns.long(), 0.0)
    scale, integers = _round(weight, spec, cuts, power)
    layer.scale.copy_(scale)
    if spec.bits == 4:
        low, high = (integers + 8).to(torch.uint8).view(len(integers), -1, 2).unbind(-1)
        integers = low | high << 4
    layer.weight.copy_(integers)
    return layer


def costliest(weight: Tensor, spec: Quantization, power: Tensor) -> Tensor:
    """Input indices [I], costliest first. An input's cost is the square error of the outputs from rounding its weights
    [O, I]. If it is the largest of its group, the cost also includes the error it adds to the other inputs by widening
    their scale."""
    scale, integers = _round(weight, spec, (1.0,), None)
    groups = scale.shape[1]
    grouped = weight.unflatten(1, (groups, -1))
    wrong = (grouped - scale[..., None] * integers.unflatten(1, (groups, -1))).square()
    wrong = wrong * power.view(groups, -1)  # [O, G, I / G]
    gain = wrong.sum(0).flatten()
    largest, place = grouped.abs().topk(min(2, grouped.shape[-1]), -1)
    shrinks = 1 - (largest[..., -1] / largest[..., 0].clamp_min(_LEAST)).square()
    others = wrong.sum(-1) - wrong.gather(-1, place[..., :1]).squeeze(-1)
    inputs = place[..., 0] + torch.arange(groups, device=weight.device) * grouped.shape[-1]  # [O, G]
    gain.index_add_(0, inputs.flatten(), (shrinks * others).flatten())
    order: Tensor = gain.argsort(descending=True)
    return order


def _round(weight: Tensor, spec: Quantization, cuts: tuple[float, ...], power: Tensor | None) -> tuple[Tensor, Tensor]:
    """Scales [O, G] with the least error over the clip factors `cuts`, and integers [O, I], both float32. Scales are
    rounded to bfloat16, their storage dtype."""
    groups = spec.groups(weight.shape[1])
    grouped = weight.unflatten(1, (groups, -1))
    counts = None if power is None else power.view(groups, -1)
    largest = grouped.abs().amax(-1).clamp_min(_LEAST)
    best: tuple[Tensor, Tensor, Tensor] | None = None
    for cut in cuts:
        scale = (largest * cut / spec.largest).bfloat16().float()
        integers = (grouped / scale[..., None]).round().clamp(-spec.largest, spec.largest)
        error = (grouped - scale[..., None] * integers).square()
        error = (error if counts is None else error * counts).sum(-1)
        if best is None:
            best = error, scale, integers
        else:
            better = error < best[0]
            best = (
                torch.where(better, error, best[0]),
                torch.where(better, scale, best[1]),
                torch.where(better[..., None], integers, best[2]),
            )
    assert best is not None  # noqa: S101 - there is at least one cut
    return best[1], best[2].flatten(1)
