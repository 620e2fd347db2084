"""What stands between the network and the engine: API key, request rate, size of a body.

Plain ASGI middleware, so that a refused request costs no parsing.
"""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import json
import time
from collections import OrderedDict
from collections.abc import Awaitable, Callable, MutableMapping, Sequence
from typing import Any

from .responses import error_json

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Any]]
Send = Callable[[Any], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]

_OPEN = ("/health",)  # answered without a key, for whoever watches the process
MAX_CLIENTS = 10_000  # whose rate is remembered


async def refuse(send: Send, status: int, error: dict[str, Any], **headers: str) -> None:
    """Answer with an error object."""
    body = json.dumps(error).encode()
    fields = [(b"content-type", b"application/json"), (b"content-length", b"%d" % len(body))]
    fields += [(name.replace("_", "-").encode(), value.encode()) for name, value in headers.items()]
    await send({"type": "http.response.start", "status": status, "headers": fields})
    await send({"type": "http.response.body", "body": body})


class RequireKey:
    """401 without one of the keys in `Authorization: Bearer KEY`."""

    def __init__(self, app: App, keys: Sequence[str]) -> None:
        self.app = app
        self._digests = [hashlib.sha256(key.encode()).digest() for key in keys]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["path"] in _OPEN or self._known(_bearer(scope)):
            return await self.app(scope, receive, send)
        error = error_json(
            "a valid API key is needed: send it as `Authorization: Bearer KEY`",
            kind="invalid_request_error",
            code="invalid_api_key",
        )
        return await refuse(send, 401, error, www_authenticate="Bearer")

    def _known(self, key: bytes | None) -> bool:
        if key is None:
            return False
        digest = hashlib.sha256(key).digest()
        known = False
        for each in self._digests:  # all, so that the time says nothing about which one it was
            known |= hmac.compare_digest(digest, each)
        return known


class LimitRate:
    """429 for a client with more requests per minute than allowed.

    A bucket of `per_minute` requests that fills up evenly.

    Args:
        app: What is behind it.
        per_minute: Requests.
        by_key: Clients are told apart by their key, which has been checked; else by their address:
            a key that nobody asked for can be another one every time.
        clock: Seconds.
    """

    def __init__(
        self,
        app: App,
        per_minute: int,
        *,
        by_key: bool,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.app = app
        self._per_minute = per_minute
        self._by_key = by_key
        self._clock = clock
        self._buckets: OrderedDict[Any, tuple[float, float]] = OrderedDict()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["method"] != "POST":
            return await self.app(scope, receive, send)
        address = (scope.get("client") or ("",))[0]
        wait = self._take(_bearer(scope) if self._by_key else address)
        if wait <= 0:
            return await self.app(scope, receive, send)
        error = error_json(
            f"more than {self._per_minute} requests per minute; try again in {wait:.1f} s",
            kind="rate_limit_error",
            code="rate_limit_exceeded",
        )
        return await refuse(send, 429, error, retry_after=str(int(wait) + 1))

    def _take(self, client: Any) -> float:
        """Take one request out of the client's bucket; 0, or seconds until there is one."""
        now, rate = self._clock(), self._per_minute / 60
        level, then = self._buckets.pop(client, (float(self._per_minute), now))
        level = min(level + (now - then) * rate, float(self._per_minute))
        wait = 0.0 if level >= 1 else (1 - level) / rate
        self._buckets[client] = (level - 1 if wait == 0 else level, now)
        while len(self._buckets) > MAX_CLIENTS:
            self._buckets.popitem(last=False)
        return wait


class LimitBody:
    """413 for a body of more bytes, by its header or while it comes; 408 for one that takes longer
    than so many seconds.
    """

    def __init__(self, app: App, max_bytes: int, seconds: float) -> None:
        self.app = app
        self._max_bytes = max_bytes
        self._seconds = seconds

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        length = dict(scope["headers"]).get(b"content-length", b"0")
        if not length.isdigit() or int(length) > self._max_bytes:
            return await self._refuse(send)
        got, started, whole = 0, False, False
        deadline = time.monotonic() + self._seconds

        async def counted() -> Any:
            nonlocal got, whole
            if whole:  # whoever asks now waits for the client to leave
                return await receive()
            left = max(deadline - time.monotonic(), 0)
            try:
                message = await asyncio.wait_for(receive(), left)
            except asyncio.TimeoutError:
                raise _TooSlow from None
            whole = not message.get("more_body", False)
            got += len(message.get("body", b""))
            if got > self._max_bytes:
                raise _TooLarge
            return message

        async def noted(message: Any) -> None:
            nonlocal started
            started = True
            await send(message)

        try:
            await self.app(scope, counted, noted)
        except _TooLarge:
            if not started:
                await self._refuse(send)
        except _TooSlow:
            if not started:
                said = f"the body must be sent within {self._seconds:g} seconds"
                error = error_json(said, kind="invalid_request_error")
                await refuse(send, 408, error, connection="close")
        return None

    async def _refuse(self, send: Send) -> None:
        error = error_json(
            f"the body must have at most {self._max_bytes} bytes", kind="invalid_request_error"
        )
        await refuse(send, 413, error, connection="close")


class _TooLarge(Exception):
    pass


class _TooSlow(Exception):
    pass


def _bearer(scope: Scope) -> bytes | None:
    value: bytes = dict(scope["headers"]).get(b"authorization", b"")
    scheme, _, key = value.partition(b" ")
    return key.strip() if scheme.lower() == b"bearer" and key.strip() else None
