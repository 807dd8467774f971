"""The rows of a call, and what attention with landmarks finds out about them."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch
from linearize_kernels.decay import computing_dtype
from torch import Tensor

from linearize.model.configuration import BLOCK, room
from linearize.model.landmarks.slots import merges, rows_of
from linearize.model.memory import store
from linearize.model.precision import decoded

if TYPE_CHECKING:
    from collections.abc import Iterator

    from linearize.families.base import Projections
    from linearize.model.memory import LayerMemory, Part
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

    @property
    def places(self) -> int:
        """The number of places that queries or tokens may have."""
        return max(self.first + self.q.shape[1], 0)

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


def lay_out(mixer: MixerBase, new: Projections, lengths: Tensor | None, memory: LayerMemory | None) -> Rows:
    """The rows of a call, without `held`."""
    tokens, sinks = new.q.shape[1], mixer.config.sinks
    q_state = new.q_rotated if mixer.config.rope else new.q
    count: Tensor | int = 0
    if memory is not None:
        count = memory.counts.clone() if memory.uniform is None else memory.uniform
    merged = merges(mixer, count)
    offset = count - sinks - merged * BLOCK
    if isinstance(offset, int):
        total = None if memory is None or lengths is None else offset + lengths
        return Rows(merged, offset, total, offset, new.q_rotated, q_state, {})
    total = offset + (tokens if lengths is None else lengths)
    # Only a CPU knows the longest row without a wait; elsewhere all places are taken that a row may have.
    span = max(int(total.max()), 1) if total.device.type == "cpu" else room(mixer.window) + tokens
    query = torch.arange(-sinks, span, device=total.device) - offset[:, None]
    query = query.clamp(0, tokens - 1)
    return Rows(merged, offset, total, -sinks, rows_of(new.q_rotated, query), rows_of(q_state, query), {})


def hold(rows: Rows, arriving: Part, window: Part) -> Rows:
    """`rows` with the tensors of the tokens from place 0 on.

    Args:
        arriving: those of the new tokens.
        window: those of the memory, of the same names.
    """
    offset = rows.offset
    if isinstance(offset, int):
        past, later = max(offset, 0), max(-offset, 0)
        held = {name: x[:, later:] for name, x in arriving.items()}
        if past:
            before = decoded(window, computing_dtype(rows.q))
            held = {name: torch.cat([before[name][:, :past], x], 1) for name, x in held.items()}
        return rows._replace(held=held)
    width, tokens = (part["received"].shape[1] for part in (window, arriving))
    place = torch.arange(rows.places, device=offset.device)
    at = torch.where(place < offset[:, None], place, width + place - offset[:, None]).clamp(max=width + tokens - 1)
    before = decoded(window, computing_dtype(rows.q))
    return rows._replace(
        held={name: rows_of(torch.cat([x, arriving[name].to(x.dtype)], 1), at) for name, x in before.items()}
    )


def keep_sums(memory: LayerMemory, sums: Tensor | None, lengths: Tensor | None) -> None:
    """Write the sums of normalised keys `[R, L, K, D]` after the last of a call's tokens; None if none is kept."""
    if sums is None:
        return
    keys = memory.parts["keys"]
    if lengths is not None:
        sums = rows_of(torch.cat([keys["sum"][:, None], sums], 1), lengths[:, None])
    store(keys, "sum", sums[:, -1])


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
