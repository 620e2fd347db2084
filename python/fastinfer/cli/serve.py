"""`fastinfer serve`: an OpenAI-compatible HTTP server."""

from __future__ import annotations

import argparse
import logging
import math
import os
import sys
from pathlib import Path
from typing import Any

from .options import add_engine_options, make_llm

_LOOPBACK = ("127.0.0.1", "::1", "localhost")


def add_parser(commands: Any) -> None:
    """Declare the command."""
    parser = commands.add_parser(
        "serve",
        help="an OpenAI-compatible HTTP server",
        description="Serve a model under /v1/completions and /v1/chat/completions, with "
        "/v1/models, /health and /metrics (Prometheus). Listens on this machine only unless told "
        "otherwise. Needs the `serve` extra: pip install 'fastinfer[serve]'.",
    )
    group = parser.add_argument_group("server")
    group.add_argument("--host", default="127.0.0.1", help="address (default: 127.0.0.1)")
    group.add_argument("--port", type=int, default=8000, metavar="N", help="0 takes a free one")
    group.add_argument(
        "--served-model-name", metavar="NAME", help="in the API (default: the folder's name)"
    )
    group.add_argument(
        "--api-key",
        action="append",
        default=[],
        metavar="KEY",
        help="ask for this key; may be repeated. FASTINFER_API_KEY does not show in the process "
        "list",
    )
    group.add_argument(
        "--requests-per-minute", type=int, default=0, metavar="N", help="per client, 0: no limit"
    )
    group.add_argument(
        "--max-requests",
        type=int,
        default=1024,
        metavar="N",
        help="unfinished at once; more are answered with 503 (default: 1024)",
    )
    group.add_argument(
        "--max-body-mb", type=float, default=8, metavar="MB", help="of a request (default: 8)"
    )
    group.add_argument(
        "--request-timeout", type=float, metavar="S", help="seconds until an answer must be whole"
    )
    group.add_argument(
        "--stall-timeout",
        type=float,
        default=60,
        metavar="S",
        help="seconds a client may leave a full connection unread, and take to send a body "
        "(default: 60)",
    )
    group.add_argument(
        "--forwarded-allow-ips",
        default="",
        metavar="A,B",
        help="addresses of proxies whose X-Forwarded-For is believed (default: nobody's)",
    )
    group.add_argument("--access-log", action="store_true", help="a line per request")
    add_engine_options(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Run the command until SIGINT or SIGTERM."""
    try:
        import uvicorn

        from ..server.app import ServerSettings, create_app
        from ..server.http import http_config
    except ImportError as error:
        raise ValueError(
            f"serve: {error.name} must be installed; pip install 'fastinfer[serve]'"
        ) from None
    keys = [key for key in (*args.api_key, os.environ.get("FASTINFER_API_KEY", "")) if key]
    _check(args)
    from ..engine.async_llm import AsyncLLM

    settings = ServerSettings(
        model_name=args.served_model_name or Path(args.model).resolve().name,
        api_keys=tuple(keys),
        requests_per_minute=args.requests_per_minute,
        max_body_bytes=int(args.max_body_mb * 2**20),
        request_timeout=args.request_timeout,
        stall_timeout=args.stall_timeout,
    )
    logging.basicConfig(level=logging.INFO, format="%(levelname)s %(name)s: %(message)s")
    if args.host not in _LOOPBACK and not keys:
        print(f"fastinfer serve: {args.host} is open to others and no key is set", file=sys.stderr)
    llm = AsyncLLM(make_llm(args), max_requests=args.max_requests)
    config = http_config(
        create_app(llm, settings),
        trusted_proxies=args.forwarded_allow_ips,
        host=args.host,
        port=args.port,
        log_level="info",
        access_log=args.access_log,
    )
    try:
        uvicorn.Server(config).run()
    finally:
        llm.close()
    return 0


def _check(args: argparse.Namespace) -> None:
    if not 0 <= args.port < 65536:
        raise ValueError(f"serve: --port must be in [0, 65535], got {args.port}")
    if args.requests_per_minute < 0:
        raise ValueError(
            f"serve: --requests-per-minute must be at least 0, got {args.requests_per_minute}"
        )
    if args.max_requests < 1:
        raise ValueError(f"serve: --max-requests must be at least 1, got {args.max_requests}")
    for name in ("max_body_mb", "request_timeout", "stall_timeout"):
        value = getattr(args, name)
        if value is not None and not 0 < value < math.inf:
            raise ValueError(
                f"serve: --{name.replace('_', '-')} must be > 0 and finite, got {value}"
            )
