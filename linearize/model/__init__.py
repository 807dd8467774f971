"""A converted checkpoint: its configuration, attention layer, memory and model.

Importing the model registers converted checkpoints with transformers' auto classes. The names below are lazy imports,
because a configuration needs none of transformers' modeling modules, which take seconds.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from linearize.model.configuration import LinearizedConfig, MixerConfig
    from linearize.model.memory import LayerMemory, cache_nbytes
    from linearize.model.modeling import LinearizedForCausalLM

__all__ = ["LayerMemory", "LinearizedConfig", "LinearizedForCausalLM", "MixerConfig", "cache_nbytes"]

_HOMES = {
    "LayerMemory": "memory",
    "LinearizedConfig": "configuration",
    "LinearizedForCausalLM": "modeling",
    "MixerConfig": "configuration",
    "cache_nbytes": "memory",
}


def __getattr__(name: str) -> object:
    if name not in _HOMES:
        raise AttributeError(f"module 'linearize.model' has no attribute {name!r}")
    return getattr(importlib.import_module(f"linearize.model.{_HOMES[name]}"), name)
