"""Llama and the families laid out like it: four projections, full rotary positions, biases and q/k norms kept."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

from linearize.families.base import Family, Projections, rotate

if TYPE_CHECKING:
    from torch import Tensor, nn


class Llama(Family):
    name: ClassVar[str] = "llama"
    model_types: ClassVar[tuple[str, ...]] = ("llama", "mistral", "qwen2", "qwen3")

    def refusal(self, config: Any) -> str | None:
        sliding = getattr(config, "sliding_window", None)
        layer_types = getattr(config, "layer_types", None)
        used = "sliding_attention" in layer_types if layer_types else sliding is not None
        return f"it has sliding-window layers of its own ({sliding} tokens)" if used else None

    def attention_modules(self, model: nn.Module) -> list[tuple[nn.Module, str]]:
        decoder: Any = model.get_submodule("model")
        return [(layer, "self_attn") for layer in decoder.layers]

    def heads(self, config: Any) -> tuple[int, int, int, int]:
        width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        return config.num_attention_heads, config.num_key_value_heads, width, width

    def scale(self, attention: nn.Module) -> float:
        return float(attention.scaling)  # type: ignore[arg-type]

    def project(
        self, attention: Any, hidden_states: Tensor, position_embeddings: tuple[Tensor, Tensor] | None
    ) -> Projections:
        q, k, v = (
            projection(hidden_states).unflatten(-1, (-1, attention.head_dim))
            for projection in (attention.q_proj, attention.k_proj, attention.v_proj)
        )
        if hasattr(attention, "q_norm"):
            q, k = attention.q_norm(q), attention.k_norm(k)
        if position_embeddings is None:
            raise ValueError("the model passed no rotary positions to its attention")
        cos, sin = position_embeddings
        return Projections(q, k, v, rotate(q, cos, sin), rotate(k, cos, sin))

    def output(self, attention: Any, heads: Tensor) -> Tensor:
        projected: Tensor = attention.o_proj(heads.flatten(2))
        return projected
