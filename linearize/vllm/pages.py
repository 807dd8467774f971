"""The memories of a sequence in pages of bytes, one page per layer.

vLLM hands out pages of one size, the same for all layers, because it then keeps one table of pages for all of them.
`LayerMemory.parts` are tensors of any shape and dtype, so a page is bytes, and each tensor is a view of them. Layers
may need unequal memory, such as unequal numbers of slots. Their tensors are then spread over all pages of the sequence.
"""

from __future__ import annotations

from math import prod
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Mapping

    import torch
    from torch import Tensor

    from linearize.model.memory import Part

_ALIGNED = 64
"""Bytes. Views need a multiple of their dtype's size; vector loads are fastest within cache lines."""


class _Place(NamedTuple):
    layer: int  # whose page holds the tensor
    start: int
    end: int
    shape: torch.Size
    dtype: torch.dtype


class Pages:
    """The places of the layers' tensors in their pages.

    Args:
        memories: the number of each layer -> an empty memory of one row, as `Mixer.parts` makes it; the meta device is
            enough.
        shared: a tensor may lie in the page of another layer; False if the layers have different tables of pages.

    Attributes:
        nbytes: the size of a page.
    """

    def __init__(self, memories: Mapping[int, Mapping[str, Part]], *, shared: bool = True) -> None:
        filled = dict.fromkeys(memories, 0)
        sizes = {
            (layer, part, name): prod(tensor.shape[1:]) * tensor.element_size()
            for layer, parts in memories.items()
            for part, tensors in parts.items()
            for name, tensor in tensors.items()
        }
        self._places: dict[tuple[int, str, str], _Place] = {}
        for layer, part, name in sorted(sizes, key=sizes.__getitem__, reverse=True):
            page = min(filled, key=filled.__getitem__) if shared else layer
            start, tensor = filled[page], memories[layer][part][name]
            end = start + sizes[layer, part, name]
            self._places[layer, part, name] = _Place(page, start, end, tensor.shape[1:], tensor.dtype)
            filled[page] = -(-end // _ALIGNED) * _ALIGNED
        self._order = list(sizes)
        self.nbytes = max(filled.values(), default=0)
        self._bytes: dict[int, Tensor] = {}
        self._views: dict[int, dict[str, Part]] = {}

    def bind(self, layer: int, pages: Tensor) -> None:
        """Take `pages` `[N, at least nbytes]` of int8 or uint8 as those of a layer."""
        self._bytes[layer] = pages
        self._views.clear()

    def memory(self, layer: int) -> dict[str, Part]:
        """The memories of N sequences in a layer, as views of pages; all layers' pages must be bound."""
        if layer not in self._views:
            parts: dict[str, Part] = {}
            for owner, part, name in self._order:
                if owner == layer:
                    place = self._places[owner, part, name]
                    pages = self._bytes[place.layer]
                    view = pages[:, place.start : place.end].view(place.dtype).view(len(pages), *place.shape)
                    parts.setdefault(part, {})[name] = view
            self._views[layer] = parts
        return self._views[layer]

    def clear(self, layers: list[int], fresh: Tensor) -> None:
        """Zero the pages of sequences that start, because a page may hold the memory of an earlier sequence."""
        for layer in layers:
            self._bytes[layer].index_fill_(0, fresh, 0)
