"""Time per token of each recurrence on texts of 1k to 16k tokens; constant if the chunkwise form is linear.

Measured is the prefill of a converted layer's recurrence: the module over a whole text from an empty state, without
gradients, with SmolLM2's heads (9 query, 3 key/value, width 64). Times are CPU seconds of one thread, which depend less
on other load; lengths run in turns, and the median over the turns is kept.

The shortest and the longest length are measured again with a C library that keeps freed memory. By default it returns
blocks of more than 32 MB to the system, and each new allocation causes page faults. At 16k tokens the output alone is
such a block.

    python -m evals.recurrences.linear_time
"""

from __future__ import annotations

import argparse
import ctypes
import sys
import time
from pathlib import Path
from statistics import median

import torch

from evals.recurrences.toy import FOLDER, markdown, surroundings, write
from linearize.families.base import AttentionLayer
from linearize.model.configuration import MixerConfig
from linearize.model.recurrences import RECURRENCES, build_recurrence

LENGTHS = (1024, 2048, 4096, 8192, 16384)
LAYER = AttentionLayer(query_heads=9, key_value_heads=3, key_width=64, value_width=64, scale=64**-0.5)


@torch.inference_mode()
def microseconds_per_token(name: str, lengths: tuple[int, ...] = LENGTHS, turns: int = 5) -> dict[int, float]:
    """The median over the turns, by length; the first turn is a warm-up."""
    generator = torch.Generator().manual_seed(0)
    module = build_recurrence(MixerConfig(layers=[0], recurrence=name), LAYER, depth=1.0)
    assert module is not None  # noqa: S101 - only the name `none` gives none
    heads = (LAYER.query_heads, LAYER.key_value_heads, LAYER.key_value_heads)
    texts = {t: [torch.randn(1, t, h, LAYER.key_width, generator=generator) for h in heads] for t in lengths}
    taken: dict[int, list[float]] = {length: [] for length in lengths}
    for turn in range(turns + 1):
        for length, (q, k, v) in texts.items():
            state = module.state(1, q.device)
            began = time.process_time()
            module.in_segments(q, k, v, k, None, state)
            if turn:
                taken[length].append((time.process_time() - began) / length * 1e6)
    return {length: median(times) for length, times in taken.items()}


def keep_freed_memory() -> bool:
    """Make glibc keep large freed blocks. False if the C library is another."""
    if not sys.platform.startswith("linux"):
        return False
    mmap_threshold, trim_threshold, bound = -3, -1, 1 << 30
    library = ctypes.CDLL(None)
    return bool(library.mallopt(mmap_threshold, bound) and library.mallopt(trim_threshold, bound))


def main() -> None:
    parser = argparse.ArgumentParser(description="Time per token by length.")
    parser.add_argument("--only", help="comma-separated; by default all")
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--out", type=Path, default=FOLDER / "linear_time.json")
    arguments = parser.parse_args()
    torch.set_num_threads(1)

    names = arguments.only.split(",") if arguments.only else list(RECURRENCES)
    ends = (LENGTHS[0], LENGTHS[-1])
    results, rows = [], []
    for name in names:
        taken = microseconds_per_token(name, turns=arguments.turns)
        ratio = taken[ends[1]] / taken[ends[0]]
        rounded = {length: round(value, 2) for length, value in taken.items()}
        results.append({"recurrence": name, "microseconds_per_token": rounded, "longest_to_shortest": round(ratio, 3)})
        lengths = {f"{length // 1024}k": f"{value:.1f}" for length, value in taken.items()}
        rows.append({"recurrence": name, **lengths, "16k / 1k": f"{ratio:.2f}"})
        print(results[-1], flush=True)
    for result, row in zip(results, rows, strict=True) if keep_freed_memory() else ():
        taken = microseconds_per_token(result["recurrence"], ends, arguments.turns)
        ratio = taken[ends[1]] / taken[ends[0]]
        result["longest_to_shortest_with_memory_kept"] = round(ratio, 3)
        row["with memory kept"] = f"{ratio:.2f}"
        print(row, flush=True)
    write(arguments.out, {**surroundings(), "turns": arguments.turns, "results": results})
    print(markdown(rows))


if __name__ == "__main__":
    main()
