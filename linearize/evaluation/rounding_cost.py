"""Measure the loss that rounded weights cause on held-out text."""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from linearize.errors import ModelError
from linearize.evaluation.heldout import Estimate, paired_difference, score_rows
from linearize.evaluation.tasks.task import evaluating
from linearize.model.quantized import Quantization, linear_layers
from linearize.quantization.rounding import rounded
from linearize.runtime.memory import nbytes

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel

    from linearize.data.rows import Rows


@dataclass(frozen=True)
class Cost:
    """Loss of quantised weights on rows of text that they were not fitted to.

    Attributes:
        text: the source of the rows, and `rows`, `tokens` their numbers; `fitted` tokens were read to choose
            what is kept.
        perplexity: before and after.
        loss, kl: difference of the losses, and divergence from the model before, in nats per token over rows.
        agreement: share of tokens with the same most likely one.
        nbytes: of all weights, before and after.
        layers: how many were quantised.
    """

    text: str
    rows: int
    tokens: int
    fitted: int
    perplexity: tuple[float, float]
    loss: Estimate
    kl: Estimate
    agreement: float
    nbytes: tuple[int, int]
    layers: int


def quantize(model: Any, spec: Quantization, rows: Rows, held_out: Rows, text: str) -> Cost:
    """Replaces the linear layers of a converted model, where it stands, and measures what that cost.

    Args:
        rows: texts that show which inputs matter.
        held_out: rows on which the cost is measured.
        text: the source of both.

    Raises:
        ModelError: the model's weights are integers already, or it has no linear layers.
    """
    if model.config.quantized:
        raise ModelError("the model's weights are integers already; export what it was made from")
    found = [one for one in linear_layers(model, head=False) if spec.takes(one[2])]
    if not found:
        raise ModelError("the model has no linear layers, which alone can be int8 or int4; leave --weights out")
    before = nbytes(model)
    tensors = [*model.parameters(), *model.buffers()]
    whole = copy.deepcopy(model, {id(tensor): tensor for tensor in tensors})  # of the modules; tensors are shared
    power = mean_squares(model, [linear for _, _, linear in found], rows)
    for parent, name, linear in found:
        setattr(parent, name, rounded(linear, spec, power[linear]))
    model.config.quantized = {"bits": spec.bits, "group": spec.group, "kept": spec.kept}
    was, now = (score_rows(one, held_out, teacher=whole) for one in (whole, model))
    assert now.mean_kl is not None and now.mean_agreement is not None  # noqa: S101 - for the type checker
    return Cost(
        text=text,
        rows=len(held_out),
        tokens=int(now.tokens.sum()),
        fitted=rows.tokens,
        perplexity=(was.perplexity, now.perplexity),
        loss=paired_difference(now, was).loss,
        kl=now.mean_kl,
        agreement=now.mean_agreement.mean,
        nbytes=(before, nbytes(model)),
        layers=len(found),
    )


@torch.no_grad()
def mean_squares(model: PreTrainedModel, layers: list[nn.Linear], rows: Rows) -> dict[nn.Linear, Tensor]:
    """Mean squares of each layer's inputs on `rows`, float32 [I]; ones for a layer that no row reaches."""
    sums = {layer: torch.zeros(layer.in_features, device=layer.weight.device) for layer in layers}
    counts = dict.fromkeys(layers, 0)

    def see(layer: nn.Linear, inputs: tuple[Tensor, ...]) -> None:
        seen = inputs[0].flatten(0, -2).float()
        sums[layer] += seen.square().sum(0)
        counts[layer] += len(seen)

    hooks = [layer.register_forward_pre_hook(see) for layer in layers]
    try:
        with evaluating(model):
            for row in range(len(rows)):
                some = rows[row : row + 1]
                ids, positions = some.input_ids.to(model.device), some.position_ids.to(model.device)
                model(input_ids=ids, position_ids=positions, use_cache=False)
    finally:
        for hook in hooks:
            hook.remove()
    return {layer: sums[layer] / counts[layer] if counts[layer] else torch.ones_like(sums[layer]) for layer in layers}


def cost_record(spec: Quantization, cost: Cost) -> dict[str, Any]:
    """The cost as a record for `linearize.json`."""
    return {
        "weights": f"int{spec.bits}",
        "group": spec.group,
        "kept_inputs": spec.kept,
        "layers": cost.layers,
        "fitted_to_tokens": cost.fitted,
        "measured_on": {"text": cost.text, "rows": cost.rows, "tokens": cost.tokens},
        "bytes": list(cost.nbytes),
        "perplexity": list(cost.perplexity),
        "loss_difference": cost.loss._asdict(),
        "kl": cost.kl._asdict(),
        "agreement": cost.agreement,
    }


def cost_section(spec: Quantization, cost: Cost) -> str:
    """The same as a section of a card."""
    scales = f"a scale per {spec.group} inputs" if spec.group else "a scale per output channel"
    kept = f"; {math.ceil(100 * spec.kept)}% of each layer's inputs keep their weights" if spec.kept else ""
    (before, after), (was, now) = cost.nbytes, cost.perplexity
    return f"""## What int{spec.bits} weights cost

{cost.layers} linear layers have int{spec.bits} weights with {scales}{kept}.
Measured at export against the same model before, on {cost.tokens:,} tokens that nothing was fitted to ({cost.text}):

| | before | int{spec.bits} |
|---|---|---|
| bytes of weights | {before:,} | {after:,} |
| perplexity | {was:.3f} | {now:.3f} |
| loss, nats per token | | {_told(cost.loss, "+")} |
| divergence from it, nats per token | | {_told(cost.kl)} |
| same most likely token | | {100 * cost.agreement:.1f}% |
"""


def _told(found: Estimate, sign: str = "") -> str:
    return f"{found.mean:{sign}.4f}" + (f" ± {found.stderr:.4f}" if found.stderr is not None else "")
