"""Backward passes through the pretrained model, watched layer by layer.

A backward pass gives the gradient of an objective by the output of each layer's heads. To first order, this gradient is
the effect of any change inside a layer on the objective, so no layer needs passes of its own through the rest of the
model.
"""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from linearize.calibration.weights import output_projection
from linearize.evaluation.tasks.hidden import hidden_states, positions_at_once

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from torch import nn

    from linearize.families import Projections
    from linearize.model import LinearizedForCausalLM
    from linearize.model.attention import LinearizedAttention


class Watched(NamedTuple):
    """One layer during a backward pass.

    Attributes:
        new, lengths: the projections of its attention, and the number of real tokens per row (None: all).
        heads: `[R, L, H V]` the outputs of its heads.
        gradient: `[R, L, H V]` the gradient of the objective by them.
    """

    new: Projections
    lengths: Tensor | None
    heads: Tensor
    gradient: Tensor


def pass_back(model: LinearizedForCausalLM, ids: Tensor, counted: Tensor, *, mean: bool = False) -> None:
    """Backward pass of the sum or mean of the losses of the tokens that are True in `counted` `[L]`."""
    at = counted[1:].nonzero()[:, 0]
    with torch.enable_grad():
        hidden = hidden_states(model, input_ids=ids[None], use_cache=False)
        states, hidden.states = hidden.states, hidden.states.detach().requires_grad_()
        for some in at.split(positions_at_once(model, 1)):
            logits = hidden.logits(torch.zeros_like(some), some)
            loss = F.cross_entropy(logits.float(), ids[some + 1], reduction="sum")
            (loss / len(at) if mean else loss).backward()
        states.backward(hidden.states.grad)


@contextmanager
def watched(
    model: LinearizedForCausalLM, layers: Sequence[int], tell: Callable[[int, Watched], None]
) -> Iterator[None]:
    """In this context a backward pass calls `tell(layer, seen)` for each layer, last layer first. Gradient
    checkpointing recomputes one block at a time, so memory holds the attention of one layer only."""
    handles: list[Any] = []
    frozen = [parameter for parameter in model.parameters() if parameter.requires_grad]
    blocks = [block for block, _ in model.attention_layers[0].family.attention_modules(model)]
    checkpoints = bool(model.supports_gradient_checkpointing)
    try:
        for parameter in frozen:
            parameter.requires_grad_(False)
        model.enable_input_require_grads()
        if checkpoints:
            model.gradient_checkpointing_enable({"use_reentrant": False})
            for block in blocks:
                block.training = True  # of the block module only, so no dropout inside becomes active
        for layer in layers:
            handles += _watch(model.attention_layers[layer], layer, tell)
        yield
    finally:
        model.disable_input_require_grads()
        for handle in handles:
            handle.remove()
        for layer in layers:
            model.attention_layers[layer].observer = None
        if checkpoints:
            model.gradient_checkpointing_disable()
            for block in blocks:
                block.training = False
        for parameter in frozen:
            parameter.requires_grad_(True)


def _watch(attention: LinearizedAttention, layer: int, tell: Callable[[int, Watched], None]) -> list[Any]:
    """Register the hooks of one layer for `watched`."""
    seen: list[tuple[Projections, Tensor | None]] = []

    def observe(new: Projections, lengths: Tensor | None) -> None:
        seen[:] = [(type(new)(*(None if x is None else x.detach() for x in new)), lengths)]

    def before_output(_: nn.Module, arguments: tuple[Any, ...]) -> None:
        whole: Tensor = arguments[0]
        if not whole.requires_grad:
            return
        new, lengths = seen[0]
        everything = whole.detach()  # a hook that refers to its own tensor would leak it

        @torch.no_grad()
        def arrived(gradient: Tensor) -> None:
            tell(layer, Watched(new, lengths, everything, gradient))

        whole.register_hook(arrived)

    attention.observer = observe
    return [output_projection(attention).register_forward_pre_hook(before_output)]
