"""`linearize serve`: a converted model behind OpenAI's protocol, by vLLM or by a server of this package."""

from __future__ import annotations

import errno
import os
import socket
import sys
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, entry_points, version
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

from linearize.errors import DataError, LinearizeError, ModelError, OutputError, check_numbers
from linearize.jobs.checks import check_dtype

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

ENGINES = ("auto", "own", "vllm")
_SPARE = 0.5  # of the free memory: the rest is for prompts that are being read, and for other programs


@dataclass(frozen=True)
class Serving:
    """A served model and the size of its memory.

    Attributes:
        url: the address for clients, `http://HOST:PORT/v1`.
        name: the model's name in requests.
        conversation_bytes: memory of one conversation, before its first token.
        growth_bytes: additional memory per token; 0 unless layers or heads keep softmax over the whole past.
        free_bytes: memory that is free on the model's device.
        fit: conversations that fit into half of it, with no token yet if they grow.
        at_once: conversations that are written at once; others wait.
    """

    url: str
    name: str
    conversation_bytes: int
    growth_bytes: int
    free_bytes: int
    fit: int
    at_once: int


def engine_for(engine: str, options: Sequence[str] = ()) -> str:
    """`own` or `vllm`: for `auto`, vLLM if it is installed with this package's plugin.

    Args:
        options: further options of vLLM.

    Raises:
        DataError: the name is unknown, or there are options for vLLM and it does not serve.
        LinearizeError: the engine is not installed.
    """
    if engine not in ENGINES:
        raise DataError(f"engine {engine}: expected {', '.join(ENGINES[:-1])} or {ENGINES[-1]}")
    installed = find_spec("vllm") is not None
    if engine == "auto":
        plugins = entry_points(group="vllm.general_plugins")
        engine = "vllm" if installed and any(one.value.startswith("linearize") for one in plugins) else "own"
    if engine == "vllm" and not installed:
        raise LinearizeError("vLLM is not installed; pip install 'linearize[vllm]', or serve with --engine own")
    if engine == "own":
        if options:
            raise DataError(f"options {' '.join(options)}: they are vLLM's, and vLLM does not serve here")
        if missing := [name for name in ("starlette", "uvicorn") if find_spec(name) is None]:
            raise LinearizeError(f"{' and '.join(missing)} not installed; pip install 'linearize[serve]'")
    return engine


def run_vllm(
    model: str,
    *,
    host: str,
    port: int,
    name: str | None,
    dtype: str,
    trust_remote_code: bool,
    at_once: int | None,
    options: Sequence[str],
) -> None:
    """Replace this process by vLLM's server.

    Raises:
        DataError: vLLM has no such dtype.
    """
    check_dtype(dtype)
    line = ["--host", host, "--port", str(port), "--dtype", dtype]
    line += ["--served-model-name", name or model]
    line += ["--trust-remote-code"] if trust_remote_code else []
    line += [] if at_once is None else ["--max-num-seqs", str(at_once)]
    sys.stdout.flush()
    sys.stderr.flush()
    os.execv(sys.executable, [sys.executable, "-m", *_vllm_command(model), *line, *options])  # noqa: S606


def _vllm_command(model: str) -> list[str]:
    try:
        version("vllm")
    except PackageNotFoundError:  # the CPU build has another name, and without this one `vllm serve` fails
        return ["vllm.entrypoints.openai.api_server", "--model", model]
    return ["vllm.entrypoints.cli.main", "serve", model]


def serve(
    model: str,
    *,
    host: str = "127.0.0.1",
    port: int = 8000,
    name: str | None = None,
    at_once: int | None = None,
    max_tokens: int = 1024,
    dtype: str = "auto",
    trust_remote_code: bool = False,
    ready: Callable[[Serving], None],
) -> None:
    """Serve a converted model until a signal ends the process.

    Args:
        port: 0 for any free one.
        name: the model's name in requests; by default `model`.
        at_once: conversations that are written at once; by default 32, or as many as fit.
        max_tokens: the maximum number of new tokens where a request sets none.
        ready: called once when the server is about to answer.

    Raises:
        ModelError: the model cannot be read, or was not converted.
        OutputError: the address is taken.
        LinearizeError: not one conversation fits into the memory.
    """
    check_dtype(dtype, int8=True)
    check_numbers(1, at_once=at_once, max_tokens=max_tokens)
    check_numbers(0, 65535, port=port)
    with _bound(host, port) as listener:
        import uvicorn

        from linearize.serving.app import build_app
        from linearize.serving.protocol import Protocol
        from linearize.serving.scheduler import Scheduler
        from linearize.sources.source import open_model

        loaded, tokenizer, source = open_model(model, dtype=dtype, trust_remote_code=trust_remote_code)
        told, most_tokens = _facts(loaded, source.name, at_once, name or model, _url(host, listener))
        scheduler = Scheduler(loaded, tokenizer, told.at_once)
        protocol = Protocol(loaded, tokenizer, told.name, max_tokens=max_tokens, most_tokens=most_tokens)
        settings = uvicorn.Config(
            build_app(scheduler, protocol),
            lifespan="on",
            log_level="warning",
            access_log=False,
            timeout_graceful_shutdown=3,
        )
        server = uvicorn.Server(settings)
        leave = server.handle_exit

        def end(signum: int, frame: Any) -> None:
            scheduler.stop()  # its texts end, so no connection has to be cut
            leave(signum, frame)

        server.handle_exit = end
        ready(told)
        server.run(sockets=[listener])


def _facts(model: Any, source: str, at_once: int | None, name: str, url: str) -> tuple[Serving, int | None]:
    """The figures of the served model, and the maximum number of tokens of a text; None for no maximum."""
    from linearize.checkpoint.sizes import growth_nbytes, state_nbytes
    from linearize.model import LinearizedForCausalLM
    from linearize.runtime.memory import free_bytes

    if not isinstance(model, LinearizedForCausalLM):
        raise ModelError(
            f"{source}: is not a converted model; run linearize convert first, or serve it with vLLM or "
            "transformers serve"
        )
    constant, growth, free = state_nbytes(model), growth_nbytes(model), free_bytes(model.device)
    fit = int(free * _SPARE) // constant
    if fit < 1:
        raise LinearizeError(f"{source}: a conversation takes {constant:,} bytes, and {free:,} bytes are free")
    rows = min(at_once or 32, fit)
    most_tokens = (int(free * _SPARE) // rows - constant) // growth if growth else None
    return Serving(url, name, constant, growth, free, fit, rows), most_tokens


def _bound(host: str, port: int) -> socket.socket:
    """A listening socket, made before the model is loaded, because that takes time."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        return socket.create_server((host, port), family=family, backlog=512)
    except OSError as error:
        reason = os.strerror(error.errno) if error.errno and error.errno in errno.errorcode else str(error)
        raise OutputError(f"{host}:{port}: {reason}; choose another --host or --port") from error


def _url(host: str, listener: socket.socket) -> str:
    shown = f"[{host}]" if ":" in host else host
    return f"http://{shown}:{listener.getsockname()[1]}/v1"
