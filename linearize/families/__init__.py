"""Where each architecture keeps its query, key, value and output projections: one row per family.

A family is a small file that subclasses `Family` and an entry below. Nothing else in the package knows architectures.
"""

from linearize.families.base import AttentionLayer, Family, Projections
from linearize.families.llama import Llama, Mistral

_FAMILIES: tuple[Family, ...] = (Llama(), Mistral())
FAMILIES: dict[str, Family] = {model_type: family for family in _FAMILIES for model_type in family.model_types}

__all__ = ["FAMILIES", "AttentionLayer", "Family", "Projections"]
