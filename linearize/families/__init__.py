"""Table of families: each names the query, key, value and output projections of its architectures.

A family is a small file that subclasses `Family` and an entry below. Nothing else in the package knows architectures.
"""

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

__all__ = ["FAMILIES", "AttentionLayer", "Family", "Projections"]
