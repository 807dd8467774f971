"""Estimates of what a user would compose in place of the fused kernels, by the same model of the same machine code.

`chunk_gla` of flash-linear-attention with keys, values and gates repeated per query head, its attention over a window,
and the mix of both. Its attention over everything is estimated too: FlashAttention's tiles, not FlashAttention 3. One
configuration of each autotuned kernel is compiled, the one that is likely best: a tuner on a GPU may find a better
one. Softmaxes of queries and keys, gates, repeats and the mix are counted by their bytes alone.
"""

from __future__ import annotations

from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any
from unittest import mock

import torch

from evals.kernels import compiled
from evals.kernels.estimates import BANDWIDTH, CHUNK, MEMORY, Estimate, by_pipes

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from evals.kernels.compiled import Launch
    from evals.kernels.work import Shape

# The configuration of each autotuned kernel.
_CONFIGURATIONS: dict[str, dict[str, int]] = {
    "chunk_local_cumsum_vector_kernel": {"num_warps": 4, "BS": 64},
    "chunk_fwd_kernel_h": {"BK": 64, "BV": 64, "num_warps": 4, "num_stages": 3},
    "chunk_bwd_kernel_dh": {"BK": 64, "BV": 64, "num_warps": 4, "num_stages": 3},
    "chunk_gla_fwd_A_kernel_intra_sub_inter": {"BK": 64, "num_warps": 2, "num_stages": 2},
    "chunk_gla_fwd_A_kernel_intra_sub_intra": {"num_warps": 2},
    "chunk_gla_fwd_kernel_o": {"BK": 64, "BV": 128, "num_warps": 4, "num_stages": 2},
    "chunk_gla_bwd_kernel_dv": {"BK": 64, "BV": 64, "num_warps": 4, "num_stages": 2},
    "chunk_gla_bwd_kernel_dA": {"BV": 64, "num_warps": 4, "num_stages": 3},
    "chunk_gla_bwd_kernel_intra": {"num_warps": 2, "num_stages": 2},
    "chunk_gla_bwd_kernel_inter": {"BK": 64, "BV": 64, "num_warps": 4, "num_stages": 2},
}
# Seconds of a chunk in a kernel that computes states one after the other.
_SERIAL = 1.3e-6
_QUERIES, _KEYS = 128, 64  # of a tile of the attention


def peers(shape: Shape, length: int, rows: int) -> dict[tuple[str, str], list[Estimate]]:
    """The launches of each pass of each part, by part and pass: `gla`, `window`, `mix` and `causal`."""
    heads, groups, width = shape.query_heads, shape.key_value_heads, shape.width
    from fla.ops.attn import parallel_attn
    from fla.ops.gla import chunk_gla

    def attention(window: int | None) -> Callable[..., Any]:
        return lambda q, k, v: parallel_attn(q, k, v, window_size=window)

    found = {}
    wide, narrow = (1, length, heads, width), (1, length, groups, width)
    parts: dict[str, tuple[Callable[..., Any], tuple[tuple[int, ...], ...]]] = {
        "gla": (lambda q, k, v, g: chunk_gla(q, k, v, g, scale=1.0)[0], (wide,) * 4),
        "window": (attention(shape.window), (wide, narrow, narrow)),
        "causal": (attention(None), (wide, narrow, narrow)),
    }
    for part, (run, sizes) in parts.items():
        window = {"window": shape.window, "causal": length}.get(part, 0)
        for name, launches in zip(("forward", "backward"), _launches(run, sizes), strict=True):
            found[part, name] = [_estimate(launch, shape, length, rows, window) for launch in launches]
    return found | {("mix", name): [_mix(shape, length * rows, name)] for name in ("forward", "backward")}


def composed(shape: Shape, length: int, rows: int) -> list[dict[str, Any]]:
    """Rows of JSON: launches, KiB to and from memory per token and estimated seconds of each part and pass."""
    return [
        {
            "shape": shape.name,
            "length": length,
            "rows": rows,
            "part": part,
            "pass": name,
            "launches": len(found),
            "bytes": sum(one.bytes for one in found),
            "spills": max(one.spills for one in found),
            "estimate": sum(one.estimate for one in found),
        }
        for (part, name), found in peers(shape, length, rows).items()
    ]


def _launches(run: Callable[..., Any], sizes: tuple[tuple[int, ...], ...]) -> tuple[list[Launch], list[Launch]]:
    with _one_configuration(), compiled.recording() as found:
        inputs = [torch.zeros(size, dtype=torch.bfloat16, requires_grad=True) for size in sizes]
        outputs = run(*inputs)
        ahead = list(found)
        outputs.backward(torch.zeros_like(outputs))
    return ahead, found[len(ahead) :]


@contextmanager
def _one_configuration() -> Iterator[None]:
    """Autotuned kernels run with the configuration of `_CONFIGURATIONS`, on the shared memory of Hopper."""
    import fla.ops.attn.parallel as attention
    from fla.ops.utils import cache
    from triton.runtime.autotuner import Autotuner

    def run(tuner: Any, *args: Any, **named: Any) -> Any:
        tuner.nargs = dict(zip(tuner.arg_names, args, strict=False))
        # What is offered here depends on the shared memory of this machine's device.
        offered, wanted = tuner.configs[0].all_kwargs(), _CONFIGURATIONS[tuner.base_fn.__name__]
        chosen = offered | {name: value for name, value in wanted.items() if name not in named}
        return tuner.fn.run(*args, **named, **chosen)

    kinds = {Autotuner, *(x for x in vars(cache).values() if isinstance(x, type) and issubclass(x, Autotuner))}
    with ExitStack() as stack:
        for kind in kinds:
            stack.enter_context(mock.patch.object(kind, "run", run))
        stack.enter_context(mock.patch.object(attention, "check_shared_mem", lambda *_: True))
        yield


def _estimate(launch: Launch, shape: Shape, length: int, rows: int, window: int) -> Estimate:
    program = compiled.compile_launch(launch)
    name, programs = launch.name, rows
    for size in launch.grid:
        programs *= size
    cycles = program.cycles(_trips(name, shape, length, window))
    moved = _bytes(name, shape, length * rows)
    ideal, estimate = by_pipes(program, programs, cycles, moved)
    serial = length / CHUNK * _SERIAL if name in ("chunk_fwd_kernel_h", "chunk_bwd_kernel_dh") else 0.0
    return Estimate(
        name,
        programs,
        program.warps,
        program.registers,
        program.spills,
        program.shared,
        program.blocks,
        program.tensor_cores,
        round(cycles),
        ideal,
        max(estimate, serial),
        moved / (length * rows),
    )


def _trips(name: str, shape: Shape, length: int, window: int) -> list[float]:
    blocks = -(-shape.width // 64)
    # Of the attention: blocks of the tile's own queries, and those of other tokens in its window, in the mean.
    own = _QUERIES / _KEYS
    others = min(-(-(window - 1) // _KEYS), (length - _QUERIES) / 2 / _KEYS)
    return {
        "chunk_fwd_kernel_h": [length / CHUNK],
        "chunk_bwd_kernel_dh": [length / CHUNK],
        "chunk_gla_fwd_A_kernel_intra_sub_inter": [blocks],
        "chunk_gla_fwd_A_kernel_intra_sub_intra": [16],
        "chunk_gla_fwd_kernel_o": [blocks],
        "chunk_gla_bwd_kernel_dv": [blocks],
        "chunk_gla_bwd_kernel_dA": [blocks],
        "chunk_gla_bwd_kernel_intra": [1.5, 16, 1.5, 16],
        "chunk_gla_bwd_kernel_inter": [blocks],
        "parallel_attn_fwd_kernel": [others, own],
        "parallel_attn_bwd_kernel_dq": [others, own],
        "parallel_attn_bwd_kernel_dkv": [own, others],
    }.get(name, [])


def _bytes(name: str, shape: Shape, tokens: int) -> float:
    """Bytes between memory and chip, where each program's inputs come from memory once."""
    heads, width = shape.query_heads, shape.width
    one = float(tokens * heads * width)  # entries of a tensor over query heads
    states = one * width / CHUNK
    pairs, few = tokens * heads * CHUNK * 4.0, tokens * shape.key_value_heads * width * 4.0
    return {
        "chunk_local_cumsum_vector_kernel": 6 * one,
        "chunk_fwd_kernel_h": 8 * one + 2 * states,
        "chunk_bwd_kernel_dh": 8 * one + 4 * states,
        "chunk_gla_fwd_A_kernel_intra_sub_inter": 8 * one + pairs,
        "chunk_gla_fwd_A_kernel_intra_sub_intra": 8 * one + pairs / 4,
        "chunk_gla_fwd_kernel_o": 10 * one + pairs + 2 * states,
        "chunk_gla_bwd_kernel_dv": 10 * one + pairs + 4 * states,
        "chunk_gla_bwd_kernel_dA": 4 * one + pairs,
        "chunk_gla_bwd_kernel_intra": 16 * one + pairs,
        "chunk_gla_bwd_kernel_inter": 24 * one + 8 * states,
        "parallel_attn_fwd_kernel": 4 * one + few,
        "parallel_attn_bwd_kernel_preprocess": 4 * one,
        "parallel_attn_bwd_kernel_dq": 8 * one + few,
        # Gradients per query head in float32, and their sums over groups.
        "parallel_attn_bwd_kernel_dkv": 4 * one + few + (16 * one if shape.group > 1 else 4 * one),
    }[name]


def _mix(shape: Shape, tokens: int, name: str) -> Estimate:
    """Softmaxes, gates, repeats of keys and values, and the mix, each read and written once, as elementwise kernels."""
    one, few = (2.0 * tokens * heads * shape.width for heads in (shape.query_heads, shape.key_value_heads))
    # Two softmaxes and the gates with their repeats; values' repeats; 0.5 y + 0.5 o in two launches.
    moved = 2 * one + 3 * (few + one) + 2 * few + 5 * one
    if name == "backward":
        moved = 3 * one + 3 * (few + one) + 6 * few + 4 * one
    taken = moved / BANDWIDTH / MEMORY
    return Estimate("elementwise", 0, 0, 0, 0, 0, 0, "none", 0, moved / BANDWIDTH, taken, moved / tokens)
