"""GPU speed against its targets: Llama-3-8B's shape in bfloat16 with random weights, converted with the recipe
`window-gla`, and its teacher, in decoding, prefill and steps of LoRA fine-tuning; and the recipe `default`, with its
slots, in decoding and prefill. Writes `llama-3-8b-GPU.json` and prints targets and results.

    python -m evals.speed.gpu              # writing after 1k to 1M tokens at batch 1 and 16; at batch 1 the rest
    python -m evals.speed.gpu --dry-run    # a small shape and short lengths, on any machine; writes nothing
    python -m evals.speed.figure evals/speed/llama-3-8b-GPU.json
"""

from __future__ import annotations

import argparse
import re
from pathlib import Path
from typing import Any

import torch

from evals.recurrences.toy import markdown, surroundings, write
from linearize.benchmark.bench import Plan, bench, sequence_of
from linearize.recipe import load_recipe

FOLDER = Path(__file__).parent
LENGTHS = tuple(1 << power for power in (10, 12, 13, 14, 15, 17, 18, 20))
TRAIN = (2048, 4096, 8192)
SLOTS_READ = 8192  # a prompt's blocks are chosen one by one
PEAK_BYTES = 16.4e9


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--config", default="llama-3-8b", help="the shape, by the name that linearize bench knows")
    parser.add_argument("--dry-run", action="store_true", help="a small shape, to see that it runs; writes nothing")
    arguments = parser.parse_args()
    if arguments.dry_run:
        small: dict[str, Any] = {"layers": 2, "repeats": 2, "steps": 4}
        parts = measured("smollm2-135m", (64, 128), (1, 2), read=64, train=(64, 128), **small)
        slots = measured("smollm2-135m", (64, 128), (1,), read=64, recipe="default", **small)
    elif not torch.cuda.is_available():
        parser.error("there is no GPU here; --dry-run shows that the script runs")
    else:
        parts = measured(arguments.config, LENGTHS, (1, 16), read=LENGTHS[-1], train=TRAIN)
        slots = measured(arguments.config, LENGTHS, (1, 16), read=SLOTS_READ, recipe="default", teacher=False)
    facts = {**parts[0], "rows": [row for part in parts for row in part["rows"]]}
    facts["copy_bytes_per_second"] = [part["copy_bytes_per_second"] for part in parts]
    facts["ahead_from"] = _merged([part["ahead_from"] for part in parts])
    facts["bars"] = bars(facts)
    facts["slots"] = [row for part in slots for row in part["rows"]]
    print(markdown([{"": bar["what"], "asked": bar["asked"], "seen": _seen(bar)} for bar in facts["bars"]]))
    told = ("kind", "system", "batch", "tokens", "tokens_per_second")
    print(markdown([{name: f"{row[name]}" for name in told} for row in facts["slots"]]))
    if not arguments.dry_run:
        gpu = re.sub(r"[^a-z0-9]+", "-", facts["device"].lower().removeprefix("nvidia ")).strip("-")
        write(FOLDER / f"{arguments.config}-{gpu}.json", {**surroundings(), **facts})


def measured(
    config: str,
    lengths: tuple[int, ...],
    batches: tuple[int, ...],
    *,
    read: int,
    train: tuple[int, ...] = (),
    recipe: str = "window-gla",
    layers: int | None = None,
    **more: Any,
) -> list[dict[str, Any]]:
    """The facts of `linearize bench` for each batch. Only the first batch also measures prefill, up to `read` tokens,
    and training, on rows of `train` tokens."""
    mixer = load_recipe(recipe).mixer
    mixer = mixer.model_copy(update={"landmarks_by": None})  # which slots a layer gets is fitted, and changes no speed
    found = []
    for batch in batches:
        first = batch == batches[0]
        also: dict[str, Any] = {"prefill_up_to": read if first else 0, "train": train if first else ()}
        plan = Plan(lengths=lengths, batches=(batch,), **also, **more)
        dtype = "bfloat16" if torch.cuda.is_available() else "float32"
        found.append(bench(None, mixer, plan, config=config, layers=layers, dtype=dtype, say=print))
    return found


def bars(facts: dict[str, Any]) -> list[dict[str, Any]]:
    """Targets and results of the converted model's rows."""
    found: list[dict[str, Any]] = []
    for batch in sorted({row["batch"] for row in facts["rows"]}):
        own = sequence_of(facts["rows"], "decode", "model", batch)
        seconds = [row["batch"] / row["tokens_per_second"] for row in own]
        middle = sorted(seconds)[len(seconds) // 2]
        found += [
            _bar(f"share of the copy's bandwidth, least, batch {batch}", ">= 0.80", min(r["roof_share"] for r in own)),
            _bar(
                f"time per token, farthest from the median, batch {batch}",
                "<= 0.03",
                max(abs(s / middle - 1) for s in seconds),
            ),
        ]
        peaks = [row["peak_bytes"] for row in own if row["peak_bytes"] is not None]
        if peaks:
            spread = max(peaks) / min(peaks) - 1
            found.append(_bar(f"peak memory, largest / smallest - 1, batch {batch}", "<= 0.01", spread))
        if peaks and batch == 16:
            found.append(_bar("peak memory, GB, batch 16", f"<= {PEAK_BYTES / 1e9:.1f}", max(peaks) / 1e9))
        ahead = facts["ahead_from"]["model"]["decode"][str(batch)]
        found.append(_bar(f"ahead of the teacher from, batch {batch}", "<= 1024", ahead))
        found += training_bars(facts, batch)
    return found


def training_bars(facts: dict[str, Any], batch: int) -> list[dict[str, Any]]:
    """As fast as the teacher at the shortest length, faster from the next on; empty if nothing was trained."""
    paces = {
        system: {row["tokens"]: row["tokens_per_second"] for row in sequence_of(facts["rows"], "train", system, batch)}
        for system in ("model", "teacher")
    }
    both = sorted(set(paces["model"]) & set(paces["teacher"]))
    if not both:
        return []
    level = f"training at {both[0]} tokens, model / teacher, batch {batch}"
    ahead = facts["ahead_from"]["model"]["train"][str(batch)]
    return [
        _bar(level, ">= 1.00", paces["model"][both[0]] / paces["teacher"][both[0]]),
        _bar(f"training ahead of the teacher from, batch {batch}", f"<= {TRAIN[1]}", ahead),
    ]


def _bar(what: str, asked: str, seen: float | None) -> dict[str, Any]:
    return {"what": what, "asked": asked, "seen": seen}


def _seen(bar: dict[str, Any]) -> str:
    return "at no length" if bar["seen"] is None else f"{bar['seen']:.4g}"


def _merged(parts: list[dict[str, Any]]) -> dict[str, Any]:
    """`ahead_from` of several batches merged; the first batch has all kinds."""
    return {
        system: {kind: {k: v for part in parts for k, v in part[system].get(kind, {}).items()} for kind in kinds}
        for system, kinds in parts[0].items()
    }


if __name__ == "__main__":
    main()
