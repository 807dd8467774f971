"""The parts of a trained state: `python -m evals.recovery.state DIR --teacher FOLDER --cells NAMES -o FILE` scores
checkpoints that `evals.recovery.stories` left in DIR.

Each is scored as it is, without the recurrence of one layer or of one head, and with its state rounded to 16 bits
after every token, computed in float32. Differences are over the same stories, with standard errors.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import torch
from transformers import DynamicCache

from evals.recovery.stories import FIGURES, Study, difference
from evals.recurrences.toy import surroundings, write
from linearize.sources.source import find_source, load_model

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from torch import Tensor

    from linearize.model import LinearizedForCausalLM


class Rounding:
    """A model that reads one token at a time and stores its states in `dtype` in between."""

    def __init__(self, model: LinearizedForCausalLM, dtype: torch.dtype) -> None:
        self.model, self.dtype = model, dtype

    def __call__(self, ids: Tensor, **_: Any) -> SimpleNamespace:
        cache, logits = DynamicCache(), []
        for token in ids.split(1, 1):
            logits.append(self.model(token, past_key_values=cache).logits)
            for held in cache.layers:
                for tensor in held.parts.get("state", {}).values():
                    tensor.copy_(tensor.to(self.dtype))
        return SimpleNamespace(logits=torch.cat(logits, 1))


def changed(folder: Path) -> Iterator[tuple[str, Any]]:
    """The checkpoint with one change each, and the name of the change."""

    def load() -> Any:
        return load_model(find_source(str(folder))).eval()

    for place, layer in enumerate(load().attention_layers):
        if layer.mixer is None:
            continue
        model = load()
        model.attention_layers[place].mixer.branches_off = frozenset({"recurrence"})
        yield f"layer {layer.layer_idx} off", model
        for head in range(layer.layer.key_value_heads if "mix_weight" in layer.mixer._parameters else 0):
            model = load()
            mixer = model.attention_layers[place].mixer
            with torch.no_grad():  # without its weight in the mix a head has its window alone
                mixer.mix_weight.unflatten(0, (layer.layer.key_value_heads, -1))[head] = 0
            yield f"layer {layer.layer_idx}, head {head} off", model
    for dtype in (torch.bfloat16, torch.float16):
        yield f"state in {dtype}".replace("torch.", ""), Rounding(load(), dtype)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m evals.recovery.state", description=__doc__.split("\n\n")[0])
    parser.add_argument("folder", type=Path, metavar="DIR", help="the folder of evals.recovery.stories")
    parser.add_argument("--teacher", required=True, help="the folder of TinyStories-656K")
    parser.add_argument("--cells", required=True, help="checkpoints in DIR, such as gated_deltanet-20M-0")
    parser.add_argument("--text", type=float, default=4e6, help="as in evals.recovery.stories")
    parser.add_argument("--stories", type=int, default=200, help="held-out stories")
    parser.add_argument("-o", "--output", type=Path, required=True, metavar="FILE", help="JSON")
    given = parser.parse_args(arguments)
    study = Study(given.folder.resolve(), given.teacher, round(given.text), given.stories)
    found: dict[str, Any] = {**surroundings(), "teacher": study.source.name, "stories": given.stories, "cells": {}}
    for name in given.cells.split(","):
        whole, _ = study.items(load_model(find_source(str(study.folder / name))).eval())
        rows = found["cells"][name] = {}
        for change, model in changed(study.folder / name):
            items, _ = study.items(model)
            rows[change] = {figure: difference(items[figure], whole[figure]) for figure in FIGURES}
            print(name, change, rows[change], flush=True)
    write(given.output, found)


if __name__ == "__main__":
    main()
