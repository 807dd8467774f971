"""What `linearize inspect` tells: the architecture, what would be converted, and the memory before and after."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from linearize.conversion.convert import mixers_for
from linearize.conversion.source import Source, load_config
from linearize.errors import ModelError
from linearize.model.attention import Mixer
from linearize.model.configuration import MixerConfig
from linearize.model.modeling import family_of

if TYPE_CHECKING:
    from linearize.recipe import MixerSpec

LENGTHS = (1_024, 8_192, 131_072, 1_048_576)


def inspect_model(source: Source, spec: MixerSpec, *, dtype: torch.dtype | None = None) -> dict[str, Any]:
    """The facts about `source`, from its configuration alone.

    Args:
        spec: the mixer to convert with; ignored for a converted checkpoint, which has its own.
        dtype: of the caches; the checkpoint's own by default.

    Raises:
        ModelError: the configuration cannot be read, or the architecture is not supported.
    """
    outer = load_config(source)
    converted = outer.model_type == "linearized"
    config = outer.text_config if converted else outer
    try:
        family = family_of(config)
    except ValueError as error:
        raise ModelError(f"{source.name}: {error}") from error
    heads = family.heads(config)
    query_heads, key_value_heads, key_width, value_width = heads
    layers = config.num_hidden_layers
    held = dtype or (config.dtype if isinstance(config.dtype, torch.dtype) else torch.float32)
    sections = [MixerConfig(**m) for m in outer.mixers] if converted else mixers_for(spec, layers)
    parts: dict[str, int] = {}
    for section in sections:
        memory = Mixer(section, heads, 1.0).memory(1, held, torch.device("meta"))
        for name, tensors in memory.parts.items():
            size = sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
            parts[name] = parts.get(name, 0) + size * len(section.layers)
    per_token = layers * key_value_heads * (key_width + value_width) * held.itemsize
    state = sum(parts.values())
    return {
        "model": source.reference,
        "converted": converted,
        "family": family.name,
        "architecture": config.model_type,
        "layers": layers,
        "converted_layers": sum(len(section.layers) for section in sections),
        "query_heads": query_heads,
        "key_value_heads": key_value_heads,
        "key_width": key_width,
        "value_width": value_width,
        "vocabulary": config.vocab_size,
        "trained_length": getattr(config, "max_position_embeddings", None),
        "dtype": str(held).removeprefix("torch."),
        "mixers": [vars(section) for section in sections],
        "state_bytes": state,
        "state_parts": parts,
        "teacher_bytes_per_token": per_token,
        "lengths": [
            {"tokens": n, "teacher_bytes": n * per_token, "converted_bytes": state, "ratio": n * per_token / state}
            for n in LENGTHS
        ],
    }
