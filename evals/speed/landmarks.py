"""The training cost of a layer with landmarks, forward and backward on a CPU: all blocks at once, as in training, and
block by block, as in decoding; compared with the pretrained model's attention over the whole row.

Seconds are CPU seconds of one thread, medians of turns in one run. Bytes are those of the tensors saved for the
backward pass.

    OMP_NUM_THREADS=1 python -m evals.speed.landmarks
    python -m evals.speed.landmarks --table
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

import torch
from linearize_kernels import full_attention
from torch import Tensor

from evals.recurrences.toy import surroundings, write
from linearize.families.base import AttentionLayer, Projections
from linearize.model import MixerConfig
from linearize.model.landmarks.chunks import _chunk
from linearize.model.landmarks.training import whole_rows
from linearize.model.mixer.mixer import Mixer

if TYPE_CHECKING:
    from collections.abc import Callable

FIGURES = Path(__file__).with_name("landmarks.json")
TURNS = 3
# Tokens of a row, landmarks and dtype. SmolLM2 has 332 per layer; redistributed, at most about 1,250.
CASES = (
    (2048, 332, "float32"),
    (2048, 332, "bfloat16"),
    (2048, 1248, "float32"),
    (4096, 332, "float32"),
)
WAYS = {"at once": "trained", "merge by merge": "merges", "the teacher's attention": "teacher"}


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m evals.speed.landmarks", description=__doc__.split("\n\n")[0])
    parser.add_argument("--table", action="store_true", help="print the table of the figures that are there")
    if not parser.parse_args().table:
        measure(CASES, FIGURES)
    print(table(json.loads(FIGURES.read_text(encoding="utf-8"))))


def measure(cases: tuple[tuple[int, int, str], ...], target: Path) -> None:
    torch.set_num_threads(1)
    found = []
    for tokens, landmarks, dtype in cases:
        layer = AttentionLayer(9, 3, 64, 64, scale=64**-0.5)  # SmolLM2's
        config = MixerConfig(layers=[0], window=64, sinks=4, landmarks=landmarks, rope=True, mix="softmax")
        mixer, new = Mixer(config, layer), _drawn(layer, tokens, getattr(torch, dtype))
        ways: dict[str, Callable[[], Tensor]] = {
            "trained": lambda mixer=mixer, new=new: whole_rows(mixer, new),
            "merges": lambda mixer=mixer, new=new: _chunk(mixer, new, None, None, fused=False),
            "teacher": lambda new=new, scale=layer.scale: full_attention(
                new.q_rotated, new.k_rotated, new.v, scale=scale
            ),
        }
        taken: dict[str, list[float]] = {name: [] for name in ways}
        for turn in range(TURNS + 1):
            for name, run in ways.items():
                began = time.process_time()
                run().float().sum().backward()
                if turn:
                    taken[name].append(time.process_time() - began)
        costs = {name: {"seconds": median(taken[name]), "kept_bytes": _kept(run)} for name, run in ways.items()}
        found.append({"tokens": tokens, "landmarks": landmarks, "dtype": dtype, **costs})
    write(target, {**surroundings(), "turns": TURNS, "cases": found})


def _drawn(layer: AttentionLayer, tokens: int, dtype: torch.dtype) -> Projections:
    generator = torch.Generator().manual_seed(0)
    heads = (layer.query_heads, layer.key_value_heads, layer.key_value_heads, layer.query_heads, layer.key_value_heads)
    shapes = [(1, tokens, count, layer.key_width) for count in heads]
    return Projections(*(torch.randn(shape, generator=generator).to(dtype).requires_grad_() for shape in shapes))


def _kept(run: Callable[[], Tensor]) -> int:
    """Bytes of the storages that autograd saves for the backward pass."""
    kept: dict[int, int] = {}

    def keep(x: Tensor) -> Tensor:
        storage = x.untyped_storage()
        kept[storage.data_ptr()] = storage.nbytes()
        return x

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        output = run()
    del output
    return sum(kept.values())


def table(found: dict[str, Any]) -> str:
    lines = [
        f"| a layer of SmolLM2, CPU seconds (MB kept) | {' | '.join(WAYS)} | merge by merge / at once |",
        "|---" * (len(WAYS) + 2) + "|",
    ]
    for case in found["cases"]:
        costs = [case[name] for name in WAYS.values()]
        cells = [f"{cost['seconds']:.2f} ({cost['kept_bytes'] / 1e6:,.0f})" for cost in costs]
        heading = f"{case['tokens']:,} tokens, {case['landmarks']:,} landmarks, {case['dtype']}"
        ratio = case["merges"]["seconds"] / case["trained"]["seconds"]
        lines.append(f"| {heading} | {' | '.join(cells)} | {ratio:.2f} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
