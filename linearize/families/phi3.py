"""Phi-3: queries, keys and values from one projection; partial rotary positions, with two tables (LongRoPE)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

from linearize.families.llama import Mistral

if TYPE_CHECKING:
    from torch import Tensor

    from linearize.families.base import AttentionLayer


class Phi3(Mistral):
    """The model selects the rotary table by the length and passes it to the layer."""

    name: ClassVar[str] = "phi3"
    model_types: ClassVar[tuple[str, ...]] = ("phi3",)
    projections: ClassVar[dict[str, str]] = {
        **dict.fromkeys(("q", "k", "v"), "qkv_proj"),
        "o": "o_proj",
        **dict.fromkeys(("gate", "up"), "gate_up_proj"),
        "down": "down_proj",
    }

    def project(self, attention: Any, layer: AttentionLayer, hidden_states: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        heads = attention.qkv_proj(hidden_states).unflatten(-1, (-1, layer.key_width))
        q, k, v = heads.split((layer.query_heads, layer.key_value_heads, layer.key_value_heads), dim=2)
        return q, k, v
