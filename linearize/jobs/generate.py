"""`linearize generate`: continue a prompt, with states loaded from files and saved to them."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from linearize.checkpoint.sizes import growth_nbytes, state_nbytes
from linearize.errors import DataError, ModelError
from linearize.generation.decoding import Decoding
from linearize.generation.state import State
from linearize.generation.statefile import check_target, header
from linearize.generation.text import continue_text
from linearize.jobs.checks import check_dtype
from linearize.model import LinearizedForCausalLM
from linearize.runtime.claims import claimed
from linearize.runtime.files import check_space
from linearize.sources.source import open_model

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from linearize.generation.text import Continuation


def generate(
    model: str | Path | PreTrainedModel,
    prompt: str,
    *,
    tokenizer: PreTrainedTokenizerBase | None = None,
    state: State | None = None,
    chat: bool = False,
    system: str | None = None,
    max_new_tokens: int = 200,
    temperature: float = 0.0,
    top_k: int = 0,
    top_p: float = 1.0,
    min_p: float = 0.0,
    repetition_penalty: float | None = None,
    presence_penalty: float = 0.0,
    frequency_penalty: float = 0.0,
    stop: Sequence[str] = (),
    seed: int = 0,
    dtype: str = "auto",
    trust_remote_code: bool = False,
    write: Callable[[str], None] | None = None,
) -> Continuation:
    """Continue a prompt, and measure speed and memory.

    Args:
        model: a model's name or folder, or a loaded model.
        tokenizer: the tokenizer of a loaded model.
        prompt: the text to continue.
        state: the state of a text that the prompt continues; the prompt may then be empty.
        chat: put the prompt into the model's chat template.
        system: the system prompt of a chat that begins here.
        max_new_tokens: the maximum number of new tokens; 0 only reads the prompt into the state.
        temperature: 0 takes the most likely token, otherwise tokens are sampled.
        top_k: sample among this many most likely tokens; 0 for all.
        top_p: sample among the most likely tokens, up to this probability mass.
        min_p: sample among tokens with at least this share of the most likely one's probability.
        repetition_penalty: above 1, tokens that occurred become less likely; None for the model's own.
        presence_penalty: lowers the logits of tokens that were written.
        frequency_penalty: lowers the logit of a token for each time that it was written.
        stop: strings that end the text.
        seed: the seed of the sampling.
        dtype: `auto`, `float32`, `bfloat16`, `float16`, or `int8` on a CPU.
        trust_remote_code: run Python code from the model's repository.
        write: called with each new piece of text.

    Returns:
        the new text, speed, memory and the final state.

    Raises:
        DataError: the prompt has no tokens, or a loaded model comes without its tokenizer.
        ModelError: the model cannot be read, has no tokenizer, or has no chat template although `chat` is set.
        StateError: a model that was not converted gets a state, or 0 new tokens.
    """
    check_dtype(dtype, int8=True)
    decoding = Decoding(
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        min_p=min_p,
        repetition_penalty=repetition_penalty,
        presence_penalty=presence_penalty,
        frequency_penalty=frequency_penalty,
        stop=tuple(stop),
        seed=seed,
    )
    loaded: Any = model
    name = "the model"
    if isinstance(model, (str, Path)):
        loaded, own, source = open_model(str(model), dtype=dtype, trust_remote_code=trust_remote_code)
        tokenizer, name = tokenizer or own, source.name
    if tokenizer is None:
        raise DataError("a model that is loaded already needs its tokenizer: generate(model, prompt, tokenizer=...)")
    check_chat(tokenizer, name, chat=chat, system=system)
    return continue_text(
        loaded, tokenizer, prompt, decoding=decoding, state=state, chat=chat, system=system, write=write
    )


class Generated(NamedTuple):
    """A continuation and the states around it.

    Attributes:
        read: tokens of the loaded state; None without one.
        kept: tokens and bytes of the saved state; None without one.
        seconds: time from the loaded model to the last token.
    """

    continuation: Continuation
    read: int | None
    kept: tuple[int, int] | None
    seconds: float


def run_generate(
    model: str,
    prompt: str | Callable[[], str],
    decoding: Decoding,
    *,
    load_state: Path | None = None,
    save_state: Path | None = None,
    chat: bool = False,
    system: str | None = None,
    dtype: str = "auto",
    trust_remote_code: bool = False,
    write: Callable[[str], None] | None = None,
) -> Generated:
    """`generate` with the states before and after it in files.

    Args:
        prompt: the text, or a function that reads it after the files have been checked.
        load_state: the file of a state that the prompt continues.
        save_state: the file to write the state to.

    Raises:
        LinearizeError: as `generate`, or a file cannot be read or written.
    """
    # Check the files first, because loading a model and reading a long text take time.
    if load_state is not None:
        header(load_state)
    if save_state is not None:
        check_target(save_state)
    with claimed(save_state):
        text = prompt if isinstance(prompt, str) else prompt()
        loaded, tokenizer, source = open_model(model, dtype=dtype, trust_remote_code=trust_remote_code)
        check_chat(tokenizer, source.name, chat=chat, system=system)
        if (load_state or save_state) and not isinstance(loaded, LinearizedForCausalLM):
            raise ModelError(
                f"{source.name}: is not a converted model, so it has no state to load or save; run linearize convert "
                "first"
            )
        if save_state is not None:
            grows = growth_nbytes(loaded)  # not 0 if layers or heads keep softmax
            check_space(save_state, state_nbytes(loaded) + (grows and grows * len(tokenizer(text).input_ids)))
        started = time.monotonic()
        state = None if load_state is None else State.load(load_state, loaded)
        found = continue_text(
            loaded, tokenizer, text, decoding=decoding, state=state, chat=chat, system=system, write=write
        )
        seconds, kept = time.monotonic() - started, None
        if save_state is not None and found.state is not None:
            kept = int(found.state.tokens), found.state.save(save_state, loaded)
    return Generated(found, None if state is None else int(state.tokens), kept, seconds)


def check_chat(tokenizer: Any, name: str, *, chat: bool, system: str | None) -> None:
    """Raises:
    DataError: there is a system prompt and no chat.
    ModelError: `chat` is True and the tokenizer has no chat template.
    """
    if system and not chat:
        raise DataError("system: a system prompt is part of a chat template; it needs chat")
    if chat and not getattr(tokenizer, "chat_template", None):
        raise ModelError(f"{name}: its tokenizer has no chat template; run linearize generate without --chat")
