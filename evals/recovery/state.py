"""The parts of a trained state: `python -m evals.recovery.state DIR --teacher FOLDER --cells NAMES -o FILE` scores
checkpoints that `evals.recovery.stories` left in DIR.

Each is scored as it is, without the recurrence of one layer or of one head, and with its state rounded to 16 bits
after every token, computed in float32. One with slots is also scored with slots for what the state recalls worst.
Differences are over the same stories, with standard errors.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any
from unittest import mock

import torch
from transformers import DynamicCache

from evals.recovery.stories import FIGURES, Study, difference
from evals.recurrences.toy import surroundings, write
from linearize.model.configuration import BLOCK
from linearize.model.landmarks import step
from linearize.model.landmarks.merging import NOVELTY, Slots
from linearize.model.landmarks.slots import kept_names, stored
from linearize.sources.source import find_source, load_model

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from torch import Tensor

    from linearize.model import LinearizedForCausalLM
    from linearize.model.memory import LayerMemory
    from linearize.model.mixer.base import MixerBase


class Rounding:
    """A model that reads one token at a time and stores its states in `dtype` in between."""

    def __init__(self, model: LinearizedForCausalLM, dtype: torch.dtype) -> None:
        self.model, self.dtype = model, dtype

    def __call__(self, ids: Tensor, **_: Any) -> SimpleNamespace:
        return _in_steps(self.model, ids, self._round)

    def _round(self, cache: DynamicCache) -> None:
        for held in cache.layers:
            for tensor in held.parts.get("state", {}).values():
                tensor.copy_(tensor.to(self.dtype))


class WorstRecalled:
    """A model that reads one token at a time and keeps in its slots what the state recalls worst: the rank of a token
    is the squared distance of its value from what the state reads for its key (LoLA, arXiv 2505.23666).

    Args:
        beside: the log of that distance takes the place of novelty, and attention counts as before.
    """

    def __init__(self, model: LinearizedForCausalLM, *, beside: bool) -> None:
        self.model, self.beside = model, beside
        self.merge, self.ranks = step._merge, Slots._ranks

    def __call__(self, ids: Tensor, **_: Any) -> SimpleNamespace:
        with mock.patch.object(step, "_merge", self._merge):
            return _in_steps(self.model, ids)

    def _merge(self, mixer: MixerBase, memory: LayerMemory, *others: Any) -> None:
        error = _recall_error(mixer, memory)

        def ranks(slots: Slots, end: int) -> Tensor:
            exists = slots.number[..., :end] > 0
            if not self.beside:
                return torch.where(exists, error, -1.0)  # the empty slots go first
            slots.scores[NOVELTY, ..., :end] = error.clamp_min(1e-12).log()  # of all candidates, at every merge
            return self.ranks(slots, end)

        with mock.patch.object(Slots, "_ranks", ranks):
            self.merge(mixer, memory, *others)


def _in_steps(
    model: LinearizedForCausalLM, ids: Tensor, after: Callable[[DynamicCache], None] | None = None
) -> SimpleNamespace:
    """The logits of `ids`, read one token at a time; `after` is called with the cache after each."""
    cache, logits = DynamicCache(), []
    for token in ids.split(1, 1):
        logits.append(model(token, past_key_values=cache).logits)
        if after is not None:
            after(cache)
    return SimpleNamespace(logits=torch.cat(logits, 1))


def _recall_error(mixer: MixerBase, memory: LayerMemory) -> Tensor:
    """The squared distance of what the state reads for the tokens in the slots and in the window's oldest block from
    their values, `[R, K, N + BLOCK]`."""
    slots, window = memory.parts["landmarks"], memory.parts["window"]
    tokens = {name: torch.cat([slots[name], window[name][:, :BLOCK]], 1) for name in kept_names(mixer)}
    k, v, source = stored(mixer, tokens)
    group = mixer.layer.query_heads // mixer.layer.key_value_heads
    writes = torch.zeros(k.shape[:2], dtype=torch.bool)
    state = {name: x.clone() for name, x in memory.parts["state"].items()}
    read, mass = mixer.recurrence(k.repeat_interleave(group, 2), k, v, source, writes, state)
    read = read if mass is None else read / mass.clamp_min(1e-6)[..., None]
    error: Tensor = (read[:, :, ::group] - v).square().sum(-1)
    return error.transpose(1, 2)


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
    mixer = load().attention_layers[0].mixer
    if mixer.config.landmarks and mixer.recurrence is not None:
        yield "slots for what the state recalls worst", WorstRecalled(load(), beside=False)
        yield "the same beside attention", WorstRecalled(load(), beside=True)


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
