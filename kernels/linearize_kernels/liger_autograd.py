"""Launch the Triton kernels of Liger attention, forward and backward."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from linearize_kernels.dispatch import interpreted, power_of_2
from linearize_kernels.liger_chunk_gradients import chunk_keys, chunk_queries, chunk_reads, chunk_values
from linearize_kernels.liger_chunks import chunk_factors, chunk_outputs
from linearize_kernels.liger_forward import carry_states, key_statistics, write_chunks, write_outputs_kernel
from linearize_kernels.liger_key_gradients import gate_gradients, key_gradients, keys_of_states, read_chunks
from linearize_kernels.liger_mix import mix_gradients
from linearize_kernels.liger_options import Columns, Gate, LigerOptions, row_starts, tile_list
from linearize_kernels.liger_query_gradients import query_gradients
from linearize_kernels.liger_tiles import tl, triton
from linearize_kernels.liger_window_gradients import sum_columns, window_keys, window_queries

if TYPE_CHECKING:
    from torch.autograd.function import FunctionCtx

CHUNK, SUB = 64, 16
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
        given: the rows as `liger_attention` takes them. tokens: of all rows.
        sinks: number of columns that are sinks.
        divisor: of gates built from keys; None for given log-gates.
    """

    options: LigerOptions
    starts: Tensor
    counts: Tensor | None
    exists: Tensor | None
    given: Tensor | int
    tokens: int
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
    def chunks(self) -> Tensor:
        """The chunks of all rows' streams, the tokens that their recurrences read; see `tile_list`."""
        return self.tiles(CHUNK, more=-self.lag)

    def tiles(self, step: int, *, more: int = 0, before: int = 0) -> Tensor:
        return tile_list(self.given, self.tokens, self.starts.device, step, more=more, before=before)

    def tiles_of_queries(self, step: int) -> Tensor:
        """Tiles of queries, aligned with the stream, and those before it."""
        return self.tiles(step, more=-self.lag, before=-(-self.lag // step))

    @cached_property
    def slots(self) -> Tensor:
        """`[R]` int32, the first slot of each row."""
        chunks = (self.starts.diff() + (CHUNK - 1 - self.lag)).clamp_min(0).div(CHUNK, rounding_mode="floor")
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
        return self.q.dtype in TILED

    @property
    def heads_per_chunk(self) -> int:
        """Query heads of a tile of a chunk: with two, each group of four warps has rows of its own."""
        return 1 if self.heads // self.groups % 2 or self.widest > 128 else 2

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
) -> tuple[Tensor, Tensor]:
    """Run `liger_attention` on checked arguments."""
    exists = columns.exists if columns is not None else None
    problem = Problem(
        options=options,
        starts=row_starts(rows, q.shape[0], q.device).int(),
        counts=None if counts is None else counts.int(),
        exists=None if exists is None else exists.to(torch.uint8).contiguous(),
        given=rows,
        tokens=q.shape[0],
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
    chunks = problem.chunks
    if len(chunks):
        write_chunks[len(chunks), o.groups, triton.cdiv(o.values, width)](
            o.k,
            o.v,
            o.stats,
            **o.gate,
            **o.rows,
            tiles=chunks,
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
    carry(o, states, masses, totals, o.initial_state, final)
    return states, masses, totals, final


def carry(
    operands: Operands,
    states: Tensor,
    masses: Tensor,
    totals: Tensor,
    initial: Tensor | None,
    final: Tensor,
    *,
    backward: bool = False,
) -> None:
    """Carry states and masses, or their gradients, over the chunks of every row."""
    o, problem = operands, operands.problem
    blocks = sum(-(-count // CARRIED) for count in (o.features * o.values, o.features))
    carry_states[problem.rows * o.groups, blocks](
        states,
        masses,
        totals,
        totals if initial is None else initial,
        final,
        problem.starts,
        problem.slots,
        problem.lag,
        o.groups,
        o.features,
        o.values,
        CHUNK,
        CARRIED,
        FROM_STATE=initial is not None,
        BACKWARD=backward,
        EXACT=o.recurrence["EXACT"],
        **FUSION,
        num_warps=4,
    )


def write_outputs(operands: Operands, states: Tensor, masses: Tensor, totals: Tensor) -> Tensor:
    """Compute the outputs `[N, H, V]`."""
    outputs = operands.q.new_empty(operands.tokens, operands.heads, operands.values)
    attend(operands, {"states": states, "masses": masses, "totals": totals, "outputs": outputs}, apart=False)
    return outputs


def attend(operands: Operands, results: dict[str, Tensor], *, apart: bool) -> dict[str, Tensor]:
    """Run the forward kernels over queries; returns the factors of chunks.

    Args:
        results: states, and the arrays that the kernels write: `outputs`, and with `apart` those of `liger_mix`.
    """
    o, problem = operands, operands.problem
    arguments = {
        **{name: getattr(o, name) for name in ("q_rotated", "k_rotated", "v", "q", "k", "stats")},
        **(o.gate | o.columns | o.rows | o.numbers | o.window | o.recurrence),
        "mix_weight": o.q if o.mix_weight is None else o.mix_weight,
        **dict.fromkeys(("apart", "faded", "rows"), results["outputs"]),
        **results,
        "entries": o.tokens * o.heads,
        "PRECISION": o.precision,
        "APART": apart,
        **FUSION,
    }
    factors: dict[str, Tensor] = {}
    if o.tiled:
        factors = factors_of_chunks(o, results["states"], results["totals"])
        tiles = problem.tiles_of_queries(CHUNK)
        parts = triton.cdiv(o.heads // o.groups, o.heads_per_chunk)
        chunk_outputs[len(tiles) * parts, o.groups, triton.cdiv(o.values, 128)](
            **taken_by(chunk_outputs, arguments | factors),
            tiles=tiles,
            BV=min(block(o.values), 128),
            HEADS=o.heads_per_chunk,
            KEYS=64,
            num_warps=4 * o.heads_per_chunk if o.widest <= 128 else 8,
            num_stages=1,
        )
    heads, parts = o.tile(OUTPUT_HEADS)
    pieces = triton.cdiv(o.values, o.value_block)
    tiles = problem.tiles_of_queries(CHUNK if o.tiled else SUB)
    write_outputs_kernel[len(tiles), o.groups, pieces * parts](
        **taken_by(write_outputs_kernel, arguments),
        tiles=tiles,
        BV=o.value_block,
        GROUP=heads,
        SUB=SUB,
        KEYS=32,
        TILED=o.tiled,
        num_warps=o.warps(heads),
    )
    return factors


def factors_of_chunks(operands: Operands, states: Tensor, totals: Tensor) -> dict[str, Tensor]:
    """Factors, folded keys and entering states of chunks with weak decays (see `liger_chunks`)."""
    o, problem = operands, operands.problem
    kept = torch.float32 if interpreted() else o.q.dtype
    factors = {"rise": o.float32(*o.k.shape)}
    factors |= {"folded": torch.empty_like(o.k, dtype=kept), "entering": torch.empty_like(states, dtype=kept)}
    chunks = problem.chunks
    if len(chunks):
        size = min(block(o.features), 64)
        chunk_factors[len(chunks), o.groups, triton.cdiv(o.features, size)](
            o.k,
            o.stats,
            **o.gate,
            **o.rows,
            tiles=chunks,
            states=states,
            totals=totals,
            **factors,
            **o.numbers,
            **o.recurrence,
            BLOCK=size,
            BV=min(block(o.values), 64),
            **FUSION,
            num_warps=4,
        )
    return factors


def take_gradients(operands: Operands, doutputs: Tensor, dfinal: Tensor) -> list[Tensor | None]:
    """The gradients of the tensors of `Operands`, in their order. Intermediate results of the forward pass are
    recomputed."""
    o, problem = operands, operands.problem
    entries, chunks = o.tokens * o.heads, problem.chunks
    states, masses, totals, _ = enter_states(o)
    mix_weight = o.q if o.mix_weight is None else o.mix_weight
    mixed = {"mix_weight": mix_weight, "MIX": problem.options.mix, "entries": entries, "H": o.heads}
    values = block(o.values)

    dq_rotated, dq = torch.empty_like(o.q_rotated), torch.empty_like(o.q)
    # The window's outputs and the faded features take the memory of gradients that are written later.
    kept = torch.float32 if interpreted() else o.q.dtype
    read = torch.empty(doutputs.shape, dtype=kept, device=o.q.device)
    window_outputs, faded = (
        x if x.shape == like.shape and x.dtype == kept else torch.empty(like.shape, dtype=kept, device=o.q.device)
        for x, like in ((dq_rotated, doutputs), (dq, o.q))
    )
    rows = o.float32(5, o.tokens, o.heads)
    of_states = {"states": states, "masses": masses, "totals": totals}
    passed = {"outputs": window_outputs, "apart": read, "faded": faded, "rows": rows}
    factors = attend(o, of_states | passed, apart=True)
    tile = 32
    dweight = None
    if o.mix_weight is not None:
        dweight = o.float32(triton.cdiv(o.tokens, tile), *o.mix_weight.shape)
    mix_gradients[triton.cdiv(o.tokens, tile), o.heads](
        window_outputs,
        read,
        mix_weight,
        doutputs,
        rows,
        rows if dweight is None else dweight,
        entries,
        o.heads,
        o.values,
        values,
        tile,
        problem.options.mix,
        problem.options.normalize,
        **FUSION,
        num_warps=4,
    )
    del window_outputs, read

    heads, parts = o.tile(QUERY_HEADS)
    dlog = o.float32(parts, o.keys, o.groups, o.features)
    inputs = {name: getattr(o, name) for name in ("q_rotated", "k_rotated", "v", "q", "k", "stats")}
    inputs |= o.gate | o.columns | o.rows | o.numbers | o.window | o.recurrence | mixed | of_states | factors
    inputs |= {"doutputs": doutputs, "rows": rows, "faded": faded, "dlog": dlog, "dq": dq}
    inputs |= {"BV": values, "PRECISION": o.precision, "TILED": o.tiled, **FUSION}
    # Tiles of 64 rows are those of tensor cores; wider heads leave no room for them in shared memory.
    wide = o.widest * o.q.element_size()
    tile, stages = (64, 2 if wide <= 256 else 1) if wide <= 512 else (32, 1)
    # Each row may have an incomplete tile.
    columns = [x for x in (o.column_k, o.column_v) if x is not None]
    parts_of_columns = [o.float32(o.tokens // tile + problem.rows, o.heads, *x.shape[1::2]) for x in columns]
    tiles = problem.tiles(tile)
    window_queries[len(tiles) * (o.heads // o.groups), o.groups](
        **taken_by(window_queries, inputs | {"tiles": tiles}),
        dq_rotated=dq_rotated,
        parts_k=parts_of_columns[0] if columns else rows,
        parts_v=parts_of_columns[1] if columns else rows,
        TILE=tile,
        KEYS=tile if wide <= 256 else 32,
        num_warps=8,
        num_stages=stages,
    )
    dcolumns: list[Tensor | None] = [None, None]
    if columns:
        dcolumns = [torch.empty_like(x) for x in columns]
        count = columns[0].shape[1]
        sum_columns[problem.rows * o.groups, triton.cdiv(count * max(o.width, o.values), 128)](
            *parts_of_columns,
            problem.starts,
            *dcolumns,
            o.heads,
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
    warps = 8 if block(o.features) > 64 else 4
    inputs |= {"dstates": dstates, "dmasses": dmasses, "tiles": chunks}
    if len(chunks):
        width = min(values, 128 if block(o.features) <= 128 else 64)
        if o.tiled:
            chunk_reads[len(chunks), o.groups, triton.cdiv(o.values, width)](
                **taken_by(chunk_reads, inputs | {"BV": width}), num_warps=warps, num_stages=2
            )
        width = min(values, 64)
        read_chunks[len(chunks), o.groups, triton.cdiv(o.values, width)](
            **taken_by(read_chunks, inputs | {"BV": width}), num_warps=warps
        )
    carry(o, dstates, dmasses, totals, dfinal, dinitial, backward=True)

    dk_rotated, dv = torch.empty_like(o.k_rotated), torch.empty_like(o.v)
    dk = torch.zeros(o.k.shape, dtype=torch.float32, device=o.k.device)
    state_dv, flow = o.float32(*o.v.shape), torch.empty_like(dk)
    inputs |= {"dk": dk, "state_dv": state_dv, "flow": flow}
    if len(chunks):
        size = 64
        pieces = triton.cdiv(o.values, size) + triton.cdiv(o.features, size)
        keys_of_states[len(chunks), o.groups, pieces](
            **taken_by(keys_of_states, inputs),
            dv=state_dv,
            BLOCK=size,
            num_warps=8 if o.widest > 64 else 4,
        )
        if o.tiled:
            width = min(values, 128 if block(o.features) <= 128 else 64)
            chunk_values[len(chunks), o.groups, triton.cdiv(o.values, width)](
                **taken_by(chunk_values, inputs | {"BV": width}), num_warps=8, num_stages=1
            )
            chunk_keys[len(chunks), o.groups](**taken_by(chunk_keys, inputs | {"BV": width}), num_warps=8, num_stages=1)
    if o.tiled:
        # After `chunk_keys`, to whose part of `dlog` it adds; and last of those that read `faded`, which may be `dq`.
        tiles = problem.tiles_of_queries(CHUNK)
        chunk_queries[len(tiles), o.groups](
            **taken_by(chunk_queries, inputs | {"BV": min(values, 64), "tiles": tiles}), num_warps=8, num_stages=1
        )
    tiles = problem.tiles_of_queries(CHUNK if o.tiled else SUB)
    query_gradients[len(tiles), o.groups, parts](
        **taken_by(query_gradients, inputs | {"tiles": tiles}), GROUP=heads, SUB=SUB, num_warps=o.warps(heads)
    )
    heads, members = o.tile(KEY_HEADS)
    if len(chunks):
        tiles = chunks if o.tiled else problem.tiles(SUB, more=-problem.lag)
        key_gradients[len(tiles), o.groups](
            **taken_by(key_gradients, inputs | {"tiles": tiles}),
            GROUP=heads,
            PARTS=members,
            LOGS=parts,
            SUB=SUB,
            num_warps=o.warps(heads),
        )
    tiles = problem.tiles(tile, more=problem.past)
    window_keys[len(tiles), o.groups](
        **taken_by(window_keys, inputs | {"tiles": tiles}),
        dk_rotated=dk_rotated,
        dv=dv,
        TILE=tile,
        QUERIES=tile if wide <= 256 else 32,
        num_warps=8,
        num_stages=stages,
    )

    of_key = problem.divisor is not None
    dgate = torch.zeros_like(o.given_gate) if not of_key else None
    dscale, dbias = (torch.zeros_like(masses) if of_key else None for _ in range(2))
    if len(chunks):
        gate_gradients[len(chunks), o.groups](
            **taken_by(gate_gradients, inputs | {"BV": 32}),
            dgate=dk if dgate is None else dgate,
            dscale=masses if dscale is None else dscale,
            dbias=masses if dbias is None else dbias,
            num_warps=warps,
        )
    if dscale is not None and dbias is not None and o.gate_bias is not None:
        dgate, dbias = dscale.sum(0).to(o.given_gate.dtype), dbias.sum(0).to(o.gate_bias.dtype)
    if dweight is not None and o.mix_weight is not None:
        dweight = dweight.sum(0).to(o.mix_weight.dtype)
    if o.initial_state is not None:
        dinitial = dinitial.to(o.initial_state.dtype)
    return [dq_rotated, dk_rotated, dv, dq, dk.to(o.k.dtype), dgate, dbias, dweight, *dcolumns, dinitial]


def taken_by(kernel: Any, arguments: dict[str, Any]) -> dict[str, Any]:
    """Those of the arguments that a kernel has, and the options of a launch."""
    names = {*kernel.arg_names, *FUSION}
    return {name: value for name, value in arguments.items() if name in names}
