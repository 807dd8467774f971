"""The rows of a call, and what attention with landmarks finds out about them."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from linearize.model.configuration import BLOCK
from linearize.model.landmarks.slots import rows_of

if TYPE_CHECKING:
    from collections.abc import Iterator

    from linearize.model.memory import Part
    from linearize.model.mixer.base import MixerBase


class Rows(NamedTuple):
    """Rows aligned by their windows: place 0 is the first token of the oldest block that is not merged yet, so block
    borders are at the same places in all rows.

    Attributes:
        merged: the number of blocks merged so far, one number for all rows or `[R]`.
        offset: the place of the first new token, one number for all rows or `[R]`; negative if it is a sink.
        total: `[R]` the number of filled places; None means all.
        first: the place of the first query in `q` and `q_state`.
        q, q_state: `[R, L, H, D]` the queries of softmax attention and those of the recurrence.
        held: the tensors of the tokens from place 0 on, by name.
    """

    merged: Tensor | int
    offset: Tensor | int
    total: Tensor | None
    first: int
    q: Tensor
    q_state: Tensor
    held: Part

    def real(self, query: Tensor) -> Tensor | None:
        """`[R, L]`, True if the query at a place in `query` `[L]` is a new token; None means all."""
        if self.total is None:
            return None
        real = query < self.total[:, None]
        return real if isinstance(self.offset, int) else real & (query >= self.offset[:, None])

    def back(self, y: Tensor, tokens: int) -> Tensor:
        """`y` `[R, L, ...]` from the order of places to the order of the new tokens."""
        if isinstance(self.offset, int):
            return y
        place = torch.arange(tokens, device=y.device) + self.offset[:, None] - self.first
        return rows_of(y, place.clamp(max=y.shape[1] - 1))


class Attended(NamedTuple):
    """All blocks of a call, with M merges.

    Attributes:
        y: `[R, L, H, V]` the outputs of softmax attention; None without values.
        logs: `[R, L, H]` the logs of the softmax's denominators; None if no mix needs them.
        slots: the slots after the last merge, as in the memory, with codes decoded.
        received: `[R, P, K]` the attention that the tokens of `rows.held` have received in the window.
        kept: `[R, M, N, K]` int32, the numbers of the tokens in the slots after each merge; None with values.
        lost: `[R, M, BLOCK, K]` int64, the tokens that have no slot after a merge, in text order: their indices in the
            slots at the start of the call, followed by `rows.held`. Places that held no token come first and are -1.
            None if not asked for.
    """

    y: Tensor | None
    logs: Tensor | None
    slots: Part
    received: Tensor
    kept: Tensor | None
    lost: Tensor | None


def merges_of(mixer: MixerBase, rows: Rows) -> int:
    """The number of merges until the last query of `rows`."""
    return max((rows.first + rows.q.shape[1] - mixer.window) // BLOCK, 0)


def blocks_of(mixer: MixerBase, rows: Rows) -> Iterator[tuple[int, int, int]]:
    """Yield the number of merges so far, and the places from and to which queries then follow; there may be none."""
    start, stop = rows.first, rows.first + rows.q.shape[1]
    for block in range(merges_of(mixer, rows) + 1):
        end = min(mixer.window - 1 + (block + 1) * BLOCK, stop)
        yield block, start, end
        start = end
