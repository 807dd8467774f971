"""Operators of a converted model on a CPU, in one decoding step and in the prefill of a prompt, compared with the
teacher on the same weights.

Seconds are CPU seconds of one thread, which depend less on other load; the models run in turns, and medians are kept.
Operator counts come from torch's profiler.

    OMP_NUM_THREADS=1 python -m evals.speed.profile CONVERTED --name after
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

import torch
from torch.profiler import ProfilerActivity, profile
from transformers import AutoModelForCausalLM, DynamicCache

from evals.recurrences.toy import surroundings, write
from linearize.checkpoint.provenance import provenance_of
from linearize.sources.source import find_source, load_model

if TYPE_CHECKING:
    from collections.abc import Callable

FOLDER = Path(__file__).parent
CONTEXT, STEPS, PROMPTS, TURNS = 512, 8, (512, 2048), 3
SHOWN = 12


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("model", help="a converted checkpoint")
    parser.add_argument("--name", required=True, help="of the file that is written")
    arguments = parser.parse_args()
    source = find_source(arguments.model)
    models = {"model": load_model(source, dtype="float32")}
    models["teacher"] = _teacher(models["model"])
    with torch.inference_mode():
        around = surroundings()
        facts = {
            **around,
            "command": around["command"].replace(arguments.model, "CONVERTED"),
            "model": provenance_of(source)["base"]["name"],
            "decode": _measured(models, lambda model: _decoding(model), STEPS),
            **{f"prefill_{n}": _measured(models, lambda model, n=n: _reading(model, n), 1) for n in PROMPTS},
        }
    write(FOLDER / f"{arguments.name}.json", facts)
    for name in ("decode", *(f"prefill_{n}" for n in PROMPTS)):
        shares = {who: 1000 * facts[name][who]["seconds"] for who in models}
        print(name, *(f"{who} {milliseconds:.1f} ms" for who, milliseconds in shares.items()))


def _teacher(model: Any) -> Any:
    """The softmax transformer with the converted model's weights."""
    teacher = AutoModelForCausalLM.from_config(model.config.text_config, dtype=model.dtype, attn_implementation="sdpa")
    teacher.load_state_dict({k: v for k, v in model.state_dict().items() if ".mixer." not in k})
    return teacher.eval()


def _decoding(model: Any) -> Callable[[], None]:
    """Decode one token after a context that is already in the cache."""
    cache, ids = DynamicCache(config=model.config.get_text_config()), torch.arange(CONTEXT)[None] + 5
    model(ids, past_key_values=cache, logits_to_keep=1)
    token = ids[:, -1:]
    return lambda: model(token, past_key_values=cache, use_cache=True).logits.argmax(-1)


def _reading(model: Any, tokens: int) -> Callable[[], None]:
    ids = torch.arange(tokens)[None] + 5

    def run() -> None:
        cache = DynamicCache(config=model.config.get_text_config())
        model(ids, past_key_values=cache, use_cache=True, logits_to_keep=1)

    return run


def _measured(
    models: dict[str, Any], prepare: Callable[[Any], Callable[[], None]], repeats: int
) -> dict[str, dict[str, Any]]:
    runs = {name: prepare(model) for name, model in models.items()}
    taken: dict[str, list[float]] = {name: [] for name in runs}
    for turn in range(TURNS + 1):
        for name, run in runs.items():
            began = time.process_time()
            for _ in range(repeats):
                run()
            if turn:
                taken[name].append((time.process_time() - began) / repeats)
    return {name: {"seconds": median(taken[name]), **_operators(run)} for name, run in runs.items()}


def _operators(run: Callable[[], None]) -> dict[str, Any]:
    with profile(activities=[ProfilerActivity.CPU]) as profiled:
        run()
    events = sorted(profiled.key_averages(), key=lambda event: -event.self_cpu_time_total)
    total = sum(event.self_cpu_time_total for event in events)
    weights = sum(event.self_cpu_time_total for event in events if event.key == "aten::mm")
    return {
        "operator_calls": sum(event.count for event in events),
        "share_of_weights": weights / total,  # the products with weight matrices
        "operators": {
            event.key: {"calls": event.count, "share": event.self_cpu_time_total / total} for event in events[:SHOWN]
        },
    }


if __name__ == "__main__":
    main()
