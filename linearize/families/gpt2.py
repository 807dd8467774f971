"""GPT-2: one projection for queries, keys and values; positions are learned and added to the embeddings."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

from linearize.families.base import AttentionLayer, Family

if TYPE_CHECKING:
    from torch import Tensor


class GPT2(Family):
    name: ClassVar[str] = "gpt2"
    model_types: ClassVar[tuple[str, ...]] = ("gpt2",)
    blocks: ClassVar[str] = "transformer.h"
    attention: ClassVar[str] = "attn"
    # The path is needed, because the MLP has a `c_proj` too.
    projections: ClassVar[dict[str, str]] = {
        **dict.fromkeys(("q", "k", "v"), "attn.c_attn"),
        "o": "attn.c_proj",
        "up": "mlp.c_fc",
        "down": "mlp.c_proj",
    }

    def refusal(self, config: Any) -> str | None:
        return "it has cross-attention to an encoder" if config.add_cross_attention else None

    def layer(self, config: Any, index: int) -> AttentionLayer:
        heads = config.num_attention_heads
        width = config.hidden_size // heads
        scale = width**-0.5 if config.scale_attn_weights else 1.0
        if config.scale_attn_by_inverse_layer_idx:
            scale /= index + 1
        return AttentionLayer(heads, heads, width, width, scale, rotary=False)

    def project(self, attention: Any, layer: AttentionLayer, hidden_states: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        heads = attention.c_attn(hidden_states).unflatten(-1, (-1, layer.key_width))
        q, k, v = heads.chunk(3, dim=2)
        return q, k, v

    def output(self, attention: Any, heads: Tensor) -> Tensor:
        # GPT-2's linear module calls `view` on its input, which fails on non-contiguous heads.
        projected: Tensor = attention.resid_dropout(attention.c_proj(heads.flatten(2).contiguous()))
        return projected
