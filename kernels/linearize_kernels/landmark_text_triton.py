"""Launch the kernels that read a whole text with landmarks: one launch chooses the tokens in the slots, one reads.

`linearize.model.landmarks.exact` is the same in plain torch, block by block.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from linearize_kernels.dispatch import interpreted, power_of_2
from linearize_kernels.landmark_choose_kernel import landmark_choose_kernel
from linearize_kernels.landmark_read_kernel import landmark_read_kernel

if TYPE_CHECKING:
    from collections.abc import Sequence

_SMALLEST = 16  # side of a product of tensor cores
_LOG2_E = 1.4426950408889634


@dataclass(frozen=True)
class LandmarkText:
    """A call's numbers, equal for keys and values.

    Attributes:
        window, sinks, slots, block, scale, softcap: as in `LandmarkStep`.
        q: `[R, L, H, D]` queries; those of a row are at the places `first` to `first + L`.
        places: the number of places of the text.
        before: the number of blocks merged before, one number or `[R]`.
        offset: the place of the first new token, as `before`.
        total: `[R]` the number of filled places; None means all.
        ahead: rows of the pool between a token and its form in the slots; 0 if they are the same.
    """

    window: int
    sinks: int
    slots: int
    block: int
    scale: float
    softcap: float | None
    q: Tensor
    first: int
    places: int
    before: Tensor | int
    offset: Tensor | int
    total: Tensor | None
    ahead: int

    @property
    def merges(self) -> int:
        """The number of merges until the last query."""
        return max((self.first + self.q.shape[1] - self.window) // self.block, 0)

    @property
    def start(self) -> int:
        """The number of the first block of queries; those below 0 are before the first merge, as is 0."""
        return (self.first - self.window + 1) // self.block


class Chosen(NamedTuple):
    """The slots of a text with M merges. Tokens are indices in the slots at the start, followed by the text.

    Attributes:
        table: `[R, K, M + 1, N]` int32, the tokens in the slots before the first merge and after each; -1 is none.
        lost: `[R, K, M, BLOCK]` int32, the tokens that have no slot after a merge, in text order after those that are
            -1; None if not asked for.
        received: `[R, K, N + P]` what the tokens in the slots and those of the text have received.
        novelty, number: `[R, K, N]` of the tokens in the slots; `novelty` is wider.
    """

    table: Tensor
    lost: Tensor | None
    received: Tensor
    novelty: Tensor
    number: Tensor


def pooled(parts: Sequence[Tensor], like: Tensor) -> Tensor:
    """Tokens `[R, S, K, D]` of several parts as the operands of products with `like`, `[R, S, K, D]`.

    With operands of half precision a wider token is two of them, side by side, whose sum keeps 16 bits or more."""
    pool = torch.cat(list(parts), 1)
    operand = operand_of(like)
    if pieces_of(pool.dtype, like) == 1:
        return pool.to(operand)
    upper = pool.to(operand)
    return torch.cat([upper, (pool - upper).to(operand)], -1)


def launch_landmark_choose(
    text: LandmarkText,
    pool: Tensor,
    received: Tensor,
    novelty: Tensor,
    number: Tensor,
    *,
    weight: float,
    fading: float,
    least_attention: float,
    least_spread: float,
    most_against: float,
    tells: bool,
    last: bool,
) -> Chosen:
    """Choose the tokens in the slots after each merge.

    Args:
        pool: keys of sinks, slots and text, and of the text as the slots store them if that differs; see `pooled`.
        received: `[R, K, N + P]` float32, of slots and text; changed in place.
        novelty: `[R, K, N + M * BLOCK]` float32, of the slots and of the blocks that are merged; changed in place.
        number: `[R, K, N]` int32, 0 for empty slots; changed in place.
        weight, fading, least_attention, least_spread, most_against: as in `launch_landmark_merge`.
        tells: return the tokens that lose their slots.
        last: the queries after the last merge count.
    """
    rows, groups = number.shape[:2]
    columns, candidates = text.sinks + text.window + text.block - 1, power_of_2(text.slots + text.block)
    merges = text.merges

    def ints(*shape: int) -> Tensor:
        return torch.empty(rows, groups, *shape, dtype=torch.int32, device=pool.device)

    table, lists, lost = ints(merges + 1, text.slots), ints(3, text.block), ints(merges, text.block)
    q, shared = _shared(text, pool, groups)
    if candidates > 1024:
        shared["num_warps"] = 8  # 4 spill
    turn = shared["BLOCK_N"]
    near = -(-columns // turn) * turn
    sums = torch.empty(rows, groups, near + candidates + turn, dtype=torch.float32, device=pool.device)
    with torch.cuda.device_of(pool):  # Triton launches on the current device
        landmark_choose_kernel[(rows, groups)](
            q,
            pool,
            received,
            novelty,
            number,
            table,
            lost,
            lists,
            sums,
            total=number if text.total is None else text.total,
            offset=text.offset,
            pool_row=pool.stride(0),
            weight=weight,
            FADING=fading,
            LEAST_ATTENTION=least_attention,
            LEAST_SPREAD=least_spread,
            MOST_AGAINST=most_against,
            HAS_TOTAL=text.total is not None,
            TELLS=tells,
            LAST=last,
            CANDIDATES=candidates,
            BLOCK_R=power_of_2(text.window + text.block - 1),
            **shared,
        )
    return Chosen(table, lost if tells else None, received, novelty, number)


def launch_landmark_read(
    text: LandmarkText, pool: Tensor, pool_v: Tensor, table: Tensor, *, logs: bool
) -> tuple[Tensor, Tensor | None]:
    """Attention of all queries to sinks, window and slots.

    Args:
        pool, pool_v: keys and values, as in `launch_landmark_choose`.
        logs: return the logs of the softmax's denominators.

    Returns:
        `[R, L, H, V]` and `[R, L, H]`, float32.
    """
    rows, tokens, heads = text.q.shape[:3]
    groups = pool.shape[2]
    log = torch.empty(rows, tokens, heads, dtype=torch.float32, device=pool.device) if logs else None
    q, shared = _shared(text, pool, groups)
    values = pool_v.shape[3] // shared["PIECES"]
    y = torch.empty(rows, tokens, heads, values, dtype=torch.float32, device=pool.device)
    tiles = text.merges + 1 - text.start
    with torch.cuda.device_of(pool):
        landmark_read_kernel[(rows * tiles, groups, -(-text.block * (heads // groups) // shared["BLOCK_Q"]))](
            q,
            pool,
            pool_v,
            table,
            y,
            y if log is None else log,
            pool_row=pool.stride(0),
            v_row=pool_v.stride(0),
            tiles=tiles,
            V=values,
            LOGS=logs,
            BLOCK_V=max(power_of_2(values), _SMALLEST),
            **shared,
        )
    return y, log


def operand_of(like: Tensor) -> torch.dtype:
    """The dtype of products with `like`."""
    # numpy, which the interpreter computes with, has no bfloat16.
    return torch.float32 if interpreted() and like.dtype == torch.bfloat16 else like.dtype


def pieces_of(dtype: torch.dtype, like: Tensor) -> int:
    """The number of operands that a token in `dtype` takes; see `pooled`."""
    return 1 if operand_of(like) in (torch.float32, dtype) else 2


def _shared(text: LandmarkText, pool: Tensor, groups: int) -> tuple[Tensor, dict[str, Any]]:
    """The queries and the arguments of both kernels."""
    q = text.q.to(operand_of(text.q))
    q = q if q.stride(-1) == 1 else q.contiguous()
    width, group = q.shape[3], q.shape[2] // groups
    block_d = max(power_of_2(pool.shape[3]), _SMALLEST)
    row = block_d * pool.element_size()  # bytes
    exact = pool.dtype == torch.float32  # products take three tiles of each operand
    wide = row > 512 or exact
    queries = min(max(power_of_2(text.block * group), 64), 64 if wide else 128)
    return q, {
        "before": text.before,
        "q_row": q.stride(0),
        "q_token": q.stride(1),
        "q_head": q.stride(2),
        "scale": text.scale,
        "factor": (text.scale if text.softcap is None else 1.0) * _LOG2_E,
        "softcap": text.softcap or 1.0,
        "first": text.first,
        "length": q.shape[1],
        "places": text.places,
        "slots": text.slots,
        "merges": text.merges,
        "start": text.start,
        "ahead": text.ahead,
        "K": groups,
        "G": group,
        "D": width,
        "W": text.window,
        "SINKS": text.sinks,
        "BLOCK": text.block,
        "RAGGED": isinstance(text.before, Tensor),
        "HAS_SOFTCAP": text.softcap is not None,
        "PIECES": pool.shape[3] // width,
        "PRECISION": "tf32x3" if exact and not interpreted() else "ieee",
        "BLOCK_D": block_d,
        "BLOCK_Q": queries,
        "BLOCK_N": 32 if wide else 64,
        "num_warps": 8 if queries == 128 or wide or row == 512 else 4,
        "num_stages": 3 if row <= 256 else 2,
        "enable_fp_fusion": True,
    }
