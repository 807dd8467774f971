"""The table of families: each names the query, key, value and output projections of its architectures.

A new family is a small file that subclasses `Family`, and an entry below. No other room depends on an architecture.
"""

from __future__ import annotations

from typing import Any

from linearize.families.base import AttentionLayer, Family, Projections
from linearize.families.cohere import Cohere, Cohere2
from linearize.families.falcon import Falcon
from linearize.families.gemma import Gemma, Gemma2, Gemma3
from linearize.families.glm import Glm
from linearize.families.gpt2 import GPT2
from linearize.families.gpt_neox import GPTNeoX
from linearize.families.llama import Granite, Llama, Mistral, Starcoder2
from linearize.families.olmo import Olmo, Olmo2
from linearize.families.phi3 import Phi3
from linearize.families.smollm3 import SmolLM3
from linearize.families.stablelm import Phi, StableLm

_FAMILIES: tuple[Family, ...] = (
    Llama(),
    Mistral(),
    Starcoder2(),
    Granite(),
    Gemma(),
    Gemma2(),
    Gemma3(),
    Phi3(),
    Olmo(),
    Olmo2(),
    SmolLM3(),
    Glm(),
    Cohere(),
    Cohere2(),
    StableLm(),
    Phi(),
    Falcon(),
    GPTNeoX(),
    GPT2(),
)
FAMILIES: dict[str, Family] = {model_type: family for family in _FAMILIES for model_type in family.model_types}


def family_of(config: Any) -> Family:
    """The family of a base configuration.

    Raises:
        ValueError: no family covers the configuration, or the family refuses it.
    """
    model_type = getattr(config, "model_type", "unknown")
    if model_type not in FAMILIES:
        raise ValueError(_unsupported(config, model_type))
    family = FAMILIES[model_type]
    if (reason := family.refusal(config)) is not None:
        raise ValueError(f"this {model_type} model cannot be converted: {reason}")
    return family


# Parts of the names of architectures and layers that keep a state instead of a cache.
_LINEAR = ("mamba", "rwkv", "xlstm", "recurrent", "rnn", "ssm", "linear", "conv")


def _unsupported(config: Any, model_type: str) -> str:
    if getattr(config, "is_encoder_decoder", False):
        return f"{model_type!r} is an encoder-decoder; only causal language models can be converted"
    if getattr(config, "vision_config", None) is not None or getattr(config, "audio_config", None) is not None:
        return f"{model_type!r} has a vision or audio tower; only text models can be converted"
    kinds = {
        model_type,
        *(getattr(config, "layer_types", None) or ()),
        *(getattr(config, "layers_block_type", None) or ()),
    }
    if any(part in str(kind) for kind in kinds for part in _LINEAR) or hasattr(config, "ssm_cfg"):
        return f"{model_type!r} has linear layers already; only softmax transformers are converted"
    return f"architecture {model_type!r} is not supported; there are: {', '.join(sorted(FAMILIES))}"


__all__ = ["FAMILIES", "AttentionLayer", "Family", "Projections", "family_of"]
