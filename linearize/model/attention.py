"""The one attention layer of a converted model.

    heads  = what the layer's mixer makes of most key/value heads, and softmax over the whole past of the heads kept
    out    = W_o heads

with the pretrained projections on both sides. A layer that is kept whole has no mixer.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from linearize_kernels import full_attention
from torch import Tensor, nn

from linearize.families.base import AttentionLayer, Family, Projections
from linearize.model.layout import Layout
from linearize.model.memory import LayerMemory, memory_of
from linearize.model.mixer.base import empty_slots
from linearize.model.mixer.mixer import Mixer

if TYPE_CHECKING:
    from collections.abc import Callable

    from transformers.cache_utils import Cache

    from linearize.model.configuration import MixerConfig


CACHE_NAMES = ("cache", "past_key_values", "layer_past")
"""What models call the cache that they hand to their layers: `cache` since transformers 5.24, and two names before."""


class LinearizedAttention(nn.Module):
    """Takes the place of a pretrained attention module and keeps its weights under their names.

    Args:
        attention: the module it replaces; its submodules move over.
        family: how that architecture projects.
        layer: its heads.
        config: the layer's mixer section.
        layer_idx: which layer of the model, and of its cache, this is.
        depth: where it stands in the model, 0 for the first layer and 1 for the last.

    Attributes:
        observer: is shown the projections of every call, as rows of real tokens with their lengths (None: all), before
            they are mixed; to see what a model attends to. Not part of the configuration.
    """

    observer: Callable[[Projections, Tensor | None], None] | None = None

    def __init__(
        self,
        attention: Any,
        family: Family,
        layer: AttentionLayer,
        config: MixerConfig,
        layer_idx: int,
        depth: float = 0.0,
    ) -> None:
        super().__init__()
        for name, module in attention.named_children():
            self.add_module(name, module)
        self.family, self.layer, self.layer_idx = family, layer, layer_idx
        config = config.fitted(layer)
        everything = range(layer.key_value_heads)
        self.softmax_heads = list(everything) if config.window is None else sorted(config.softmax_heads)
        self.mixed_heads = [head for head in everything if head not in self.softmax_heads]
        self.mixer = Mixer(config, _part_of(layer, self.mixed_heads), depth) if self.mixed_heads else None

    def memory(self, batch: int, dtype: torch.dtype, device: torch.device, capacity: int | None = None) -> LayerMemory:
        """An empty memory for `batch` rows.

        Args:
            dtype: of keys and values; the recurrence's state is float32.
            capacity: tokens to make room for in the heads that keep softmax; None lets that part grow.
        """
        parts = self.mixer.parts(batch, dtype, device) if self.mixer is not None else {}
        past = None
        if self.softmax_heads:
            kept, slots = _part_of(self.layer, self.softmax_heads), (batch, capacity or 0)
            past = {name: empty_slots(kept, name, slots, dtype, device) for name in ("k_rotated", "v")}
        return LayerMemory(parts, batch, device, past=past, capacity=capacity)

    def memory_nbytes(self, dtype: torch.dtype) -> tuple[int, int]:
        """Bytes of one sequence's memory that do not depend on its length, and those of each token."""
        meta = torch.device("meta")
        past = self.memory(1, dtype, meta, capacity=1).past.values()
        return self.memory(1, dtype, meta).nbytes, sum(x.numel() * x.element_size() for x in past)

    def forward(
        self,
        hidden_states: Tensor,
        position_embeddings: tuple[Tensor, Tensor] | None = None,
        attention_mask: Tensor | None = None,
        cache: Cache | None = None,
        past_key_values: Cache | None = None,
        layer_past: Cache | None = None,
        **_: Any,
    ) -> tuple[Tensor, None]:
        """`hidden_states` `[B, T, width]`; `attention_mask` is what `LinearizedForCausalLM` makes: `[B, 1, 1, T]`
        document numbers with 0 at pads (of one token 0 or 1), or `[1, 1, 1, 0]` where there is nothing to say. The
        cache has each of the names that families call it by (`CACHE_NAMES`)."""
        projected = self.project(hidden_states, position_embeddings)
        cache = next((held for held in (cache, past_key_values, layer_past) if held is not None), None)
        memory = None
        if cache is not None:
            batch, device, dtype = hidden_states.shape[0], hidden_states.device, projected.k.dtype
            memory = memory_of(cache, self.layer_idx, lambda capacity: self.memory(batch, dtype, device, capacity))
        lengths = None
        if attention_mask is None or attention_mask.numel() == 0:
            heads = self._mix(projected, None, memory)
        elif attention_mask.shape[-1] == 1:
            # One token a row is in place already, and nothing here waits for the device to say which are real.
            lengths = attention_mask[:, 0, 0, 0]
            heads = self._mix(projected, lengths, memory)
        else:
            layout = layout_of(attention_mask)
            lengths = layout.lengths
            heads = layout.scatter(self._mix(Projections(*(layout.gather(x) for x in projected)), lengths, memory))
        if memory is not None:
            memory.advance(hidden_states.shape[1], lengths)
        heads = heads if heads.dtype == projected.v.dtype else heads.to(projected.v.dtype)
        return self.family.output(self, heads), None

    def project(
        self, hidden_states: Tensor, position_embeddings: tuple[Tensor, Tensor] | None, attention: Any = None
    ) -> Projections:
        """The projections of `hidden_states` `[B, T, width]`, by this layer's weights or those of `attention`, a module
        of the same architecture."""
        q, k, v = self.family.project(self if attention is None else attention, self.layer, hidden_states)
        if not self.layer.rotary:
            return Projections(q, k, v, q, k)
        if position_embeddings is None:
            raise ValueError("the model passed no rotary positions to its attention")
        if hidden_states.shape[1] == 1:
            # Heads are turned alike: as one tensor it takes half of the launches.
            both = _joined(q, k)
            turn = self._turn(both, position_embeddings)
            if turn is None:
                turned = self.family.rotate(both, *position_embeddings)
            elif turn.shape[0] == 1:
                turned = torch.mm(both.view(-1, both.shape[-1]), turn[0]).view(both.shape)
            else:
                turned = torch.bmm(both.squeeze(1), turn).unsqueeze(1)
            q_rotated, k_rotated = turned.split([q.shape[2], k.shape[2]], 2)
        else:
            q_rotated, k_rotated = (self.family.rotate(x, *position_embeddings) for x in (q, k))
        return Projections(q, k, v, q_rotated, k_rotated)

    def _turn(self, heads: Tensor, position_embeddings: tuple[Tensor, Tensor]) -> Tensor | None:
        """What rotary positions do to one token's `heads` `[B, 1, N, D]`, as a matrix `[B or 1, D, D]` that all layers
        share, kept on the table: one product a layer in the place of seven small operations. None where that does not
        pay, or would round what the family does not."""
        cos, sin = position_embeddings
        if heads.device.type != "cpu" or torch.is_grad_enabled() or torch.compiler.is_compiling():
            return None
        if cos.dtype != heads.dtype or heads.dtype not in (torch.float32, torch.float64):
            return None
        kept: tuple[Family, Tensor] | None = cos.__dict__.get("_turn")
        if kept is None or kept[0] is not self.family or kept[1].shape[-1] != heads.shape[-1]:
            every = torch.eye(heads.shape[-1], dtype=heads.dtype).expand(cos.shape[0], 1, -1, -1)
            kept = self.family, self.family.rotate(every, cos, sin).squeeze(1)
            cos.__dict__["_turn"] = kept
        return kept[1]

    def _mix(self, new: Projections, lengths: Tensor | None, memory: LayerMemory | None) -> Tensor:
        """Rows of real tokens `[R, L, ...]` to heads `[R, L, H, V]`; `lengths` `[R]` are the real ones, None if all."""
        if self.observer is not None:
            self.observer(new, lengths)
        heads: Tensor
        if self.mixer is None:
            heads = self._attend(new, lengths, memory)
        elif not self.softmax_heads:
            heads = self.mixer(new, lengths, memory)
        else:
            kept = self._attend(self.select(new, self.softmax_heads), lengths, memory)
            mixed = self.mixer(self.select(new, self.mixed_heads), lengths, memory)
            groups = torch.cat([_by_group(kept, self.softmax_heads), _by_group(mixed, self.mixed_heads).to(kept)], 2)
            order = self.softmax_heads + self.mixed_heads
            heads = groups[:, :, [order.index(head) for head in range(len(order))]].flatten(2, 3)
        return heads

    def _attend(self, new: Projections, lengths: Tensor | None, memory: LayerMemory | None) -> Tensor:
        """Softmax attention over the whole past, for the heads that keep it."""
        first: Tensor | int = 0
        k, v = new.k_rotated, new.v
        if memory is not None:
            first, k, v = memory.extend_past(k, v, ragged=lengths is not None)
        return full_attention(new.q_rotated, k, v, first=first, scale=self.layer.scale, softcap=self.layer.softcap)

    def select(self, new: Projections, heads: list[int]) -> Projections:
        """The key/value heads of that number, and the query heads that share them."""
        groups = self.layer.key_value_heads

        def queries(x: Tensor) -> Tensor:
            chosen: Tensor = x.unflatten(2, (groups, -1))[:, :, heads]
            return chosen.flatten(2, 3)

        return Projections(
            queries(new.q), new.k[:, :, heads], new.v[:, :, heads], queries(new.q_rotated), new.k_rotated[:, :, heads]
        )


def layout_of(attention_mask: Tensor) -> Layout:
    """The layout that a mask made by `LinearizedForCausalLM` stands for; worked out once and kept on the mask."""
    layout = getattr(attention_mask, "_layout", None)
    if layout is None:
        segments = attention_mask[:, 0, 0]
        layout = Layout(segments, packed=bool((segments > 1).any()))
        attention_mask._layout = layout  # type: ignore[attr-defined]
    assert isinstance(layout, Layout)  # noqa: S101 - for the type checker
    return layout


def _part_of(layer: AttentionLayer, heads: list[int]) -> AttentionLayer:
    """The layer with only the key/value heads of that number."""
    group = layer.query_heads // layer.key_value_heads
    return replace(layer, key_value_heads=len(heads), query_heads=len(heads) * group)


def _joined(q: Tensor, k: Tensor) -> Tensor:
    """The heads of one token side by side, `[B, 1, H + K, D]`: as they lie, where one product has put them so."""
    size = q.element_size()
    if q.shape[0] == 1 and k.data_ptr() == q.data_ptr() + q.numel() * size and q.is_contiguous() and k.is_contiguous():
        shape, end = (1, 1, q.shape[2] + k.shape[2], q.shape[3]), q.storage_offset() + q.numel() + k.numel()
        if end * size <= q.untyped_storage().nbytes():
            width = q.shape[3]
            return q.as_strided(shape, (shape[2] * width, shape[2] * width, width, 1))
    return torch.cat([q, k], 2)


def _by_group(heads: Tensor, key_value_heads: list[int]) -> Tensor:
    groups: Tensor = heads.unflatten(2, (len(key_value_heads), -1))
    return groups


__all__ = ["CACHE_NAMES", "LinearizedAttention", "layout_of"]
