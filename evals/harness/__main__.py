"""Seconds and memory of scoring with lm-eval's requests, beside lm-eval's own `HFLM`.

`python -m evals.harness MODEL --data DATA` times MMLU with five solved examples and HellaSwag, in turns, on one model
in memory. `--page MODEL` measures the memory of scoring one long text with another model instead. Both add their
figures to `figures.json`.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from pathlib import Path
from typing import Any

import torch

from evals.recurrences.toy import markdown, surroundings, write
from linearize.evaluation.tasks.loading import lm_eval_tasks
from linearize.evaluation.tasks.tasks import build_tasks
from linearize.runtime.memory import PeakMemory, nbytes
from linearize.sources.source import find_source, load_model, load_tokenizer

FIGURES = Path(__file__).parent / "figures.json"
TASKS = ("mmlu", "hellaswag")
WAYS = {"HFLM": True, "ours": False}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("model", nargs="?", help="the model to time, e.g. SmolLM2-135M")
    parser.add_argument("--data", type=Path, required=True, help="the folder of the tasks' files, see evals/README.md")
    parser.add_argument("--items", type=int, default=32, help="consecutive items of each task")
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--page", metavar="MODEL", help="measure the memory of a long text with this model")
    parser.add_argument("--longest", type=int, default=8192, help="most tokens of that text")
    arguments = parser.parse_args()
    if arguments.page is None and arguments.model is None:
        parser.error("give a MODEL, or --page MODEL")
    found = (
        {"timed": timed(arguments.model, arguments.data, arguments.items, arguments.repeats)}
        if arguments.page is None
        else {"page": page(arguments.page, arguments.data, arguments.longest)}
    )
    earlier = json.loads(FIGURES.read_text()) if FIGURES.exists() else {}
    write(FIGURES, {**earlier, **found})


def timed(reference: str, data: Path, items: int, repeats: int) -> dict[str, Any]:
    """CPU seconds of both ways on the same items, which other work on the machine changes little. Consecutive items of
    MMLU are of one subject, as in a whole run."""
    source = find_source(reference)
    model, tokenizer = load_model(source, dtype="float32").eval(), load_tokenizer(source)
    rows = []
    for name in TASKS:
        ways = {way: lm_eval_tasks([name], data, plain=plain)[0] for way, plain in WAYS.items()}
        seconds: dict[str, list[float]] = {way: [] for way in ways}
        values: dict[str, list[float]] = {}
        for _ in range(repeats):
            for way, task in ways.items():
                started = time.process_time()
                with torch.inference_mode():
                    values[way] = [one.value for one in task.score(model, tokenizer, range(items), 8)]
                seconds[way].append(round(time.process_time() - started, 2))
        rows.append({"task": name, "items": items, "cpu_seconds": seconds, "equal": values["HFLM"] == values["ours"]})
        medians = {way: statistics.median(found) for way, found in seconds.items()}
        print(markdown([{"task": name, **{way: f"{one:.1f} s" for way, one in medians.items()}}]))
    return {**surroundings(), "model": source.name, "dtype": "float32", "rows": rows}


def page(reference: str, data: Path, longest: int) -> dict[str, Any]:
    """Memory beside the weights while the longest page of WikiText-2 (test) of up to `longest` tokens is scored."""
    source = find_source(reference)
    model, tokenizer = load_model(source, dtype="float32").eval(), load_tokenizer(source)
    (task,) = lm_eval_tasks(["wikitext2"], data)
    documents: Any = build_tasks(["wikitext2"], data)["wikitext2"][""].eval_docs
    sizes = [len(tokenizer(document["page"]).input_ids) for document in documents]
    index = max((size, index) for index, size in enumerate(sizes) if size <= longest)[1]
    with torch.inference_mode():
        model(torch.ones(1, 8, dtype=torch.long, device=model.device))  # weights are mapped until they are first read
    started = time.process_time()
    with torch.inference_mode(), PeakMemory(model.device) as peak:
        (item,) = task.score(model, tokenizer, [index], 8)
    row = {
        "tokens": sizes[index],
        "vocabulary": model.config.vocab_size,
        "nats_per_token": -item.value / sizes[index],
        "peak_bytes_beside_weights": peak.bytes,
        "weights_bytes": nbytes(model),
        "cpu_seconds": round(time.process_time() - started, 1),
    }
    print(row)
    return {**surroundings(), "model": source.name, "dtype": "float32", **row}


if __name__ == "__main__":
    main()
