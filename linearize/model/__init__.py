"""What a converted checkpoint is: configuration, attention layer, memory and model.

Importing it makes transformers' auto classes load converted checkpoints.
"""

from linearize.model.configuration import LinearizedConfig, MixerConfig
from linearize.model.memory import LayerMemory, cache_nbytes
from linearize.model.modeling import LinearizedForCausalLM, register_classes

register_classes()

__all__ = ["LayerMemory", "LinearizedConfig", "LinearizedForCausalLM", "MixerConfig", "cache_nbytes"]
