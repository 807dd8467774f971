"""Estimated times of the two kernels that choose and read for a whole text with landmarks, from their machine code for
Hopper. Two more move as much as they have to: one lays tokens out, one writes the memory.

    python -m evals.kernels.landmarks      needs triton, and no GPU; writes results/landmarks.json

The model is that of `estimates.py`, with what it assumes. It counts no waits: a merge has some 40 sums over a program's
threads, one after the other.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from evals.kernels.compiled import compile_launch, recording
from evals.kernels.estimates import NOTE, by_pipes
from evals.kernels.work import SHAPES
from evals.recurrences.toy import markdown, surroundings, write
from linearize.families.base import AttentionLayer, Projections
from linearize.model.configuration import BLOCK, MixerConfig, room
from linearize.model.memory import LayerMemory
from linearize.model.mixer.mixer import Mixer

if TYPE_CHECKING:
    from evals.kernels.compiled import Launch
    from evals.kernels.work import Shape

FIGURES = Path(__file__).with_name("results") / "landmarks.json"
WINDOW, SINKS = 64, 4
TEXTS, SLOTS = ((2048, 1), (8192, 1), (2048, 16)), (332, 1035)
READING = ("landmark_choose_kernel", "landmark_read_kernel")
CODED = {"memory_dtype": "int4", "landmark_score": "learned"}  # those of the default recipe


@dataclass(frozen=True)
class Estimate:
    """One launch for a layer: seconds if pipes were always busy, and estimated seconds."""

    kernel: str
    programs: int
    warps: int
    registers: int
    spills: int
    shared: int
    ideal: float
    estimate: float


def landmark_launches(
    heads: tuple[int, int, int], tokens: int, slots: int, *, rows: int = 1, dtype: torch.dtype = torch.bfloat16,
    **options: Any,
) -> list[Launch]:  # fmt: skip
    """The launches for texts of `tokens` tokens, from an empty memory.

    Args:
        heads: query heads, key/value heads and their width.
        options: of the mixer.
    """
    queries, groups, width = heads
    layer = AttentionLayer(queries, groups, width, width, width**-0.5)
    config = MixerConfig(layers=[0], window=WINDOW, sinks=SINKS, landmarks=slots, recurrence="none", **options)
    with torch.device("meta"):
        mixer = Mixer(config, layer)
        q, k = (torch.empty(rows, tokens, heads, width, dtype=dtype) for heads in (queries, groups))
        memory = LayerMemory(mixer.parts(rows, dtype, q.device), rows, q.device)
        with torch.no_grad(), recording() as found:
            mixer(Projections(q, k, k, q, k), None, memory, fused=True)
    return found


def estimates(shape: Shape, tokens: int, slots: int, rows: int) -> list[Estimate]:
    """The launches for `rows` texts; queries, keys and outputs move once."""
    found = []
    heads = (shape.query_heads, shape.key_value_heads, shape.width)
    first = (-SINKS - WINDOW + 1) // BLOCK  # blocks of queries before the first merge
    last = (tokens - SINKS - WINDOW) // BLOCK
    filled = [min(BLOCK * max(block, 0), slots) for block in range(first, last + 1)]
    blocks = len(filled)
    moved = rows * tokens * shape.width * (2 * shape.query_heads + 8 * shape.key_value_heads)
    for launch in landmark_launches(heads, tokens, slots, rows=rows, **CODED):
        if launch.name not in READING:
            continue
        program, turn = compile_launch(launch), launch.constants["BLOCK_N"]
        near = -(-(SINKS + room(WINDOW)) // turn)
        kept = sum(-(-count // turn) for count in filled) / blocks
        programs = launch.grid[0] * launch.grid[1] * (launch.grid[2] if len(launch.grid) > 2 else 1)
        if launch.name == "landmark_choose_kernel":
            cycles = program.cycles([blocks, *(blocks * turns for turns in (near, kept, near, kept))])
        else:
            cycles = program.cycles([near, kept])
        ideal, estimate = by_pipes(program, programs, cycles, moved)
        facts = (program.warps, program.registers, program.spills, program.shared)
        found.append(Estimate(launch.name, programs, *facts, ideal, estimate))
    return found


def main() -> None:
    rows = [
        {"shape": shape.name, "tokens": tokens, "rows": count, "slots": slots, **asdict(one)}
        for shape in SHAPES.values()
        for slots in SLOTS
        for tokens, count in TEXTS
        for one in estimates(shape, tokens, slots, count)
    ]
    write(FIGURES, {"note": NOTE, **surroundings(), "results": rows})
    told = [
        {
            "heads": row["shape"],
            "tokens": f"{row['rows']} x {row['tokens']:,}",
            "slots": str(row["slots"]),
            "kernel": row["kernel"],
            "programs": f"{row['programs']:,}",
            "ideal": f"{row['ideal'] * 1e3:.2f} ms",
            "estimate": f"{row['estimate'] * 1e3:.2f} ms",
        }
        for row in rows
    ]
    print(f"{NOTE}\n\n{markdown(told)}")


if __name__ == "__main__":
    main()
