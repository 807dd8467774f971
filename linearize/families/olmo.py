"""OLMo: Llama's layout; from OLMo 2 on, queries and keys are normed over all heads together."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

from linearize.families.llama import Llama

if TYPE_CHECKING:
    from torch import Tensor

    from linearize.families.base import AttentionLayer


class Olmo(Llama):
    name: ClassVar[str] = "olmo"
    model_types: ClassVar[tuple[str, ...]] = ("olmo",)

    def refusal(self, config: Any) -> str | None:
        return None if config.clip_qkv is None else "it clips queries, keys and values (clip_qkv)"


class Olmo2(Llama):
    """OLMo 3 adds sliding layers with their own rotary positions (each layer gets its table)."""

    name: ClassVar[str] = "olmo2"
    model_types: ClassVar[tuple[str, ...]] = ("olmo2", "olmo3")
    norms: ClassVar[tuple[str, str, str, str] | None] = (
        "",
        "post_attention_layernorm",
        "",
        "post_feedforward_layernorm",
    )

    def project(self, attention: Any, layer: AttentionLayer, hidden_states: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        q = attention.q_norm(attention.q_proj(hidden_states))
        k = attention.k_norm(attention.k_proj(hidden_states))
        v = attention.v_proj(hidden_states)
        width = (-1, layer.key_width)
        return q.unflatten(-1, width), k.unflatten(-1, width), v.unflatten(-1, width)
