"""Generate text and measure speed and the memory of the cache."""

from __future__ import annotations

import time
import warnings
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch

from linearize.errors import DataError
from linearize.generation.decoding import Decoding
from linearize.generation.engine import Engine
from linearize.generation.plain import Past, continue_plain
from linearize.generation.sampling import unfollowed
from linearize.generation.state import State
from linearize.generation.stream import CONTEXT, TextStream
from linearize.model import LinearizedForCausalLM
from linearize.sources.limits import check_tokens, context_of, learned_positions

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
        past: the same for a model that was not converted.
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
    past: Past | None = None


def continue_text(
    model: Any,
    tokenizer: Any,
    prompt: str,
    *,
    decoding: Decoding | None = None,
    state: State | None = None,
    past: Past | None = None,
    chat: bool = False,
    system: str | None = None,
    write: Callable[[str], object] | None = None,
    interrupted: Callable[[], bool] | None = None,
) -> Continuation:
    """Continue `prompt`.

    Args:
        decoding: how to write; with `max_new_tokens` 0 a converted model reads the prompt and writes nothing.
        state: the state of one text to continue; it is not changed. With it the prompt may be empty.
        past: the same for a model that was not converted; its cache grows in place.
        chat: put the prompt into the chat template as a user turn.
        system: the system prompt of a chat that begins here.
        write: called with each piece of new text as soon as it is decoded.
        interrupted: called after each token; True ends the text there.

    Raises:
        DataError: the prompt has no tokens, more tokens than the model has positions, or a token without an embedding
            row; or the state holds several texts.
        StateError: a model that was not converted cannot use a state, or read without writing.
    """
    decoding = decoding or Decoding()
    if state is not None and state.last.shape[0] != 1:
        raise DataError(f"the state holds {state.last.shape[0]} texts; continue them in Python with State.generate")
    started = time.monotonic()
    ids = _prompt_ids(tokenizer, prompt, chat, system, state, past).to(model.device)
    if ids.shape[1] == 0 and state is None:
        raise DataError("the prompt is empty; give some text to continue")
    check_tokens(ids, tokenizer, model.config, "the prompt")
    converted = isinstance(model, LinearizedForCausalLM)
    read = ids.shape[1] + (0 if state is None else int(state.tokens)) + (0 if past is None else past.ids.shape[1])
    learned = learned_positions(model)
    reads, way = learned, ""
    if learned is None and not converted:
        # The model was not trained on further positions, and its attention takes quadratic time.
        reads, way = context_of(model.config), ", or convert it"
    if reads is not None and read > reads:
        what = "the prompt has" if state is None and past is None else "the text so far and the prompt have"
        raise DataError(f"{what} {read:,} tokens, and the model reads {reads:,}; shorten it{way}")
    sampling = decoding.sampling(model, tokenizer)
    if ignored := unfollowed(model.generation_config):
        warnings.warn(f"the checkpoint's generation settings {', '.join(ignored)} are not applied", stacklevel=2)
    asked = sampling.max_new_tokens
    if learned is not None and asked:
        if read == learned:
            raise DataError(f"the text fills all {learned:,} positions that the model has learned; shorten it")
        sampling = replace(sampling, max_new_tokens=min(asked, learned - read))
    # An answer is a text of its own; any other goes on from the prompt.
    before = [] if chat else [*([] if state is None else state.last[0].tolist()), *ids[0, -CONTEXT:].tolist()]
    stream, times = TextStream(tokenizer, decoding.stop, write, before), list[float]()

    def pass_on(token: torch.Tensor) -> bool:
        times.append(time.monotonic())
        stream.put(int(token))
        return stream.stopped or (interrupted is not None and interrupted())

    torch.manual_seed(decoding.seed)
    after: State | None = None
    with torch.inference_mode():
        if converted or state is not None or not asked:
            if asked:
                stoppable = bool(decoding.stop) or interrupted is not None
                after = (
                    Engine(model)
                    .generate(sampling, ids, state=state, write=pass_on, stoppable=stoppable, keep=True)
                    .state
                )
            else:
                after = State.read(model, ids, state=state)
        else:
            past = continue_plain(model, sampling, ids, past, pass_on)
    stream.end()
    written = len(times)
    return Continuation(
        text=stream.text,
        prompt_tokens=ids.shape[1],
        new_tokens=written,
        prefill_seconds=(times[0] if written else time.monotonic()) - started,
        tokens_per_second=(written - 1) / (times[-1] - times[0]) if written > 1 else 0.0,
        memory_bytes=after.nbytes if after is not None else past.nbytes if past is not None else 0,
        last_position=learned if written == sampling.max_new_tokens < asked else None,
        constant=after is not None and not any(layer.past for layer in after.layers),
        state=after,
        past=None if converted else past,
    )


def _prompt_ids(
    tokenizer: Any, prompt: str, chat: bool, system: str | None, state: State | None, past: Past | None
) -> torch.Tensor:
    """Token ids `[1, T]`. After an earlier text, the prompt is tokenized alone, without special tokens before it."""
    last = int(state.last) if state is not None else int(past.ids[0, -1]) if past is not None else None
    if chat and (prompt or last is None):
        prompt = _turn(tokenizer, prompt, last, system)
    try:
        prompt.encode()
    except UnicodeError as error:  # bytes that are not UTF-8 arrive as halves of surrogate pairs in some locales
        raise DataError("the prompt is not UTF-8 text; convert it first, with iconv for example") from error
    ids: torch.Tensor = tokenizer(prompt, return_tensors="pt", add_special_tokens=not chat and last is None).input_ids
    return ids.long()  # an empty text gives floats


_ANSWER = "<the answer so far>"


def _turn(tokenizer: Any, prompt: str, last: int | None, system: str | None = None) -> str:
    """The user's turn in the chat template, up to the start of the answer.

    After an earlier text, which ends with the token `last`, the turn includes the template's text between an answer and
    the next turn. Some templates rewrite earlier turns when a later one follows; that text is then unknown, and the
    turn is written as the first of a chat.
    """

    def render(*turns: tuple[str, str], answer: bool) -> str:
        messages = [{"role": role, "content": content} for role, content in turns]
        text: str = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=answer)
        return text

    turn = ("user", prompt)
    if last is not None:
        earlier = (("user", "?"), ("assistant", _ANSWER))
        before, whole = render(*earlier, answer=False), render(*earlier, turn, answer=True)
        if _ANSWER in before and whole.startswith(before):
            closing = before.rpartition(_ANSWER)[2]
            if last in tokenizer.all_special_ids:
                closing = closing.removeprefix(tokenizer.decode([last]))  # the answer already has its end token
            return closing + whole[len(before) :]
    return render(*([("system", system)] if system else []), turn, answer=True)
