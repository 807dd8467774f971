"""What mixes tokens in a converted layer: window, sinks and recurrence.

    y_t   softmax over the last W tokens and the first M (sinks), with the family's positions
    o_t   what the recurrence answers, without positions; its gate comes from the pretrained keys
    out   mix(y_t, o_t)

With `landmarks` some of the tokens that leave the window are kept and read exactly; `landmarks.py` says how.
With `covers: evicted` the state receives a token when it leaves the window: query t reads the recurrence as it stood
after token t - W, so window, sinks and state share the past without counting anything twice.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from linearize_kernels import window_attention
from linearize_kernels.liger import TINY, mix_outputs
from torch import Tensor, nn

from linearize.model.fused import fused_attention, fused_step, fuses
from linearize.model.landmarks import landmark_parts, room
from linearize.model.memory import Flow, store
from linearize.model.recurrences import build_recurrence, register
from linearize.model.step import step, steps

if TYPE_CHECKING:
    from linearize.families.base import AttentionLayer, Projections
    from linearize.model.configuration import MixerConfig
    from linearize.model.memory import LayerMemory, Part


@dataclass
class Evicted:
    """The tokens that leave the window, one for each query from query `first` on.

    Attributes:
        k, k_rotated, v: `[R, E, K, D or V]` keys without and with positions, and values.
        source: `[R, E, K, D]` what their gates are built from.
        index: `[R or 1, E]` each token's number in its row; below 0 there is no such token.
        writes: `[R or 1, E]` False where there is nothing to evict; None where each of them is to be written.
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
    """What the window reads, and what passes through it.

    Attributes:
        k_rotated, v: `[R, P + L, K, D or V]`, the P tokens before the first query, then those of the queries.
        exists: `[R, P + L]`, which of them are real; None means all.
        evicted: the tokens that leave; None where none can.
        whole: with a memory and several queries, W tokens of it and the new ones, by name; otherwise None.
    """

    k_rotated: Tensor
    v: Tensor
    exists: Tensor | None
    evicted: Evicted | None
    whole: Part | None = None


class Mixer(nn.Module):
    """Window, sinks and recurrence on rows of real tokens; holds the layer's few own parameters.

    Args:
        config: the layer's mixer section, fitted to the layer.
        layer: the heads that it mixes.
        depth: where it stands in the model, 0 for the first layer and 1 for the last.

    Attributes:
        kind: what tells it from mixers that compute something else with the same weights.
        branches_off: which of `recurrence` and `window` (with its sinks) is silent, to see what the other does alone.
            Not part of the configuration: a checkpoint has both.

    Raises:
        ValueError: options that do not go together.
    """

    mix_weight: nn.Parameter
    branches_off: frozenset[str] = frozenset()

    def __init__(self, config: MixerConfig, layer: AttentionLayer, depth: float = 0.0) -> None:
        super().__init__()
        if config.window is None:
            raise ValueError("a mixer needs a window; a layer without one keeps its softmax attention")
        self.config, self.layer, self.window = config, layer, config.window
        self.kind = repr((replace(config, layers=[], softmax_heads=[]), layer))
        self.recurrence = build_recurrence(config, layer, depth)
        if config.landmarks and self.recurrence is not None and config.covers == "all":
            raise ValueError("landmarks need covers: evicted, for a state of all tokens holds them already")
        if self.recurrence is not None and config.mix == "softmax" and not self.recurrence.has_mass:
            raise ValueError(f"mix: softmax needs a recurrence with a normaliser, which {config.recurrence} has not")
        if (weight := self._mix_start()) is not None:
            register(self, {"mix_weight": weight})

    def _mix_start(self) -> Tensor | None:
        """A mix weight of 0 is the window alone, with a gradient that is not 0."""
        heads, width = self.layer.query_heads, self.layer.value_width
        shape = {"learned": (heads, width), "softmax": (heads,)}.get(self.config.mix)
        return None if self.recurrence is None or shape is None else torch.zeros(shape, device="cpu")

    def initial_values(self) -> dict[str, Tensor]:
        """What each own parameter starts as."""
        weight = self._mix_start()
        values = {} if weight is None else {"mix_weight": weight}
        if self.recurrence is not None:
            values |= {f"recurrence.{name}": value for name, value in self.recurrence.initial_values().items()}
        return values

    @staticmethod
    def check(config: MixerConfig, layer: AttentionLayer) -> None:
        """Raises:
        ValueError: options that do not go together, told without making a tensor.
        """
        if config.window is not None:
            with torch.device("meta"):
                Mixer(config, layer)

    @property
    def flops(self) -> int:
        """Floating-point operations of a decoding step once window and sinks are full; see `Recurrence.flops`."""
        window = room(self.window) if self.config.landmarks else self.window
        exact = self.layer.flops_per_key * (window + self.config.sinks + self.config.landmarks)
        if self.recurrence is None:
            return exact
        heads = self.layer.key_value_heads
        return exact + heads * self.recurrence.flops(self.layer.query_heads // heads)

    def parts(self, batch: int, dtype: torch.dtype, device: torch.device) -> dict[str, Part]:
        """An empty memory for `batch` rows: tensors whose size depends on the configuration alone."""

        def slots(count: int, *names: str) -> Part:
            return {name: empty_slots(self.layer, name, (batch, count), dtype, device) for name in names}

        # What only the state needs of a token is kept where it will ask for it once the window lets go.
        waits = self.recurrence is not None and self.config.covers == "evicted"
        more = ("k", "source") if waits and self.config.gate_source == "q" else ("k",) if waits else ()
        if self.config.landmarks:
            parts = landmark_parts(self, slots, batch, device)
        else:
            parts = {"window": slots(self.window, "k_rotated", *more, "v")}
            if self.config.sinks:
                parts["sinks"] = slots(self.config.sinks, "k_rotated", "v")
        if self.recurrence is not None:
            parts["state"] = self.recurrence.state(batch, device)
        return parts

    def forward(self, new: Projections, lengths: Tensor | None, memory: LayerMemory | None) -> Tensor:
        """Mixes L new tokens of R rows, continuing `memory` where one is given (its parts are updated in place).

        Args:
            new: projections `[R, L, ...]`, each row's real tokens first.
            lengths: `[R]` real tokens per row; None means L in all.

        Returns:
            `[R, L, H, V]` float32; meaningless past a row's length.
        """
        return self.run(new, lengths, memory, fused=fuses(self, new, memory))

    def run(self, new: Projections, lengths: Tensor | None, memory: LayerMemory | None, *, fused: bool) -> Tensor:
        """`forward` on the fused kernels, or in plain torch."""
        if self.config.landmarks:
            # Its `torch.compiler.disable` imports torch._dynamo, two seconds that a configuration need not wait for.
            from linearize.model.landmark_attention import landmark_attention

            attended: Tensor = landmark_attention(self, new, lengths, memory)
            return attended
        if memory is not None and fused and new.q.shape[1] == 1:
            return fused_step(self, new, lengths, memory)
        if memory is not None and not fused and steps(self, new, lengths, memory):
            return step(self, new, memory)
        tokens = new.q.shape[1]
        count = memory.counts[:, None] if memory else new.q.new_zeros(1, 1, dtype=torch.long)
        query_index = count + torch.arange(tokens, device=new.q.device)  # [R or 1, L]
        span = self._slide(new, lengths, memory, query_index)
        columns, evicted = self._sinks(span.evicted, memory, query_index)
        if fused:
            return fused_attention(self, new, lengths, memory, span.whole, columns)
        y, normaliser = window_attention(
            new.q_rotated,
            span.k_rotated,
            span.v,
            window=self.window,
            scale=self.layer.scale,
            key_exists=span.exists,
            columns=columns,
            softcap=self.layer.softcap,
            normaliser=self.config.mix == "softmax",
        )
        if "window" in self.branches_off and (self.recurrence is None or "recurrence" in self.branches_off):
            return torch.zeros_like(y)
        if self.recurrence is None or "recurrence" in self.branches_off:
            return y
        return self._recur(y, normaliser, new, lengths, evicted, memory)

    def _slide(self, new: Projections, lengths: Tensor | None, memory: LayerMemory | None, query_index: Tensor) -> Span:
        """Moves the window over the new tokens."""
        window, tokens = self.window, new.q.shape[1]
        index = query_index - window  # of the token that query t pushes out
        count = None if memory is None or lengths is not None else memory.uniform
        writes: Tensor | None
        if memory is None or count == 0:
            if memory is not None:
                self._fill(new, memory.parts["window"])
            left = tokens - window
            if left <= 0:
                return Span(new.k_rotated, new.v, None, None)
            index = index[:, window:]
            writes = None if lengths is None else index < lengths[:, None] - window
            k, k_rotated, v, source = (x[:, :left] for x in (new.k, new.k_rotated, new.v, self.source(new)))
            evicted = Evicted(k, k_rotated, v, source, index, writes, window)
            return Span(new.k_rotated, new.v, None, evicted)

        ring = memory.parts["window"]
        arriving = {"k_rotated": new.k_rotated, "k": new.k, "v": new.v, "source": self.source(new)}
        real = query_index < memory.counts[:, None] + (tokens if lengths is None else lengths[:, None])
        writes = None if count is not None and count >= window else (index >= 0) & real
        whole: Part | None = None
        if tokens == 1:
            # The order of keys does not matter to softmax, so one slot is exchanged and nothing else moves.
            slot = (query_index % window)[:, :, None, None]
            held: Part = {}
            for name, tensor in ring.items():
                at = slot.expand(-1, 1, *tensor.shape[2:])
                held[name] = tensor.gather(1, at)
                incoming = arriving[name].detach().to(tensor.dtype)
                tensor.scatter_(1, at, torch.where(real[:, :, None, None], incoming, held[name]))
            exists = torch.arange(window, device=slot.device) <= query_index
            # A later step writes into the ring, where a backward pass would still want to read.
            seen = {name: tensor.clone() for name, tensor in ring.items()} if torch.is_grad_enabled() else ring
        else:
            past = torch.arange(window, device=index.device)
            order = (memory.counts[:, None] + past) % window  # oldest first
            exists = past >= window - memory.counts[:, None]
            whole = {n: torch.cat([_take(t, order), arriving[n].to(t.dtype)], 1) for n, t in ring.items()}
            held = {name: tensor[:, :tokens] for name, tensor in whole.items()}
            seen = {name: whole[name][:, 1:] for name in ("k_rotated", "v")}
            first_kept = tokens if lengths is None else lengths[:, None]
            kept = (first_kept + past).expand(order.shape)
            slots = (memory.counts[:, None] + kept) % window
            for name, tensor in ring.items():
                at = slots[:, :, None, None].expand_as(tensor)
                taken = _take(whole[name], kept)
                if isinstance(ring, Flow):
                    ring[name] = tensor.scatter(1, at, taken)
                else:
                    tensor.scatter_(1, at, taken.detach())
            exists = F.pad(exists[:, 1:], (0, tokens), value=True)
        k = held.get("k", held["k_rotated"])
        source = held.get("source", held["v"] if self.config.gate_source == "v" else k)
        evicted = Evicted(k, held["k_rotated"], held["v"], source, index, writes, 0)
        return Span(seen["k_rotated"], seen["v"], exists, evicted, whole)

    def source(self, new: Projections) -> Tensor:
        """What the gates of new tokens are built from, `[R, L, K, D or V]`."""
        kind = self.config.gate_source
        if kind == "q":
            grouped: Tensor = new.q.unflatten(2, (self.layer.key_value_heads, -1))
            return grouped.mean(3)
        return new.v if kind == "v" else new.k

    def _sinks(
        self, evicted: Evicted | None, memory: LayerMemory | None, query_index: Tensor
    ) -> tuple[tuple[Tensor, Tensor, Tensor] | None, Evicted | None]:
        """Keeps the first tokens of each row as they leave the window: the columns `window_attention` wants, and what
        goes into the state."""
        sinks = self.config.sinks
        if not sinks or evicted is None:
            return None, evicted
        number = torch.arange(sinks, device=query_index.device)
        visible = number <= (query_index - self.window)[:, :, None]
        count = memory.uniform if memory is not None and evicted.writes is None else 0
        if memory is not None and count is not None and count >= self.window + sinks:
            return (memory.parts["sinks"]["k_rotated"], memory.parts["sinks"]["v"], visible), evicted
        rows = evicted.v.shape[0]
        place = (number - evicted.index[:, :1]).expand(rows, -1)  # where in `evicted` sink j is, if it leaves now
        inside = place.clamp(0, evicted.index.shape[1] - 1)
        arrives = place == inside
        if evicted.writes is not None:
            arrives = arrives & evicted.writes.expand(rows, -1).gather(1, inside)
        k, v = _take(evicted.k_rotated, inside), _take(evicted.v, inside)
        if memory is not None:
            part = memory.parts["sinks"]
            here = arrives[:, :, None, None]
            k, v = torch.where(here, k, part["k_rotated"]), torch.where(here, v, part["v"])
            store(part, "k_rotated", k)
            store(part, "v", v)
        if evicted.writes is None:
            # The rows are of one length, so the sinks are the same few columns in each.
            return (k, v, visible), evicted.without(max(sinks - max((count or 0) - self.window, 0), 0))
        evicted.writes = evicted.writes & (evicted.index >= sinks)
        return (k, v, visible), evicted

    def _fill(self, new: Projections, ring: Part) -> None:
        """The first tokens of all into an empty window, the latest of them where there are more than it holds."""
        tokens = new.q.shape[1]
        for name, tensor in ring.items():
            arriving = self.source(new) if name == "source" else getattr(new, name)
            latest = arriving[:, -self.window :]
            if tokens < self.window:
                store(ring, name, torch.cat([latest.to(tensor.dtype), tensor[:, tokens:]], 1))
            else:
                store(ring, name, latest.roll(tokens % self.window, 1))  # token i stands in slot i mod W

    def _recur(
        self,
        y: Tensor,
        normaliser: Tensor | None,
        new: Projections,
        lengths: Tensor | None,
        evicted: Evicted | None,
        memory: LayerMemory | None,
    ) -> Tensor:
        """Joins the window's output `y` `[R, L, H, V]` with the recurrence's."""
        assert self.recurrence is not None  # noqa: S101 - for the type checker; the caller has looked
        state = memory.parts["state"] if memory else None
        tokens, first = y.shape[1], 0
        if "window" in self.branches_off:
            y = torch.zeros_like(y)  # all that is left where the state is empty
        writes: Tensor | None
        if self.config.covers == "evicted":
            if evicted is None or evicted.v.shape[1] == 0:
                return y
            first = evicted.first
            k, v, source, writes = evicted.k, evicted.v, evicted.source, evicted.writes
            k = evicted.k_rotated if self.config.rope else k
            # Nothing has been written yet for these queries.
            empty = None if writes is None else evicted.index < self.config.sinks
        else:
            k, v, source = new.k_rotated if self.config.rope else new.k, new.v, self.source(new)
            empty = None
            writes = None if lengths is None else torch.arange(tokens, device=y.device) < lengths[:, None]
        q = new.q_rotated if self.config.rope else new.q
        read, mass = self.recurrence.in_segments(q[:, first:], k, v, source, writes, state)
        logs = None if normaliser is None else normaliser[:, first:]
        mixed = self.mix(y[:, first:], logs, read, None if mass is None else mass[..., None])
        if empty is not None:
            # An empty state has no opinion: the window's output stays as it is.
            mixed = torch.where(empty[:, :, None, None], y[:, first:], mixed)
        return torch.cat([y[:, :first], mixed], 1) if first else mixed

    def mix(self, y: Tensor, normaliser: Tensor | None, read: Tensor, mass: Tensor | None) -> Tensor:
        """Joins window and recurrence; `normaliser` `[R, L, H]` is the window's, where `mix: softmax` wants it."""
        if "window" in self.branches_off:
            if mass is None or not (self.config.normalize or self.config.mix == "softmax"):
                return read
            return torch.where(mass > 0, read / mass.clamp_min(TINY), 0)
        return mix_outputs(
            y,
            normaliser,
            read,
            mass,
            mix=self.config.mix,
            normalize=self.config.normalize,
            weight=self._parameters.get("mix_weight"),
        )


def empty_slots(
    layer: AttentionLayer, name: str, shape: tuple[int, int], dtype: torch.dtype, device: torch.device
) -> Tensor:
    """Room `[B, N, K, D or V]` for N keys or, with the name `v`, values."""
    width = layer.value_width if name == "v" else layer.key_width
    return torch.zeros(*shape, layer.key_value_heads, width, dtype=dtype, device=device)


def _take(x: Tensor, index: Tensor) -> Tensor:
    """Rows `index` `[R, N]` along the token axis of `x` `[R, T, heads, width]`."""
    return x.gather(1, index[:, :, None, None].expand(-1, -1, *x.shape[2:]))
