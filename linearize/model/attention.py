"""The one attention layer of a converted model.

    y_t   softmax over the last W tokens and the first M (sinks), with the family's positions
    o_t   what the recurrence answers, without positions; its gate comes from the pretrained keys
    out   W_o mix(y_t, o_t)

With `covers: evicted` the state receives a token when it leaves the window: query t reads the recurrence as it stood
after token t - W, so window, sinks and state share the past without counting anything twice.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from linearize_kernels import window_attention
from torch import Tensor, nn

from linearize.families.base import Family, Projections
from linearize.model.layout import Layout
from linearize.model.memory import LayerMemory, Part, memory_of
from linearize.model.recurrence import build_recurrence

if TYPE_CHECKING:
    from transformers.cache_utils import Cache

    from linearize.model.configuration import MixerConfig


@dataclass
class Evicted:
    """The tokens that leave the window, one for each query from query `first` on.

    Attributes:
        k, k_rotated, v: `[R, E, K, D or V]` keys without and with positions, and values.
        index: `[R or 1, E]` each token's number in its row; below 0 there is no such token.
        writes: `[R or 1, E]` False where there is nothing to evict.
    """

    k: Tensor
    k_rotated: Tensor
    v: Tensor
    index: Tensor
    writes: Tensor
    first: int


class Mixer(nn.Module):
    """Window, sinks and recurrence on rows of real tokens; holds the layer's few own parameters.

    Args:
        config: the layer's mixer section.
        heads: (H, K, D, V) of the layer.
        scale: multiplies q·k in the window.
    """

    def __init__(self, config: MixerConfig, heads: tuple[int, int, int, int], scale: float) -> None:
        super().__init__()
        self.config, self.heads, self.scale = config, heads, scale
        self.recurrence = build_recurrence(config, heads)
        query_heads, _, _, value_width = heads
        if self.recurrence is not None and config.mix == "learned":
            self.mix_weight = nn.Parameter(torch.zeros(query_heads, value_width))
        elif self.recurrence is not None and config.mix == "softmax":
            self.mix_weight = nn.Parameter(torch.zeros(query_heads))

    def initial_values(self) -> dict[str, float]:
        """What each own parameter starts as; a mix weight of 0 is the window alone, with a gradient that is not 0."""
        values = {"mix_weight": 0.0} if hasattr(self, "mix_weight") else {}
        if self.recurrence is not None:
            values |= {f"recurrence.{name}": value for name, value in self.recurrence.initial_values().items()}
        return values

    def memory(self, batch: int, dtype: torch.dtype, device: torch.device) -> LayerMemory:
        """An empty memory for `batch` rows."""
        _, key_value_heads, key_width, value_width = self.heads

        def slots(count: int, *names: str) -> Part:
            widths = {"v": value_width}
            return {
                name: torch.zeros(
                    batch, count, key_value_heads, widths.get(name, key_width), dtype=dtype, device=device
                )
                for name in names
            }

        # Keys without positions are kept only where the state will ask for them once the window lets go.
        keys = ("k_rotated", "k") if self.recurrence is not None and self.config.covers == "evicted" else ("k_rotated",)
        parts = {"window": slots(self.config.window, *keys, "v")}
        if self.config.sinks:
            parts["sinks"] = slots(self.config.sinks, "k_rotated", "v")
        if self.recurrence is not None:
            parts["state"] = self.recurrence.state(batch, device)
        return LayerMemory(parts, batch, device)

    def forward(self, new: Projections, lengths: Tensor | None, memory: LayerMemory | None) -> Tensor:
        """Mixes L new tokens of R rows, continuing `memory` where one is given (it is updated in place).

        Args:
            new: projections `[R, L, ...]`, each row's real tokens first.
            lengths: `[R]` real tokens per row; None means L in all.

        Returns:
            `[R, L, H, V]` float32; meaningless past a row's length.
        """
        tokens = new.q.shape[1]
        count = memory.counts[:, None] if memory else new.q.new_zeros(1, 1, dtype=torch.long)
        query_index = count + torch.arange(tokens, device=new.q.device)  # [R or 1, L]
        k, v, exists, evicted = self._slide(new, lengths, memory, query_index)
        columns = self._sinks(evicted, memory, query_index)
        y, normaliser = window_attention(
            new.q_rotated, k, v, window=self.config.window, scale=self.scale, key_exists=exists, columns=columns
        )
        if self.recurrence is not None:
            y = self._recur(y, normaliser, new, lengths, evicted, memory)
        if memory is not None:
            memory.advance(tokens, lengths)
        return y

    def _slide(
        self, new: Projections, lengths: Tensor | None, memory: LayerMemory | None, query_index: Tensor
    ) -> tuple[Tensor, Tensor, Tensor | None, Evicted | None]:
        """Moves the window over the new tokens: keys, values and existence of what it holds, and what it lets go."""
        window, tokens = self.config.window, new.q.shape[1]
        index = query_index - window  # of the token that query t pushes out
        if memory is None:
            left = tokens - window
            if left <= 0:
                return new.k_rotated, new.v, None, None
            index = index[:, window:]
            writes = index >= 0 if lengths is None else index < lengths[:, None] - window
            evicted = Evicted(new.k[:, :left], new.k_rotated[:, :left], new.v[:, :left], index, writes, window)
            return new.k_rotated, new.v, None, evicted

        ring = memory.parts["window"]
        arriving = {"k_rotated": new.k_rotated, "k": new.k, "v": new.v}
        writes = index >= 0
        real = query_index < memory.counts[:, None] + (tokens if lengths is None else lengths[:, None])
        writes = writes & real
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
            span = {name: tensor.clone() for name, tensor in ring.items()} if torch.is_grad_enabled() else ring
        else:
            past = torch.arange(window, device=index.device)
            order = (memory.counts[:, None] + past) % window  # oldest first
            exists = past >= window - memory.counts[:, None]
            whole = {n: torch.cat([_take(t, order), arriving[n].to(t.dtype)], 1) for n, t in ring.items()}
            held = {name: tensor[:, :tokens] for name, tensor in whole.items()}
            span = {name: whole[name][:, 1:] for name in ("k_rotated", "v")}
            first_kept = tokens if lengths is None else lengths[:, None]
            kept = (first_kept + past).expand(order.shape)
            slots = (memory.counts[:, None] + kept) % window
            for name, tensor in ring.items():
                at = slots[:, :, None, None].expand_as(tensor)
                tensor.scatter_(1, at, _take(whole[name], kept).detach())
            exists = F.pad(exists[:, 1:], (0, tokens), value=True)
        evicted = Evicted(held.get("k", held["k_rotated"]), held["k_rotated"], held["v"], index, writes, 0)
        return span["k_rotated"], span["v"], exists, evicted

    def _sinks(
        self, evicted: Evicted | None, memory: LayerMemory | None, query_index: Tensor
    ) -> tuple[Tensor, Tensor, Tensor] | None:
        """Keeps the first tokens of each row as they leave the window; the columns `window_attention` wants."""
        sinks = self.config.sinks
        if not sinks or evicted is None:
            return None
        number = torch.arange(sinks, device=query_index.device)
        rows = evicted.v.shape[0]
        place = (number - evicted.index[:, :1]).expand(rows, -1)  # where in `evicted` sink j is, if it leaves now
        inside = place.clamp(0, evicted.index.shape[1] - 1)
        arrives = (place == inside) & evicted.writes.expand(rows, -1).gather(1, inside)
        k, v = _take(evicted.k_rotated, inside), _take(evicted.v, inside)
        if memory is not None:
            part = memory.parts["sinks"]
            here = arrives[:, :, None, None]
            k, v = torch.where(here, k, part["k_rotated"]), torch.where(here, v, part["v"])
            part["k_rotated"].copy_(k.detach())
            part["v"].copy_(v.detach())
        visible = number <= (query_index - self.config.window)[:, :, None]
        evicted.writes = evicted.writes & (evicted.index >= sinks)
        return k, v, visible

    def _recur(
        self,
        y: Tensor,
        normaliser: Tensor,
        new: Projections,
        lengths: Tensor | None,
        evicted: Evicted | None,
        memory: LayerMemory | None,
    ) -> Tensor:
        """Joins the window's output `y` `[R, L, H, V]` with the recurrence's."""
        assert self.recurrence is not None  # noqa: S101 - for the type checker; the caller has looked
        state = memory.parts["state"] if memory else None
        tokens, first = y.shape[1], 0
        writes: Tensor | None
        if self.config.covers == "evicted":
            if evicted is None:
                return y
            first = evicted.first
            k, v, writes = evicted.k, evicted.v, evicted.writes
        else:
            k, v = new.k, new.v
            writes = None if lengths is None else torch.arange(tokens, device=y.device) < lengths[:, None]
        numerator, mass = self.recurrence(new.q[:, first:], k, v, writes, state)
        mixed = self._mix(y[:, first:], normaliser[:, first:], numerator, mass[..., None])
        return torch.cat([y[:, :first], mixed], 1) if first else mixed

    def _mix(self, y: Tensor, normaliser: Tensor, numerator: Tensor, mass: Tensor) -> Tensor:
        if self.config.mix == "softmax":
            # One normaliser, exp(normaliser) + |w| mass, written so that neither term can overflow. A weight of
            # either sign keeps the denominator positive and the derivative at 0 alive.
            weight = self.mix_weight[:, None]
            log_ratio = mass.clamp_min(_TINY).log() - normaliser[..., None]
            ratio = log_ratio.clamp_max(_MOST_LOG_RATIO).exp()
            share = torch.where(mass > 0, weight * ratio / (1 + weight.abs() * ratio), 0)
            return y + share * (numerator / mass.clamp_min(_TINY) - y)
        o = numerator / mass.clamp_min(_TINY) if self.config.normalize else numerator
        weight = self.mix_weight.to(y.dtype).expand_as(y) if self.config.mix == "learned" else torch.full_like(y, 0.5)
        # An empty state has no opinion: the window's output stays as it is.
        return torch.where(mass > 0, torch.lerp(y, o, weight), y)


_TINY = torch.finfo(torch.float32).tiny
_MOST_LOG_RATIO = 60.0


class LinearizedAttention(nn.Module):
    """Takes the place of a pretrained attention module and keeps its weights under their names.

    Args:
        attention: the module it replaces; its submodules move over.
        family: how that architecture projects.
        config: the layer's mixer section.
        heads: (H, K, D, V).
        layer_idx: which layer of the model, and of its cache, this is.
    """

    def __init__(
        self, attention: Any, family: Family, config: MixerConfig, heads: tuple[int, int, int, int], layer_idx: int
    ) -> None:
        super().__init__()
        for name, module in attention.named_children():
            self.add_module(name, module)
        self.family, self.layer_idx = family, layer_idx
        self.head_dim = heads[2]
        self.mixer = Mixer(config, heads, family.scale(attention))

    def forward(
        self,
        hidden_states: Tensor,
        position_embeddings: tuple[Tensor, Tensor] | None = None,
        attention_mask: Tensor | None = None,
        past_key_values: Cache | None = None,
        **_: Any,
    ) -> tuple[Tensor, None]:
        """`hidden_states` `[B, T, width]`; `attention_mask` is what `LinearizedForCausalLM` makes: `[B, 1, 1, T]`
        document numbers with 0 at pads, or `[1, 1, 1, 0]` where there is nothing to say."""
        projected = self.family.project(self, hidden_states, position_embeddings)
        layout = layout_of(attention_mask)
        memory = None
        if past_key_values is not None:
            batch, device, dtype = hidden_states.shape[0], hidden_states.device, projected.k.dtype
            memory = memory_of(past_key_values, self.layer_idx, lambda: self.mixer.memory(batch, dtype, device))
        if layout is None:
            heads = self.mixer(projected, None, memory)
        else:
            rows = Projections(*(layout.gather(x) for x in projected))
            heads = layout.scatter(self.mixer(rows, layout.lengths, memory))
            if memory is not None:
                memory.seen += layout.tokens - rows.q.shape[1]  # columns count, also those without a real token
        return self.family.output(self, heads.to(projected.v.dtype)), None


def layout_of(attention_mask: Tensor | None) -> Layout | None:
    """The layout that a mask made by `LinearizedForCausalLM` stands for; worked out once and kept on the mask."""
    if attention_mask is None or attention_mask.numel() == 0:
        return None
    layout = getattr(attention_mask, "_layout", None)
    if layout is None:
        segments = attention_mask[:, 0, 0]
        layout = Layout(segments, packed=bool((segments > 1).any()))
        attention_mask._layout = layout  # type: ignore[attr-defined]
    assert isinstance(layout, Layout)  # noqa: S101 - for the type checker
    return layout


def _take(x: Tensor, index: Tensor) -> Tensor:
    """Rows `index` `[R, N]` along the token axis of `x` `[R, T, heads, width]`."""
    return x.gather(1, index[:, :, None, None].expand(-1, -1, *x.shape[2:]))


__all__ = ["LinearizedAttention", "Mixer", "layout_of"]
