"""`linearize generate`: text from a model, streamed, in constant memory."""

from __future__ import annotations

import sys
import time
from typing import Annotated, Any

import typer

from linearize.cli.console import (
    DtypeOption,
    JsonOption,
    ModelArgument,
    TrustOption,
    check_dtype,
    examples,
    print_json,
    readable_bytes,
    status,
)
from linearize.cli.libraries import quiet_libraries

EPILOG = examples(
    'linearize generate ./tuned "The capital of France is"',
    'linearize generate ./tuned "Why is the sky blue?" --chat --temperature 0.7',
    "linearize generate ./tuned - < long-document.txt",
)


def generate(
    model: ModelArgument,
    prompt: Annotated[str, typer.Argument(metavar="PROMPT", help="The text to continue; - reads it from stdin.")],
    chat: Annotated[bool, typer.Option("--chat", help="Put the prompt into the model's chat template.")] = False,
    max_new_tokens: Annotated[
        int, typer.Option("--max-new-tokens", "-n", min=1, help="Stop after so many tokens.")
    ] = 200,
    temperature: Annotated[float, typer.Option("--temperature", min=0.0, help="0 takes the most likely token.")] = 0.0,
    top_p: Annotated[
        float, typer.Option("--top-p", min=0.0, max=1.0, help="Sample among the most likely, up to this mass.")
    ] = 1.0,
    seed: Annotated[int, typer.Option("--seed", help="Of the sampling.")] = 0,
    dtype: DtypeOption = "auto",
    trust_remote_code: TrustOption = False,
    as_json: JsonOption = False,
) -> None:
    """Continue a prompt. Text goes to stdout; speed and the memory held go to stderr."""
    check_dtype(dtype)
    quiet_libraries()
    from linearize.conversion.convert import open_model
    from linearize.errors import ModelError
    from linearize.generation import continue_text

    if prompt == "-":
        prompt = sys.stdin.read()
    loaded, tokenizer, source = open_model(model, dtype=dtype, trust_remote_code=trust_remote_code)
    if chat and not getattr(tokenizer, "chat_template", None):
        raise ModelError(f"{source.name}: its tokenizer has no chat template; leave --chat out")
    started = time.monotonic()
    result = continue_text(
        loaded,
        tokenizer,
        prompt,
        chat=chat,
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        top_p=top_p,
        seed=seed,
        write=None if as_json else _write,
    )
    facts: dict[str, Any] = {
        "text": result.text,
        "prompt_tokens": result.prompt_tokens,
        "new_tokens": result.new_tokens,
        "prefill_seconds": result.prefill_seconds,
        "tokens_per_second": result.tokens_per_second,
        "memory_bytes": result.memory_bytes,
        "memory_is_constant": result.constant,
        "seconds": time.monotonic() - started,
    }
    if as_json:
        print_json(facts)
        return
    sys.stdout.write("\n")
    kind = "constant" if result.constant else "and growing"
    status(
        f"{result.prompt_tokens} tokens read in {result.prefill_seconds:.2f} s; {result.new_tokens} written at "
        f"{result.tokens_per_second:.1f} tok/s; memory {readable_bytes(result.memory_bytes)}, {kind}"
    )


def _write(text: str) -> None:
    sys.stdout.write(text)
    sys.stdout.flush()
