"""Generation with figures: how fast, and how much memory the past takes."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from transformers import DynamicCache, TextStreamer

from linearize.errors import DataError
from linearize.model import LinearizedForCausalLM, cache_nbytes

if TYPE_CHECKING:
    from collections.abc import Callable

# A converted model reads a long prompt in pieces, so that its peak memory does not depend on the prompt either.
PREFILL_CHUNK = 2048


@dataclass(frozen=True)
class Continuation:
    """What was written.

    Attributes:
        text: the new text alone.
        prefill_seconds: until the first new token was there.
        tokens_per_second: of the tokens after the first.
        memory_bytes: of the cache at the end.
        constant: whether that memory is of fixed size.
    """

    text: str
    prompt_tokens: int
    new_tokens: int
    prefill_seconds: float
    tokens_per_second: float
    memory_bytes: int
    constant: bool


class _Streamer(TextStreamer):
    """Hands text on as it is decoded, and notes when tokens came."""

    def __init__(self, tokenizer: Any, write: Callable[[str], None] | None) -> None:
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)
        self.write, self.times = write, list[float]()

    def put(self, value: torch.Tensor) -> None:
        self.times.append(time.monotonic())
        super().put(value)

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        if self.write is not None:
            self.write(text)


def continue_text(
    model: Any,
    tokenizer: Any,
    prompt: str,
    *,
    chat: bool = False,
    max_new_tokens: int = 200,
    temperature: float = 0.0,
    top_p: float = 1.0,
    seed: int = 0,
    write: Callable[[str], None] | None = None,
) -> Continuation:
    """Continues `prompt`.

    Args:
        temperature: 0 takes the most likely token, otherwise tokens are sampled.
        write: called with each piece of new text as soon as it is there.

    Raises:
        DataError: the prompt has no tokens.
    """
    if chat:
        prompt = tokenizer.apply_chat_template(
            [{"role": "user", "content": prompt}], tokenize=False, add_generation_prompt=True
        )
    encoded = tokenizer(prompt, return_tensors="pt", add_special_tokens=not chat)
    ids = encoded.input_ids.to(model.device)
    if ids.shape[1] == 0:
        raise DataError("the prompt is empty; give some text to continue")
    constant = isinstance(model, LinearizedForCausalLM)
    cache = DynamicCache(config=model.config.get_text_config())
    streamer = _Streamer(tokenizer, write)
    options: dict[str, Any] = {"do_sample": temperature > 0}
    if temperature > 0:
        options |= {"temperature": temperature, "top_p": top_p, "top_k": 0}
    if constant and ids.shape[1] > PREFILL_CHUNK:
        options["prefill_chunk_size"] = PREFILL_CHUNK
    torch.manual_seed(seed)
    with torch.inference_mode():
        output = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            past_key_values=cache,
            max_new_tokens=max_new_tokens,
            streamer=streamer,
            pad_token_id=tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id,
            **options,
        )
    times = streamer.times  # the prompt's first, then one for each new token
    new = output.shape[1] - ids.shape[1]
    return Continuation(
        text=tokenizer.decode(output[0, ids.shape[1] :], skip_special_tokens=True),
        prompt_tokens=ids.shape[1],
        new_tokens=new,
        prefill_seconds=times[1] - times[0] if new else 0.0,
        tokens_per_second=(new - 1) / (times[-1] - times[1]) if new > 1 else 0.0,
        memory_bytes=cache_nbytes(cache) if constant else _nbytes(cache),
        constant=constant,
    )


def _nbytes(cache: DynamicCache) -> int:
    """Bytes of an ordinary cache."""
    return sum(
        x.numel() * x.element_size() for layer in cache.layers for x in (layer.keys, layer.values) if x is not None
    )
