"""The entry point `vllm.general_plugins`: vLLM calls `register` in each of its processes."""

from __future__ import annotations

import warnings
from typing import Any

from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from linearize.families import FAMILIES, family_of
from linearize.model.configuration import LinearizedConfig

HYBRID = "Hybrid"
"""The beginning of the names of architectures in which a layer keeps softmax."""
OP = "vllm::linearize_mix"


def register() -> None:
    """Tell vLLM the configuration and the architectures of converted checkpoints.

    A vLLM that lacks what is used here only warns, because it calls this for the models of others too.
    """
    try:
        _register()
    except (ImportError, AttributeError) as error:
        warnings.warn(f"linearize: this version of vLLM cannot serve converted models ({error})", stacklevel=2)


def _register() -> None:
    from vllm.config import CompilationConfig
    from vllm.model_executor.models import ModelRegistry
    from vllm.model_executor.models.config import MODELS_CONFIG_MAP
    from vllm.transformers_utils import config as configurations

    from linearize.vllm.settings import Settings

    configurations._CONFIG_REGISTRY[LinearizedConfig.model_type] = ServedConfig
    for model_type in FAMILIES:
        name = f"Linearized{MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[model_type]}"
        for architecture in (name, HYBRID + name):
            ModelRegistry.register_model(architecture, f"linearize.vllm.models:{architecture}")
            MODELS_CONFIG_MAP[architecture] = Settings
    if OP not in CompilationConfig._attention_ops:  # piecewise CUDA graphs are cut here
        CompilationConfig._attention_ops.append(OP)


class ServedConfig(LinearizedConfig):
    """Reads a converted checkpoint's configuration as vLLM needs it; the instances are plain `LinearizedConfig`s."""

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        found: Any = LinearizedConfig.from_dict(config_dict, **kwargs)
        config = found[0] if isinstance(found, tuple) else found
        if config.architectures:
            name = config.architectures[0].removeprefix(HYBRID)
            # vLLM reads from the class alone if a model has layers that keep softmax.
            config.architectures = [HYBRID + name if keeps_softmax(config) else name]
        # vLLM treats a hybrid with layer types as a model without states; `text_config` keeps them.
        config.layer_types = None
        return found


def keeps_softmax(config: LinearizedConfig) -> bool:
    """True if some layer or head keeps softmax over the whole past."""
    base: Any = config.text_config
    mixers = (config.mixer_of(index).fitted(layer) for index, layer in enumerate(family_of(base).layers(base)))
    return any(mixer.window is None or mixer.softmax_heads for mixer in mixers)
