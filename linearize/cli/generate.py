"""`linearize generate`: text from a model, streamed, in constant memory."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from linearize.cli.console import (
    Int8Option,
    JsonOption,
    ModelArgument,
    TrustOption,
    check_dtype,
    examples,
    print_json,
    status,
    write_text,
)
from linearize.cli.decoding import SystemOption, decodes
from linearize.cli.libraries import quiet_libraries
from linearize.generation.decoding import Decoding
from linearize.report.formatting import readable_bytes

EPILOG = examples(
    'linearize generate ./tuned "The capital of France is"',
    'linearize generate ./tuned "Why is the sky blue?" --chat --temperature 0.7',
    "linearize generate ./tuned - < long-document.txt",
    "linearize generate ./tuned - -n 0 --save-state manual.state < manual.txt",
    'linearize generate ./tuned "In short, the manual says:" --load-state manual.state',
)


@decodes
def generate(
    model: ModelArgument,
    prompt: Annotated[
        str | None,
        typer.Argument(metavar="PROMPT", help="The text to continue; - reads it from stdin.", show_default=False),
    ] = None,
    chat: Annotated[bool, typer.Option("--chat", help="Put the prompt into the model's chat template.")] = False,
    system: SystemOption = None,
    decoding: Decoding = Decoding(),  # noqa: B008 - frozen; its options come from `decodes`
    load_state: Annotated[
        Path | None,
        typer.Option(
            "--load-state",
            metavar="FILE",
            help="Continue the text of the state in FILE; PROMPT, if any, follows it.",
        ),
    ] = None,
    save_state: Annotated[
        Path | None,
        typer.Option("--save-state", metavar="FILE", help="Save the state after all tokens, read and new, to FILE."),
    ] = None,
    dtype: Int8Option = "auto",
    trust_remote_code: TrustOption = False,
    as_json: JsonOption = False,
) -> None:
    """Continue a prompt. Text goes to stdout; speed and memory go to stderr.

    A state (--save-state) is the model's memory of a text. The text is read
    once, and can be continued any number of times, by the same model only.
    The state's size does not depend on the text's length. The PROMPT after
    --load-state is tokenized on its own; with --chat it is the user's next
    turn, in the form of the chat template after an answer.
    """
    check_dtype(dtype, int8=True)
    if prompt is None and load_state is None:
        raise typer.BadParameter("give a PROMPT, or a text to continue with --load-state")
    if decoding.max_new_tokens == 0 and save_state is None:
        raise typer.BadParameter("-n 0 reads and writes nothing; name a file to keep what was read with --save-state")
    quiet_libraries()
    from linearize.jobs.generate import run_generate

    result, read, kept, seconds = run_generate(
        model,
        sys.stdin.read if prompt == "-" else prompt or "",
        decoding,
        load_state=load_state,
        save_state=save_state,
        chat=chat,
        system=system,
        dtype=dtype,
        trust_remote_code=trust_remote_code,
        write=None if as_json else write_text,
    )
    facts: dict[str, Any] = {
        "text": result.text,
        "prompt_tokens": result.prompt_tokens,
        "new_tokens": result.new_tokens,
        "prefill_seconds": result.prefill_seconds,
        "tokens_per_second": result.tokens_per_second,
        "memory_bytes": result.memory_bytes,
        "memory_is_constant": result.constant,
        "last_position": result.last_position,
        "seconds": seconds,
    }
    if read is not None:
        facts["loaded_state"] = {"file": str(load_state), "tokens": read}
    if kept is not None:
        facts["saved_state"] = {"file": str(save_state), "tokens": kept[0], "bytes": kept[1]}
    if as_json:
        print_json(facts)
        return
    if result.new_tokens:
        sys.stdout.write("\n")
    written = f"{result.new_tokens} written at {result.tokens_per_second:.1f} tok/s; " if result.new_tokens else ""
    kind = "constant" if result.constant else "and growing"
    status(
        f"{result.prompt_tokens} tokens read in {result.prefill_seconds:.2f} s; {written}"
        f"memory {readable_bytes(result.memory_bytes)}, {kind}"
    )
    if result.last_position is not None:
        status(f"stopped at position {result.last_position:,}, the last that the model has learned")
    for verb in ("loaded", "saved"):
        if state := facts.get(f"{verb}_state"):
            nbytes = f", {readable_bytes(state['bytes'])}" if "bytes" in state else ""
            status(f"state of {state['tokens']:,} tokens{nbytes} {verb}: {state['file']}")
