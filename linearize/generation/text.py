"""Generate text and measure speed and the memory of the cache."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from transformers import DynamicCache, TextStreamer

from linearize.errors import DataError
from linearize.generation.state import State
from linearize.model import LinearizedForCausalLM, cache_nbytes
from linearize.sources.limits import check_tokens, learned_positions

if TYPE_CHECKING:
    from collections.abc import Callable


@dataclass(frozen=True)
class Continuation:
    """The generated text and its figures.

    Attributes:
        text: the new text alone.
        prefill_seconds: time to the first new token, or, with `max_new_tokens` 0, to the end of the prompt.
        tokens_per_second: decoding speed after the first token.
        memory_bytes: of the cache at the end.
        constant: True if the cache has a fixed size.
        last_position: the model's last learned position if the text stopped there; None otherwise.
        state: the state after the prompt and the new text; None for a model that was not converted.
    """

    text: str
    prompt_tokens: int
    new_tokens: int
    prefill_seconds: float
    tokens_per_second: float
    memory_bytes: int
    constant: bool
    last_position: int | None
    state: State | None


class _Streamer(TextStreamer):
    """Pass on decoded text, and record the time of each token."""

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
    state: State | None = None,
    chat: bool = False,
    max_new_tokens: int = 200,
    temperature: float = 0.0,
    top_p: float = 1.0,
    seed: int = 0,
    write: Callable[[str], None] | None = None,
) -> Continuation:
    """Continue `prompt`.

    Args:
        state: the state of one text to continue; it is not changed. With it the prompt may be empty.
        chat: put the prompt into the chat template as a user turn.
        max_new_tokens: 0 reads the prompt and writes nothing; for converted models only.
        temperature: 0 for greedy decoding; otherwise tokens are sampled.
        write: called with each piece of new text as soon as it is decoded.

    Raises:
        DataError: the prompt has no tokens, more tokens than the model has positions, or a token without an embedding
            row; or the state holds several texts.
        StateError: a model that was not converted cannot use a state, or read without writing.
    """
    if state is not None and state.last.shape[0] != 1:
        raise DataError(f"the state holds {state.last.shape[0]} texts; continue them in Python with State.generate")
    started = time.monotonic()
    ids = _prompt_ids(tokenizer, prompt, chat, state).to(model.device)
    if ids.shape[1] == 0 and state is None:
        raise DataError("the prompt is empty; give some text to continue")
    check_tokens(ids, tokenizer, model.config, "the prompt")
    converted = isinstance(model, LinearizedForCausalLM)
    read = ids.shape[1] + (0 if state is None else int(state.tokens))
    learned = learned_positions(model)
    reads, way = learned, ""
    if learned is None and not converted:
        # The model was not trained on further positions, and its attention takes quadratic time.
        reads, way = getattr(model.config.get_text_config(), "max_position_embeddings", None), ", or convert it"
    if reads is not None and read > reads:
        what = "the prompt has" if state is None else "the state and the prompt have"
        raise DataError(f"{what} {read:,} tokens, and the model reads {reads:,}; shorten it{way}")
    asked = max_new_tokens
    if learned is not None and asked:
        if read == learned:
            raise DataError(f"the text fills all {learned:,} positions that the model has learned; shorten it")
        max_new_tokens = min(asked, learned - read)
    streamer = _Streamer(tokenizer, write)
    options: dict[str, Any] = {
        "max_new_tokens": max_new_tokens,
        "streamer": streamer,
        "pad_token_id": tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id,
        "do_sample": temperature > 0,
    }
    if temperature > 0:
        options |= {"temperature": temperature, "top_p": top_p, "top_k": 0}
    torch.manual_seed(seed)
    with torch.inference_mode():
        if converted or state is not None or not max_new_tokens:
            after, new = State.read(model, ids, state=state), ids[:, :0]
            if max_new_tokens:
                output = after.generate(model, return_dict_in_generate=True, **options)
                new = output.sequences
                after = State(output.past_key_values, new[:, -1:])
            cache = after.cache
        else:
            after, cache = None, DynamicCache(config=model.config.get_text_config())
            mask = torch.ones_like(ids)
            output = model.generate(ids, attention_mask=mask, past_key_values=cache, **options)
            new = output[:, ids.shape[1] :]
    times, written = streamer.times, new.shape[1]  # one time for the prompt, then one per new token
    return Continuation(
        text=tokenizer.decode(new[0], skip_special_tokens=True),
        prompt_tokens=ids.shape[1],
        new_tokens=written,
        prefill_seconds=(times[1] if written else time.monotonic()) - started,
        tokens_per_second=(written - 1) / (times[-1] - times[1]) if written > 1 else 0.0,
        memory_bytes=cache_nbytes(cache) if converted else _nbytes(cache),
        last_position=learned if written == max_new_tokens < asked else None,
        constant=after is not None and not any(layer.past for layer in after.layers),
        state=after,
    )


def _prompt_ids(tokenizer: Any, prompt: str, chat: bool, state: State | None) -> torch.Tensor:
    """Token ids `[1, T]`. After a state, the prompt is tokenized alone, without special tokens before it."""
    if chat and (prompt or state is None):
        prompt = _turn(tokenizer, prompt, state)
    ids: torch.Tensor = tokenizer(prompt, return_tensors="pt", add_special_tokens=not chat and state is None).input_ids
    return ids.long()  # an empty text gives floats


_ANSWER = "<the answer so far>"


def _turn(tokenizer: Any, prompt: str, state: State | None) -> str:
    """The user's turn in the chat template, up to the start of the answer.

    After a state, the turn includes the template's text between an answer and the next turn. Some templates rewrite
    earlier turns when a later one follows; that text is then unknown, and the turn is written as the first of a chat.
    """

    def render(*turns: tuple[str, str], answer: bool) -> str:
        messages = [{"role": role, "content": content} for role, content in turns]
        text: str = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=answer)
        return text

    turn = ("user", prompt)
    if state is not None:
        earlier = (("user", "?"), ("assistant", _ANSWER))
        before, whole = render(*earlier, answer=False), render(*earlier, turn, answer=True)
        if _ANSWER in before and whole.startswith(before):
            closing = before.rpartition(_ANSWER)[2]
            if int(state.last) in tokenizer.all_special_ids:
                closing = closing.removeprefix(tokenizer.decode(state.last[0]))  # the answer already has its end token
            return closing + whole[len(before) :]
    return render(turn, answer=True)


def _nbytes(cache: DynamicCache) -> int:
    """Bytes of a cache of transformers."""
    return sum(
        x.numel() * x.element_size() for layer in cache.layers for x in (layer.keys, layer.values) if x is not None
    )
