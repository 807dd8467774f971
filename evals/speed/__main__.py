"""CPU speed of SmolLM2-135M against its targets. The converted model, its int8 variant, the teacher in plain
transformers and, if that is faster, the teacher with oneDNN products run in turns: decoding, prefill and, except for
int8, steps of LoRA fine-tuning. Medians of five runs count. Writes `smollm2-cpu.json` and prints targets and results.

Memory is measured on the model's first layers, while they read 100,000 tokens in chunks: the cache and the resident
memory of the process, at the end compared with after a tenth of the tokens.

    python -m evals.speed CONVERTED            # minutes on two cores, most of them training
    python -m evals.speed CONVERTED --short    # a few minutes, to see that it runs
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch
from transformers import DynamicCache

from evals.recurrences.toy import markdown, surroundings, write
from linearize.benchmark.bench import Plan, bench
from linearize.checkpoint.provenance import provenance_of
from linearize.model import cache_nbytes
from linearize.recipe import load_recipe
from linearize.runtime.memory import resident_bytes
from linearize.sources.source import find_source, load_model

FOLDER = Path(__file__).parent
LENGTHS = (512, 2048, 8192, 32_768)
TRAIN = (512, 2048)
READ, PIECE, LAYERS = 100_000, 1000, 3


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("model", help="SmolLM2-135M, converted with the default recipe")
    parser.add_argument("--short", action="store_true", help="fewer lengths, runs and tokens; writes nothing")
    arguments = parser.parse_args()
    plan = Plan(lengths=LENGTHS, prefill_up_to=2048, repeats=5, int8=True, train=TRAIN)
    read = READ
    if arguments.short:
        plan = Plan(lengths=(512, 8192), prefill_up_to=512, repeats=3, steps=4, int8=True, train=TRAIN[:1])
        read //= 10
    facts = bench(arguments.model, load_recipe("window-gla").mixer, plan, say=print)
    facts["model"] = provenance_of(find_source(arguments.model))["base"]["name"]
    facts["long_text"] = _long_text(arguments.model, read)
    facts["bars"] = bars(facts)
    print(
        markdown([{"": bar["what"], "asked": f"{bar['asked']}", "seen": f"{bar['seen']:.3g}"} for bar in facts["bars"]])
    )
    if not arguments.short:
        around = surroundings()
        command = around["command"].replace(arguments.model, "CONVERTED")
        write(FOLDER / "smollm2-cpu.json", {**around, "command": command, **facts})


def bars(facts: dict[str, Any]) -> list[dict[str, Any]]:
    """Targets and results of all measurements."""
    speeds = {
        (row["kind"], row["system"], row["tokens"]): row["tokens_per_second"]
        for row in facts["rows"]
        if "skipped" not in row
    }
    aims = [
        ("decode", "model", 512, "teacher", 1.0),
        ("decode", "model", 8192, "teacher", 2.0),
        ("decode", "model", 32_768, "teacher", 6.0),
        ("prefill", "model", 512, "teacher", 0.9),
        ("prefill", "model", 2048, "teacher", 1.0),
        ("decode", "model", 2048, "teacher-onednn", 1.0),
        ("prefill", "model", 2048, "teacher-onednn", 1.0),
        ("decode", "int8", 512, "model", 1.5),
        ("train", "model", 2048, "teacher", 1.0),
        ("train", "model", 2048, "teacher-onednn", 1.0),
    ]
    found = [
        {
            "what": f"{kind} at {tokens}: {system} / {other}",
            "asked": f">= {least}",
            "seen": speeds[kind, system, tokens] / speeds[kind, other, tokens],
        }
        for kind, system, tokens, other, least in aims
        if {(kind, system, tokens), (kind, other, tokens)} <= set(speeds)
    ]
    long = facts["long_text"]
    for name in ("cache_bytes", "resident_bytes"):
        first, last = long[name][0], long[name][-1]
        found.append({"what": f"{name} at the end / after a tenth", "asked": "<= 1.01", "seen": last / first})
    return found


@torch.inference_mode()
def _long_text(reference: str, tokens: int) -> dict[str, Any]:
    model: Any = load_model(find_source(reference), dtype="float32", device="cpu")
    model.model.layers = model.model.layers[:LAYERS]
    cache, ids = DynamicCache(config=model.config.text_config), torch.arange(PIECE)[None] + 5
    cache.layers = cache.layers[:LAYERS]
    seen: dict[str, Any] = {"layers": LAYERS, "tokens": [], "cache_bytes": [], "resident_bytes": []}
    for read in range(PIECE, tokens + 1, PIECE):
        model(ids, past_key_values=cache, use_cache=True, logits_to_keep=1)
        if read % (tokens // 10) == 0:
            seen["tokens"].append(read)
            seen["cache_bytes"].append(cache_nbytes(cache))
            seen["resident_bytes"].append(resident_bytes())
    return seen


if __name__ == "__main__":
    main()
