"""The attention layer of a converted model.

    heads  = the mixer's output for most key/value heads, softmax over the whole past for the heads in `softmax_heads`
    out    = W_o heads

The pretrained projections stay on both sides. A layer that keeps its pretrained attention has no mixer.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from linearize_kernels import full_attention
from torch import Tensor, nn

from linearize.families.base import AttentionLayer, Family, Projections
from linearize.model.landmarks.slots import joint_parts
from linearize.model.layout import Layout
from linearize.model.memory import LayerMemory, clear, memory_of
from linearize.model.mixer.mixer import Mixer
from linearize.model.precision import empty_slots

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from transformers.cache_utils import Cache

    from linearize.model.configuration import MixerConfig
    from linearize.model.memory import Part


CACHE_NAMES = ("cache", "past_key_values", "layer_past")
"""Argument names by which models pass the cache to layers: `cache` since transformers 5.24, two others before."""


class LinearizedAttention(nn.Module):
    """Replaces a pretrained attention module and keeps its weights under their names.

    Args:
        attention: the pretrained module; its submodules move into this one.
        family: the projections of the architecture.
        layer: the layer's heads.
        config: the layer's mixer section.
        layer_idx: the index of the layer in the model and in its cache.
        depth: the relative depth of the layer, 0 for the first and 1 for the last.

    Attributes:
        observer: a callback that gets every call's projections before mixing, as rows of real tokens, and their
            lengths `[R]` (None: all tokens are real). Probing sets it. It is not part of the configuration.
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
            dtype: the dtype of keys and values; the recurrence's state is float32.
            capacity: the number of tokens preallocated in `past`, for the softmax heads; None lets `past` grow.
        """
        parts = self.mixer.parts(batch, dtype, device) if self.mixer is not None else {}
        past: Part | None = None
        if self.softmax_heads:
            kept, slots = _part_of(self.layer, self.softmax_heads), (batch, capacity or 0)
            past = {}
            for name in ("k_rotated", "v"):
                past |= empty_slots(kept, name, slots, dtype, device)
            clear(past)
        joints = joint_parts(self.mixer) if self.mixer is not None and self.mixer.config.landmarks else ()
        return LayerMemory(parts, batch, device, past=past, capacity=capacity, joints=joints)

    def memory_in(self, caches: Sequence[Cache | None], batch: int, like: Tensor) -> LayerMemory | None:
        """The layer's memory for `batch` rows of tensors as `like`, in the cache that is given; None without one."""
        cache = next((held for held in caches if held is not None), None)
        if cache is None:
            return None
        return memory_of(cache, self.layer_idx, lambda capacity: self.memory(batch, like.dtype, like.device, capacity))

    def memory_nbytes(self, dtype: torch.dtype) -> tuple[int, int]:
        """Bytes of one sequence's memory: the part of constant size, and the part per token."""
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
        """Attention output `[B, T, width]` for `hidden_states` `[B, T, width]`, and None for the attention weights.

        Args:
            attention_mask: the mask that `LinearizedForCausalLM` makes: `[B, 1, 1, T]` document numbers with 0 at pads
                (0 or 1 if T is 1), or `[1, 1, 1, 0]` if all tokens are real and belong to one document per row.
            cache, past_key_values, layer_past: the cache, under the name that the family uses (`CACHE_NAMES`).
        """
        projected = self.project(hidden_states, position_embeddings)
        memory = self.memory_in((cache, past_key_values, layer_past), hidden_states.shape[0], projected.k)
        lengths = None
        if attention_mask is None or attention_mask.numel() == 0:
            heads = self.mix(projected, None, memory)
        elif attention_mask.shape[-1] == 1:
            # With one token per row no gather is needed, and a check for all-real rows would sync the device.
            lengths = lengths_of(attention_mask)
            heads = self.mix(projected, lengths, memory)
        else:
            layout = layout_of(attention_mask)
            lengths = layout.lengths
            documents = self._mix_documents(projected, layout) if memory is None else None
            if documents is None:
                gathered = Projections(*(layout.gather(x) for x in projected))
                documents = layout.scatter(self._mix_rows(gathered, layout, memory))
            heads = documents
        if memory is not None:
            memory.advance(hidden_states.shape[1], lengths)
        heads = heads if heads.dtype == projected.v.dtype else heads.to(projected.v.dtype)
        return self.family.output(self, heads), None

    def project(
        self, hidden_states: Tensor, position_embeddings: tuple[Tensor, Tensor] | None, attention: Any = None
    ) -> Projections:
        """Project `hidden_states` `[B, T, width]`.

        Args:
            attention: a module of the same architecture whose weights are used instead of this layer's.

        Raises:
            ValueError: the layer has rotary positions and the model passed none.
        """
        q, k, v = self.family.project(self if attention is None else attention, self.layer, hidden_states)
        if not self.layer.rotary:
            return Projections(q, k, v, q, k)
        if position_embeddings is None:
            raise ValueError("the model passed no rotary positions to its attention")
        if hidden_states.shape[1] == 1:
            # All heads are rotated alike, so one joined tensor halves the kernel launches.
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
        """The rotation of one token's `heads` `[B, 1, N, D]` as a matrix `[B or 1, D, D]`: one matrix product per layer
        instead of seven small operations. Cached on `cos`, because all layers share it. None where this is slower (GPU,
        autograd, compiled code) or would round differently from the family's `rotate`. With several threads it is
        slower, too: torch would wake its own for each product, and they then wait actively beside those of `native`."""
        cos, sin = position_embeddings
        if heads.device.type != "cpu" or torch.is_grad_enabled() or torch.compiler.is_compiling():
            return None
        if torch.get_num_threads() > 1:
            return None
        if cos.dtype != heads.dtype or heads.dtype not in (torch.float32, torch.float64):
            return None
        kept: tuple[Family, Tensor] | None = cos.__dict__.get("_turn")
        if kept is None or kept[0] is not self.family or kept[1].shape[-1] != heads.shape[-1]:
            every = torch.eye(heads.shape[-1], dtype=heads.dtype).expand(cos.shape[0], 1, -1, -1)
            kept = self.family, self.family.rotate(every, cos, sin).squeeze(1)
            cos.__dict__["_turn"] = kept
        return kept[1]

    def mix(self, new: Projections, lengths: Tensor | None, memory: LayerMemory | None) -> Tensor:
        """Mix rows of real tokens `[R, L, ...]` to heads `[R, L, H, V]`; `lengths` `[R]`: real tokens (None: all L)."""
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

    def _mix_rows(self, new: Projections, layout: Layout, memory: LayerMemory | None) -> Tensor:
        """`mix` of rows without pads; packed documents of similar lengths at a time, so few places are computed in
        vain."""
        if memory is not None or self.observer is not None or len(layout.by_length) == 1:
            return self.mix(new, layout.lengths, memory)
        mixed = [
            self.mix(Projections(*(x[rows, :longest] for x in new)), layout.lengths[rows], None)
            for rows, longest in layout.by_length
        ]
        padded = torch.cat([F.pad(y, (0, 0, 0, 0, 0, new.q.shape[1] - y.shape[1])) for y in mixed])
        return padded[torch.cat([rows for rows, _ in layout.by_length]).argsort()]

    def _mix_documents(self, new: Projections, layout: Layout) -> Tensor | None:
        """`mix` of packed documents `[B, T, ...]` without a row for each; None if no kernel takes them so."""
        if self.mixer is None or self.softmax_heads or self.observer is not None or not layout.packed:
            return None
        heads = self.mixer.documents(new, layout)
        return None if heads is None else layout.masked(heads)

    def _attend(self, new: Projections, lengths: Tensor | None, memory: LayerMemory | None) -> Tensor:
        """Softmax attention over the whole past, for the heads in `softmax_heads`."""
        first: Tensor | int = 0
        k, v = new.k_rotated, new.v
        if memory is not None:
            first, k, v = memory.extend_past(k, v, ragged=lengths is not None)
        return full_attention(new.q_rotated, k, v, first=first, scale=self.layer.scale, softcap=self.layer.softcap)

    def select(self, new: Projections, heads: list[int]) -> Projections:
        """Select key/value heads by index, with the query heads that share them."""
        groups = self.layer.key_value_heads

        def queries(x: Tensor) -> Tensor:
            chosen: Tensor = x.unflatten(2, (groups, -1))[:, :, heads]
            return chosen.flatten(2, 3)

        return Projections(
            queries(new.q), new.k[:, :, heads], new.v[:, :, heads], queries(new.q_rotated), new.k_rotated[:, :, heads]
        )


def layout_of(attention_mask: Tensor) -> Layout:
    """The layout of a mask made by `LinearizedForCausalLM`; cached on the mask, because all layers share it."""
    layout = getattr(attention_mask, "_layout", None)
    if layout is None:
        segments = attention_mask[:, 0, 0]
        layout = Layout(segments, packed=bool((segments > 1).any()))
        attention_mask._layout = layout  # type: ignore[attr-defined]
    assert isinstance(layout, Layout)  # noqa: S101 - for the type checker
    return layout


def lengths_of(attention_mask: Tensor) -> Tensor:
    """`[B]` 1 for rows whose one token is real. One tensor for all layers, which attach to it what they share."""
    lengths = getattr(attention_mask, "_lengths", None)
    if lengths is None:
        lengths = attention_mask[:, 0, 0, 0]
        attention_mask._lengths = lengths  # type: ignore[attr-defined]
    assert isinstance(lengths, Tensor)  # noqa: S101 - for the type checker
    return lengths


def _part_of(layer: AttentionLayer, heads: list[int]) -> AttentionLayer:
    """`layer` reduced to these key/value heads and the query heads that share them."""
    group = layer.query_heads // layer.key_value_heads
    return replace(layer, key_value_heads=len(heads), query_heads=len(heads) * group)


def _joined(q: Tensor, k: Tensor) -> Tensor:
    """The heads of one token in one tensor `[B, 1, H + K, D]`: a view if q and k lie side by side, else a copy."""
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


__all__ = ["CACHE_NAMES", "LinearizedAttention", "layout_of", "lengths_of"]
