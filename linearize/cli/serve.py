"""`linearize serve`: a server of OpenAI's protocol."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated

import typer

from linearize.cli.console import (
    Int8Option,
    JsonOption,
    ModelArgument,
    TrustOption,
    check_dtype,
    examples,
    memory_words,
    print_json,
    status,
)
from linearize.cli.libraries import quiet_libraries
from linearize.report.formatting import readable_bytes

if TYPE_CHECKING:
    from linearize.jobs.serve import Serving

EPILOG = examples(
    "linearize serve ./tuned",
    "linearize serve ./tuned --port 8123 --served-name tuned --at-once 64",
    "linearize serve ./tuned --engine own --dtype int8",
)


def serve(
    model: ModelArgument,
    options: Annotated[
        list[str] | None, typer.Argument(metavar="VLLM_OPTIONS", help="After --, further options of vllm serve.")
    ] = None,
    host: Annotated[str, typer.Option("--host", metavar="ADDRESS", help="The address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option("--port", min=0, max=65535, help="The port; 0 for any free one.")] = 8000,
    served_name: Annotated[
        str | None,
        typer.Option("--served-name", metavar="NAME", help="The model's name in requests. Default: MODEL."),
    ] = None,
    at_once: Annotated[
        int | None,
        typer.Option(
            "--at-once",
            min=1,
            metavar="N",
            help="Conversations that are written at once; others wait. Default: 32, or as many as fit.",
        ),
    ] = None,
    max_tokens: Annotated[
        int, typer.Option("--max-tokens", min=1, help="Maximum number of new tokens where a request sets none.")
    ] = 1024,
    engine: Annotated[
        str,
        typer.Option(
            "--engine", help="own, vllm, or auto: vLLM if it is installed with the plugin of linearize, else own."
        ),
    ] = "auto",
    dtype: Int8Option = "auto",
    trust_remote_code: TrustOption = False,
    as_json: JsonOption = False,
) -> None:
    """Serve a converted model to clients of OpenAI's protocol.

    /v1/chat/completions and /v1/completions, streamed or whole, many
    conversations as one batch. Ctrl-C ends the server. --json prints one line
    on stdout once it answers: the address and the memory of a conversation.

    The server checks no keys: listen on another address than this machine's
    own only behind a proxy that checks them.

    vLLM has defaults and output of its own: --max-tokens and --json are for
    the own engine.
    """
    from linearize.jobs.serve import engine_for, run_vllm
    from linearize.jobs.serve import serve as run_serve

    check_dtype(dtype, int8=True)
    if engine_for(engine, options or ()) == "vllm":
        status("vLLM serves the model")
        run_vllm(
            model,
            host=host,
            port=port,
            name=served_name,
            dtype=dtype,
            trust_remote_code=trust_remote_code,
            at_once=at_once,
            options=options or (),
        )
    quiet_libraries()

    def ready(told: Serving) -> None:
        if as_json:
            print_json(asdict(told), lines=False)
        growing = " with no token yet" if told.growth_bytes else ""
        status(
            f"a conversation takes {memory_words(told.conversation_bytes, told.growth_bytes)}; {told.fit:,} fit into "
            f"half of the {readable_bytes(told.free_bytes)} that are free{growing}; {told.at_once} are written at once"
        )
        status(f"serving {told.name} at {told.url}; Ctrl-C ends it")

    run_serve(
        model,
        host=host,
        port=port,
        name=served_name,
        at_once=at_once,
        max_tokens=max_tokens,
        dtype=dtype,
        trust_remote_code=trust_remote_code,
        ready=ready,
    )
