"""GLM and GLM-4: Llama's layout; rotary positions on the first half of each head, on neighbouring channels."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from linearize.families.base import rotate_pairs
from linearize.families.llama import Llama

if TYPE_CHECKING:
    from linearize_kernels.block import Turn
    from torch import Tensor


class Glm(Llama):
    name: ClassVar[str] = "glm"
    model_types: ClassVar[tuple[str, ...]] = ("glm", "glm4")
    norms: ClassVar[tuple[str, str, str, str] | None] = (
        "input_layernorm",
        "post_self_attn_layernorm",
        "post_attention_layernorm",
        "post_mlp_layernorm",
    )
    turn: ClassVar[Turn] = "pairs of halves"
    projections: ClassVar[dict[str, str]] = Llama.projections | dict.fromkeys(("gate", "up"), "gate_up_proj")

    def rotate(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        # transformers' table has the layout for halves.
        cos, sin = (table.chunk(2, dim=-1)[0].repeat_interleave(2, dim=-1) for table in (cos, sin))
        return rotate_pairs(x, cos, sin)
