"""The HTTP side of the server: requests in, answers and streams out."""

from __future__ import annotations

import asyncio
import json
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from linearize.serving.protocol import Answer, Protocol, RequestError
from linearize.serving.scheduler import Job, Scheduler

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from starlette.requests import Request

_MOST_BYTES = 32 << 20  # of a body
_MOST_SECONDS = 60.0  # for a body to arrive
_MOST_WAITING = 512  # requests that wait for a place in the batch


def build_app(scheduler: Scheduler, protocol: Protocol) -> Starlette:
    """The application; it starts the scheduler, and closes it at the end."""

    async def chat(request: Request) -> Response:
        return await _served(request, "chat", scheduler, protocol)

    async def text(request: Request) -> Response:
        return await _served(request, "text", scheduler, protocol)

    async def models(_: Request) -> Response:
        return JSONResponse({"object": "list", "data": [_card(protocol)]})

    async def model(request: Request) -> Response:
        if (named := request.path_params["name"]) != protocol.name:
            message = f"there is no model {named!r} here; there is {protocol.name!r}"
            raise RequestError(message, status=404, code="model_not_found")
        return JSONResponse(_card(protocol))

    async def health(_: Request) -> Response:
        return JSONResponse(
            {"status": "ok"} if scheduler.alive else {"status": "ended"}, 200 if scheduler.alive else 503
        )

    @asynccontextmanager
    async def lifespan(_: Starlette) -> AsyncIterator[None]:
        scheduler.start()
        yield
        await asyncio.to_thread(scheduler.close)

    return Starlette(
        routes=[
            Route("/v1/chat/completions", chat, methods=["POST"]),
            Route("/v1/completions", text, methods=["POST"]),
            Route("/v1/models", models),
            Route("/v1/models/{name:path}", model),
            Route("/health", health),
        ],
        exception_handlers={
            RequestError: _refused,
            HTTPException: _refused,
            ClientDisconnect: _gone,
            Exception: _failed,
        },
        lifespan=lifespan,
    )


def _card(protocol: Protocol) -> dict[str, Any]:
    return {"id": protocol.name, "object": "model", "created": 0, "owned_by": "linearize"}


async def _refused(_: Request, error: Exception) -> Response:
    if isinstance(error, HTTPException):  # an unknown path, or another method
        error = RequestError(error.detail, status=error.status_code)
    assert isinstance(error, RequestError)  # noqa: S101 - for the type checker
    return JSONResponse(error.body(), error.status)


async def _gone(_: Request, __: Exception) -> Response:
    return Response(status_code=400)  # the client does not read it


async def _failed(request: Request, error: Exception) -> Response:
    return await _refused(request, RequestError(f"unexpected {type(error).__name__}", status=500))


async def _served(request: Request, kind: str, scheduler: Scheduler, protocol: Protocol) -> Response:
    content = await _body(request)
    # Reading tokenizes, which takes seconds for a long text.
    asked = await asyncio.to_thread(protocol.read, kind, content)
    if not scheduler.alive:
        raise RequestError("the scheduler has ended", status=503)
    if scheduler.pending >= _MOST_WAITING:
        raise RequestError(f"{_MOST_WAITING} requests are waiting; try again later", status=429)
    answer, told = Answer(asked, protocol.name), _Told()
    job = Job(asked.ids, asked.decoding, told.tell, goes_on=kind == "text")
    scheduler.submit(job)
    if asked.stream:
        events = _events(request, job, told, answer)
        return StreamingResponse(events, media_type="text/event-stream", headers={"Cache-Control": "no-cache"})
    async with _watched(request, job):
        text = "".join([piece async for piece in told.pieces()])
    if job.error is not None:
        raise RequestError(job.error, status=500)
    return JSONResponse(answer.whole(text, job.finish, job.new_tokens))


async def _events(request: Request, job: Job, told: _Told, answer: Answer) -> AsyncIterator[str]:
    """The server-sent events of a stream. A client that goes away ends the job."""
    async with _watched(request, job):
        if answer.request.kind == "chat":
            yield _event(answer.piece(""))
        async for piece in told.pieces():
            yield _event(answer.piece(piece))
        if job.error is not None:
            yield _event(RequestError(job.error, status=500).body())
            return
        yield _event(answer.piece("", job.finish))
        if answer.request.include_usage:
            yield _event(answer.usage(job.new_tokens))
        yield "data: [DONE]\n\n"


def _event(body: dict[str, Any]) -> str:
    return f"data: {json.dumps(body, ensure_ascii=False)}\n\n"


class _Told:
    """Carries a job's text from the scheduler's thread to the event loop."""

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._queue: asyncio.Queue[str | None] = asyncio.Queue()

    def tell(self, piece: str | None) -> None:
        if not self._loop.is_closed():
            self._loop.call_soon_threadsafe(self._queue.put_nowait, piece)

    async def pieces(self) -> AsyncIterator[str]:
        while (piece := await self._queue.get()) is not None:
            yield piece


@asynccontextmanager
async def _watched(request: Request, job: Job) -> AsyncIterator[None]:
    """In this context a client that disconnects cancels the job, and so does leaving it early."""

    async def watch() -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass
        job.cancelled = True

    task = asyncio.create_task(watch())
    try:
        yield
    finally:
        job.cancelled = True  # a no-op for a job that has ended
        task.cancel()


async def _body(request: Request) -> bytes:
    """The body of a request.

    Raises:
        RequestError: it is too long, or does not arrive.
    """

    async def read() -> bytes:
        parts, length = list[bytes](), 0
        async for part in request.stream():
            parts.append(part)
            length += len(part)
            if length > _MOST_BYTES:
                raise RequestError(f"the body is larger than {_MOST_BYTES >> 20} MB", status=413)
        return b"".join(parts)

    try:
        return await asyncio.wait_for(read(), _MOST_SECONDS)
    except asyncio.TimeoutError as error:
        raise RequestError(f"the body did not arrive in {_MOST_SECONDS:.0f} s", status=408) from error
