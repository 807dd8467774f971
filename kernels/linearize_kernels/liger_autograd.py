"""Launches the Triton kernels of Liger attention, forwards and backwards."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from linearize_kernels import liger_forward as forwards
from linearize_kernels.liger import Columns, Gate, LigerOptions, longest_row, row_starts
from linearize_kernels.liger_tiles import tl, triton

if TYPE_CHECKING:
    from torch.autograd.function import FunctionCtx

CHUNK, SUB = 64, 16
_OPERANDS = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}


@dataclass
class Problem:
    """Everything about a call but its differentiable tensors.

    Attributes:
        starts: `[R + 1]` int32. counts: `[R]` int32 or None. exists: `[R, M - sinks]` uint8 or None.
        longest: tokens of the longest row or more.
        sinks: how many of the columns are sinks.
        divisor: of gates built from keys; None where log-gates are given.
    """

    options: LigerOptions
    starts: Tensor
    counts: Tensor | None
    exists: Tensor | None
    longest: int
    sinks: int
    divisor: float | None

    @property
    def rows(self) -> int:
        return self.starts.shape[0] - 1

    @property
    def past(self) -> int:
        return 0 if self.counts is None else self.options.window

    @property
    def evicted(self) -> bool:
        return self.options.covers == "evicted"

    @property
    def lag(self) -> int:
        return self.options.window - self.past if self.evicted else 0

    @property
    def ahead(self) -> int:
        return self.past if self.evicted else 0

    @property
    def least(self) -> int:
        """The number of the first token of a row that is written."""
        return self.sinks if self.evicted else 0

    @property
    def stream(self) -> int:
        """Tokens that the longest row's recurrence reads."""
        return max(self.longest - self.lag, 0)

    @property
    def chunks(self) -> int:
        return -(-self.stream // CHUNK)

    @property
    def tiles(self) -> int:
        """Sub-chunks of the longest row's queries, those before the stream included."""
        return -(-self.lag // SUB) + -(-self.stream // SUB)

    @cached_property
    def slots(self) -> Tensor:
        """`[R]` int32, the first slot of each row."""
        chunks = (self.starts.diff() - self.lag).clamp_min(0).add(CHUNK - 1).div(CHUNK, rounding_mode="floor")
        return ((chunks + 1).cumsum(0) - (chunks + 1)).int()

    def slot_count(self, tokens: int) -> int:
        """Slots of all rows or more, told without asking the device."""
        return tokens // CHUNK + 2 * self.rows


class Operands:
    """The tensors of a call, and what kernels are told of them.

    Args:
        gate: log-gates, or a scale with its `gate_bias`.
    """

    def __init__(
        self,
        problem: Problem,
        q_rotated: Tensor,
        k_rotated: Tensor,
        v: Tensor,
        q: Tensor,
        k: Tensor,
        gate: Tensor,
        gate_bias: Tensor | None,
        mix_weight: Tensor | None,
        column_k: Tensor | None,
        column_v: Tensor | None,
        initial_state: Tensor | None,
    ) -> None:
        options = problem.options
        self.problem, self.q_rotated, self.k_rotated, self.v, self.q, self.k = problem, q_rotated, k_rotated, v, q, k
        self.mix_weight, self.initial_state = mix_weight, initial_state
        (self.tokens, self.heads, width), (self.keys, self.groups, features), values = q_rotated.shape, k.shape, v.shape[2]
        self.width, self.features, self.values = width, features, values
        columns = 0 if column_k is None else column_k.shape[1]
        interpreted = q.device.type != "cuda"
        exact = q.dtype == torch.float32
        # bfloat16 is added up as float32 by tensor cores, which the interpreter has not.
        operand = tl.float32 if interpreted else _OPERANDS[q.dtype]
        self.stats = q
        of_key = problem.divisor is not None
        self.gate: dict[str, Any] = {
            "gate": q if of_key else gate,
            "gate_scale": gate if of_key else q,
            "gate_bias": q if gate_bias is None else gate_bias,
            "divisor": problem.divisor or 1.0,
        }
        self.columns: dict[str, Any] = {
            "column_k": q if column_k is None else column_k,
            "column_v": q if column_v is None else column_v,
            "column_exists": q if problem.exists is None else problem.exists,
        }
        self.rows: dict[str, Any] = {
            "starts": problem.starts,
            "counts": problem.starts if problem.counts is None else problem.counts,
            "slots": problem.slots,
        }
        self.numbers: dict[str, Any] = {
            "keys": self.keys,
            "past": problem.past,
            "lag": problem.lag,
            "ahead": problem.ahead,
            "least": problem.least,
        }
        self.window: dict[str, Any] = {
            "window": options.window,
            "scale": options.scale,
            "softcap": options.softcap or 1.0,
            "H": self.heads,
            "D": width,
            "BD": block(width),
            "BM": block(columns),
            "COLUMNS": columns,
            "SINKS": problem.sinks,
            "EXISTS": problem.exists is not None,
            "CAPPED": options.softcap is not None,
            "MIX": options.mix,
            "NORMALIZE": options.normalize,
            "EVICTED": problem.evicted,
            "OPERAND": operand,
        }
        self.recurrence: dict[str, Any] = {
            "K": self.groups,
            "F": features,
            "V": values,
            "BF": block(features),
            "CHUNK": CHUNK,
            "SOFTMAX": options.feature_map == "softmax",
            "FROM_KEY": of_key,
            "PER_CHANNEL": of_key or gate.shape[-1] > 1,
            "COUNTED": problem.counts is not None,
            "EXACT": exact,
        }
        # How products of float32 tiles are taken: as such, or of tensor cores what leaves the result's rounding
        # the larger error.
        self.precision = "ieee" if exact else "tf32" if q.dtype == torch.bfloat16 else "tf32x3"
        self.state_precision = "ieee" if exact else "tf32x3"

    def float32(self, *shape: int) -> Tensor:
        return torch.empty(shape, dtype=torch.float32, device=self.q.device)

    @property
    def widest(self) -> int:
        return max(block(self.features), block(self.width), block(self.values))

    @property
    def group(self) -> int:
        """Query heads of a tile, a power of 2: the whole group, or what registers and shared memory hold."""
        return min(block_of(self.heads // self.groups), 4 if self.widest <= 128 else 2)

    @property
    def parts(self) -> int:
        """Tiles that the query heads of a key/value head make."""
        return triton.cdiv(self.heads // self.groups, self.group)

    @property
    def value_block(self) -> int:
        """Value channels of a tile."""
        return min(block(self.values), 128 if block(self.features) <= 128 else 64)

    @property
    def warps(self) -> int:
        return 8 if self.group * SUB * self.widest > 64 * 64 else 4


def block(width: int) -> int:
    """The power of 2 that holds a width; tensor cores want 16 or more."""
    return max(16, block_of(width))


def block_of(count: int) -> int:
    return 1 << (max(count, 1) - 1).bit_length()


def fused(
    q_rotated: Tensor,
    k_rotated: Tensor,
    v: Tensor,
    q: Tensor,
    k: Tensor,
    gate: Tensor | Gate,
    options: LigerOptions,
    mix_weight: Tensor | None,
    columns: Columns | None,
    rows: Tensor | int,
    counts: Tensor | None,
    initial_state: Tensor | None,
    longest: int | None,
) -> tuple[Tensor, Tensor]:
    """`liger_attention` on checked arguments."""
    exists = columns.exists if columns is not None else None
    problem = Problem(
        options=options,
        starts=row_starts(rows, q.shape[0], q.device).int(),
        counts=None if counts is None else counts.int(),
        exists=None if exists is None else exists.to(torch.uint8).contiguous(),
        longest=longest_row(rows, q.shape[0], longest),
        sinks=columns.sinks if columns is not None else 0,
        divisor=gate.divisor if isinstance(gate, Gate) else None,
    )
    tensors = [q_rotated, k_rotated, v, q, k, *(gate[:2] if isinstance(gate, Gate) else (gate, None)), mix_weight]
    # No columns are none: a tensor without elements has no address to pass.
    tensors += columns[:2] if columns is not None and columns.k.shape[1] else (None, None)
    tensors.append(initial_state)
    outputs, state = _Fused.apply(problem, *(None if x is None else x.contiguous() for x in tensors))
    return outputs, state


class _Fused(torch.autograd.Function):
    @staticmethod
    def forward(ctx: FunctionCtx, problem: Problem, *tensors: Tensor | None) -> tuple[Tensor, Tensor]:
        operands = Operands(problem, *tensors)  # type: ignore[arg-type]
        with on_device(operands.q):
            states, masses, _, final = enter_states(operands)
            outputs = write_outputs(operands, states, masses)
        return outputs, final


def on_device(x: Tensor) -> AbstractContextManager[Any]:
    """Triton launches on the current device."""
    return torch.cuda.device(x.device) if x.device.type == "cuda" else nullcontext()


def enter_states(operands: Operands) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The states, masses and log decays of all chunks (see `liger_forward`), and the final state."""
    o, problem = operands, operands.problem
    slots, wide = problem.slot_count(o.tokens), (problem.rows, o.groups)
    if problem.options.feature_map == "softmax" and o.stats is o.q:
        o.stats, rows = o.float32(2, o.keys, o.groups), 16
        grid = (triton.cdiv(o.keys * o.groups, rows),)
        forwards.key_statistics[grid](o.k, o.stats, o.keys * o.groups, o.features, block(o.features), rows)
    states, masses = o.float32(slots, o.groups, o.features, o.values), o.float32(slots, o.groups, o.features)
    totals, final = torch.empty_like(masses), o.float32(*wide, o.features, o.values + 1)
    width = min(block(o.values), 64)
    if problem.chunks:
        grid = (problem.chunks, problem.rows * o.groups, triton.cdiv(o.values, width))
        forwards.write_chunks[grid](
            o.k, o.v, o.stats, **o.gate, **o.rows, states=states, masses=masses, totals=totals, **o.numbers,
            **o.recurrence, BV=width, PRECISION=o.state_precision, num_warps=8 if block(o.features) > 64 else 4,
        )
    for carried, values, column in ((states, o.values, 0), (masses, 1, o.values)):
        size = min(512, triton.next_power_of_2(o.features * values))
        forwards.carry_states[triton.cdiv(o.features * values, size), problem.rows * o.groups](
            carried, totals, totals if o.initial_state is None else o.initial_state, final, problem.starts,
            problem.slots, problem.lag, o.groups, o.features, values, column, o.values + 1, CHUNK, size,
            FROM_STATE=o.initial_state is not None, EXACT=o.recurrence["EXACT"], num_warps=4,
        )
    return states, masses, totals, final


def write_outputs(operands: Operands, states: Tensor, masses: Tensor) -> Tensor:
    """Outputs `[N, H, V]`."""
    o, problem = operands, operands.problem
    outputs = o.q.new_empty(o.tokens, o.heads, o.values)
    grid = (problem.tiles, problem.rows * o.groups, triton.cdiv(o.values, o.value_block) * o.parts)
    forwards.write_outputs[grid](
        o.q_rotated, o.k_rotated, o.v, o.q, o.k, o.stats, **o.gate, **o.columns,
        mix_weight=o.q if o.mix_weight is None else o.mix_weight, **o.rows, states=states, masses=masses,
        outputs=outputs, **o.numbers, **o.window, **o.recurrence, BV=o.value_block, GROUP=o.group, SUB=SUB, KEYS=32,
        PRECISION=o.precision, num_warps=o.warps,
    )
    return outputs
