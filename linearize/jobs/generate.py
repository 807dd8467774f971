"""`linearize generate`: continue a prompt, with states loaded from files and saved to them."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from linearize.checkpoint.sizes import growth_nbytes, state_nbytes
from linearize.errors import DataError, ModelError
from linearize.generation.state import State
from linearize.generation.statefile import check_target, header
from linearize.generation.text import continue_text
from linearize.jobs.checks import check_dtype, check_numbers
from linearize.model import LinearizedForCausalLM
from linearize.runtime.claims import claimed
from linearize.runtime.files import check_space
from linearize.sources.source import open_model

if TYPE_CHECKING:
    from collections.abc import Callable

    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from linearize.generation.text import Continuation


def generate(
    model: str | Path | PreTrainedModel,
    prompt: str,
    *,
    tokenizer: PreTrainedTokenizerBase | None = None,
    state: State | None = None,
    chat: bool = False,
    max_new_tokens: int = 200,
    temperature: float = 0.0,
    top_p: float = 1.0,
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
        max_new_tokens: the maximum number of new tokens; 0 only reads the prompt into the state.
        temperature: 0 takes the most likely token, otherwise tokens are sampled.
        top_p: sample among the most likely tokens, up to this probability mass.
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
    check_numbers(0, max_new_tokens=max_new_tokens, temperature=temperature)
    check_numbers(0, 1, top_p=top_p)
    check_numbers(-(2**63), 2**64 - 1, seed=seed)
    loaded: Any = model
    name = "the model"
    if isinstance(model, (str, Path)):
        loaded, own, source = open_model(str(model), dtype=dtype, trust_remote_code=trust_remote_code)
        tokenizer, name = tokenizer or own, source.name
    if tokenizer is None:
        raise DataError("a model that is loaded already needs its tokenizer: generate(model, prompt, tokenizer=...)")
    _check_chat(tokenizer, chat, name)
    return continue_text(
        loaded,
        tokenizer,
        prompt,
        state=state,
        chat=chat,
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        top_p=top_p,
        seed=seed,
        write=write,
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
    *,
    load_state: Path | None = None,
    save_state: Path | None = None,
    chat: bool = False,
    max_new_tokens: int = 200,
    temperature: float = 0.0,
    top_p: float = 1.0,
    seed: int = 0,
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
        _check_chat(tokenizer, chat, source.name)
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
        found = generate(
            loaded,
            text,
            tokenizer=tokenizer,
            state=state,
            chat=chat,
            max_new_tokens=max_new_tokens,
            temperature=temperature,
            top_p=top_p,
            seed=seed,
            write=write,
        )
        seconds, kept = time.monotonic() - started, None
        if save_state is not None and found.state is not None:
            kept = int(found.state.tokens), found.state.save(save_state, loaded)
    return Generated(found, None if state is None else int(state.tokens), kept, seconds)


def _check_chat(tokenizer: Any, chat: bool, name: str) -> None:
    """Raises:
    ModelError: `chat` is True and the tokenizer has no chat template.
    """
    if chat and not getattr(tokenizer, "chat_template", None):
        raise ModelError(f"{name}: its tokenizer has no chat template; leave --chat out")
