"""Cohere (Command R): Llama's layout; rotary positions on neighbouring channels, q/k norms with weights per head."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any, ClassVar

from linearize.families.base import rotate_pairs
from linearize.families.llama import Llama

if TYPE_CHECKING:
    from linearize_kernels.block import Turn
    from torch import Tensor

    from linearize.families.base import AttentionLayer


class Cohere(Llama):
    name: ClassVar[str] = "cohere"
    model_types: ClassVar[tuple[str, ...]] = ("cohere",)
    norms: ClassVar[tuple[str, str, str, str] | None] = ("input_layernorm", "", "", "")
    turn: ClassVar[Turn] = "pairs"

    def rotate(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        return rotate_pairs(x.float(), cos, sin).to(x.dtype)


class Cohere2(Cohere):
    """Only layers with a sliding window have rotary positions."""

    name: ClassVar[str] = "cohere2"
    model_types: ClassVar[tuple[str, ...]] = ("cohere2",)

    def layer(self, config: Any, index: int) -> AttentionLayer:
        layer = super().layer(config, index)
        return replace(layer, rotary=layer.window is not None)
