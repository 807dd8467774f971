"""Continue a text with a model that was not converted, by transformers' `generate`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers import DynamicCache, LogitsProcessor, LogitsProcessorList, StoppingCriteria, StoppingCriteriaList

if TYPE_CHECKING:
    from collections.abc import Callable

    from linearize.generation.sampling import Sampling


@dataclass(frozen=True, eq=False)
class Past:
    """Tokens that a model has read, and its cache of keys and values, which grows with them.

    Attributes:
        ids: `[1, T]`.
        cache: of all tokens but the last.
    """

    ids: Tensor
    cache: DynamicCache

    @property
    def nbytes(self) -> int:
        """Bytes of the cache."""
        held = (x for layer in self.cache.layers for x in (layer.keys, layer.values) if x is not None)
        return sum(x.numel() * x.element_size() for x in held)


def continue_plain(
    model: Any, sampling: Sampling, ids: Tensor, past: Past | None, write: Callable[[Tensor], object]
) -> Past:
    """Continue one text `[1, T]` that follows `past`, whose cache grows in place.

    Args:
        write: called with each new token `[1]`; a true value ends the text.
    """
    cache = DynamicCache(config=model.config.get_text_config()) if past is None else past.cache
    whole = ids if past is None else torch.cat([past.ids, ids], 1)
    writer = _Writer(write)
    options: dict[str, Any] = {
        "max_new_tokens": sampling.max_new_tokens,
        "eos_token_id": list(sampling.eos) or None,
        "pad_token_id": sampling.pad,
        "repetition_penalty": sampling.repetition_penalty,
        "do_sample": sampling.temperature is not None,
    }
    if sampling.temperature is not None:
        options |= {"temperature": sampling.temperature, "top_k": sampling.top_k or 0}
        options |= {"top_p": 1.0 if sampling.top_p is None else sampling.top_p, "min_p": sampling.min_p}
    new = model.generate(
        whole,
        attention_mask=torch.ones_like(whole),
        past_key_values=cache,
        streamer=writer,
        stopping_criteria=StoppingCriteriaList([writer]),
        logits_processor=LogitsProcessorList([_Penalties(sampling, whole.shape[1])] if sampling.counts_written else []),
        **options,
    )
    return Past(new, cache)


class _Writer(StoppingCriteria):
    """Passes on new tokens, and ends the text when `write` says so."""

    def __init__(self, write: Callable[[Tensor], object]) -> None:
        self.write, self.prompt, self.ended = write, True, False

    def put(self, tokens: Tensor) -> None:
        if not self.prompt:  # transformers begins with the prompt
            self.ended = bool(self.write(tokens))
        self.prompt = False

    def end(self) -> None:
        """Nothing is held back."""

    def __call__(self, input_ids: Tensor, scores: Tensor, **_: Any) -> Tensor:
        return torch.full((len(input_ids),), self.ended, device=input_ids.device)


class _Penalties(LogitsProcessor):
    """Presence and frequency penalties on the tokens from column `start` on."""

    def __init__(self, sampling: Sampling, start: int) -> None:
        self.sampling, self.start = sampling, start

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        new = input_ids[:, self.start :]
        written = torch.zeros_like(scores).scatter_add_(1, new, torch.ones_like(new, dtype=scores.dtype))
        return self.sampling.penalised(scores, written)
