"""Multi-query associative recall (Zoology, arXiv 2312.04927): key-value pairs, then keys whose values are the targets,
among filler tokens. One layer of each recurrence, with the same size, texts and number of steps.

    python -m evals.recurrences.mqar                       # all, and softmax attention as the ceiling
    python -m evals.recurrences.mqar --only gla,kda        # some; the others' results stay as they are
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from evals.recurrences.toy import FOLDER, SOFTMAX, ToyModel, accuracy, markdown, surroundings, train, write
from linearize.model.recurrences import RECURRENCES

KEYS, VALUES = 32, 32  # different tokens; one more token is the filler
FILLER = KEYS + VALUES
SETTING: dict[str, Any] = {
    "pairs": 16,
    "length": 64,
    "rows_per_step": 32,
    "width": 64,
    "heads": 1,
    "head_width": 16,
    "convolution": 2,
    "lr": 3e-3,
    "own_lr": 1e-2,
}


def draw(rows: int, generator: torch.Generator, pairs: int, length: int) -> tuple[Tensor, Tensor]:
    """Tokens and targets `[rows, length]`: the pairs, then each key once at a random place with its value as the
    target; -100 elsewhere."""
    keys = torch.rand(rows, KEYS, generator=generator).argsort(1)[:, :pairs]
    values = torch.randint(0, VALUES, (rows, pairs), generator=generator)
    tokens = torch.full((rows, length), FILLER)
    targets = torch.full((rows, length), -100)
    tokens[:, : 2 * pairs : 2], tokens[:, 1 : 2 * pairs : 2] = keys, KEYS + values
    places = 2 * pairs + torch.rand(rows, length - 2 * pairs, generator=generator).argsort(1)[:, :pairs]
    return tokens.scatter(1, places, keys), targets.scatter(1, places, values)


def run(name: str, *, seed: int, steps: int) -> dict[str, Any]:
    """Train one model; returns its accuracy over the targets in 512 new texts."""
    torch.manual_seed(seed)
    shape = {key: SETTING[key] for key in ("width", "heads", "head_width", "convolution")}
    # Queries and keys as projected, and a norm after the output instead of a mass, as in most of the papers.
    options = {} if name == SOFTMAX else {"feature_map": "identity", "normalize": False}
    model = ToyModel(name, vocabulary=FILLER + 1, classes=VALUES, **shape, **options)
    pairs, length, rows = SETTING["pairs"], SETTING["length"], SETTING["rows_per_step"]
    began = time.perf_counter()
    losses = train(
        model,
        lambda g: draw(rows, g, pairs, length),
        steps=steps,
        lr=SETTING["lr"],
        own_lr=SETTING["own_lr"],
        seed=seed,
    )
    seconds = time.perf_counter() - began
    generator = torch.Generator().manual_seed(10_000 + seed)
    return {
        "recurrence": name,
        "state_floats": model.state_floats(),
        "parameters": sum(p.numel() for p in model.parameters()),
        "accuracy": round(accuracy(model, *draw(512, generator, pairs, length)), 4),
        "last_loss": round(sum(losses[-20:]) / len(losses[-20:]), 4),
        "seconds": round(seconds, 1),
    }


def main() -> None:
    names = [*RECURRENCES, SOFTMAX]
    parser = argparse.ArgumentParser(description="Associative recall, one layer of each recurrence.")
    parser.add_argument("--only", help="comma-separated; by default all")
    parser.add_argument("--steps", type=int, default=500)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=FOLDER / "mqar.json")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    asked = arguments.only.split(",") if arguments.only else names
    if unknown := set(asked) - set(names):
        parser.error(f"unknown: {', '.join(sorted(unknown))}; there are: {', '.join(names)}")

    setting = {**SETTING, "keys": KEYS, "values": VALUES, "steps": arguments.steps, "seed": arguments.seed}
    found: dict[str, dict[str, Any]] = {}
    if arguments.out.exists():
        before = json.loads(arguments.out.read_text(encoding="utf-8"))
        if before["setting"] == setting:  # a table must not mix results of different settings
            found = {result["recurrence"]: result for result in before["results"]}
    for name in asked:
        found[name] = run(name, seed=arguments.seed, steps=arguments.steps)
        ordered = [found[n] for n in names if n in found]
        write(arguments.out, {**surroundings(), "setting": setting, "results": ordered})
        print(found[name], flush=True)
    rows = [
        {"recurrence": r["recurrence"], "state floats": str(r["state_floats"]), "accuracy": f"{r['accuracy']:.3f}"}
        for r in found.values()
    ]
    print(markdown(rows))


if __name__ == "__main__":
    main()
