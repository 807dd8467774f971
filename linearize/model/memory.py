"""The memory of a converted layer: a list of parts of fixed size, held as one layer of a transformers cache.

Each part is a few tensors whose first axis is the batch. `LayerMemory` knows nothing of what they mean, so a part is
added without touching reordering, resetting, byte counts or the other parts.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

Part = dict[str, Tensor]


class LayerMemory(CacheLayerMixin):
    """What one converted layer remembers of a batch of sequences, in bytes that do not depend on their length.

    Attributes:
        parts: name of a part -> its tensors, each `[B, ...]`.
        counts: `[B]` real tokens that each row has seen.
        seen: tokens the layer was called with, pads included; what transformers calls the sequence length.
    """

    is_compileable: ClassVar[bool] = False
    is_croppable: ClassVar[bool] = False
    is_sliding: ClassVar[bool] = False
    supports_early_init: ClassVar[bool] = False

    def __init__(self, parts: dict[str, Part], batch: int, device: torch.device) -> None:
        super().__init__()
        self.parts = parts
        self.counts = torch.zeros(batch, dtype=torch.long, device=device)
        self.seen = 0
        self.is_initialized = True

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """Every tensor with its name, `part.tensor`; the row counts come last."""
        for part, tensors in self.parts.items():
            for name, tensor in tensors.items():
                yield f"{part}.{name}", tensor
        yield "counts", self.counts

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return sum(tensor.numel() * tensor.element_size() for _, tensor in self.tensors())

    def advance(self, tokens: int, lengths: Tensor | None) -> None:
        """Counts `tokens` columns as seen, of which row b had `lengths[b]` real ones (all, if None)."""
        self.counts.add_(tokens if lengths is None else lengths)
        self.seen += tokens

    def _apply(self, change: Callable[[Tensor], Tensor]) -> None:
        for tensors in self.parts.values():
            for name, tensor in tensors.items():
                tensors[name] = change(tensor)
        self.counts = change(self.counts)

    def reset(self) -> None:
        for _, tensor in self.tensors():
            tensor.zero_()
        self.seen = 0

    def reorder_cache(self, beam_idx: Tensor) -> None:
        self._apply(lambda x: x.index_select(0, beam_idx.to(x.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        self._apply(lambda x: x.repeat_interleave(repeats, dim=0))

    def batch_select_indices(self, indices: Tensor) -> None:
        self._apply(lambda x: x[indices.to(x.device)])

    def crop(self, tokens_to_remove: int) -> None:
        if tokens_to_remove != 0:
            raise ValueError("a recurrent state cannot forget its last tokens; start again from an earlier state")

    def get_seq_length(self, *_: Any) -> int:
        return self.seen

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.seen + query_length, 0

    def get_max_length(self) -> int:
        return -1

    get_max_cache_shape = get_max_length  # its name before transformers 5.20

    @property
    def batch_size(self) -> int:
        return self.counts.shape[0]

    def offload(self) -> None:
        """Nothing: a memory of fixed size stays where its layer is."""

    def prefetch(self) -> None:
        """Nothing, see `offload`."""

    def lazy_initialization(self, *_: Any) -> None:
        raise NotImplementedError("a LayerMemory is made whole by its layer")

    def update(self, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        raise NotImplementedError("a LayerMemory is written by its layer, not through keys and values")


def memory_of(cache: Cache, layer: int, make: Callable[[], LayerMemory]) -> LayerMemory:
    """The memory of `layer` in any transformers cache; takes the place of the entry that the library put there.

    Raises:
        ValueError: the cache already holds keys and values of another kind of layer.
    """
    while len(cache.layers) <= layer:
        cache.layers.append(cache.layer_class_to_replicate())
    held = cache.layers[layer]
    if isinstance(held, LayerMemory):
        return held
    if held.get_seq_length() > 0:
        raise ValueError(f"layer {layer} of the cache holds keys and values of a model that was not converted")
    cache.layers[layer] = made = make()
    return made


def cache_nbytes(cache: Cache) -> int:
    """Bytes that the memories in `cache` take, all layers together."""
    return sum(layer.nbytes for layer in cache.layers if isinstance(layer, LayerMemory))
