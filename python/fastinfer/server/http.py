"""The HTTP server below the app: one set of settings for the command, the tests and benchmarks."""

from __future__ import annotations

from typing import Any

import uvicorn

MAX_HEADER_BYTES = 64 << 10  # of a request, its first line included


def http_config(app: Any, *, trusted_proxies: str = "", **options: Any) -> uvicorn.Config:
    """uvicorn's settings for `app`.

    Args:
        app: An ASGI application.
        trusted_proxies: Addresses, with commas, whose X-Forwarded-For is believed; none: nobody's,
            so that a client cannot pass for another one.
        options: Further arguments of `uvicorn.Config`.
    """
    settings: dict[str, Any] = {
        "timeout_graceful_shutdown": 10,
        "server_header": False,
        "proxy_headers": bool(trusted_proxies),
        "forwarded_allow_ips": trusted_proxies or None,
        "http": _protocol(),
        "h11_max_incomplete_event_size": MAX_HEADER_BYTES,
    }
    return uvicorn.Config(app, **(settings | options))


def _protocol() -> Any:
    """httptools, which is C, where it is installed; it takes headers of any length, so they are
    counted here. h11 counts by itself.
    """
    try:
        from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol
    except ImportError:
        return "h11"

    class LimitedHeaders(HttpToolsProtocol):
        _head: int | None = None  # bytes that came since the request began, until its headers end

        def on_message_begin(self) -> None:
            self._head = 0
            super().on_message_begin()

        def on_headers_complete(self) -> None:
            self._head = None
            super().on_headers_complete()

        def data_received(self, data: bytes) -> None:
            super().data_received(data)
            if self._head is not None:
                self._head += len(data)
                if self._head > MAX_HEADER_BYTES:
                    self.send_400_response(f"headers must be at most {MAX_HEADER_BYTES} bytes")

    return LimitedHeaders
