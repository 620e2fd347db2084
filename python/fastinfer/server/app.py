"""Routes of the server: parse, ask the engine, answer in one piece or as server-sent events."""

from __future__ import annotations

import asyncio
import json
import logging
import os
import time
from collections.abc import AsyncIterator, Callable, Coroutine, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, PlainTextResponse, Response
from starlette.routing import Route

from .._version import __version__
from ..engine.async_llm import AsyncLLM, AsyncStream, EngineBusy, EngineStopped
from ..engine.outputs import RequestOutput
from .exposition import CONTENT_TYPE, Exposition
from .limits import LimitBody, LimitRate, Receive, RequireKey, Scope, Send
from .protocol import Ask, BadRequest, read_chat, read_completion
from .responses import Reply, error_json

_log = logging.getLogger("fastinfer")
_INLINE_BYTES = 4096  # bodies up to this size are tokenised in the event loop
UNHEALTHY_AFTER = 3  # failed steps in a row


@dataclass(slots=True, kw_only=True)
class ServerSettings:
    """What the server allows.

    Args:
        model_name: Under which the model is served.
        api_keys: Any of these is needed; none are needed when empty.
        requests_per_minute: Per key, without keys per address; 0 is no limit.
        max_body_bytes: Of a request.
        max_prompts: In one request for completions.
        request_timeout: Seconds until an answer must be complete; None is no limit.
        stall_timeout: Seconds a reader may leave a full connection unread, and a body may take.
    """

    model_name: str
    api_keys: tuple[str, ...] = ()
    requests_per_minute: int = 0
    max_body_bytes: int = 8 << 20
    max_prompts: int = 128
    request_timeout: float | None = None
    stall_timeout: float = 60.0


def create_app(llm: AsyncLLM, settings: ServerSettings) -> Starlette:
    """The ASGI application; closes the engine when it shuts down."""
    service = _Service(llm, settings)

    @asynccontextmanager
    async def lifespan(_: Starlette) -> AsyncIterator[None]:
        yield
        await asyncio.to_thread(llm.close)

    middleware = [Middleware(_Count, service.exposition)]
    if settings.api_keys:
        middleware.append(Middleware(RequireKey, settings.api_keys))
    if settings.requests_per_minute:
        by_key = bool(settings.api_keys)
        middleware.append(Middleware(LimitRate, settings.requests_per_minute, by_key=by_key))
    middleware.append(Middleware(LimitBody, settings.max_body_bytes, settings.stall_timeout))
    return Starlette(
        routes=[
            Route("/health", service.health),
            Route("/metrics", service.metrics),
            Route("/version", service.version),
            Route("/v1/models", service.models),
            Route("/v1/models/{name:path}", service.model),
            Route("/v1/completions", service.completions, methods=["POST"]),
            Route("/v1/chat/completions", service.chat, methods=["POST"]),
        ],
        middleware=middleware,
        lifespan=lifespan,
        exception_handlers={HTTPException: _http_error, Exception: _server_error},
    )


class _Service:
    def __init__(self, llm: AsyncLLM, settings: ServerSettings) -> None:
        self.llm = llm
        self.settings = settings
        self.exposition = Exposition()
        self.started = int(time.time())

    async def health(self, _: Request) -> Response:
        well = self.llm.alive and self.llm.failed_steps < UNHEALTHY_AFTER
        return JSONResponse({"status": "ok" if well else "failing"}, 200 if well else 503)

    async def version(self, _: Request) -> Response:
        return JSONResponse({"version": __version__})

    async def metrics(self, _: Request) -> Response:
        stats = await asyncio.to_thread(self.llm.stats)
        text = self.exposition.text(stats, self.llm.num_requests)
        return PlainTextResponse(text, media_type=CONTENT_TYPE)

    def _model(self) -> dict[str, Any]:
        return {
            "id": self.settings.model_name,
            "object": "model",
            "created": self.started,
            "owned_by": "fastinfer",
            "max_model_len": self.llm.llm.max_model_len,
        }

    async def models(self, _: Request) -> Response:
        return JSONResponse({"object": "list", "data": [self._model()]})

    async def model(self, request: Request) -> Response:
        if request.path_params["name"] != self.settings.model_name:
            raise HTTPException(404, "no such model")
        return JSONResponse(self._model())

    async def completions(self, request: Request) -> Any:
        settings = self.settings
        return await self._answer(
            request,
            lambda body: read_completion(
                body, models=(settings.model_name,), max_prompts=settings.max_prompts
            ),
        )

    async def chat(self, request: Request) -> Any:
        names = (self.settings.model_name,)
        return await self._answer(request, lambda body: read_chat(body, models=names))

    async def _answer(self, request: Request, read: Callable[[Any], Ask]) -> Any:
        try:
            raw = await request.body()
        except ClientDisconnect:
            return Response(status_code=499)
        try:
            try:
                body = json.loads(raw)
            except (ValueError, RecursionError) as error:
                raise BadRequest(f"the body must be JSON: {error!s:.120}") from None
            ask = read(body)
            if ask.chat or len(raw) > _INLINE_BYTES:
                parsed = await asyncio.to_thread(self._parse, ask)
            else:
                parsed = self._parse(ask)
            streams = self._start(parsed, ask)
        except BadRequest as error:
            shown = self._public(error)
            kind = "invalid_request_error"
            code = "model_not_found" if error.status == 404 else None
            return JSONResponse(
                error_json(shown, kind=kind, param=error.param, code=code), error.status
            )
        except ValueError as error:
            return JSONResponse(error_json(self._public(error), kind="invalid_request_error"), 400)
        except EngineBusy:
            busy = "too many requests are being served; try again later"
            return JSONResponse(
                error_json(busy, kind="overloaded_error", code="engine_overloaded"),
                503,
                headers={"retry-after": "1"},
            )
        except EngineStopped as error:
            _log.error("a request was refused: %s", error)
            return JSONResponse(
                error_json(
                    "the engine has stopped; the server must be started again", kind="server_error"
                ),
                503,
            )
        tokenizer = self.llm.llm.tokenizer
        reply = Reply(
            self.settings.model_name,
            chat=ask.chat,
            n=ask.params.n,
            return_token_ids=ask.return_token_ids,
            token_bytes=None if tokenizer is None else tokenizer.token_bytes,
        )
        echoes = [self._echo(ask, each) for each in parsed]
        if ask.stream:
            events = self._events(ask, reply, streams, echoes)
            return EventStream(events, streams, self.settings.stall_timeout)
        return await self._whole(request.receive, reply, streams, echoes)

    def _parse(self, ask: Ask) -> list[Any]:
        llm = self.llm.llm
        parsed = []
        for prompt in ask.prompts:
            if llm.tokenizer is None and (ask.chat or isinstance(prompt, str)):
                field = "messages" if ask.chat else "prompt"
                raise BadRequest(f"{field} must be token ids: the model has no tokenizer", field)
            if ask.chat:
                prompt = llm.chat_prompt(prompt, **ask.template_options)
            parsed.append(self.llm.parse(prompt, ask.params))
        return parsed

    def _start(self, parsed: Sequence[Any], ask: Ask) -> list[AsyncStream]:
        """All of the prompts, or none."""
        streams: list[AsyncStream] = []
        try:
            for each in parsed:
                streams.append(
                    self.llm.start(
                        each,
                        timeout=self.settings.request_timeout,
                        whole=not ask.stream,
                        priority=ask.priority,
                    )
                )
        except BaseException:
            for stream in streams:
                stream.close()
            raise
        return streams

    def _echo(self, ask: Ask, parsed: Any) -> str:
        if not ask.echo:
            return ""
        text, ids, _ = parsed
        if text is not None:
            return str(text)
        tokenizer = self.llm.llm.tokenizer
        return tokenizer.decode(ids) if tokenizer is not None else ""

    def _public(self, error: BaseException) -> str:
        """The sentence without the names of this machine's folders."""
        text = str(error)
        config = self.llm.llm.config
        for path in (config.model, config.tokenizer):
            if path:
                text = text.replace(repr(path), repr(self.settings.model_name))
            if path and os.sep in path:  # "." or "model" alone may be part of the sentence
                text = text.replace(path, self.settings.model_name)
        return text

    def _note(self, output: RequestOutput) -> None:
        for completion in output.outputs:
            if completion.finish_reason is not None and completion.metrics is not None:
                self.exposition.completed(completion.finish_reason, completion.metrics)

    async def _whole(
        self, receive: Receive, reply: Reply, streams: list[AsyncStream], echoes: list[str]
    ) -> Response:
        async def gather() -> list[RequestOutput]:
            return [await stream.__anext__() for stream in streams]

        try:
            outputs = await _unless_disconnected(receive, gather())
        except Exception as error:
            return self._failure(error)
        finally:
            for stream in streams:
                stream.close()
        if outputs is None:
            return Response(status_code=499)  # nobody is there to read it
        for output in outputs:
            self._note(output)
        return JSONResponse(reply.whole(outputs, echoes))

    def _failure(self, error: Exception) -> Response:
        status, body = self._describe(error)
        return JSONResponse(body, status)

    def _describe(self, error: Exception) -> tuple[int, dict[str, Any]]:
        if isinstance(error, TimeoutError):
            limit = f"{self.settings.request_timeout:g}"
            return 504, error_json(
                f"the answer was not complete within {limit} seconds", kind="timeout_error"
            )
        if isinstance(error, ValueError):
            return 400, error_json(self._public(error), kind="invalid_request_error")
        _log.error("a request failed: %s", error)
        return 500, error_json("the engine failed on this request", kind="server_error")

    async def _events(
        self, ask: Ask, reply: Reply, streams: list[AsyncStream], echoes: list[str]
    ) -> AsyncIterator[bytes]:
        try:
            for prompt, echo in enumerate(echoes):
                for chunk in reply.opening(prompt, echo):
                    yield _event(chunk)
            async for prompt, output in _merged(streams):
                self._note(output)
                chunks = reply.chunks(prompt, output)
                if chunks:
                    yield b"".join(map(_event, chunks))
            if ask.include_usage:
                yield _event(reply.closing())
        except Exception as error:
            yield _event(self._describe(error)[1])
        yield b"data: [DONE]\n\n"


def _event(data: dict[str, Any]) -> bytes:
    return b"data: %b\n\n" % json.dumps(data, ensure_ascii=False, separators=(",", ":")).encode()


async def _merged(streams: list[AsyncStream]) -> AsyncIterator[tuple[int, RequestOutput]]:
    """(index of the stream, output) in the order in which they come."""
    if len(streams) == 1:
        async for output in streams[0]:
            yield 0, output
        return
    waiting: dict[asyncio.Task[RequestOutput], int] = {
        asyncio.ensure_future(_next(stream)): i for i, stream in enumerate(streams)
    }
    try:
        while waiting:
            done, _ = await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
            for task in done:
                index = waiting.pop(task)
                output = task.result()
                yield index, output
                if not output.finished:
                    waiting[asyncio.ensure_future(_next(streams[index]))] = index
    finally:
        for task in waiting:
            task.cancel()
        await asyncio.gather(*waiting, return_exceptions=True)


async def _next(stream: AsyncStream) -> RequestOutput:
    return await stream.__anext__()


async def _unless_disconnected(receive: Receive, work: Coroutine[Any, Any, Any]) -> Any:
    """The result of `work`, or None if the client leaves first, which cancels it."""
    task = asyncio.ensure_future(work)
    gone = asyncio.ensure_future(_disconnected(receive))
    try:
        await asyncio.wait({task, gone}, return_when=asyncio.FIRST_COMPLETED)
        return task.result() if task.done() else None
    finally:
        for each in (task, gone):
            each.cancel()
        await asyncio.gather(task, gone, return_exceptions=True)


async def _disconnected(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


class EventStream:
    """A response of server-sent events.

    Ends, and with it the requests, when the client leaves or lets a full connection stand for
    `stall_timeout` seconds.
    """

    def __init__(
        self, events: AsyncIterator[bytes], streams: list[AsyncStream], stall_timeout: float
    ) -> None:
        self._events = events
        self._streams = streams
        self._stall_timeout = stall_timeout

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await _unless_disconnected(receive, self._write(send))
        except (OSError, _Stalled):  # the connection broke while it was written to, or stands still
            pass
        finally:
            for stream in self._streams:
                stream.close()

    async def _write(self, send: Send) -> bool:
        loop, task, stalled = asyncio.get_running_loop(), asyncio.current_task(), False
        assert task is not None

        def stall() -> None:
            nonlocal stalled
            stalled = task.cancel()

        headers = [
            (b"content-type", b"text/event-stream; charset=utf-8"),
            (b"cache-control", b"no-cache"),
            (b"x-accel-buffering", b"no"),
        ]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        async for data in self._events:
            timer = loop.call_later(self._stall_timeout, stall)
            try:
                await send({"type": "http.response.body", "body": data, "more_body": True})
            except asyncio.CancelledError:
                if stalled:
                    raise _Stalled from None
                raise
            finally:
                timer.cancel()
        await send({"type": "http.response.body", "body": b""})
        return True


class _Stalled(Exception):
    """A full connection has not been read for too long."""


class _Count:
    """Counts answers by path and status, for /metrics."""

    _PATHS = ("/v1/completions", "/v1/chat/completions", "/v1/models", "/health", "/metrics")

    def __init__(self, app: Any, exposition: Exposition) -> None:
        self.app = app
        self._exposition = exposition

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def counted(message: Any) -> None:
            if message["type"] == "http.response.start":
                path = scope["path"] if scope["path"] in self._PATHS else "other"
                self._exposition.answered(path, message["status"])
            await send(message)

        await self.app(scope, receive, counted if scope["type"] == "http" else send)


async def _http_error(_: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    body = error_json(error.detail, kind="invalid_request_error")
    return JSONResponse(body, error.status_code, headers=error.headers)


async def _server_error(_: Request, error: Exception) -> Response:
    return JSONResponse(error_json("internal error", kind="server_error"), 500)
