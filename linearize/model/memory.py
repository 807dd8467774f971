"""The memory of a converted layer: a list of parts of fixed size, held as one layer of a transformers cache.

Each part is a few tensors whose first axis is the batch. `LayerMemory` knows nothing of what they mean, so a part is
added without touching reordering, resetting, byte counts or the other parts.
"""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

Part = dict[str, Tensor]


def store(part: Part, name: str, value: Tensor) -> None:
    """Copy `value` into a tensor of `part`, in place and without its autograd history."""
    part[name].copy_(value.detach())


class LayerMemory(CacheLayerMixin):
    """The cache of one converted layer for a batch of sequences, of a size that does not depend on their length.

    Attributes:
        parts: name of a part -> its tensors, each `[B, ...]`.
        past: keys and values `[B, N, ...]` of the heads that keep softmax over everything, if the layer has any: the
            one part that has to grow.
        capacity: how many tokens `past` has room for from the start; None where it grows.
        counts_on_host: False while work is recorded that will be repeated, so that nothing depends on a number of now;
            after repeating it, `recount` reads them.
        stays: True once work was recorded on its tensors, which then stay where they are.
        seen: tokens the layer was called with, pads included; what transformers calls the sequence length.
    """

    is_croppable: ClassVar[bool] = False
    is_sliding: ClassVar[bool] = False
    supports_early_init: ClassVar[bool] = False

    def __init__(
        self,
        parts: dict[str, Part],
        batch: int,
        device: torch.device,
        *,
        past: Part | None = None,
        capacity: int | None = None,
    ) -> None:
        super().__init__()
        self.parts, self.past, self.capacity = parts, past or {}, capacity
        self.ragged = False  # whether rows may have seen different numbers of tokens
        self.counts_on_host, self.stays = True, False
        self._counts, self._uncounted = torch.zeros(batch, dtype=torch.long, device=device), 0
        # A number that compiled code would be built for again, so there it is a tensor.
        self._seen = torch.zeros((), dtype=torch.long, device=device) if self.is_compileable else 0
        self._joined: dict[str, tuple[Tensor, Tensor, Tensor]] = {}
        self.is_initialized = True

    @property
    def counts(self) -> Tensor:
        """`[B]` real tokens that each row has seen."""
        if self._uncounted:
            # All rows of all layers count alike, so it is written down only when it is asked for: perhaps outside of
            # the inference mode that made the tensor, where it may not be changed in place.
            tokens, self._uncounted = self._uncounted, 0
            if self._counts.is_inference() and not torch.is_inference_mode_enabled():
                self._counts = self._counts + tokens
            else:
                self._counts.add_(tokens)
        return self._counts

    @counts.setter
    def counts(self, counts: Tensor) -> None:
        self._counts, self._uncounted = counts, 0

    @property
    def is_compileable(self) -> bool:
        """True for a static cache of `generate`: no tensor ever changes its shape or address."""
        return self.capacity is not None

    @property
    def uniform(self) -> int | None:
        """How many tokens every row has seen, where that is a plain number: not with pads, and not in compiled or
        recorded code."""
        return self._seen if isinstance(self._seen, int) and self.counts_on_host and not self.ragged else None

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """Every tensor with its name, `part.tensor`; the row counts come last."""
        for part, tensors in [*self.parts.items(), ("softmax", self.past)]:
            for name, tensor in tensors.items():
                yield f"{part}.{name}", tensor
        yield "counts", self.counts

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return sum(tensor.numel() * tensor.element_size() for _, tensor in self.tensors())

    @property
    def seen(self) -> int:
        return int(self._seen)

    @seen.setter
    def seen(self, tokens: int) -> None:
        if isinstance(self._seen, Tensor):
            self._seen.fill_(tokens)
        else:
            self._seen = tokens

    def advance(self, tokens: int, lengths: Tensor | None) -> None:
        """Counts `tokens` columns as seen, of which row b had `lengths[b]` real ones (all, if None)."""
        if lengths is None and not self.stays and isinstance(self._seen, int) and self._counts.device.type == "cpu":
            self._uncounted += tokens
        else:
            self.counts.add_(tokens if lengths is None else lengths)
        if self.counts_on_host:
            self._seen += tokens
        self.ragged = self.ragged or lengths is not None

    def stay(self) -> None:
        """Keeps all tensors where they are from now on, for work that is recorded on them."""
        self.counts, self.stays = self.counts, True

    def joined(self, first: str, second: str, names: Sequence[str]) -> Part:
        """The tensors of that name of two parts `[B, M, ...]` and `[B, N, ...]` as one `[B, M + N, ...]`, which the
        parts are made views of. Copied only at the first call, or where a part has other tensors since; each time where
        tensors have to stay where they are and do not lie so."""
        whole: Part = {}
        one, other = self.parts[first], self.parts[second]
        for name in names:
            kept = self._joined.get(name)
            if kept is None or kept[1] is not one[name] or kept[2] is not other[name]:
                # Whoever goes on with this memory outside of inference mode writes into it as well.
                with torch.inference_mode(False), torch.no_grad():
                    joint, at = torch.cat([one[name], other[name]], 1), one[name].shape[1]
                    if self.stays:
                        whole[name] = joint
                        continue
                    one[name], other[name] = joint[:, :at], joint[:, at:]
                self._joined[name] = kept = joint, one[name], other[name]
            whole[name] = kept[0]
        return whole

    def extend_past(self, k: Tensor, v: Tensor, *, ragged: bool) -> tuple[Tensor | int, Tensor, Tensor]:
        """Adds the keys and values of L new tokens `[B, L, ...]` to `past`.

        Args:
            ragged: whether some of them are not real; those are written over by the next call.

        Returns:
            the place of the first of them (per row `[B]` where rows may differ), then all keys and all values.
        """
        self.ragged = self.ragged or ragged
        new, tokens = {"k_rotated": k, "v": v}, k.shape[1]
        if self.capacity is None:
            held = next(iter(self.past.values())).shape[1]
            if not self.ragged:
                joined = {name: torch.cat([self.past[name], x.to(self.past[name].dtype)], 1) for name, x in new.items()}
                self.past = {name: x.detach() for name, x in joined.items()}
                return held, joined["k_rotated"], joined["v"]
            room = {name: F.pad(x, (0, 0, 0, 0, 0, tokens)) for name, x in self.past.items()}
        else:
            room = self.past
        slots = (self.counts[:, None] + torch.arange(tokens, device=k.device))[:, :, None, None]
        joined = {}
        for name, x in room.items():
            at, incoming = slots.expand_as(new[name]), new[name].to(x.dtype)
            joined[name] = x.scatter(1, at, incoming) if torch.is_grad_enabled() else x.scatter_(1, at, incoming)
        if self.capacity is None:
            self.past = {name: x.detach() for name, x in joined.items()}
        elif torch.is_grad_enabled():
            for name, x in self.past.items():
                x.copy_(joined[name].detach())
        return self.counts.clone(), joined["k_rotated"], joined["v"]

    def _apply(self, change: Callable[[Tensor], Tensor]) -> None:
        for tensors in (*self.parts.values(), self.past):
            for name, tensor in tensors.items():
                tensors[name] = change(tensor)
        self.counts = change(self.counts)

    def holding(self, tensors: dict[str, Tensor]) -> LayerMemory:
        """A memory of the same parts that holds `tensors`, named as `tensors()` names them, and starts without pads."""
        parts = {part: {name: tensors[f"{part}.{name}"] for name in held} for part, held in self.parts.items()}
        past, counts = {name: tensors[f"softmax.{name}"] for name in self.past}, tensors["counts"]
        memory = LayerMemory(parts, counts.shape[0], counts.device, past=past)
        memory.counts = counts
        recount([memory])
        return memory

    def take(self, other: LayerMemory) -> None:
        """Remembers what `other` does, in tensors of its own that stay where they are; to be recounted."""
        for (_, mine), (_, theirs) in zip(self.tensors(), other.tensors(), strict=True):
            mine.copy_(theirs)

    def rows(self, indices: Tensor) -> LayerMemory:
        """A memory of some rows, which may repeat; this one stays as it is."""
        memory = copy.copy(self)
        memory.parts = {name: copy.copy(part) for name, part in self.parts.items()}
        memory.past, memory._joined, memory.counts = copy.copy(self.past), {}, self.counts
        memory.batch_select_indices(indices)
        return memory

    def clone(self) -> LayerMemory:
        """A copy that shares nothing with this one and keeps no room in `past` beyond the longest row."""
        longest = int(self.counts.max())
        tensors = {
            name: (tensor[:, :longest] if name.startswith("softmax.") else tensor).detach().clone()
            for name, tensor in self.tensors()
        }
        return self.holding(tensors)

    def reset(self) -> None:
        if self.capacity is None:
            self.past = {name: tensor[:, :0] for name, tensor in self.past.items()}
        for _, tensor in self.tensors():
            tensor.zero_()
        self.seen, self.ragged = 0, False

    def reorder_cache(self, beam_idx: Tensor) -> None:
        self._apply(lambda x: x.index_select(0, beam_idx.to(x.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        self._apply(lambda x: x.repeat_interleave(repeats, dim=0))

    def batch_select_indices(self, indices: Tensor) -> None:
        self._apply(lambda x: x[indices.to(x.device)])

    def crop(self, tokens_to_remove: int) -> None:
        if tokens_to_remove != 0:
            raise ValueError("a recurrent state cannot forget its last tokens; start again from an earlier state")

    def get_seq_length(self, *_: Any) -> int | Tensor:
        return self._seen

    def get_mask_sizes(self, query_length: int) -> tuple[int | Tensor, int]:
        return self._seen + query_length, 0

    def get_max_length(self) -> int:
        return -1

    get_max_cache_shape = get_max_length  # its name before transformers 5.20

    @property
    def batch_size(self) -> int:
        return self._counts.shape[0]

    def offload(self) -> None:
        """Nothing: a memory of fixed size stays where its layer is."""

    def prefetch(self) -> None:
        """Nothing, see `offload`."""

    def lazy_initialization(self, *_: Any) -> None:
        raise NotImplementedError("a LayerMemory is made whole by its layer")

    def update(self, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        raise NotImplementedError("a LayerMemory is written by its layer, not through keys and values")


def memory_of(cache: Cache, layer: int, make: Callable[[int | None], LayerMemory]) -> LayerMemory:
    """The memory of `layer` in any transformers cache; takes the place of the entry that the library put there.

    Args:
        make: an empty memory, given the number of tokens that a static cache has room for (None for others).

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
    static = held.is_compileable
    cache.layers[layer] = made = make(held.max_cache_len if static else None)
    if static and not torch.compiler.is_compiling():
        for _, tensor in [*made.tensors(), ("seen", made._seen)]:
            torch._dynamo.mark_static_address(tensor)
    return made


def recount(layers: Sequence[LayerMemory]) -> None:
    """Reads from their counts how many tokens the layers of one model have seen, pads not counted."""
    most, least = (int(x) for x in layers[0].counts.aminmax()[::-1])
    for layer in layers:
        layer.seen, layer.ragged = most, least < most


def cache_nbytes(cache: Cache) -> int:
    """Bytes that the memories in `cache` take, all layers together."""
    return sum(layer.nbytes for layer in cache.layers if isinstance(layer, LayerMemory))
