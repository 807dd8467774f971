"""Imports of the process that `tests/forked.py` forks from; none of them is this package."""

import torch  # noqa: F401
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationMixin, pipeline  # noqa: F401
