"""StableLM and Phi: Llama's layout with partial rotary positions and, as an option, layer norms per head."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

from linearize.families.llama import Llama

if TYPE_CHECKING:
    from torch import Tensor

    from linearize.families.base import AttentionLayer


class StableLm(Llama):
    name: ClassVar[str] = "stablelm"
    model_types: ClassVar[tuple[str, ...]] = ("stablelm",)

    def project(self, attention: Any, layer: AttentionLayer, hidden_states: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v = super().project(attention, layer, hidden_states)
        if hasattr(attention, "q_layernorm"):  # StableLM's norms are one module per head, with heads before tokens
            q = attention.q_layernorm(q.transpose(1, 2)).transpose(1, 2)
            k = attention.k_layernorm(k.transpose(1, 2)).transpose(1, 2)
        return q, k, v


class Phi(StableLm):
    name: ClassVar[str] = "phi"
    model_types: ClassVar[tuple[str, ...]] = ("phi",)
    projections: ClassVar[dict[str, str]] = {
        "q": "q_proj",
        "k": "k_proj",
        "v": "v_proj",
        "o": "dense",
        "up": "fc1",
        "down": "fc2",
    }
