"""Named configurations for models with random weights. Speed depends on shapes only, so nothing is downloaded."""

from __future__ import annotations

from typing import Any

from transformers import AutoConfig

from linearize.errors import ModelError, hint_for

_TIED = {"tie_word_embeddings": True}


def _row(
    model_type: str,
    hidden: int,
    intermediate: int,
    layers: int,
    heads: tuple[int, int, int],
    vocabulary: int,
    **more: Any,
) -> dict[str, Any]:
    """`heads`: query heads, key/value heads, width."""
    return {
        "model_type": model_type,
        "hidden_size": hidden,
        "intermediate_size": intermediate,
        "num_hidden_layers": layers,
        "num_attention_heads": heads[0],
        "num_key_value_heads": heads[1],
        "head_dim": heads[2],
        "vocab_size": vocabulary,
        "max_position_embeddings": 1 << 20,
        **more,
    }


CONFIGS: dict[str, dict[str, Any]] = {
    "smollm2-135m": _row("llama", 576, 1536, 30, (9, 3, 64), 49_152, **_TIED),
    "smollm2-360m": _row("llama", 960, 2560, 32, (15, 5, 64), 49_152, **_TIED),
    "smollm2-1.7b": _row("llama", 2048, 8192, 24, (32, 32, 64), 49_152, **_TIED),
    "llama-3.2-1b": _row("llama", 2048, 8192, 16, (32, 8, 64), 128_256, **_TIED),
    "llama-3.2-3b": _row("llama", 3072, 8192, 28, (24, 8, 128), 128_256, **_TIED),
    "llama-3-8b": _row("llama", 4096, 14_336, 32, (32, 8, 128), 128_256),
    "mistral-7b": _row("mistral", 4096, 14_336, 32, (32, 8, 128), 32_768, sliding_window=None),
    "qwen3-0.6b": _row("qwen3", 1024, 3072, 28, (16, 8, 128), 151_936, **_TIED),
    "qwen3-1.7b": _row("qwen3", 2048, 6144, 28, (16, 8, 128), 151_936, **_TIED),
    "qwen3-4b": _row("qwen3", 2560, 9728, 36, (32, 8, 128), 151_936, **_TIED),
    "qwen3-8b": _row("qwen3", 4096, 12_288, 36, (32, 8, 128), 151_936),
}
"""The shapes of published models. The context lengths are not theirs, because positions cost the same at any length."""


def named_config(name: str, layers: int | None = None) -> Any:
    """The transformers configuration of that name, with `layers` layers if given.

    Raises:
        ModelError: the name is unknown, or the configuration has fewer layers.
    """
    if name not in CONFIGS:
        raise ModelError(f"--config {name}: no such configuration; {hint_for(name.lower(), CONFIGS, most=1)}")
    row = dict(CONFIGS[name])
    if layers is not None:
        row["num_hidden_layers"] = fewer_layers(layers, row["num_hidden_layers"])
    return AutoConfig.for_model(row.pop("model_type"), **row)


def fewer_layers(wanted: int, there: int) -> int:
    """Return `wanted`.

    Raises:
        ModelError: it is not between 1 and `there`.
    """
    if not 1 <= wanted <= there:
        raise ModelError(f"--layers {wanted}: the model has {there} layers; give 1 to {there}")
    return wanted
