"""Operators per layer, counted by torch's dispatcher: for a prompt, for a step of decoding, and for a pass forward and
back in training, of each recipe.

On a GPU each operator is at least one launch; on a CPU it costs some microseconds. Views are not counted. A small
model of random weights is enough, because the counts depend on neither widths nor values: a layer's count is that of a
model of two layers minus that of one layer. With triton, but without a GPU, the launches of a GPU's prompt, of the
step that it records, and of training are counted too: Triton's kernels are noted instead of launched. A call of a C
function counts as one operator.

    python -m evals.speed.operators            # a table
    python -m evals.speed.operators --write    # and the figures, to operators.json
"""

from __future__ import annotations

import argparse
import importlib.util
import os
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any
from unittest import mock

import torch
from linearize_kernels import native
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import LlamaConfig, LlamaForCausalLM

from evals.recurrences.toy import markdown, surroundings, write
from linearize import State
from linearize.conversion.swap import convert_model
from linearize.generation.blocks import Blocks
from linearize.generation.engine import _Rows
from linearize.recipe import load_recipe

if TYPE_CHECKING:
    from collections.abc import Callable

    from linearize.recipe import MixerSpec

FIGURES = Path(__file__).with_name("operators.json")
RECIPES = ("default", "window-gla")
PROMPTS = (512, 2048, 8192)
STEPS = 32  # a merge is due once in as many
KERNELS_TAKE = 64  # the least width of a head for slots in 4 bits
_NO_WORK = ("empty", "empty_strided", "empty_like", "new_empty")


class Operators(TorchDispatchMode):
    """Counts the operators that write memory, by name: no views, and no conversions to the dtype that is there. C
    functions, which torch's dispatcher does not see, are counted as well."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()
        self._function = native._function

    def __enter__(self) -> Any:
        native._function = self._noted  # type: ignore[assignment]
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        native._function = self._function
        super().__exit__(*error)

    def _noted(self, name: str) -> Any:
        self.counts[f"native {name}"] += 1
        return self._function(name)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name, result = func.overloadpacket.__name__, func(*args, **(kwargs or {}))
        given = {x.untyped_storage().data_ptr() for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)}
        made = [x for x in tree_leaves(result) if isinstance(x, torch.Tensor)]
        if name not in _NO_WORK and (
            func._schema.is_mutable or any(x.untyped_storage().data_ptr() not in given for x in made)
        ):
            self.counts[name] += 1
        return result


def small(mixer: MixerSpec, layers: int, width: int = 8) -> Any:
    """A model of few heads, of `width` channels, with such mixers."""
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=width,
        vocab_size=97,
        max_position_embeddings=2**15,
    )
    return convert_model(LlamaForCausalLM(config).eval(), mixer)


def of_a_layer(mixer: MixerSpec, work: Callable[[Any], Counter[str]], width: int = 8) -> Counter[str]:
    """The operators of one layer in `work`, by name. A first run makes what a process keeps."""
    _, one, two = (work(small(mixer, layers, width)) for layers in (1, 1, 2))
    return Counter({name: two[name] - one[name] for name in two if two[name] != one[name]})


def reading(tokens: int) -> Callable[[Any], Counter[str]]:
    """Read a prompt, as `generate` reads it."""

    def work(model: Any) -> Counter[str]:
        with Operators() as operators:
            State.read(model, _text(tokens))
        return operators.counts

    return work


def training(tokens: int) -> Callable[[Any], Counter[str]]:
    """Run one row forward and back, with gradients of all weights."""

    def work(model: Any) -> Counter[str]:
        with Operators() as operators:
            _pass(model, _text(tokens))
        return operators.counts

    return work


def _pass(model: Any, ids: torch.Tensor) -> None:
    model.train()(input_ids=ids, logits_to_keep=1).logits.sum().backward()


def taking(tokens: int, rows: int = 1, *, trains: bool = False) -> Callable[[Any], Counter[str]]:
    """Read a prompt as a GPU does, or with `trains` run it forward and back, in bfloat16: operators of torch, and the
    names of Triton's kernels."""
    from evals.kernels.compiled import recording

    make = torch.empty

    def empty(*shape: Any, **options: Any) -> torch.Tensor:
        found = make(*shape, **options)
        if found.dtype == torch.int32:
            found.numpy().fill(0)  # the indices that a kernel would write
        return found

    def work(model: Any) -> Counter[str]:
        model, ids = model.to(torch.bfloat16), _text(tokens).expand(rows, -1)
        pinned, filled = mock.patch.dict(os.environ, LINEARIZE_KERNELS="triton"), mock.patch("torch.empty", empty)
        with pinned, filled, torch.inference_mode(not trains), recording() as launched:
            if not trains:
                model(input_ids=ids[:, :2], use_cache=True)  # makes the constants
                launched.clear()
            with Operators() as operators:
                if trains:
                    _pass(model, ids)
                else:
                    model(input_ids=ids, use_cache=True, logits_to_keep=1)
        return operators.counts + Counter(launch.name for launch in launched)

    return work


def writing(tokens: int, *, merges: bool | None = None) -> Callable[[Any], Counter[str]]:
    """Write `STEPS` tokens after a prompt.

    Args:
        merges: count a step as a CUDA graph records it, without the host's numbers: True for the one that merges a
            block into landmarks, False for all others. None counts steps as a CPU runs them.
    """

    def work(model: Any) -> Counter[str]:
        rows = _Rows.around(State.read(model, _text(tokens)).cache, 1, model)
        for layer in rows.state.layers:
            layer.stay()
            layer.counts_on_host = merges is None
        with torch.inference_mode(), Operators() as operators:
            for _ in range(STEPS):
                rows.forward(model, masked=merges is not None, merges=merges)
        return operators.counts

    return work


def launching(tokens: int, *, merges: bool = False, short: bool = True) -> Callable[[Any], Counter[str]]:
    """Run the step that a GPU records, in bfloat16: operators of torch, and the names of Triton's kernels.

    Args:
        merges: as in `writing`. short: False runs the base model's own code between the mixers.
    """
    from evals.kernels.compiled import recording

    def work(model: Any) -> Counter[str]:
        model = model.to(torch.bfloat16)
        rows = _Rows.around(State.read(model, _text(tokens)).cache, 1, model)
        for layer in rows.state.layers:
            layer.stay()
            layer.counts_on_host = False
        with mock.patch.dict(os.environ, LINEARIZE_KERNELS="triton"), torch.inference_mode(), recording() as launched:
            rows.blocks = Blocks(model, fused=True) if short else None
            rows.forward(model, masked=True, merges=merges)  # joins weights
            launched.clear()
            with Operators() as operators:
                rows.forward(model, masked=True, merges=merges)
        return operators.counts + Counter(launch.name for launch in launched)

    return work


def counted(mixer: MixerSpec, prompts: tuple[int, ...] = PROMPTS) -> dict[str, float]:
    """Operators per layer: of prompts, and of a step, averaged over `STEPS`."""
    found = {f"prompt of {tokens:,}": float(sum(of_a_layer(mixer, reading(tokens)).values())) for tokens in prompts}
    for name, merges in (("step", None), ("recorded step", False), ("recorded step with a merge", True)):
        found[name] = sum(of_a_layer(mixer, writing(1100, merges=merges)).values()) / STEPS
    for tokens in prompts:
        found[f"training on {tokens:,}"] = float(sum(of_a_layer(mixer, training(tokens)).values()))
    if importlib.util.find_spec("triton") is not None:
        for tokens in prompts:
            name = f"launches of a GPU's prompt of {tokens:,}"
            found[name] = float(sum(of_a_layer(mixer, taking(tokens), KERNELS_TAKE).values()))
        for merges in (False, True):
            name = f"launches of a GPU's step{' with a merge' if merges else ''}"
            found[name] = float(sum(of_a_layer(mixer, launching(1100, merges=merges), KERNELS_TAKE).values()))
        for tokens in prompts:
            name = f"launches of a GPU's training on {tokens:,}"
            found[name] = float(sum(of_a_layer(mixer, taking(tokens, trains=True), KERNELS_TAKE).values()))
    return found


def _text(tokens: int) -> torch.Tensor:
    return torch.randint(0, 97, (1, tokens), generator=torch.Generator().manual_seed(1))


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m evals.speed.operators", description=__doc__.split("\n\n")[0])
    parser.add_argument("--write", action="store_true", help="write operators.json too")
    arguments = parser.parse_args()
    torch.set_num_threads(1)  # a step with several threads rotates by other operators
    found = {}
    for recipe, kernels in (*((recipe, "torch") for recipe in RECIPES), ("default", "native")):
        with mock.patch.dict(os.environ, LINEARIZE_KERNELS=kernels):
            name = recipe if kernels == "torch" else f"{recipe}, {kernels}"
            found[name] = counted(load_recipe(recipe).mixer)
    if arguments.write:
        write(FIGURES, {**surroundings(), "operators_per_layer": found})
    print(markdown([{"recipe": recipe, **{k: f"{v:,.0f}" for k, v in row.items()}} for recipe, row in found.items()]))


if __name__ == "__main__":
    main()
