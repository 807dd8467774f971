"""Estimated times of the kernels on an H100 or H200, from their machine code.

    python -m evals.kernels --estimate     needs triton, and no GPU

Nothing here is a measurement. `ideal` is what the busiest pipe needs, or the memory: 132 multiprocessors at 1.85 GHz,
4.3 TB/s. `estimate` assumes that a multiprocessor keeps its pipes busy 45 % of the time with one block of 8 warps, and
60 % with more; and that memory reaches 80 %. The error is estimated too: 15 % for cycles, -30 to +40 % for times.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from evals.kernels.compiled import compile_launch, launches

if TYPE_CHECKING:
    from evals.kernels.compiled import Launch, Program
    from evals.kernels.work import Shape

CLOCK, MULTIPROCESSORS, BANDWIDTH = 1.85e9, 132, 4.3e12
ALONE, TOGETHER, MEMORY = 0.45, 0.6, 0.8
NOTE = "Estimates from machine code for Hopper, not measurements: times to -30 and +40 %."
CHUNK, SUB = 64, 16
# Seconds of four chunks that follow each other in a kernel that carries states; and of a program that finds its chunk
# to be another kernel's.
CARRY, LEAVE = 1.1e-6, 1.3e-6
# Kernels over sub-chunks, which leave chunks of weak decays to those over chunks.
LEAVING = {"write_outputs_kernel", "query_gradients", "key_gradients", "keys_of_states", "read_chunks"}


@dataclass(frozen=True)
class Estimate:
    """One launch. `cycles` of a warp, seconds, `bytes` to and from memory per token."""

    kernel: str
    programs: int
    warps: int
    registers: int
    spills: int
    shared: int
    resident: int
    tensor_cores: str
    cycles: float
    ideal: float
    estimate: float
    bytes: float


def passes(shape: Shape, length: int, rows: int, *, weak: bool = True) -> dict[str, list[Estimate]]:
    """The launches of `forward` and `backward` on `rows` texts of `length` tokens.

    Args:
        weak: all chunks decay weakly; else all are left to the kernels over sub-chunks, and those key by key.
    """
    found = launches(
        shape.query_heads, shape.key_value_heads, shape.width, length, rows=rows, window=shape.window, sinks=shape.sinks
    )
    return {
        name: [_estimate(launch, shape, length, rows, weak, names(part)) for launch in part]
        for name, part in zip(("forward", "backward"), found, strict=True)
    }


def seconds(shape: Shape, length: int, rows: int) -> dict[str, float]:
    """Estimated seconds of each pass."""
    return {name: sum(one.estimate for one in part) for name, part in passes(shape, length, rows).items()}


def names(part: list[Launch]) -> set[str]:
    return {launch.name for launch in part}


def _estimate(launch: Launch, shape: Shape, length: int, rows: int, weak: bool, beside: set[str]) -> Estimate:
    program = compile_launch(launch)
    name, programs = launch.name, _programs(launch, shape, length, rows)
    tiled = any(other.startswith("chunk_") for other in beside)
    leaves = tiled and (name in LEAVING if weak else name.startswith("chunk_"))
    moved = 0.0 if leaves else _bytes(name, shape, length, rows, apart="mix_gradients" in beside)
    cycles = program.cycles(_trips(name, shape, length, weak))
    held = program.blocks
    if leaves:
        cycles, ideal = 0.0, 0.0
        estimate = programs * LEAVE / MULTIPROCESSORS / held
    elif name.startswith("carry"):
        chain = -(-length // CHUNK) / 4 * CARRY
        ideal, estimate = max(moved / BANDWIDTH, chain), max(moved / BANDWIDTH / 0.7, chain)
    else:
        ideal, estimate = by_pipes(program, programs, cycles, moved)
    return Estimate(
        name,
        programs,
        program.warps,
        program.registers,
        program.spills,
        program.shared,
        held,
        program.tensor_cores,
        round(cycles),
        ideal,
        estimate,
        moved / (length * rows),
    )


def by_pipes(program: Program, programs: int, cycles: float, moved: float) -> tuple[float, float]:
    """Ideal and estimated seconds of `programs` of some cycles that move some bytes in all."""
    one = cycles * program.warps / 4 / CLOCK
    pipes = programs * one / MULTIPROCESSORS
    busy = ALONE if program.blocks * program.warps <= 8 else TOGETHER
    ideal, estimate = max(pipes, one, moved / BANDWIDTH), max(pipes / busy, one / busy, moved / BANDWIDTH / MEMORY)
    return ideal, estimate


def _programs(launch: Launch, shape: Shape, length: int, rows: int) -> int:
    """Programs with work; those beyond the end of their row are few."""
    total = 1
    for size in launch.grid:
        total *= size
    return total


def _trips(name: str, shape: Shape, length: int, weak: bool) -> list[float]:
    """Turns of each loop of a kernel, in the order of the code."""
    group = shape.group
    keys = -(-(CHUNK + shape.window - 1) // 64)  # blocks of keys in the windows of a chunk
    near = -(-(SUB + shape.window - 1) // 32)
    own, parts = (0 if weak else SUB), -(-group // 2)
    earlier = 1.5  # sub-chunks of the chunk before one of them, in the mean
    pieces = -(-shape.width // 64)  # blocks of a head's values
    queries = -(-(CHUNK + shape.window - 1) // 64)
    return {
        "write_outputs_kernel": [1, near, own, earlier],
        "query_gradients": [1, earlier, own],
        "key_gradients": [1, parts, own * parts, earlier, earlier * parts],
        "read_chunks": [group],
        "chunk_reads": [group],
        "sum_columns": [length / 512 * group, length / 512 * group],
        "chunk_factors": [pieces] if pieces > 1 else [],
        "chunk_outputs": [keys],
        "window_queries": [keys],
        "chunk_values": [group],
        "chunk_keys": [group] if shape.width <= 128 else [group, group * pieces, pieces],
        "chunk_queries": [group, *([group * pieces] if pieces > 1 else [])],
        "window_keys": [queries, queries * group],
    }.get(name, [])


def _bytes(name: str, shape: Shape, length: int, rows: int, *, apart: bool) -> float:
    """Bytes between memory and chip, where each program's inputs come from memory once.

    Args:
        apart: of the backward pass, where the forward kernels keep their parts.
    """
    tokens, heads, groups, width = length * rows, shape.query_heads, shape.key_value_heads, shape.width
    of_heads, of_groups = 2.0 * tokens * heads * width, 2.0 * tokens * groups * width
    states = 4.0 * tokens / CHUNK * groups * width * width
    numbers = 4.0 * tokens * heads
    wide = 2 * of_groups  # keys in float32
    parts = 2 * of_heads + 3 * numbers if apart else 0.0
    return {
        "key_statistics": of_groups,
        "write_chunks": 2 * of_groups + states,
        "carry_states": 2 * states,
        "write_outputs_kernel": 3 * of_heads + 3 * of_groups + states + (parts and parts - of_heads),
        "chunk_factors": of_groups + 1.5 * wide + 1.5 * states,
        "chunk_outputs": 3 * of_heads + 4 * of_groups + wide + states / 2 + parts,
        "mix_gradients": 3 * of_heads + 6 * numbers,
        "query_gradients": 3 * of_heads + 2 * of_groups + states + wide + 2 * numbers,
        "window_queries": 3 * of_heads + 2 * of_groups + 3 * numbers,
        "chunk_values": 2 * of_heads + of_groups + states + wide + numbers,
        "chunk_keys": 2 * of_heads + 3 * of_groups + states + 4 * wide + 2 * numbers,
        "chunk_queries": 4 * of_heads + 2 * of_groups + states / 2 + 3 * wide + 2 * numbers,
        "window_keys": 2 * of_heads + 4 * of_groups + wide + 3 * numbers,
        "sum_columns": tokens / CHUNK * heads * shape.sinks * width * 8,
        "chunk_reads": 2 * of_heads + states + 2 * numbers,
        "read_chunks": 2 * of_heads + of_groups + states,
        "keys_of_states": 2 * of_groups + states + 3 * wide,
        "key_gradients": 2 * of_heads + 2 * of_groups + 5 * wide,
        "gate_gradients": of_groups + 2 * states + 4 * wide,
    }[name]


def table(shape: Shape, lengths: tuple[int, ...], tokens: int) -> list[dict[str, Any]]:
    """Every launch of every length, as rows of JSON."""
    return [
        {"shape": shape.name, "length": length, "rows": max(tokens // length, 1), "pass": name, **asdict(one)}
        for length in lengths
        for name, part in passes(shape, length, max(tokens // length, 1)).items()
        for one in part
    ]
