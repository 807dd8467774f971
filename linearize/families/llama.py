"""Llama and the families with its layout: four projections, full rotary positions, optional biases and q/k norms."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any, ClassVar

from linearize.families.base import AttentionLayer, Family, head_width, own_window, project_jointly

if TYPE_CHECKING:
    from torch import Tensor


class Llama(Family):
    """Layers have a sliding window where `layer_types` has one."""

    name: ClassVar[str] = "llama"
    model_types: ClassVar[tuple[str, ...]] = ("llama", "ministral", "qwen2", "qwen2_moe", "qwen3")
    norms: ClassVar[tuple[str, str, str, str] | None] = ("input_layernorm", "", "post_attention_layernorm", "")

    def layer(self, config: Any, index: int) -> AttentionLayer:
        width = head_width(config)
        return AttentionLayer(
            query_heads=config.num_attention_heads,
            key_value_heads=config.num_key_value_heads,
            key_width=width,
            value_width=width,
            scale=width**-0.5,
            window=own_window(config, index),
        )

    def project(self, attention: Any, layer: AttentionLayer, hidden_states: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        modules = attention._modules
        projected = project_jointly(hidden_states, [modules["q_proj"], modules["k_proj"], modules["v_proj"]])
        rows = hidden_states.shape[:2]
        q, k, v = (x.view(*rows, -1, layer.key_width) for x in projected)
        if "q_norm" in modules:
            q, k = attention.q_norm(q), attention.k_norm(k)
        return q, k, v


class Mistral(Llama):
    """One sliding window, if any, in every layer."""

    name: ClassVar[str] = "mistral"
    model_types: ClassVar[tuple[str, ...]] = ("mistral", "mixtral", "qwen3_moe")

    def layer(self, config: Any, index: int) -> AttentionLayer:
        return replace(super().layer(config, index), window=config.sliding_window)


class Starcoder2(Mistral):
    name: ClassVar[str] = "starcoder2"
    model_types: ClassVar[tuple[str, ...]] = ("starcoder2",)
    projections: ClassVar[dict[str, str]] = {
        "q": "q_proj",
        "k": "k_proj",
        "v": "v_proj",
        "o": "o_proj",
        "up": "c_fc",
        "down": "c_proj",
    }


class Granite(Llama):
    """The configuration gives the scale."""

    name: ClassVar[str] = "granite"
    model_types: ClassVar[tuple[str, ...]] = ("granite", "granitemoe")

    def layer(self, config: Any, index: int) -> AttentionLayer:
        return replace(super().layer(config, index), scale=float(config.attention_multiplier))
