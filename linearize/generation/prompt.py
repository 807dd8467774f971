"""Read a prompt into a model's cache in pieces."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers import DynamicCache

from linearize.errors import DataError, StateError
from linearize.generation import statefile
from linearize.model import LayerMemory, LinearizedForCausalLM
from linearize.model.memory import recount

if TYPE_CHECKING:
    from collections.abc import Sequence

    from linearize.generation.state import State


# Tokens per piece, over all rows. Pieces make peak memory independent of the text's length. The sizes keep the device
# busy; not measured on a GPU yet.
_PIECE = {"cpu": 2048, "cuda": 8192}


_SHORTEST = 256  # tokens; a shorter piece would cost more, because each one reads a whole window


def prefill_chunk(device: torch.device, rows: int = 1) -> int:
    """Tokens per piece for each of `rows` texts."""
    return max(_PIECE.get(device.type, _PIECE["cpu"]) // max(rows, 1), _SHORTEST)


def prepared(
    model: Any,
    input_ids: Tensor,
    attention_mask: Tensor | None,
    state: State | None,
    into: Sequence[LayerMemory] | None = None,
) -> tuple[DynamicCache, Tensor, Tensor | None]:
    """The initial memories, the tokens to read `[B, T]`, and a mask of real tokens (None: all). Arguments as in
    `State.read`; `into` are memories of B rows to use, by default new ones."""
    converted = _converted(model)
    ids, rows = input_ids, input_ids.shape[0]
    real = None if attention_mask is None else (attention_mask.to(ids.device) != 0).long()
    if state is None:
        memories = statefile.empty_memories(converted, rows) if into is None else list(into)
        for memory in into or ():
            memory.reset()
    elif state.last.shape[0] == rows:
        memories = [layer.clone() for layer in state.layers] if into is None else list(into)
        if into is not None:
            for memory, earlier in zip(into, state.layers, strict=True):
                memory.take(earlier)
            recount(into)
        ids = torch.cat([state.last.to(ids), ids], 1)
        real = None if real is None else torch.cat([real.new_ones(rows, 1), real], 1)
    else:
        raise DataError(
            f"the state has {state.last.shape[0]} rows and input_ids {rows}; state.fork(copies) repeats rows"
        )
    some = torch.full((rows,), ids.shape[1] > 0) if real is None else real.any(1)
    if not bool(some.all()):
        raise DataError(f"row {int(some.int().argmin())} of the prompt has no tokens; give each row some")
    return _cache(memories), ids, real


def read_through(model: Any, cache: DynamicCache, ids: Tensor, real: Tensor | None) -> Tensor | None:
    """Read a text from any device in pieces; returns the logits of its last column `[B, vocabulary]`, or None
    for an empty text."""
    chunk, out = prefill_chunk(model.device, ids.shape[0]), None
    with torch.no_grad():
        for start in range(0, ids.shape[1], chunk):
            own = slice(start, start + chunk)
            piece, mask = ids[:, own].to(model.device), None if real is None else real[:, own].to(model.device)
            out = model(piece, attention_mask=mask, past_key_values=cache, use_cache=True, logits_to_keep=1)
    return None if out is None else out.logits[:, -1]


def without_last(ids: Tensor, real: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
    """Split off each row's last real token. Returns it `[B, 1]`, the earlier tokens, and their mask (None: all)."""
    if real is None:
        return ids[:, -1:].clone(), ids[:, :-1], None
    at = (real * torch.arange(1, ids.shape[1] + 1, device=ids.device)).argmax(1, keepdim=True)
    last, real = ids.gather(1, at), real.scatter(1, at, 0)
    columns = real.any(0)
    return last, ids[:, columns], real[:, columns]


def _converted(model: Any) -> LinearizedForCausalLM:
    converted = model.get_base_model() if hasattr(model, "get_base_model") else model
    if not isinstance(converted, LinearizedForCausalLM):
        raise StateError(
            f"{type(model).__name__} is not a converted model, so it has no state to keep; convert it first"
        )
    return converted


def _cache(memories: Sequence[LayerMemory]) -> DynamicCache:
    cache = DynamicCache()
    cache.layers = list(memories)
    return cache
