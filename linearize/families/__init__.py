"""Where each architecture keeps its query, key, value and output projections: one row per family.

A family is a small file that subclasses `Family` and an entry below. Nothing else in the package knows architectures.
"""

from linearize.families.base import Family, Projections
from linearize.families.llama import Llama

_FAMILIES: tuple[Family, ...] = (Llama(),)
FAMILIES: dict[str, Family] = {model_type: family for family in _FAMILIES for model_type in family.model_types}

__all__ = ["FAMILIES", "Family", "Projections"]
