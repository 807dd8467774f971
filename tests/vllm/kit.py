"""vLLM in the tests' own process, and transformers' greedy text beside it."""

from __future__ import annotations

import gc
import json
import os
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from pathlib import Path

os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")
os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")


@contextmanager
def served(folder: Path, **options: Any) -> Iterator[Any]:
    """`vllm.LLM` of a checkpoint, without tokenizer and compiler."""
    from vllm import LLM
    from vllm.distributed import cleanup_dist_env_and_memory

    _register(folder)
    given = {
        "dtype": "float32", "enforce_eager": True, "skip_tokenizer_init": True, "max_model_len": 128,
        "max_num_seqs": 4, "disable_log_stats": True, "distributed_executor_backend": "uni",
    }  # fmt: skip
    llm = LLM(str(folder), **given | options)
    try:
        yield llm
    finally:
        llm.llm_engine.engine_core.shutdown()
        del llm
        gc.collect()
        cleanup_dist_env_and_memory()


def _register(folder: Path) -> None:
    """Register the classes of a checkpoint's architecture; vLLM would start a process to look at each."""
    from vllm.model_executor.models import ModelRegistry
    from vllm.plugins import load_general_plugins

    from linearize.vllm import models
    from linearize.vllm.plugin import HYBRID

    load_general_plugins()
    (name,) = json.loads((folder / "config.json").read_text())["architectures"]
    for architecture in (name, HYBRID + name):
        ModelRegistry.register_model(architecture, getattr(models, architecture))


def write(llm: Any, prompts: Sequence[list[int]], tokens: int) -> list[list[int]]:
    """Greedy text after each prompt."""
    from vllm import SamplingParams

    greedy = SamplingParams(temperature=0, max_tokens=tokens, ignore_eos=True, detokenize=False)
    written = llm.generate([{"prompt_token_ids": prompt} for prompt in prompts], greedy, use_tqdm=False)
    return [list(answer.outputs[0].token_ids) for answer in written]


@torch.inference_mode()
def differences(model: Any, prompts: Sequence[list[int]], texts: Sequence[list[int]]) -> list[str]:
    """Tokens of `texts` that are not the most likely ones of `model`, ties aside.

    A token counts as a tie if its logit is within 1e-4 of the spread of the largest; text after it is read as written,
    so one tie hides no later difference.
    """
    found = []
    for number, (prompt, text) in enumerate(zip(prompts, texts, strict=True)):
        logits = model(torch.tensor([prompt + text[:-1]])).logits[0, len(prompt) - 1 :].float()
        for place, (row, token) in enumerate(zip(logits, text, strict=True)):
            short = (row.max() - row[token]) / (row.max() - row.min())
            if short > 1e-4:
                found.append(f"text {number}, token {place}: {token} is {short:.1e} below {int(row.argmax())}")
    return found
