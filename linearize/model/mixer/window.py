"""Window and sinks of rows that continue a memory.

The window is a ring buffer: token i of a row is in slot i mod W. `slide` writes the new tokens into it and returns the
keys for their queries and the tokens that leave.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from linearize_kernels.decay import computing_dtype
from torch import Tensor

from linearize.model.memory import store
from linearize.model.precision import decoded, encoded

if TYPE_CHECKING:
    from linearize.families.base import Projections
    from linearize.model.memory import LayerMemory, Part
    from linearize.model.mixer.base import ExactColumns, MixerBase


@dataclass
class Evicted:
    """The tokens that leave the window, one for each query from query `first` on.

    Attributes:
        k, k_rotated, v: `[R, E, K, D or V]` keys without and with positions, and values.
        source: `[R, E, K, D]` the input of their gates.
        index: `[R or 1, E]` each token's number in its row; a number below 0 means no token.
        writes: `[R or 1, E]` True for the tokens that the state receives; None means all.
    """

    k: Tensor
    k_rotated: Tensor
    v: Tensor
    source: Tensor
    index: Tensor
    writes: Tensor | None
    first: int

    def without(self, tokens: int) -> Evicted:
        """All but the first `tokens`."""
        k, k_rotated, v, source = (x[:, tokens:] for x in (self.k, self.k_rotated, self.v, self.source))
        return Evicted(k, k_rotated, v, source, self.index[:, tokens:], self.writes, self.first + tokens)


@dataclass
class Span:
    """The keys for new queries, and the tokens that leave the window.

    Attributes:
        k_rotated, v: `[R, P + L, K, D or V]`, the P tokens before the first query, then those of the queries.
        exists: `[R, P + L]`, True for real tokens.
        columns: the sinks; None without sinks.
        evicted: the tokens that leave and are not sinks.
        whole: for several queries, the W tokens of the memory and the new ones, by name; otherwise None.
    """

    k_rotated: Tensor
    v: Tensor
    exists: Tensor
    columns: ExactColumns | None
    evicted: Evicted
    whole: Part | None


def starts(memory: LayerMemory, lengths: Tensor | None) -> bool:
    """True if the memory is empty and all new tokens are real, so that the rows start together and have one length."""
    return lengths is None and memory.uniform == 0


def fill(mixer: MixerBase, new: Projections, memory: LayerMemory) -> None:
    """Write the first tokens of the rows into an empty memory: the last W into the window, and the sinks that have left
    it into their slots."""
    ring, window, tokens = memory.parts["window"], mixer.window, new.q.shape[1]
    latest = {name: x[:, -window:] for name, x in arriving_in(mixer, new).items() if name in ring}
    for name, x in encoded(latest, ring).items():
        if tokens < window:
            store(ring, name, torch.cat([x.to(ring[name].dtype), ring[name][:, tokens:]], 1))
        else:
            store(ring, name, x.roll(tokens % window, 1))  # token i is in slot i mod W
    if (count := min(mixer.config.sinks, tokens - window)) > 0:
        sinks = memory.parts["sinks"]
        for name, x in encoded({"k_rotated": new.k_rotated[:, :count], "v": new.v[:, :count]}, sinks).items():
            sinks[name][:, :count].copy_(x.detach())


def arriving_in(mixer: MixerBase, new: Projections) -> Part:
    """The new tokens' tensors by the names of the window."""
    return {"k_rotated": new.k_rotated, "k": new.k, "v": new.v, "source": mixer.source(new)}


def slide(mixer: MixerBase, new: Projections, lengths: Tensor | None, memory: LayerMemory) -> Span:
    """Move the window over the new tokens `[R, L, ...]` and store the sinks that leave it."""
    window, tokens = mixer.window, new.q.shape[1]
    query_index = memory.counts[:, None] + torch.arange(tokens, device=new.q.device)  # [R, L]
    index = query_index - window  # of the token that query t pushes out
    count = None if lengths is not None else memory.uniform
    ring, dtype = memory.parts["window"], computing_dtype(new.q)
    arriving = {name: x for name, x in arriving_in(mixer, new).items() if name in ring}
    real = query_index < memory.counts[:, None] + (tokens if lengths is None else lengths[:, None])
    writes = None if count is not None and count >= window else (index >= 0) & real
    whole: Part | None = None
    if tokens == 1:
        # Softmax does not depend on the order of the keys, so overwriting one slot is enough.
        slot = (query_index % window)[:, :, None, None]
        left: Part = {}
        for name, x in encoded(arriving, ring).items():
            at = slot.expand(-1, 1, *x.shape[2:])
            left[name] = ring[name].gather(1, at)
            incoming = x.detach().to(ring[name].dtype)
            ring[name].scatter_(1, at, torch.where(real[:, :, None, None], incoming, left[name]))
        exists = torch.arange(window, device=slot.device) <= query_index
        # Clone for autograd: the next step overwrites the ring before a backward pass reads these tensors.
        seen = {name: tensor.clone() for name, tensor in ring.items()} if torch.is_grad_enabled() else ring
        held, seen = decoded(left, dtype), decoded(seen, dtype)
    else:
        past = torch.arange(window, device=index.device)
        order = (memory.counts[:, None] + past) % window  # oldest first
        exists = past >= window - memory.counts[:, None]
        kept_values = decoded(ring, dtype)
        whole = {n: torch.cat([take_tokens(x, order), arriving[n].to(x.dtype)], 1) for n, x in kept_values.items()}
        held = {name: tensor[:, :tokens] for name, tensor in whole.items()}
        seen = {name: whole[name][:, 1:] for name in ("k_rotated", "v")}
        first_kept = tokens if lengths is None else lengths[:, None]
        kept = (first_kept + past).expand(order.shape)
        slots = (memory.counts[:, None] + kept) % window
        latest = encoded({name: take_tokens(x, kept).detach() for name, x in whole.items()}, ring)
        for name, tensor in ring.items():
            tensor.scatter_(1, slots[:, :, None, None].expand_as(tensor), latest[name])
        exists = F.pad(exists[:, 1:], (0, tokens), value=True)
    k = held.get("k", held["k_rotated"])
    source = held.get("source", held["v"] if mixer.config.gate_source == "v" else k)
    evicted = Evicted(k, held["k_rotated"], held["v"], source, index, writes, 0)
    columns: ExactColumns | None = None
    if mixer.config.sinks:
        columns, evicted = _split_sinks(mixer, evicted, memory, query_index)
    return Span(seen["k_rotated"], seen["v"], exists, columns, evicted, whole)


def _split_sinks(
    mixer: MixerBase, evicted: Evicted, memory: LayerMemory, query_index: Tensor
) -> tuple[ExactColumns, Evicted]:
    """Store the first M tokens of each row as they leave the window. Returns the sinks, and the other tokens."""
    sinks, part = mixer.config.sinks, memory.parts["sinks"]
    read = decoded(part, computing_dtype(evicted.v))
    number = torch.arange(sinks, device=query_index.device)
    visible = number <= (query_index - mixer.window)[:, :, None]
    count = memory.uniform if evicted.writes is None else 0
    if count is not None and count >= mixer.window + sinks:
        return (read["k_rotated"], read["v"], visible), evicted
    rows = evicted.v.shape[0]
    place = (number - evicted.index[:, :1]).expand(rows, -1)  # the index of sink j in `evicted`, if it leaves now
    inside = place.clamp(0, evicted.index.shape[1] - 1)
    arrives = place == inside
    if evicted.writes is not None:
        arrives = arrives & evicted.writes.expand(rows, -1).gather(1, inside)
    here = arrives[:, :, None, None]
    k, v = take_tokens(evicted.k_rotated, inside), take_tokens(evicted.v, inside)
    k, v = torch.where(here, k, read["k_rotated"]), torch.where(here, v, read["v"])
    for name, x in encoded({"k_rotated": k, "v": v}, part).items():
        store(part, name, x)
    if evicted.writes is None:
        # All rows have the same length, so the sinks are the same columns in each row.
        return (k, v, visible), evicted.without(max(sinks - max((count or 0) - mixer.window, 0), 0))
    evicted.writes = evicted.writes & (evicted.index >= sinks)
    return (k, v, visible), evicted


def take_tokens(x: Tensor, index: Tensor) -> Tensor:
    """Tokens `index` `[R, N]` of each row of `x` `[R, T, heads, width]`."""
    return x.gather(1, index[:, :, None, None].expand(-1, -1, *x.shape[2:]))
