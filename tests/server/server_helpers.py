"""A server on a free port of this machine, in a thread of the test process."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import uvicorn

from fastinfer.engine import LLM, AsyncLLM
from fastinfer.server.app import ServerSettings, create_app
from fastinfer.server.http import http_config

MODEL = Path(__file__).resolve().parents[2] / "examples/tiny/model"


@dataclass
class Running:
    """Address of a server and the engine behind it."""

    url: str
    port: int
    llm: AsyncLLM


def make_llm(**options: Any) -> LLM:
    """The bundled model on the CPU."""
    options = {"device": "cpu", "num_blocks": 2048, "progress": False, **options}
    return LLM(str(MODEL), **options)


@contextmanager
def serving(
    *,
    engine: dict[str, Any] | None = None,
    max_requests: int | None = None,
    http: str | None = None,
    **settings: Any,
) -> Iterator[Running]:
    """Start, yield, stop; the engine must be empty at the end. `http`: uvicorn's parser."""
    llm = AsyncLLM(make_llm(**(engine or {})), max_requests=max_requests)
    app = create_app(llm, ServerSettings(**{"model_name": "tiny", **settings}))
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        config = http_config(
            app,
            log_level="warning",
            timeout_graceful_shutdown=5,
            **({"http": http} if http else {}),
        )
        server = uvicorn.Server(config)
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]}, daemon=True)
        thread.start()
        deadline = time.monotonic() + 30
        while not server.started:
            assert thread.is_alive() and time.monotonic() < deadline
            time.sleep(0.01)
        port = listener.getsockname()[1]
        try:
            yield Running(f"http://127.0.0.1:{port}", port, llm)
        finally:
            server.should_exit = True
            thread.join(30)
            llm.close()
    assert not thread.is_alive()


def wait_until_idle(llm: AsyncLLM, seconds: float = 20.0) -> None:
    """Wait until no request is open, then check that no block is held."""
    deadline = time.monotonic() + seconds
    while llm.num_requests and time.monotonic() < deadline:
        time.sleep(0.01)
    stats = llm.stats()
    assert (llm.num_requests, stats.running, stats.waiting, stats.kv_blocks_used) == (0, 0, 0, 0)
