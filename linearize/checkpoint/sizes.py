"""Memory of a converted model, in bytes."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

    from linearize.model import LinearizedForCausalLM


def state_nbytes(model: LinearizedForCausalLM, dtype: torch.dtype | None = None) -> int:
    """Bytes of memory per sequence, over all layers, before the first token. This is the total unless layers or heads
    keep softmax over the whole past."""
    return sum(layer.memory_nbytes(dtype or model.dtype)[0] for layer in model.attention_layers)


def growth_nbytes(model: LinearizedForCausalLM) -> int:
    """Additional bytes per token in the layers and heads that keep softmax over the whole past."""
    return sum(layer.memory_nbytes(model.dtype)[1] for layer in model.attention_layers)
