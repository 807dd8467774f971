"""vLLM's settings for a converted model, and those that are refused, with the reason."""

from __future__ import annotations

from typing import Any

from vllm.model_executor.models import ModelRegistry
from vllm.model_executor.models.config import MambaModelConfig

from linearize.families import family_of
from linearize.vllm.plugin import HYBRID


class Settings(MambaModelConfig):
    """Called by vLLM before it starts a model."""

    @classmethod
    def verify_and_update_config(cls, vllm_config: Any) -> None:
        if (reason := refusal(vllm_config)) is not None:
            raise ValueError(f"linearize: {reason}")
        super().verify_and_update_config(vllm_config)


def refusal(vllm_config: Any) -> str | None:
    """The reason why vLLM cannot serve a converted model with these settings; None if it can."""
    config = vllm_config.model_config.hf_config
    base, ranks = config.text_config, vllm_config.parallel_config.tensor_parallel_size
    if base_model(config.architectures[0]) is None:
        return (
            f"vLLM has no model of its own for {base.model_type!r}, only a backend that pages the keys of every "
            "layer of transformers' model; use `linearize generate` or transformers"
        )
    if any(getattr(base, option, False) for option in _IGNORED.get(base.model_type, ())):
        options = " or ".join(_IGNORED[base.model_type])
        return f"vLLM's model for {base.model_type!r} has no {options}, which this model uses"
    if base.model_type in _TIED and not base.tie_word_embeddings:
        return f"vLLM's model for {base.model_type!r} ties its embeddings, which this model does not"
    if vllm_config.speculative_config is not None:
        return (
            "speculative decoding takes back the tokens that the model rejects, and a recurrent state cannot give them "
            "back; leave the speculative config out"
        )
    layers = family_of(base).layers(base)
    mixers = [config.mixer_of(index).fitted(layer) for index, layer in enumerate(layers)]
    if ranks > 1 and any(mixer.softmax_heads for mixer in mixers):
        return "single heads keep softmax, and each tensor-parallel rank would need as many of them"
    if ranks > 1 and (heads := {layer.key_value_heads for layer in layers if layer.key_value_heads % ranks}):
        return (
            f"each of {ranks} tensor-parallel ranks needs whole key/value heads, and the model has {heads.pop()}; set "
            "--tensor-parallel-size to a divisor of that"
        )
    if ranks > 1 and any(mixer.recurrence == "retention" for mixer in mixers):
        return "a head's decay in retention depends on its number, which a tensor-parallel rank does not know"
    return None


_IGNORED = {
    "stablelm": ("qk_layernorm", "use_parallel_residual"),
    "gpt2": ("scale_attn_by_inverse_layer_idx",),
    **dict.fromkeys(("cohere", "cohere2", "granitemoe"), ("attention_bias",)),
}
"""Options of a base model that vLLM's model of it does not compute."""
_TIED = ("gemma2", "cohere", "cohere2")
"""Models whose output head is the embedding in vLLM, whatever the configuration says."""


def base_model(architecture: str) -> Any:
    """vLLM's entry for the base model of a converted architecture; None if it has no implementation of its own."""
    name = architecture.removeprefix(HYBRID).removeprefix("Linearized")
    found = ModelRegistry.models.get(name)
    return None if found is None or found.module_name.endswith(".transformers") else found
