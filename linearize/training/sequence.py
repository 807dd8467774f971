"""One text over several processes: each runs a part of its tokens and hands what it remembers to the next.

A converted layer needs of all earlier tokens its memory alone, which is small and of a size that does not depend on
their number. So a process receives each layer's memory from the one before it, runs its own tokens, and sends the
memory on; the gradient comes back the same way. Layer by layer: the next process starts as soon as the first layer is
done, and all of them compute while the text is longer than a few parts.

    forward    rank r: layer l   waits for   rank r - 1: layer l,   rank r: layer l - 1
    backward   rank r: layer l   waits for   rank r + 1: layer l,   rank r: layer l + 1

Layers and heads that keep softmax over the whole past hand that on as well, and it grows.
"""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor
from transformers.cache_utils import DynamicCache

from linearize.model.memory import Flow, LayerMemory

if TYPE_CHECKING:
    from collections.abc import Iterator

    from torch import nn

    from linearize.model.attention import LinearizedAttention

IGNORE = -100


def part_of(input_ids: Tensor, labels: Tensor, group: dist.ProcessGroup | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """This process's part of rows of one document each.

    Args:
        input_ids, labels: `[B, T]`, whole and the same in each process.

    Returns:
        its `input_ids` and `position_ids` `[B, T / n]`, and as labels for each token the one that follows it (shifted
        before the cut, for the last token of a part is asked for the first of the next).

    Raises:
        ValueError: a part would be shorter than two tokens.
    """
    rank, count = dist.get_rank(group), dist.get_world_size(group)
    if input_ids.shape[1] < 2 * count:
        raise ValueError(f"{input_ids.shape[1]} tokens cannot be split over {count} processes")
    following = torch.cat([labels[:, 1:], torch.full_like(labels[:, :1], IGNORE)], 1)
    positions = torch.arange(input_ids.shape[1], device=input_ids.device).expand(input_ids.shape)
    ids, places, asked = (x.tensor_split(count, 1)[rank] for x in (input_ids, positions, following))
    return ids, places, asked


@contextlib.contextmanager
def split_sequence(
    model: nn.Module, position_ids: Tensor, group: dist.ProcessGroup | None = None
) -> Iterator[DynamicCache]:
    """While the block runs, each layer of `model` takes over its memory from the process before and hands it on.

    Forward and backward belong into the block, in all processes of `group`; outputs, losses and gradients are then
    those of the tokens that each process ran, and their sum over the processes is the whole's.

    Args:
        model: a converted model, or what wraps one.
        position_ids: `[B, L]` of this process's tokens, see `part_of`.

    Yields:
        what to pass as `past_key_values`; after the forward pass it holds the memory behind this part.

    Raises:
        ValueError: layers are computed again in the backward pass, which would send everything twice.
    """
    inner: Any = next(m for m in model.modules() if hasattr(m, "attention_layers"))
    if any(getattr(module, "gradient_checkpointing", False) for module in inner.modules()) and inner.training:
        raise ValueError("a split sequence does not go with gradient checkpointing; leave that out")
    batch, start = position_ids.shape[0], int(position_ids[0, 0])
    dtype, device = inner.dtype, position_ids.device
    cache = DynamicCache()
    cache.layers = [_memory(layer, batch, start, dtype, device) for layer in inner.attention_layers]
    hooks: list[Any] = []
    for attention in inner.attention_layers:
        relay = _Relay(cache.layers[attention.layer_idx], group)
        hooks.append(attention.register_forward_pre_hook(relay.take, with_kwargs=True))
        hooks.append(attention.register_forward_hook(relay.hand_on))
    try:
        yield cache
    finally:
        for hook in hooks:
            hook.remove()


def sum_gradients(model: nn.Module, group: dist.ProcessGroup | None = None) -> None:
    """Adds up over the processes what each found on its part."""
    for parameter in model.parameters():
        if parameter.requires_grad:
            if parameter.grad is None:  # of a mixer whose window is longer than the first part, say
                parameter.grad = torch.zeros_like(parameter)
            dist.all_reduce(parameter.grad, group=group)


def _memory(
    layer: LinearizedAttention, batch: int, start: int, dtype: torch.dtype, device: torch.device
) -> LayerMemory:
    made = layer.memory(batch, dtype, device)
    parts: dict[str, Any] = {name: Flow(part) for name, part in made.parts.items()}
    past = Flow({name: x.new_zeros(batch, start, *x.shape[2:]) for name, x in made.past.items()})
    memory = LayerMemory(parts, batch, device, past=past)
    memory.counts.fill_(start)
    memory.seen = start
    return memory


class _Relay:
    """What one layer does before and after it runs."""

    def __init__(self, memory: LayerMemory, group: dist.ProcessGroup | None) -> None:
        rank, count = dist.get_rank(group), dist.get_world_size(group)
        self.memory, self.group = memory, group
        self.before = _global(group, rank - 1) if rank else None
        self.behind = _global(group, rank + 1) if rank + 1 < count else None

    def flows(self) -> list[Any]:
        return [*self.memory.parts.values(), *([self.memory.past] if self.memory.past else [])]

    def take(self, _: nn.Module, arguments: tuple[Any, ...], named: dict[str, Any]) -> None:
        if self.before is None:
            return
        hidden = named["hidden_states"] if "hidden_states" in named else arguments[0]
        held = [tensor for flow in self.flows() for tensor in flow.values()]
        wide = torch.float64 if hidden.dtype == torch.float64 else torch.float32
        flat = held[0].new_empty(sum(x.numel() for x in held), dtype=wide)
        taken: Tensor = _Take.apply(hidden, flat, self.before, self.group)  # type: ignore[no-untyped-call]
        pieces = iter(taken.split([x.numel() for x in held]))
        for flow in self.flows():
            for name, tensor in flow.items():
                flow[name] = next(pieces).view(tensor.shape).to(tensor.dtype)

    def hand_on(self, _: nn.Module, __: Any, outputs: tuple[Tensor, None]) -> tuple[Tensor, None]:
        if self.behind is None:
            return outputs
        heads = outputs[0]
        wide = torch.float64 if heads.dtype == torch.float64 else torch.float32
        flat = torch.cat([x.to(wide).flatten() for flow in self.flows() for x in flow.values()])
        passed: Tensor = _HandOn.apply(heads, flat, self.behind, self.group)  # type: ignore[no-untyped-call]
        return passed, None


def _global(group: dist.ProcessGroup | None, rank: int) -> int:
    return rank if group is None else dist.get_global_rank(group, rank)


class _Take(torch.autograd.Function):
    """The memory of the process before; `anchor` is what makes autograd call back."""

    @staticmethod
    def forward(ctx: Any, anchor: Tensor, flat: Tensor, rank: int, group: Any) -> Tensor:
        ctx.rank, ctx.group = rank, group
        dist.recv(flat, rank, group)
        ctx.mark_dirty(flat)
        return flat

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[None, ...]:
        dist.send(gradient.contiguous(), ctx.rank, ctx.group)
        return None, None, None, None


class _HandOn(torch.autograd.Function):
    """Sends the memory to the process behind; `heads` pass through, so that this runs before their gradient is used."""

    @staticmethod
    def forward(ctx: Any, heads: Tensor, flat: Tensor, rank: int, group: Any) -> Tensor:
        ctx.rank, ctx.group, ctx.like = rank, group, flat.new_empty(0)
        ctx.size = flat.shape
        dist.send(flat.detach().contiguous(), rank, group)
        return heads.view_as(heads)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor, None, None]:
        flat = ctx.like.new_empty(ctx.size)
        dist.recv(flat, ctx.rank, ctx.group)
        return gradient, flat, None, None
