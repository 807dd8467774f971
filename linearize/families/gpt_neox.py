"""GPT-NeoX (and Pythia): one projection, in which each head has its query, key and value side by side."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

from linearize.families.base import AttentionLayer, Family

if TYPE_CHECKING:
    from torch import Tensor


class GPTNeoX(Family):
    """Rotary positions on a part of each head."""

    name: ClassVar[str] = "gpt_neox"
    model_types: ClassVar[tuple[str, ...]] = ("gpt_neox",)
    blocks: ClassVar[str] = "gpt_neox.layers"
    attention: ClassVar[str] = "attention"
    projections: ClassVar[dict[str, str]] = {
        **dict.fromkeys(("q", "k", "v"), "query_key_value"),
        "o": "dense",
        "up": "dense_h_to_4h",
        "down": "dense_4h_to_h",
    }

    def layer(self, config: Any, index: int) -> AttentionLayer:
        heads = config.num_attention_heads
        width = config.hidden_size // heads
        return AttentionLayer(heads, heads, width, width, width**-0.5)

    def project(self, attention: Any, layer: AttentionLayer, hidden_states: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        heads = attention.query_key_value(hidden_states).unflatten(-1, (layer.query_heads, -1))
        q, k, v = heads.chunk(3, dim=-1)
        return q, k, v
