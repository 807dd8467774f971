"""Matrix products with weights on a CPU, one layer at a time: float32 and bfloat16 by torch and by oneDNN, int8 by
torch's kernel and in pairs. `linearize_kernels/products.py` and `quantization/pairs.py` choose among them.

The weights exceed the CPU caches, as in a model; contenders run in turns, and medians are kept. Needs an otherwise idle
machine. Writes `products.json`.

    python -m evals.speed.products
"""

from __future__ import annotations

import argparse
import itertools
import json
import time
from functools import partial
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import nn

from evals.recurrences.toy import markdown, surroundings, write
from linearize.model.quantized import Quantization
from linearize.quantization.pairs import PairedLinear, pairs_are_fast
from linearize.quantization.rounding import rounded

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from torch import Tensor

FIGURES = Path(__file__).with_name("products.json")
# Name, inputs, outputs: of SmolLM2-135M, and of a feed-forward block of a billion parameters.
LAYERS = (
    ("q, k and v", 576, 960),
    ("up", 576, 1536),
    ("down", 1536, 576),
    ("head", 576, 49_152),
    ("up of 1B", 2048, 8192),
)
ROWS = (1, 16, 512)
# Bytes of weights, larger than any cache.
APART = 2**28
TURNS, SECONDS = 7, 0.05


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m evals.speed.products", description=__doc__.split("\n\n")[0])
    parser.add_argument("--table", action="store_true", help="print the figures that are there")
    parser.add_argument("--short", action="store_true", help="one layer and few turns, to see that it runs")
    arguments = parser.parse_args()
    if arguments.table:
        print(table(json.loads(FIGURES.read_text(encoding="utf-8"))))
        return
    layers, turns = (LAYERS[:1], 1) if arguments.short else (LAYERS, TURNS)
    most = torch.get_num_threads()
    facts = {**surroundings(), "rows": [row for threads in sorted({1, most}) for row in _on(threads, layers, turns)]}
    torch.set_num_threads(most)
    if not arguments.short:
        write(FIGURES, facts)
    print(table(facts))


def _on(threads: int, layers: Any, turns: int) -> Iterator[dict[str, Any]]:
    torch.set_num_threads(threads)
    for (name, inputs, outputs), rows in itertools.product(layers, ROWS):
        with torch.inference_mode():
            seconds = _measured(inputs, outputs, rows, turns)
        told = {who: round(1e6 * one, 1) for who, one in seconds.items()}
        yield {
            "layer": name,
            "inputs": inputs,
            "outputs": outputs,
            "rows": rows,
            "threads": threads,
            "microseconds": told,
        }


def _measured(inputs: int, outputs: int, rows: int, turns: int) -> dict[str, float]:
    """Seconds of a product, by contender."""
    count = max(2, APART // (4 * inputs * outputs))
    linears = [nn.Linear(inputs, outputs, bias=False) for _ in range(count)]
    x = torch.randn(rows, inputs)
    calls = {who: itertools.cycle(of) for who, of in _contenders(linears, x).items()}
    found: dict[str, list[float]] = {who: [] for who in calls}
    for _ in range(turns):
        for who, turn in calls.items():
            next(turn)()
            done, started = 0, time.perf_counter()
            while (spent := time.perf_counter() - started) < SECONDS or done < 2:
                next(turn)()
                done += 1
            found[who].append(spent / done)
    return {who: median(times) for who, times in found.items()}


def _contenders(linears: list[nn.Linear], x: Tensor) -> dict[str, list[Callable[[], Any]]]:
    """By contender, a product with each of the layers."""
    half = x.bfloat16()
    kinds: dict[str, list[Callable[[], Any]]] = {}
    kinds["float32"] = [partial(F.linear, x, linear.weight) for linear in linears]
    halves = [linear.weight.bfloat16() for linear in linears]
    kinds["bfloat16"] = [partial(F.linear, half, weight) for weight in halves]
    if hasattr(torch.ops.mkldnn, "_linear_pointwise"):
        kinds["float32, oneDNN"] = [partial(_onednn, x, linear.weight) for linear in linears]
        if torch.ops.mkldnn._is_mkldnn_bf16_supported():
            kinds["bfloat16, oneDNN"] = [partial(_onednn, half, weight) for weight in halves]
    integers = [rounded(linear, Quantization()) for linear in linears]
    for layer in integers:
        layer.fast = True
    kinds["int8"] = [partial(layer, x) for layer in integers]
    if pairs_are_fast():
        kinds["int8 in pairs"] = [partial(PairedLinear(layer), x) for layer in integers]
    return kinds


def _onednn(x: Tensor, weight: Tensor) -> Any:
    return torch.ops.mkldnn._linear_pointwise(x, weight, None, "none", [], "")


def table(facts: dict[str, Any]) -> str:
    """The figures as Markdown, in microseconds."""
    heads = list(dict.fromkeys(who for row in facts["rows"] for who in row["microseconds"]))
    return markdown(
        [
            {
                "layer": f"{row['layer']}, {row['inputs']:,} x {row['outputs']:,}",
                "rows": f"{row['rows']}",
                "threads": f"{row['threads']}",
                **{who: f"{row['microseconds'][who]:,.0f}" if who in row["microseconds"] else "" for who in heads},
            }
            for row in facts["rows"]
        ]
    )


if __name__ == "__main__":
    main()
