"""Baselines of a converted model: its teacher, windows that cost no training, and the model with a branch off."""

from __future__ import annotations

from dataclasses import asdict, replace
from typing import TYPE_CHECKING, Any

import torch

from linearize.checkpoint.provenance import teacher_of
from linearize.conversion.inspection import weightless_layers
from linearize.conversion.swap import BASELINE_SINKS
from linearize.errors import ModelError
from linearize.model.attention import LinearizedAttention
from linearize.model.configuration import LinearizedConfig, MixerConfig
from linearize.sources.source import load_config

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from linearize.model import LinearizedForCausalLM
    from linearize.sources.source import Source

BRANCHES_OFF = {
    "no_recurrence": ("recurrence",),
    "no_window": ("window",),
    "neither": ("recurrence", "window"),
}
"""Name of a baseline -> the branches of the model's own mixers that are silent in it."""


_SHAPE = ("model_type", "num_hidden_layers", "hidden_size", "num_attention_heads", "vocab_size")


def teacher_beside(source: Source, named: str | None, say: Callable[[str], None]) -> Source | None:
    """The teacher of `source`, or None, after a word to `say`, where it is gone.

    Args:
        named: the user's own choice: a Hub id, a folder or a GGUF file.

    Raises:
        ModelError: `named` is not what `source` was converted from, or `source` was not converted.
    """
    if named is None:
        if not source.is_converted:
            return source
        try:
            return teacher_of(source)
        except ModelError as error:
            say(alone(error))
            return None
    if not source.is_converted:
        raise ModelError(f"{source.name}: is not converted, so it is its own teacher; leave --teacher out")
    teacher = teacher_of(source, named)
    if teacher.is_converted:
        raise ModelError(f"{teacher.name}: is a converted model; name the pretrained one with --teacher")
    base, found = load_config(source).text_config, load_config(teacher).get_text_config()
    for key in _SHAPE:
        own, other = getattr(base, key, None), getattr(found, key, None)
        if own != other:
            raise ModelError(
                f"{teacher.name}: {source.name} was not converted from it ({key} is {other}, not {own}); name another "
                "with --teacher"
            )
    return teacher


def alone(why: ModelError) -> str:
    """The line for a model that is scored without its teacher."""
    return f"no teacher, so no baselines made of it and no divergence from it: {why}"


def silence(model: LinearizedForCausalLM, branches: Sequence[str]) -> LinearizedForCausalLM:
    """`model` itself, with branches off in every layer that was converted.

    Without `recurrence` a layer's output is its window's and sinks', as if its state were empty. Without
    `window` it is the recurrence's reading alone, and zero while the state is empty. Without both it is zero. Layers
    and heads that keep their softmax attention keep it here.
    """
    for module in model.attention_layers:
        if module.mixer is not None:
            converts = model.config.mixer_of(module.layer_idx).converts(module.layer)
            module.mixer.branches_off = frozenset(branches) if converts else frozenset()
    return model


def branches_off(model: Any) -> dict[str, list[str]]:
    """By layer which branches of `model` are off: a model of the same weights without them is another one."""
    return {
        name: sorted(module.mixer.branches_off)
        for name, module in model.named_modules()
        if isinstance(module, LinearizedAttention) and module.mixer is not None and module.mixer.branches_off
    }


def memory_bytes(config: Any, mixers: Sequence[Any], dtype: torch.dtype) -> list[tuple[int, int]]:
    """Bytes of each layer's memory for one sequence: those independent of its length, and those per token.

    Args:
        config: the base model's.
        mixers: the sections of a converted model; none for the pretrained one.
        dtype: of keys and values.
    """
    layers = weightless_layers(LinearizedConfig(text_config=config, mixers=list(mixers)))
    # A transformer's cache does not count its tokens; a memory does, in 8 bytes.
    uncounted = 0 if mixers else 8
    return [(constant - uncounted, per_token) for constant, per_token in (x.memory_nbytes(dtype) for x in layers)]


def equal_bytes(config: Any, mixers: Sequence[Any], dtype: torch.dtype) -> list[dict[str, Any]]:
    """Sections like `mixers` for `window_baseline`, in which every layer that was converted has the widest window that
    there is room for: windows and sinks have as many bytes as windows, sinks and states of all these layers together,
    rounded down to whole tokens. One window for all, however theirs differ: sharing it out is part of a conversion."""
    sections = [MixerConfig(**mixer) if isinstance(mixer, dict) else mixer for mixer in mixers]
    widest: list[dict[str, Any]] = []
    room, per_token, converted = 0, 0, list[int]()
    for index, attention in enumerate(weightless_layers(LinearizedConfig(text_config=config, mixers=list(sections)))):
        section, layer = next((one for one in sections if index in one.layers), None), attention.layer
        if section is None:
            continue
        if section.converts(layer):
            held, _ = attention.memory_nbytes(dtype)
            token = _token_bytes(attention, dtype)
            room += held - 8 - max(section.sinks, BASELINE_SINKS) * token
            per_token += token
            converted.append(len(widest))
        widest.append(asdict(replace(section, layers=[index])))
    for place in converted:
        widest[place]["window"] = max(1, room // per_token)
    return widest


def _token_bytes(attention: LinearizedAttention, dtype: torch.dtype) -> int:
    """Bytes of a token's keys and values in the window of a converted layer."""
    assert attention.mixer is not None  # noqa: S101 - for the type checker; a converted layer has one
    window = attention.mixer.parts(1, dtype, torch.device("meta"))["window"]
    read = [x[:, :1] for name, x in window.items() if name.startswith(("k_rotated", "v"))]
    return sum(x.numel() * x.element_size() for x in read)
