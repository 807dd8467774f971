"""Read a prompt into a model's cache, a piece at a time."""

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


# A long text is read in pieces, so that peak memory does not depend on its length either. So many tokens of all rows
# together keep the device busy; not measured on a GPU yet.
_PIECE = {"cpu": 2048, "cuda": 8192}


_SHORTEST = 256  # a piece has a whole window to bring along


def prefill_chunk(device: torch.device, rows: int = 1) -> int:
    """Number of tokens of each of `rows` texts that are read at once."""
    return max(_PIECE.get(device.type, _PIECE["cpu"]) // max(rows, 1), _SHORTEST)


def prepared(
    model: Any,
    input_ids: Tensor,
    attention_mask: Tensor | None,
    state: State | None,
    into: Sequence[LayerMemory] | None,
) -> tuple[DynamicCache, Tensor, Tensor | None]:
    """Memories as they are before a text is read, its tokens `[B, T]`, and which of them are real (None: all). The
    arguments are those of `State.read`."""
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
    """Reads a text piece by piece, from where it lies; the logits after its last column, `[B, vocabulary]`, if any."""
    chunk, out = prefill_chunk(model.device, ids.shape[0]), None
    with torch.no_grad():
        for start in range(0, ids.shape[1], chunk):
            own = slice(start, start + chunk)
            piece, mask = ids[:, own].to(model.device), None if real is None else real[:, own].to(model.device)
            out = model(piece, attention_mask=mask, past_key_values=cache, use_cache=True, logits_to_keep=1)
    return None if out is None else out.logits[:, -1]


def without_last(ids: Tensor, real: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
    """The last token of each row `[B, 1]`, then the tokens before it and which of these are real (None: all)."""
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
