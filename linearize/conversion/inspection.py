"""What `linearize inspect` tells: the architecture, what would be converted, and the memory before and after."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from linearize.conversion.convert import mixers_for
from linearize.conversion.source import Source, load_config
from linearize.errors import ModelError
from linearize.model.attention import LinearizedAttention
from linearize.model.configuration import LinearizedConfig
from linearize.model.modeling import family_of

if TYPE_CHECKING:
    from linearize.families import AttentionLayer
    from linearize.recipe import MixerSpec

LENGTHS = (1_024, 8_192, 131_072, 1_048_576)


def inspect_model(source: Source, spec: MixerSpec, *, dtype: torch.dtype | None = None) -> dict[str, Any]:
    """The facts about `source`, from its configuration alone.

    Args:
        spec: the mixer to convert with; ignored for a converted checkpoint, which has its own.
        dtype: of the caches; the checkpoint's own by default.

    Raises:
        ModelError: the configuration cannot be read, or the architecture is not supported.
        RecipeError: the mixer does not fit the model.
    """
    outer = load_config(source)
    converted = outer.model_type == "linearized"
    config = outer.text_config if converted else outer
    try:
        family = family_of(config)
    except ValueError as error:
        raise ModelError(f"{source.name}: {error}") from error
    layers = family.layers(config)
    held = dtype or (config.dtype if isinstance(config.dtype, torch.dtype) else torch.float32)
    asked = LinearizedConfig(text_config=config, mixers=outer.mixers if converted else mixers_for(spec, layers))
    # What a layer would remember does not depend on its weights.
    attentions = [
        LinearizedAttention(torch.nn.Module(), family, layer, asked.mixer_of(index), index)
        for index, layer in enumerate(layers)
    ]
    parts: dict[str, int] = {}
    for attention in attentions:
        for name, tensors in attention.memory(1, held, torch.device("meta")).parts.items():
            size = sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
            parts[name] = parts.get(name, 0) + size

    def per_token(layer: AttentionLayer, heads: int) -> int:
        return heads * (layer.key_width + layer.value_width) * held.itemsize

    def teacher_bytes(tokens: int) -> int:
        seen = (min(tokens, layer.window or tokens) * per_token(layer, layer.key_value_heads) for layer in layers)
        return sum(seen)

    state = sum(parts.values())
    growth = sum(per_token(attention.layer, len(attention.softmax_heads)) for attention in attentions)
    first = layers[0]
    return {
        "model": source.reference,
        "converted": converted,
        "family": family.name,
        "architecture": config.model_type,
        "layers": len(layers),
        "converted_layers": sum(asked.mixer_of(i).converts(layer) for i, layer in enumerate(layers)),
        "own_window_layers": [
            i for i, layer in enumerate(layers) if layer.window is not None and not asked.mixer_of(i).converts(layer)
        ],
        "softmax_layers": [i for i, a in enumerate(attentions) if a.mixer is None],
        "softmax_heads": {i: a.softmax_heads for i, a in enumerate(attentions) if a.mixer and a.softmax_heads},
        "query_heads": first.query_heads,
        "key_value_heads": first.key_value_heads,
        "key_width": first.key_width,
        "value_width": first.value_width,
        "vocabulary": config.vocab_size,
        "trained_length": getattr(config, "max_position_embeddings", None),
        "dtype": str(held).removeprefix("torch."),
        "mixers": asked.mixers,
        "state_bytes": state,
        "state_parts": parts,
        "growth_bytes_per_token": growth,
        "teacher_bytes_per_token": teacher_bytes(1),
        "lengths": [
            {
                "tokens": n,
                "teacher_bytes": teacher_bytes(n),
                "converted_bytes": state + n * growth,
                "ratio": teacher_bytes(n) / (state + n * growth),
            }
            for n in LENGTHS
        ],
    }
