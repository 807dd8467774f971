"""Attention of each head by distance: sums of exact softmax weights, computed for a block of queries at a time.

Dimensions: R rows, L tokens a row, C queries of a block, N keys, H query heads, K key/value heads, D key width;
W tokens of the window, M sinks.
"""

from __future__ import annotations

import math
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from linearize.families import AttentionLayer, Projections
    from linearize.model import LinearizedForCausalLM

# Attention weights in memory at once: 32 MB in float32, and a few times that during the sums.
_WEIGHTS = 2**23
_LONGEST_BLOCK = 128


@dataclass(frozen=True)
class HeadStatistics:
    """Attention of one query head, as means over the counted queries.

    Attributes:
        window: share of the attention mass on the last W tokens, the query's own included.
        sinks: share on the first M tokens of the text.
        beyond: share on all others.
        half_life: the smallest distance d such that at least half of the mass outside the sinks is at most d tokens
            back (0: the query's own token); None if all mass is on sinks.
        entropy: entropy of the weights, in nats.
        retrieval: share of the mass on a needle's value, at the positions that predict the answer.
    """

    window: float
    sinks: float
    beyond: float
    half_life: int | None
    entropy: float
    retrieval: float


class Tally:
    """Sums the attention of one layer's query heads by distance; an `observer` of `LinearizedAttention`.

    Only queries at position W + M and later count, because earlier ones have nothing beyond window and sinks and would
    make every head look local.

    Args:
        layer: the layer's heads.
        window, sinks: W and M.

    Attributes:
        queries: the number of counted queries.
    """

    def __init__(self, layer: AttentionLayer, window: int, sinks: int) -> None:
        self.layer, self.window, self.sinks = layer, window, sinks
        self.queries = 0
        self._on_sinks = torch.zeros(layer.query_heads, dtype=torch.float64)
        self._entropy = torch.zeros(layer.query_heads, dtype=torch.float64)
        self._by_distance = torch.zeros(layer.query_heads, 0, dtype=torch.float64)
        self._available = torch.zeros(0, dtype=torch.float64)

    def __call__(self, new: Projections, lengths: Tensor | None) -> None:
        rows, tokens = new.q.shape[:2]
        start = self.window + self.sinks
        while start < tokens:
            room = _WEIGHTS // (rows * self.layer.query_heads * tokens)
            stop = min(start + max(1, min(_LONGEST_BLOCK, room)), tokens)
            self._add(new, lengths, start, stop)
            start = stop

    def _add(self, new: Projections, lengths: Tensor | None, start: int, stop: int) -> None:
        """Add queries `start` to `stop` of all rows."""
        weights = attention_weights(self.layer, new.q_rotated[:, start:stop], new.k_rotated[:, :stop], start)
        query = torch.arange(start, stop, device=weights.device)
        counted = torch.ones(len(weights), stop - start, dtype=torch.bool, device=weights.device)
        if lengths is not None:
            counted &= query < lengths[:, None]
        self.queries += int(counted.sum())
        one = counted.to(weights.dtype)

        def total(values: Tensor) -> Tensor:
            """`[R, H, C, ...]` to `[H, ...]`."""
            return torch.einsum("rhc...,rc->h...", values, one).double().cpu()

        self._on_sinks += total(weights[..., : self.sinks].sum(-1))
        self._entropy += total(torch.special.entr(weights).sum(-1))
        place = query[:, None] - torch.arange(stop, device=weights.device)  # of the key at each distance
        lagged = weights.gather(-1, place.clamp_min(0).expand_as(weights)) * (place >= self.sinks)
        grown = torch.zeros(self.layer.query_heads, max(stop, self._by_distance.shape[1]), dtype=torch.float64)
        grown[:, : self._by_distance.shape[1]] = self._by_distance
        grown[:, :stop] += total(lagged)
        self._by_distance = grown
        farthest = (counted * (query - self.sinks + 1)).flatten()  # smaller distances lead to no sink
        reached = torch.bincount(farthest.clamp_min(0).cpu(), minlength=grown.shape[1] + 1).double()
        available = reached.flip(0).cumsum(0).flip(0)[1 : grown.shape[1] + 1]
        available[: self._available.shape[0]] += self._available
        self._available = available

    def beyond(self) -> tuple[Tensor, Tensor]:
        """Attention mass beyond window and sinks: `[H, E]` by distance, counted from the first token outside the
        window, and `[E]` the number of queries with a token at that distance that is not a sink."""
        return self._by_distance[:, self.window :], self._available[self.window :]

    def heads(self, retrieval: Tensor) -> list[HeadStatistics]:
        """The statistics of each query head.

        Args:
            retrieval: `[H]`, see `mass_on`.
        """
        count = max(self.queries, 1)
        within = self._by_distance.cumsum(1)
        every = self._by_distance.sum(1, keepdim=True)
        # The total and the last cumulative sum differ by rounding.
        half = (within < every / 2 * (1 - 1e-9)).sum(1)
        local = self._by_distance[:, : self.window].sum(1)
        return [
            HeadStatistics(
                window=float(local[head]) / count,
                sinks=float(self._on_sinks[head]) / count,
                beyond=float(every[head, 0] - local[head]) / count,
                half_life=int(half[head]) if every[head, 0] > 0 else None,
                entropy=float(self._entropy[head]) / count,
                retrieval=float(retrieval[head]),
            )
            for head in range(self.layer.query_heads)
        ]


def attention_weights(layer: AttentionLayer, q: Tensor, k: Tensor, first: int) -> Tensor:
    """Softmax weights `[R, H, C, N]`, in float32 or float64.

    Args:
        q: `[R, C, H, D]` with positions; the first is query number `first`.
        k: `[R, N, K, D]` with positions, from the first token of the row.
    """
    dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
    grouped = q.to(dtype).unflatten(2, (layer.key_value_heads, -1)).permute(0, 2, 3, 1, 4)  # [R, K, G, C, D]
    scores = grouped @ k.to(dtype).permute(0, 2, 3, 1).unsqueeze(2) * layer.scale
    if layer.softcap is not None:
        scores = layer.softcap * torch.tanh(scores / layer.softcap)
    back = torch.arange(first, first + q.shape[1], device=q.device)[:, None] - torch.arange(k.shape[1], device=q.device)
    seen = back >= 0 if layer.window is None else (back >= 0) & (back < layer.window)
    weights: Tensor = scores.masked_fill(~seen, -math.inf).softmax(-1).flatten(1, 2)
    return weights


def mass_on(layer: AttentionLayer, new: Projections, queries: range, keys: range) -> Tensor:
    """Share of each query head's attention mass on the keys at `keys`, averaged over `queries`: `[H]` float64."""
    q, k = new.q_rotated[:, queries.start : queries.stop], new.k_rotated[:, : queries.stop]
    weights = attention_weights(layer, q, k, queries.start)
    return weights[..., keys.start : keys.stop].sum(-1).mean((0, 2)).double().cpu()


@contextmanager
def observed(
    model: LinearizedForCausalLM, observer: Callable[[int], Callable[[Projections, Tensor | None], None]]
) -> Iterator[None]:
    """In this context every call passes the projections of layer i to `observer(i)`."""
    layers = model.attention_layers
    try:
        for index, attention in enumerate(layers):
            attention.observer = observer(index)
        yield
    finally:
        for attention in layers:
            attention.observer = None
