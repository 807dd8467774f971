"""The state beside landmarks, for a whole text: it receives the tokens that lose their slots, and all queries read it.

Writes and reads run as one sequence, in which the tokens at the places of queries do not write: the queries before the
first merge that counts, and then, per merge, the tokens that it evicts and the queries up to the next merge.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from linearize.model.configuration import BLOCK
from linearize.model.landmarks.slots import join

if TYPE_CHECKING:
    from linearize.model.memory import Part
    from linearize.model.mixer.base import MixerBase


class Evictions(NamedTuple):
    """The tokens that B merges evict, each `[R, B * BLOCK, ...]`: keys, values and gate inputs for the state; `writes`
    is False where no token goes."""

    k: Tensor
    v: Tensor
    source: Tensor
    writes: Tensor


def recalled(
    mixer: MixerBase,
    y: Tensor,
    logs: Tensor | None,
    q: Tensor,
    evicted: Evictions,
    *,
    start: int,
    before: int,
    state: Part | None,
    empty: Tensor | None,
) -> Tensor:
    """Mix the state's outputs with the exact branch's `y` `[R, L, H, V]`.

    Args:
        logs: `[R, L, H]` the logs of the softmax's denominators, for `mix: softmax`.
        q: `[R, L, H, D]` the queries of the state.
        start: the first query that reads; the state is empty before.
        before: the number of queries from there to the first merge.
        empty: `[R, L]` True for queries whose state is empty; None means none of them.
    """
    recurrence, q = mixer.recurrence, q[:, start:]
    assert recurrence is not None  # noqa: S101 - for the type checker
    tokens, blocks = q.shape[1], evicted.writes.shape[1] // BLOCK

    def sequence(x: Tensor, asks: bool) -> Tensor:
        ahead, x = (x[:, :before], x[:, before:]) if asks else (x.new_zeros(len(x), before, *x.shape[2:]), x)
        x = x.unflatten(1, (blocks, BLOCK))
        silent = torch.zeros_like(x)
        pairs = torch.cat([silent, x] if asks else [x, silent], 2).flatten(1, 2)
        return torch.cat([ahead, pairs], 1) if before else pairs

    q = F.pad(q, (0, 0, 0, 0, 0, before + blocks * BLOCK - tokens))
    k, v, source, writes = (sequence(x, False) for x in evicted)
    answers, mass = recurrence.in_segments(sequence(q, True), k, v, source, writes, state)

    def read(x: Tensor) -> Tensor:
        found = x[:, before:].unflatten(1, (blocks, 2 * BLOCK))[:, :, BLOCK:].flatten(1, 2)
        return (torch.cat([x[:, :before], found], 1) if before else found)[:, :tokens]

    mass = None if mass is None else read(mass)
    logs, empty = (None if x is None else x[:, start:] for x in (logs, empty))
    mixed = join(mixer, y[:, start:], logs, read(answers), mass, empty)
    return torch.cat([y[:, :start], mixed], 1) if start else mixed
