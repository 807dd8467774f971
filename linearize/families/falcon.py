"""Falcon: one projection, in which each key/value head follows the query heads that share it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

from linearize.families.base import AttentionLayer, Family

if TYPE_CHECKING:
    from torch import Tensor


class Falcon(Family):
    """Multi-query (one key/value head), multi-head, and grouped (`new_decoder_architecture`)."""

    name: ClassVar[str] = "falcon"
    model_types: ClassVar[tuple[str, ...]] = ("falcon",)
    blocks: ClassVar[str] = "transformer.h"
    attention: ClassVar[str] = "self_attention"
    projections: ClassVar[dict[str, str]] = {
        **dict.fromkeys(("q", "k", "v"), "query_key_value"),
        "o": "dense",
        "up": "dense_h_to_4h",
        "down": "dense_4h_to_h",
    }

    def refusal(self, config: Any) -> str | None:
        return "its positions are ALiBi biases, which only rotary variants do without" if config.alibi else None

    def layer(self, config: Any, index: int) -> AttentionLayer:
        heads, width = config.num_attention_heads, config.head_dim
        groups = config.num_kv_heads
        if not config.new_decoder_architecture:  # transformers then ignores num_kv_heads
            groups = 1 if config.multi_query else heads
        return AttentionLayer(heads, groups, width, width, width**-0.5)

    def project(self, attention: Any, layer: AttentionLayer, hidden_states: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        groups = attention.query_key_value(hidden_states).unflatten(-1, (layer.key_value_heads, -1, layer.key_width))
        return groups[..., :-2, :].flatten(2, 3), groups[..., -2, :], groups[..., -1, :]
