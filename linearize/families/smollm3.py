"""SmolLM3: Llama's layout, with layers that have no positions."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any, ClassVar

from linearize.families.llama import Llama

if TYPE_CHECKING:
    from linearize.families.base import AttentionLayer


class SmolLM3(Llama):
    name: ClassVar[str] = "smollm3"
    model_types: ClassVar[tuple[str, ...]] = ("smollm3",)

    def layer(self, config: Any, index: int) -> AttentionLayer:
        # Despite its name, `no_rope_layers` is 1 where a layer has rotary positions.
        return replace(super().layer(config, index), rotary=bool(config.no_rope_layers[index]))
