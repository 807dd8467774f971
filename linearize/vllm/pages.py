"""The memory of one layer and sequence as one page of bytes.

vLLM hands out pages of one size. `LayerMemory.parts` are tensors of any shape and dtype, so a page is bytes, and each
tensor is a view of them. All layers get pages of the largest layer's size, because vLLM then keeps one table of pages
for all of them.
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
    part: str
    name: str
    start: int
    shape: torch.Size
    dtype: torch.dtype


class Page:
    """The places of a memory's tensors in a page.

    Args:
        parts: an empty memory of one row, as `Mixer.parts` makes it; the meta device is enough.

    Attributes:
        nbytes: the size of a page.
    """

    def __init__(self, parts: Mapping[str, Part]) -> None:
        self._places: list[_Place] = []
        self.nbytes = 0
        for part, tensors in parts.items():
            for name, tensor in tensors.items():
                self._places.append(_Place(part, name, self.nbytes, tensor.shape[1:], tensor.dtype))
                self.nbytes += _rounded(prod(tensor.shape[1:]) * tensor.element_size())

    def views(self, pages: Tensor) -> dict[str, Part]:
        """The memory of N rows as views of `pages` `[N, at least nbytes]` of int8 or uint8."""
        parts: dict[str, Part] = {}
        for part, name, start, shape, dtype in self._places:
            end = start + prod(shape) * dtype.itemsize
            parts.setdefault(part, {})[name] = pages[:, start:end].view(dtype).view(len(pages), *shape)
        return parts


def _rounded(nbytes: int) -> int:
    return -(-nbytes // _ALIGNED) * _ALIGNED
