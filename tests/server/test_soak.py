"""A server under mixed traffic for minutes: memory, threads and blocks stay where they are."""

from __future__ import annotations

import asyncio
import gc
import os
import random
import threading
import time

import httpx
import pytest
from server_helpers import Running, serving, wait_until_idle

MINUTES = float(os.environ.get("FASTINFER_SOAK_MINUTES", "0.5"))
CLIENTS = 24


def resident_mb() -> float:
    with open("/proc/self/statm") as pages:
        return int(pages.read().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**20


async def client(server: Running, http: httpx.AsyncClient, rng: random.Random, end: float) -> int:
    """Requests of all kinds until `end`, some of them broken, some left in the middle."""
    done = 0
    while time.monotonic() < end:
        done += 1
        kind = rng.randrange(6)
        body = {
            "prompt": [rng.randrange(900) for _ in range(rng.randint(1, 120))],
            "max_tokens": rng.randint(1, 40),
            "ignore_eos": True,
            "stream": kind < 3,
            "n": rng.choice((1, 1, 2)),
            "temperature": rng.choice((0, 1)),
        }
        if kind == 5:
            body["temperature"] = -1
        if kind == 4:
            answer = await http.post(server.url + "/v1/completions", json=body)
            assert answer.status_code == 200
            continue
        async with http.stream("POST", server.url + "/v1/completions", json=body) as answer:
            assert answer.status_code == (400 if kind == 5 else 200)
            lines = 0
            async for _ in answer.aiter_lines():
                lines += 1
                if kind == 0 and lines > 3:
                    break  # leaves
    return done


async def traffic(server: Running, seconds: float, seed: int) -> int:
    end = time.monotonic() + seconds
    limits = httpx.Limits(max_connections=None, max_keepalive_connections=4)
    async with httpx.AsyncClient(limits=limits, timeout=120) as http:
        rngs = [random.Random(seed * 1000 + i) for i in range(CLIENTS)]
        return sum(await asyncio.gather(*(client(server, http, rng, end) for rng in rngs)))


@pytest.mark.full
def test_memory_and_blocks_stay_flat():
    # Few tokens per step: torch's matrix products keep code for every number of rows they have seen,
    # so memory is flat only once all of them have been.
    engine = {"max_num_seqs": 32, "num_blocks": 256, "max_num_batched_tokens": 64}
    with serving(engine=engine, max_requests=4 * CLIENTS) as server:
        seconds = MINUTES * 60 / 10
        sizes, total = [], 0
        for part in range(10):
            total += asyncio.run(traffic(server, seconds, part))
            wait_until_idle(server.llm)
            gc.collect()
            sizes.append(resident_mb())
        threads = threading.active_count()
        print(
            f"\n{total} requests in {MINUTES:g} minutes, resident MB: {[round(s) for s in sizes]}"
        )
        # after the first parts have filled caches and pools
        assert sizes[-1] - sizes[3] < 16, sizes
        assert threading.active_count() == threads
        assert server.llm.failed_steps == 0
