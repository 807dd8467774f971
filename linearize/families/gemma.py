"""Gemma: Llama's layout with scales, softcaps and windows of its own."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any, ClassVar

from linearize.families.llama import Llama

if TYPE_CHECKING:
    from linearize.families.base import AttentionLayer


class Gemma(Llama):
    name: ClassVar[str] = "gemma"
    model_types: ClassVar[tuple[str, ...]] = ("gemma",)

    def refusal(self, config: Any) -> str | None:
        if getattr(config, "use_bidirectional_attention", None):
            return "its attention is bidirectional, and only causal attention has a recurrent form"
        return None


class Gemma2(Gemma):
    """Windows in every other layer, capped scores."""

    name: ClassVar[str] = "gemma2"
    model_types: ClassVar[tuple[str, ...]] = ("gemma2",)
    norms: ClassVar[tuple[str, str, str, str] | None] = (
        "input_layernorm",
        "post_attention_layernorm",
        "pre_feedforward_layernorm",
        "post_feedforward_layernorm",
    )

    def layer(self, config: Any, index: int) -> AttentionLayer:
        scale = config.query_pre_attn_scalar**-0.5
        return replace(super().layer(config, index), scale=scale, softcap=config.attn_logit_softcapping)


class Gemma3(Gemma2):
    """q/k norms instead of the cap, and another rotary base in sliding layers (each layer gets its table)."""

    name: ClassVar[str] = "gemma3"
    model_types: ClassVar[tuple[str, ...]] = ("gemma3_text",)

    def layer(self, config: Any, index: int) -> AttentionLayer:
        # The configuration has a cap, but transformers does not apply it.
        return replace(super().layer(config, index), softcap=None)
