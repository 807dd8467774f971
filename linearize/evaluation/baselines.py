"""What a converted model is measured against besides its teacher: windows that cost no training, and the model itself
with one of its branches off."""

from __future__ import annotations

from dataclasses import asdict, replace
from typing import TYPE_CHECKING, Any

import torch

from linearize.conversion.convert import BASELINE_SINKS
from linearize.model.attention import LinearizedAttention
from linearize.model.configuration import LinearizedConfig, MixerConfig
from linearize.model.modeling import family_of

if TYPE_CHECKING:
    from collections.abc import Sequence

    from linearize.model import LinearizedForCausalLM

BRANCHES_OFF = {
    "no_recurrence": ("recurrence",),
    "no_window": ("window",),
    "neither": ("recurrence", "window"),
}
"""Name of a baseline -> the branches of the model's own mixers that are silent in it."""


def silence(model: LinearizedForCausalLM, branches: Sequence[str]) -> LinearizedForCausalLM:
    """`model` itself, with branches off in every layer that was converted.

    Without `recurrence` a layer's output is its window's and sinks', as if the recurrence had nothing to say. Without
    `window` it is the recurrence's reading alone, and zero while the state is empty. Without both it is zero. Layers
    and heads that keep their softmax attention keep it here.
    """
    layers = family_of(model.config.text_config).layers(model.config.text_config)
    for module in model.modules():
        if isinstance(module, LinearizedAttention) and module.mixer is not None:
            index = module.layer_idx
            converts = model.config.mixer_of(index).converts(layers[index])
            module.mixer.branches_off = frozenset(branches) if converts else frozenset()
    return model


def memory_bytes(config: Any, mixers: Sequence[Any], dtype: torch.dtype) -> list[tuple[int, int]]:
    """Of each layer the bytes of one sequence's memory that do not depend on its length, and those of each token.

    Args:
        config: the base model's.
        mixers: the sections of a converted model; none for the pretrained one.
        dtype: of keys and values.
    """
    found = []
    for attention in _attentions(config, mixers):
        # A transformer's cache does not count its tokens; a memory does, in 8 bytes.
        constant = attention.memory(1, dtype, torch.device("meta")).nbytes - (0 if mixers else 8)
        per_token = sum(
            x.numel() * x.element_size()
            for x in attention.memory(1, dtype, torch.device("meta"), capacity=1).past.values()
        )
        found.append((constant, per_token))
    return found


def equal_bytes(config: Any, mixers: Sequence[Any], dtype: torch.dtype) -> list[dict[str, Any]]:
    """Sections like `mixers` for `window_baseline`, in which every layer that was converted has the widest window that
    its memory has room for: with window and sinks of equal bytes as its window, sinks and state have together, rounded
    down to whole tokens."""
    sections = [MixerConfig(**mixer) if isinstance(mixer, dict) else mixer for mixer in mixers]
    widest: list[dict[str, Any]] = []
    layers = family_of(config).layers(config)
    for index, (attention, (held, _)) in enumerate(
        zip(_attentions(config, sections), memory_bytes(config, sections, dtype), strict=True)
    ):
        section = next((one for one in sections if index in one.layers), None)
        if section is None:
            continue
        if section.converts(layers[index]):
            layer = layers[index]
            token = len(attention.mixed_heads) * (layer.key_width + layer.value_width) * dtype.itemsize
            sinks = max(section.sinks, BASELINE_SINKS)
            section = replace(section, window=max(1, (held - 8) // token - sinks))
        widest.append(asdict(replace(section, layers=[index])))
    return widest


def _attentions(config: Any, mixers: Sequence[Any]) -> list[LinearizedAttention]:
    """The layers, without weights."""
    family, whole = family_of(config), LinearizedConfig(text_config=config, mixers=list(mixers))
    with torch.device("meta"):
        return [
            LinearizedAttention(torch.nn.Module(), family, layer, whole.mixer_of(index), index)
            for index, layer in enumerate(family.layers(config))
        ]
