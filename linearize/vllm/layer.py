"""One layer's attention in vLLM: the mixer on pages of fixed size.

vLLM's attention modules project, rotate and then call `self.attn(q, k, v)`. `MixedAttention` takes the place of `attn`.
The recurrence also needs queries and keys before the rotation, so `BothPositions` takes the place of `rotary_emb` and
returns each head group twice as wide: the channels as they came, then the rotated ones.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from vllm.forward_context import get_forward_context
from vllm.model_executor.layers.mamba.abstract import MambaBase
from vllm.utils.torch_utils import direct_register_custom_op
from vllm.v1.attention.backend import AttentionCGSupport
from vllm.v1.attention.backends.linear_attn import LinearAttentionBackend, LinearAttentionMetadataBuilder
from vllm.v1.attention.backends.registry import MambaAttentionBackendEnum

from linearize.families.base import Projections
from linearize.vllm.batches import MOST_SLOTS, batches, mix
from linearize.vllm.plugin import OP

if TYPE_CHECKING:
    from linearize.families.base import AttentionLayer
    from linearize.model.mixer.mixer import Mixer
    from linearize.vllm.batches import Batch
    from linearize.vllm.pages import Pages


_ALL = 1 << 30


class BothPositions(nn.Module):
    """Rotary positions that also return their inputs: q `[T, H * D]` becomes `[T, 2 * H * D]`, and k likewise."""

    def __init__(self, rotary: nn.Module) -> None:
        super().__init__()
        self.rotary = rotary

    def forward(self, positions: Tensor, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        # Clones, because vLLM rotates in place.
        q_rotated, k_rotated = self.rotary(positions, q.clone(), k.clone())
        return torch.cat([q, q_rotated], -1), torch.cat([k, k_rotated], -1)


class MixedAttention(nn.Module, MambaBase):
    """`attn` of a converted layer.

    Args:
        mixer: the layer's mixer, for the heads of this tensor-parallel rank.
        pages: the places of all layers' memories.
        index: the number of the layer.
        name: vLLM's name of the layer.
        context: vLLM's layers by name, into which this one goes.
    """

    def __init__(self, mixer: Mixer, pages: Pages, index: int, name: str, context: dict[str, Any]) -> None:
        super().__init__()
        self.mixer, self.pages, self.index, self.layer_name, self.context = mixer, pages, index, name, context
        self.layer: AttentionLayer = mixer.layer
        slots = mixer.config.landmarks
        self.most = max(MOST_SLOTS // slots, 1) if slots else _ALL
        self.bound = False
        self.kv_cache = (torch.tensor([]),)
        context[name] = self

    @property
    def mamba_type(self) -> MambaAttentionBackendEnum:
        return MambaAttentionBackendEnum.LINEAR

    def get_state_shape(self) -> tuple[tuple[int, ...], ...]:
        return ((self.pages.nbytes,),)

    def get_state_dtype(self) -> tuple[torch.dtype, ...]:
        return (torch.int8,)

    def get_attn_backend(self) -> type[LinearAttentionBackend]:
        return PageBackend

    def bind_kv_cache(self, kv_cache: Tensor) -> None:
        super().bind_kv_cache(kv_cache)
        self.pages.bind(self.index, self.kv_cache[0])
        self.bound = True

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Heads `[T, H * V]`; q and k as `BothPositions` returns them, or without positions."""
        layer = self.layer
        v = v.reshape(-1, layer.key_value_heads * layer.value_width)
        out = v.new_empty(v.shape[0], layer.query_heads * layer.value_width)
        q_rotated, k_rotated = q, k
        if layer.rotary:
            q, q_rotated = q.chunk(2, -1)
            k, k_rotated = k.chunk(2, -1)
        torch.ops.vllm.linearize_mix(q, k, v, q_rotated, k_rotated, out, self.layer_name)
        return out

    def mix(self, q: Tensor, k: Tensor, v: Tensor, q_rotated: Tensor, k_rotated: Tensor, out: Tensor) -> None:
        """`forward` for the sequences of the present step.

        Raises:
            RuntimeError: vLLM divides the step (dual batch overlap).
        """
        steps = get_forward_context().attn_metadata
        if steps is None or not self.bound:  # vLLM measures the memory that a step takes
            out.zero_()
            return
        if not isinstance(steps, dict):
            raise RuntimeError("linearize: converted layers do not go with dual batch overlap; leave it out")
        plan = self._plan(steps)
        keys, queries = self.layer.key_value_heads, self.layer.query_heads
        new = Projections(
            *(
                x.unflatten(-1, (heads, -1))
                for x, heads in zip((q, k, v, q_rotated, k_rotated), (queries, keys, keys, queries, keys), strict=True)
            )
        )
        heads = out.view(-1, queries, self.layer.value_width)
        for batch in plan.batches(self.most if q.device.type == "cpu" else _ALL):
            mix(self.mixer, new, batch, self.pages.memory(self.index), heads)

    def _plan(self, steps: dict[str, Any]) -> _Plan:
        """The step's batches; kept on the metadata, which all layers with one table of pages share. The first of these
        layers clears the pages of all, because they may hold tensors of each other."""
        step = steps[self.layer_name]
        plan: _Plan | None = step.__dict__.get("linearize_plan")
        if plan is None:
            plan = step.__dict__["linearize_plan"] = _Plan(step)
            if plan.fresh is not None:
                alike = [self.context[name].index for name, other in steps.items() if other is step]
                self.pages.clear(alike, plan.fresh)
        return plan


class SplitAttention(nn.Module):
    """`attn` of a layer in which some key/value heads keep softmax over the whole past.

    Args:
        kept: vLLM's attention, for these heads and the query heads that share them.
        mixed: the attention of the other heads.
        heads: the key/value heads that `kept` has.
        layer: all heads.
    """

    def __init__(self, kept: nn.Module, mixed: MixedAttention, heads: list[int], layer: AttentionLayer) -> None:
        super().__init__()
        self.kept, self.mixed, self.layer = kept, mixed, layer
        others = [head for head in range(layer.key_value_heads) if head not in heads]
        order = heads + others
        self.choices = heads, others
        self.places = [order.index(head) for head in range(layer.key_value_heads)]

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        groups, (heads, others) = self.layer.key_value_heads, self.choices

        def of(x: Tensor, chosen: list[int]) -> Tensor:
            """`[T, heads * width]` of these key/value heads and the query heads that share them."""
            some: Tensor = x.unflatten(-1, (groups, -1))[:, chosen].flatten(1)
            return some

        both = 2 if self.layer.rotary else 1
        parts = [x.chunk(both, -1) for x in (q, k)]
        kept = self.kept(*(of(part[-1], heads) for part in parts), of(v, heads))
        q, k = (torch.cat([of(x, others) for x in part], -1) for part in parts)
        mixed = self.mixed(q, k, of(v, others))
        out = [x.unflatten(-1, (len(chosen), -1)) for x, chosen in zip((kept, mixed), self.choices, strict=True)]
        return torch.cat(out, 1)[:, self.places].flatten(1)


class _Plan:
    """The batches of a step, and the pages of the sequences that start in it."""

    def __init__(self, step: Any) -> None:
        starts, totals, pages = (x.tolist() for x in (step.query_start_loc, step.seq_lens, step.state_indices_tensor))
        device = step.seq_lens.device
        count = step.num_decodes + step.num_prefills
        lengths = [starts[i + 1] - starts[i] for i in range(count)]
        seen = [totals[i] - lengths[i] for i in range(count)]
        self._given = lengths, seen, pages[:count], device
        self._batches: dict[int, list[Batch]] = {}
        fresh = [pages[i] for i in range(count) if lengths[i] and not seen[i]]
        self.fresh = torch.tensor(fresh, device=device) if fresh else None

    def batches(self, most: int) -> list[Batch]:
        """The batches for layers that decode at most `most` sequences at once."""
        most = min(most, len(self._given[0]))
        if most not in self._batches:
            self._batches[most] = batches(*self._given, most=most)
        return self._batches[most]


class _Builder(LinearAttentionMetadataBuilder):
    # A step reads lengths on the host, which a full CUDA graph cannot; piecewise graphs leave this op out.
    _cudagraph_support = AttentionCGSupport.NEVER

    @classmethod
    def get_cudagraph_support(cls, *_: Any) -> AttentionCGSupport:
        return cls._cudagraph_support


class PageBackend(LinearAttentionBackend):
    """vLLM's attention backend of layers on pages."""

    @staticmethod
    def get_name() -> str:
        return "LINEARIZE"

    @staticmethod
    def get_builder_cls() -> type[_Builder]:
        return _Builder


def _mix(q: Tensor, k: Tensor, v: Tensor, q_rotated: Tensor, k_rotated: Tensor, out: Tensor, layer_name: str) -> None:
    get_forward_context().no_compile_layers[layer_name].mix(q, k, v, q_rotated, k_rotated, out)


def _mix_shapes(
    q: Tensor, k: Tensor, v: Tensor, q_rotated: Tensor, k_rotated: Tensor, out: Tensor, layer_name: str
) -> None:
    return None


# vLLM makes a schema from the annotations, which `from __future__ import annotations` leaves as strings.
for _body in (_mix, _mix_shapes):
    _body.__annotations__ = dict.fromkeys(_body.__annotations__, Tensor) | {"layer_name": str, "return": None}
direct_register_custom_op(OP.removeprefix("vllm::"), _mix, mutates_args=["out"], fake_impl=_mix_shapes)
