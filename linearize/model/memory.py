"""The memory of a converted layer: named parts of fixed size, stored as one layer of a transformers cache.

Each part is a few tensors whose first axis is the batch. `LayerMemory` does not depend on their meaning, so a new part
needs no change to reordering, resetting or byte counts.
"""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

Part = dict[str, Tensor]


class Joint(NamedTuple):
    """Tensors of several parts that lie side by side: those of `names`, which all of `parts` have."""

    parts: tuple[str, ...]
    names: tuple[str, ...]


def store(part: Part, name: str, value: Tensor) -> None:
    """Copy `value` into a tensor of `part`, in place and without its autograd history."""
    part[name].copy_(value.detach())


def clear(*parts: Part) -> None:
    """Fill the tensors of parts with zeros, in one launch for each dtype."""
    by_dtype: dict[torch.dtype, list[Tensor]] = {}
    for x in (x for part in parts for x in part.values() if x.numel() and not x.is_meta):
        by_dtype.setdefault(x.dtype, []).append(x)
    for tensors in by_dtype.values():
        torch._foreach_zero_(tensors)


class LayerMemory(CacheLayerMixin):
    """The cache of one converted layer for a batch of sequences. Its size does not depend on their length.

    Attributes:
        parts: the tensors of each part by name, each `[B, ...]`.
        past: keys and values `[B, N, ...]` of the heads that keep full softmax attention; empty if there are none.
            Only this part grows.
        capacity: the number of tokens that `past` is preallocated for; None if it grows.
        joints: the tensors that steps read or write as one; `stay` joins them.
        counts_on_host: False while a CUDA graph is captured, because Python numbers would be frozen in it. After a
            replay, `recount` restores the numbers.
        merges: False if the host knows that the next token merges no block into landmarks, True if it may; None if
            nothing is known.
        stays: True once a graph was captured on the tensors, which then keep their addresses.
        seen: the number of tokens in all calls, pads included; the sequence length of transformers.
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
        joints: tuple[Joint, ...] = (),
    ) -> None:
        super().__init__()
        self.joints = joints
        self.parts, self.past, self.capacity = parts, past or {}, capacity
        self.ragged = False  # True if rows may have seen different numbers of tokens
        self.counts_on_host, self.stays = True, False
        self.merges: bool | None = None
        self._counts, self._uncounted = torch.zeros(batch, dtype=torch.long, device=device), 0
        # torch.compile would recompile for each value of a Python int, so a static cache counts in a tensor.
        self._seen = torch.zeros((), dtype=torch.long, device=device) if self.is_compileable else 0
        self._joined: dict[tuple[Joint, str], tuple[Tensor, tuple[Tensor, ...]]] = {}
        self.native: tuple[list[Tensor], bytes, list[Tensor]] | None = None  # arguments of C functions for its tensors
        self.is_initialized = True

    @property
    def counts(self) -> Tensor:
        """`[B]` real tokens that each row has seen."""
        if self._uncounted:
            # Counts are added lazily, because most steps do not read them. An inference tensor cannot be changed in
            # place outside of inference mode, so there the sum is a new tensor.
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
        """True for a static cache of `generate`: its tensors keep their shapes and addresses."""
        return self.capacity is not None

    @property
    def uniform(self) -> int | None:
        """The number of tokens that every row has seen; None if it may differ between rows, and in compiled or captured
        code."""
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

    def advance(self, tokens: int, lengths: Tensor | None, *, counted: bool = False) -> None:
        """Count `tokens` more columns; row b has `lengths[b]` real ones (None: all). `counted`: `counts` has them."""
        if counted:
            pass
        elif lengths is None and not self.stays and isinstance(self._seen, int) and self._counts.device.type == "cpu":
            self._uncounted += tokens
        else:
            self.counts.add_(tokens if lengths is None else lengths)
        if self.counts_on_host:
            self._seen += tokens
        self.ragged = self.ragged or lengths is not None

    def stay(self) -> None:
        """Keep the addresses of all tensors from now on, because a CUDA graph refers to them."""
        for joint in self.joints:
            self.joined(joint)
        self.counts, self.stays = self.counts, True

    def joined(self, joint: Joint) -> Part:
        """The tensors of `joint.parts`, each `[B, N, ...]` with an N of its own, as one of each name.

        The first call copies and makes the parts views of the joint tensor; later calls return it. If the tensors must
        keep their addresses (`stays`) and were not joined before, each call copies.
        """
        whole: Part = {}
        for name in joint.names:
            held = [self.parts[part][name] for part in joint.parts]
            kept = self._joined.get((joint, name))
            if kept is None or any(one is not other for one, other in zip(kept[1], held, strict=True)):
                # A normal tensor, because calls outside of inference mode may write into it later.
                with torch.inference_mode(False), torch.no_grad():
                    tensor = torch.cat(held, 1)
                    if self.stays:
                        whole[name] = tensor
                        continue
                    views = tensor.split([x.shape[1] for x in held], 1)
                for part, view in zip(joint.parts, views, strict=True):
                    self.parts[part][name] = view
                self._joined[joint, name] = kept = tensor, views
            whole[name] = kept[0]
        return whole

    def keep(self, joint: Joint, whole: Part) -> None:
        """Copy changed tensors of `joined` back into their parts, unless the parts are views of them."""
        for name, tensor in whole.items():
            kept = self._joined.get((joint, name))
            if kept is not None and kept[0] is tensor:
                continue
            held = [self.parts[part][name] for part in joint.parts]
            for x, piece in zip(held, tensor.split([x.shape[1] for x in held], 1), strict=True):
                x.copy_(piece)

    def extend_past(self, k: Tensor, v: Tensor, *, ragged: bool) -> tuple[Tensor | int, Tensor, Tensor]:
        """Append the keys and values of L new tokens `[B, L, ...]` to `past`.

        Args:
            ragged: True if some tokens may be pads; the next call overwrites those.

        Returns:
            the index of the first new token (`[B]` if rows may differ), all keys and all values.
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
        """A memory of the same parts with the contents `tensors`, keyed as in `tensors()`, and no pads."""
        parts = {part: {name: tensors[f"{part}.{name}"] for name in held} for part, held in self.parts.items()}
        past, counts = {name: tensors[f"softmax.{name}"] for name in self.past}, tensors["counts"]
        memory = LayerMemory(parts, counts.shape[0], counts.device, past=past, joints=self.joints)
        memory.counts = counts
        recount([memory])
        return memory

    def take(self, other: LayerMemory) -> None:
        """Copy the contents of `other` into this memory's tensors, whose addresses stay; `recount` must follow."""
        for (_, mine), (_, theirs) in zip(self.tensors(), other.tensors(), strict=True):
            mine.copy_(theirs)

    def rows(self, indices: Tensor) -> LayerMemory:
        """A memory of the rows `indices` `[N]`, which may repeat; this one does not change."""
        memory = copy.copy(self)
        memory.parts = {name: copy.copy(part) for name, part in self.parts.items()}
        memory.past, memory._joined, memory.counts = copy.copy(self.past), {}, self.counts
        memory.batch_select_indices(indices)
        return memory

    def clone(self) -> LayerMemory:
        """A copy without shared tensors; its `past` is cropped to the longest row."""
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
        """No-op, because a memory of fixed size stays on its layer's device."""

    def prefetch(self) -> None:
        """No-op, see `offload`."""

    def lazy_initialization(self, *_: Any) -> None:
        raise NotImplementedError("a LayerMemory is made whole by its layer")

    def update(self, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        raise NotImplementedError("a LayerMemory is written by its layer, not through keys and values")


def memory_of(cache: Cache, layer: int, make: Callable[[int | None], LayerMemory]) -> LayerMemory:
    """The memory of `layer` in a transformers cache; replaces the empty entry that transformers made.

    Args:
        make: returns an empty memory; its argument is the capacity of a static cache, None for other caches.

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
    """Set `seen` and `ragged` of one model's layers from their row counts; pads are not counted."""
    most, least = (int(x) for x in layers[0].counts.aminmax()[::-1])
    for layer in layers:
        layer.seen, layer.ragged = most, least < most


def cache_nbytes(cache: Cache) -> int:
    """Bytes of all layers' memories in `cache`."""
    return sum(layer.nbytes for layer in cache.layers if isinstance(layer, LayerMemory))
