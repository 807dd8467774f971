"""Launch the Triton kernels of Liger attention, forward and backward."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from linearize_kernels.dispatch import interpreted
from linearize_kernels.liger_chunk_gradients import chunk_pairs, chunk_reads, chunk_rows
from linearize_kernels.liger_chunks import chunk_factors, chunk_outputs
from linearize_kernels.liger_forward import carry_states, key_statistics, write_chunks, write_outputs_kernel
from linearize_kernels.liger_key_gradients import (
    carry_gradients,
    gate_gradients,
    key_gradients,
    keys_of_states,
    read_chunks,
)
from linearize_kernels.liger_options import Columns, Gate, LigerOptions, longest_row, row_starts
from linearize_kernels.liger_query_gradients import query_gradients
from linearize_kernels.liger_tiles import tl, triton
from linearize_kernels.liger_window_gradients import sum_columns, window_keys, window_queries

if TYPE_CHECKING:
    from collections.abc import Iterator

    from torch.autograd.function import FunctionCtx

CHUNK, SUB = 64, 16
# Rows times key/value heads of one launch; CUDA's limit of a grid's second axis.
MOST_PROGRAMS = 65535
# Entries of a state, or of a mass, per program that carries them from chunk to chunk.
CARRIED = 512
# Input dtypes whose chunks of weak decays are tiles of tensor cores. float16 has too few exponents for their factors.
TILED = {torch.bfloat16}
# Launches over chunks have as few stages as let them fit into the 99 KiB of shared memory of smaller GPUs.
# Triton 3.10 changes the default.
FUSION = {"enable_fp_fusion": True}
_OPERANDS = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}


@dataclass
class Problem:
    """All arguments of a call except its differentiable tensors.

    Attributes:
        starts: `[R + 1]` int32. counts: `[R]` int32 or None. exists: `[R, M - sinks]` uint8 or None.
        longest: upper bound of a row's tokens.
        sinks: number of columns that are sinks.
        divisor: of gates built from keys; None for given log-gates.
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
        """Number of a row's first token that is written into the state."""
        return self.sinks if self.evicted else 0

    @property
    def stream(self) -> int:
        """Length of the longest row's stream, the tokens that its recurrence reads."""
        return max(self.longest - self.lag, 0)

    @property
    def chunks(self) -> int:
        return -(-self.stream // CHUNK)

    @property
    def tiles(self) -> int:
        """Sub-chunks of the longest row's queries, including those before the stream."""
        return -(-self.lag // SUB) + -(-self.stream // SUB)

    @property
    def query_chunks(self) -> int:
        """Chunks of the longest row's queries, including those before the stream."""
        return -(-self.lag // CHUNK) + self.chunks

    @cached_property
    def slots(self) -> Tensor:
        """`[R]` int32, the first slot of each row."""
        chunks = (self.starts.diff() - self.lag).clamp_min(0).add(CHUNK - 1).div(CHUNK, rounding_mode="floor")
        return ((chunks + 1).cumsum(0) - (chunks + 1)).int()

    def slot_count(self, tokens: int) -> int:
        """Upper bound of the slots of all rows, computed without a sync."""
        return tokens // CHUNK + 2 * self.rows


class Operands:
    """The tensors of a call, and the constants passed to kernels.

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
        self.mix_weight, self.initial_state, self.given_gate, self.gate_bias = (
            mix_weight,
            initial_state,
            gate,
            gate_bias,
        )
        self.column_k, self.column_v = column_k, column_v
        (self.tokens, self.heads, width), (self.keys, self.groups, features), values = (
            q_rotated.shape,
            k.shape,
            v.shape[2],
        )
        self.width, self.features, self.values = width, features, values
        columns = 0 if column_k is None else column_k.shape[1]
        exact = q.dtype == torch.float32
        # Tensor cores accumulate bfloat16 products in float32. Triton's interpreter does not, so give it float32.
        operand = tl.float32 if interpreted() else _OPERANDS[q.dtype]
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
        # Precision of products of float32 tiles: exact, or the tensor-core mode whose error is below the rounding of
        # the result's dtype.
        self.precision = "ieee" if exact else "tf32" if q.dtype == torch.bfloat16 else "tf32x3"

    def float32(self, *shape: int) -> Tensor:
        return torch.empty(shape, dtype=torch.float32, device=self.q.device)

    @property
    def tiled(self) -> bool:
        return self.q.dtype in TILED and block(self.features) * block(self.values) <= 128 * 128 and self.widest <= 128

    @property
    def heads_per_chunk(self) -> int:
        """Query heads of a tile of a chunk: with two, each group of four warps has rows of its own."""
        return 1 if self.heads // self.groups % 2 else 2

    @property
    def widest(self) -> int:
        return max(block(self.features), block(self.width), block(self.values))

    def tile(self, most: int) -> tuple[int, int]:
        """Query heads per tile, a power of 2, and the number of tiles per group.

        Args:
            most: query heads that fit into registers and shared memory for heads of width 128 in a two-byte dtype.
        """
        group, bytes_wide = self.heads // self.groups, self.widest * self.q.element_size()
        heads = min(power_of_2(group), max(1, most * 256 // max(bytes_wide, 256)))
        return heads, triton.cdiv(group, heads)

    @property
    def value_block(self) -> int:
        """Value channels per tile of outputs."""
        return min(block(self.values), 128 if block(self.features) <= 128 else 64)

    def warps(self, heads: int = 4) -> int:
        return 8 if heads * SUB * self.widest > 64 * 64 else 4


# Query heads per tile in the kernels over 16 queries, and in the kernel over 16 keys.
OUTPUT_HEADS, QUERY_HEADS, KEY_HEADS = 4, 4, 2


def block(width: int) -> int:
    """The least power of 2 that is at least `width`, and at least 16, the minimum of tensor cores."""
    return max(16, power_of_2(width))


def power_of_2(count: int) -> int:
    power: int = 1 << (max(count, 1) - 1).bit_length()
    return power


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
    """Run `liger_attention` on checked arguments."""
    whole, most = (rows if isinstance(rows, int) else rows.shape[0] - 1), max(MOST_PROGRAMS // k.shape[1], 1)
    if whole > most:
        pieces = [
            fused(*piece)
            for piece in pieces_of_rows(
                (
                    q_rotated,
                    k_rotated,
                    v,
                    q,
                    k,
                    gate,
                    options,
                    mix_weight,
                    columns,
                    rows,
                    counts,
                    initial_state,
                    longest,
                ),
                most,
            )
        ]
        outputs, states = zip(*pieces, strict=True)
        return torch.cat(outputs), torch.cat(states)
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
    # Zero columns become None, because an empty tensor has no address to pass.
    tensors += columns[:2] if columns is not None and columns.k.shape[1] else (None, None)
    tensors.append(initial_state)
    outputs, state = _Fused.apply(  # type: ignore[no-untyped-call]
        problem, *(None if x is None else x.contiguous() for x in tensors)
    )
    return outputs, state


def pieces_of_rows(arguments: tuple[Any, ...], most: int) -> Iterator[tuple[Any, ...]]:
    """The arguments of `fused`, cut into calls of at most `most` rows. Packed rows are read with a sync."""
    q_rotated, k_rotated, v, q, k, gate, options, mix_weight, columns, rows, counts, initial_state, longest = arguments
    starts = row_starts(rows, q.shape[0], torch.device("cpu")) if isinstance(rows, int) else rows.cpu()
    past = 0 if counts is None else options.window
    for first in range(0, len(starts) - 1, most):
        last = min(first + most, len(starts) - 1)
        own = slice(int(starts[first]), int(starts[last]))
        of_keys = slice(own.start + first * past, own.stop + last * past)
        part = slice(first, last)
        cut = None
        if columns is not None:
            exists = None if columns.exists is None else columns.exists[part]
            cut = Columns(columns.k[part], columns.v[part], columns.sinks, exists)
        yield (
            q_rotated[own],
            k_rotated[of_keys],
            v[of_keys],
            q[own],
            k[of_keys],
            gate if isinstance(gate, Gate) else gate[of_keys],
            options,
            mix_weight,
            cut,
            last - first if isinstance(rows, int) else rows[first : last + 1] - rows[first],
            None if counts is None else counts[part],
            None if initial_state is None else initial_state[part],
            longest,
        )


class _Fused(torch.autograd.Function):
    @staticmethod
    def forward(ctx: FunctionCtx, problem: Problem, *tensors: Tensor | None) -> tuple[Tensor, Tensor]:
        operands = Operands(problem, *tensors)  # type: ignore[arg-type]
        with on_device(operands.q):
            states, masses, totals, final = enter_states(operands)
            outputs = write_outputs(operands, states, masses, totals)
        ctx.problem = problem  # type: ignore[attr-defined]
        ctx.save_for_backward(*tensors)  # type: ignore[arg-type]
        return outputs, final

    @staticmethod
    def backward(ctx: Any, doutputs: Tensor, dfinal: Tensor) -> tuple[Tensor | None, ...]:
        operands = Operands(ctx.problem, *ctx.saved_tensors)
        with on_device(operands.q):
            gradients = take_gradients(operands, doutputs.contiguous(), dfinal.contiguous())
        wanted = zip(gradients, ctx.needs_input_grad[1:], strict=True)
        return None, *(gradient if needed else None for gradient, needed in wanted)


def on_device(x: Tensor) -> AbstractContextManager[Any]:
    """Make the device of `x` current, because Triton launches on the current device."""
    return torch.cuda.device(x.device) if x.device.type == "cuda" else nullcontext()


def enter_states(operands: Operands) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The states, masses and log decays of all chunks (see `liger_forward`), and the final state."""
    o, problem = operands, operands.problem
    slots, wide = problem.slot_count(o.tokens), (problem.rows, o.groups)
    if problem.options.feature_map == "softmax" and o.stats is o.q:
        o.stats, rows = o.float32(2, o.keys, o.groups), 16
        key_statistics[(triton.cdiv(o.keys * o.groups, rows),)](
            o.k, o.stats, o.keys * o.groups, o.features, block(o.features), rows, **FUSION
        )
    states, masses = o.float32(slots, o.groups, o.features, o.values), o.float32(slots, o.groups, o.features)
    totals, final = torch.empty_like(masses), o.float32(*wide, o.features, o.values + 1)
    width = min(block(o.values), 128 if block(o.features) <= 128 else 64)
    if problem.chunks:
        grid = (problem.chunks, problem.rows * o.groups, triton.cdiv(o.values, width))
        write_chunks[grid](
            o.k,
            o.v,
            o.stats,
            **o.gate,
            **o.rows,
            states=states,
            masses=masses,
            totals=totals,
            **o.numbers,
            **o.recurrence,
            BV=width,
            OPERAND=o.window["OPERAND"],
            PRECISION=o.precision,
            **FUSION,
            num_warps=8 if block(o.features) > 64 else 4,
        )
    carry_states[blocks_of_carry(o), problem.rows * o.groups](
        states,
        masses,
        totals,
        totals if o.initial_state is None else o.initial_state,
        final,
        problem.starts,
        problem.slots,
        problem.lag,
        o.groups,
        o.features,
        o.values,
        CHUNK,
        CARRIED,
        FROM_STATE=o.initial_state is not None,
        EXACT=o.recurrence["EXACT"],
        **FUSION,
        num_warps=4,
    )
    return states, masses, totals, final


def blocks_of_carry(o: Operands) -> int:
    """Programs per row and head that carry states and masses."""
    return sum(-(-count // CARRIED) for count in (o.features * o.values, o.features))


def write_outputs(operands: Operands, states: Tensor, masses: Tensor, totals: Tensor) -> Tensor:
    """Compute the outputs `[N, H, V]`."""
    o, problem = operands, operands.problem
    outputs = o.q.new_empty(o.tokens, o.heads, o.values)
    arguments = {
        **{name: getattr(o, name) for name in ("q_rotated", "k_rotated", "v", "q", "k", "stats")},
        **(o.gate | o.columns | o.rows | o.numbers | o.window | o.recurrence),
        "mix_weight": o.q if o.mix_weight is None else o.mix_weight,
        "states": states,
        "masses": masses,
        "totals": totals,
        "outputs": outputs,
        "PRECISION": o.precision,
        **FUSION,
    }
    whole, pieces = problem.rows * o.groups, triton.cdiv(o.values, o.value_block)
    if o.tiled:
        chunk_outputs[problem.query_chunks, whole, pieces](
            **taken_by(chunk_outputs, arguments | factors_of_chunks(o, states, totals)),
            BV=o.value_block,
            HEADS=o.heads_per_chunk,
            KEYS=64,
            num_warps=4 * o.heads_per_chunk,
            num_stages=1,
        )
    heads, parts = o.tile(OUTPUT_HEADS)
    write_outputs_kernel[problem.query_chunks if o.tiled else problem.tiles, whole, pieces * parts](
        **arguments, BV=o.value_block, GROUP=heads, SUB=SUB, KEYS=32, TILED=o.tiled, num_warps=o.warps(heads)
    )
    return outputs


def factors_of_chunks(operands: Operands, states: Tensor, totals: Tensor) -> dict[str, Tensor]:
    """Factors, folded keys and entering states of chunks with weak decays (see `liger_chunks`)."""
    o, problem = operands, operands.problem
    kept = torch.float32 if interpreted() else o.q.dtype
    factors = {"rise": o.float32(*o.k.shape)}
    factors |= {"folded": torch.empty_like(o.k, dtype=kept), "entering": torch.empty_like(states, dtype=kept)}
    if problem.chunks:
        chunk_factors[problem.chunks, problem.rows * o.groups](
            o.k,
            o.stats,
            **o.gate,
            **o.rows,
            states=states,
            totals=totals,
            **factors,
            **o.numbers,
            **o.recurrence,
            BV=block(o.values),
            **FUSION,
            num_warps=8 if block(o.features) > 64 else 4,
        )
    return factors


def take_gradients(operands: Operands, doutputs: Tensor, dfinal: Tensor) -> list[Tensor | None]:
    """The gradients of the tensors of `Operands`, in their order. Intermediate results of the forward pass are
    recomputed."""
    o, problem = operands, operands.problem
    entries, whole = o.tokens * o.heads, problem.rows * o.groups
    states, masses, totals, _ = enter_states(o)
    mix_weight = o.q if o.mix_weight is None else o.mix_weight
    mixed = {"mix_weight": mix_weight, "MIX": problem.options.mix, "entries": entries, "H": o.heads}
    values = block(o.values)

    rows = o.float32(5, o.tokens, o.heads)
    dq_rotated, dq = torch.empty_like(o.q_rotated), torch.empty_like(o.q)
    heads, parts = o.tile(QUERY_HEADS)
    dlog = o.float32(parts, o.keys, o.groups, o.features)
    dweight = None
    if o.mix_weight is not None:
        # Tiles without a query stay 0.
        tiles = o.tokens // SUB + 3 * problem.rows
        dweight = torch.zeros(tiles, *o.mix_weight.shape, dtype=torch.float32, device=o.q.device)
    of_states = {"states": states, "masses": masses, "totals": totals}
    passed = {"doutputs": doutputs, "rows": rows, "BV": values, "PRECISION": o.precision, **FUSION}
    inputs = {name: getattr(o, name) for name in ("q_rotated", "k_rotated", "v", "q", "k", "stats")}
    inputs |= o.gate | o.columns | o.rows | o.numbers | o.window | o.recurrence | mixed | of_states | passed
    if o.tiled:
        inputs |= factors_of_chunks(o, states, totals)
        chunk_rows[problem.query_chunks, whole](
            **taken_by(chunk_rows, inputs),
            dweight=o.q if dweight is None else dweight,
            HEADS=o.heads_per_chunk,
            SUB=SUB,
            KEYS=64,
            num_warps=4 * o.heads_per_chunk,
            num_stages=1,
        )
    query_gradients[problem.query_chunks if o.tiled else problem.tiles, whole, parts](
        **taken_by(query_gradients, inputs),
        dq=dq,
        dweight=o.q if dweight is None else dweight,
        dlog=dlog,
        GROUP=heads,
        SUB=SUB,
        KEYS=32,
        TILED=o.tiled,
        num_warps=o.warps(heads),
    )
    # Tiles of 64 rows are those of tensor cores; wider heads leave no room for them in shared memory.
    tile, stages = (64, 2) if o.widest * o.q.element_size() <= 256 else (32, 1)
    # Tiles of all rows are concatenated; each row may have an incomplete one.
    columns = [x for x in (o.column_k, o.column_v) if x is not None]
    parts_of_columns = [o.float32(o.tokens // tile + problem.rows, o.groups, *x.shape[1::2]) for x in columns]
    window_queries[-(-problem.longest // tile), whole](
        **taken_by(window_queries, inputs),
        dq_rotated=dq_rotated,
        parts_k=parts_of_columns[0] if columns else rows,
        parts_v=parts_of_columns[1] if columns else rows,
        TILE=tile,
        KEYS=tile,
        num_warps=8,
        num_stages=stages,
    )
    dcolumns: list[Tensor | None] = [None, None]
    if columns:
        dcolumns = [torch.empty_like(x) for x in columns]
        count = columns[0].shape[1]
        sum_columns[triton.cdiv(count * max(o.width, o.values), 128), whole](
            *parts_of_columns,
            problem.starts,
            *dcolumns,
            o.groups,
            o.width,
            o.values,
            count,
            tile,
            128,
            **FUSION,
            num_warps=4,
        )

    dstates, dmasses, dinitial = torch.empty_like(states), torch.empty_like(masses), torch.empty_like(dfinal)
    width = min(values, 64)
    if problem.chunks:
        of_chunks = inputs | {"dstates": dstates, "dmasses": dmasses, "TILED": o.tiled}
        warps = 8 if block(o.features) > 64 else 4
        if o.tiled:
            chunk_reads[problem.chunks, whole](**taken_by(chunk_reads, of_chunks), num_warps=warps, num_stages=2)
        read_chunks[problem.chunks, whole, triton.cdiv(o.values, width)](
            **taken_by(read_chunks, of_chunks | {"BV": width}), num_warps=warps
        )
    carry_gradients[blocks_of_carry(o), whole](
        dstates,
        dmasses,
        totals,
        dinitial,
        dfinal,
        problem.starts,
        problem.slots,
        problem.lag,
        o.groups,
        o.features,
        o.values,
        CHUNK,
        CARRIED,
        EXACT=o.recurrence["EXACT"],
        **FUSION,
        num_warps=4,
    )

    dk_rotated, dv = torch.empty_like(o.k_rotated), torch.empty_like(o.v)
    dk = torch.zeros(o.k.shape, dtype=torch.float32, device=o.k.device)
    state_dv, flow = o.float32(*o.v.shape), torch.empty_like(dk)
    if problem.chunks:
        size = 64
        pieces = triton.cdiv(o.values, size) + triton.cdiv(o.features, size)
        keys_of_states[problem.chunks, whole, pieces](
            o.k,
            o.v,
            o.stats,
            **o.gate,
            **o.rows,
            totals=totals,
            dstates=dstates,
            dmasses=dmasses,
            dk=dk,
            dv=state_dv,
            flow=flow,
            **o.numbers,
            **o.recurrence,
            TILED=o.tiled,
            BV=values,
            BLOCK=size,
            PRECISION=o.precision,
            **FUSION,
            num_warps=8 if o.widest > 64 else 4,
        )
    if o.tiled:
        chunk_pairs[problem.query_chunks, whole](
            **taken_by(chunk_pairs, inputs),
            dstates=dstates,
            dmasses=dmasses,
            dq=dq,
            dk=dk,
            state_dv=state_dv,
            flow=flow,
            dlog=dlog,
            num_warps=8,
            num_stages=1,
        )
    heads, members = o.tile(KEY_HEADS)
    if problem.chunks:
        key_gradients[problem.chunks if o.tiled else -(-problem.stream // SUB), whole](
            **taken_by(key_gradients, inputs),
            dk=dk,
            state_dv=state_dv,
            dlog=dlog,
            GROUP=heads,
            PARTS=members,
            LOGS=parts,
            SUB=SUB,
            TILED=o.tiled,
            num_warps=o.warps(heads),
        )
    window_keys[-(-(problem.longest + problem.past) // tile), whole](
        **taken_by(window_keys, inputs),
        dk_rotated=dk_rotated,
        dv=dv,
        state_dv=state_dv,
        TILE=tile,
        QUERIES=tile,
        num_warps=8,
        num_stages=stages,
    )

    of_key = problem.divisor is not None
    dgate = torch.zeros_like(o.given_gate) if not of_key else None
    dscale, dbias = (torch.zeros_like(masses) if of_key else None for _ in range(2))
    if problem.chunks:
        gate_gradients[problem.chunks, whole](
            o.k,
            **without(o.gate, "gate"),
            **o.rows,
            states=states,
            masses=masses,
            totals=totals,
            dstates=dstates,
            dmasses=dmasses,
            dlog=dlog,
            flow=flow,
            dk=dk,
            dgate=dk if dgate is None else dgate,
            dscale=masses if dscale is None else dscale,
            dbias=masses if dbias is None else dbias,
            **without(o.numbers, "keys"),
            **without(o.recurrence, "SOFTMAX"),
            BV=32,
            **FUSION,
            num_warps=8 if block(o.features) > 64 else 4,
        )
    if dscale is not None and dbias is not None and o.gate_bias is not None:
        dgate, dbias = dscale.sum(0).to(o.given_gate.dtype), dbias.sum(0).to(o.gate_bias.dtype)
    if dweight is not None and o.mix_weight is not None:
        dweight = dweight.sum(0).to(o.mix_weight.dtype)
    if o.initial_state is not None:
        dinitial = dinitial.to(o.initial_state.dtype)
    return [
        dq_rotated,
        dk_rotated,
        dv,
        dq,
        dk.to(o.k.dtype),
        dgate,
        dbias,
        dweight,
        *dcolumns,
        dinitial,
    ]


def taken_by(kernel: Any, arguments: dict[str, Any]) -> dict[str, Any]:
    """Those of the arguments that a kernel has, and the options of a launch."""
    names = {*kernel.arg_names, *FUSION}
    return {name: value for name, value in arguments.items() if name in names}


def without(arguments: dict[str, Any], *names: str) -> dict[str, Any]:
    return {name: value for name, value in arguments.items() if name not in names}
