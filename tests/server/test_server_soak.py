"""A server under mixed traffic for minutes: memory, threads and blocks stay where they are."""

from __future__ import annotations

import asyncio
import ctypes
import gc
import os
import random
import subprocess
import sys
import threading
import time

import httpx
import pytest
from server_helpers import serving, wait_until_idle

MINUTES = float(os.environ.get("FASTINFER_SOAK_MINUTES", "6"))
CLIENTS = 24


def resident_mb() -> float:
    """What is held, without what the allocator merely has not given back."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    with open("/proc/self/statm") as pages:
        return int(pages.read().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**20


async def client(url: str, http: httpx.AsyncClient, rng: random.Random, end: float) -> int:
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
            answer = await http.post(url + "/v1/completions", json=body)
            assert answer.status_code == 200
            continue
        async with http.stream("POST", url + "/v1/completions", json=body) as answer:
            assert answer.status_code == (400 if kind == 5 else 200)
            lines = 0
            async for _ in answer.aiter_lines():
                lines += 1
                if kind == 0 and lines > 3:
                    break  # leaves
    return done


async def traffic(url: str, seconds: float, seed: int) -> int:
    end = time.monotonic() + seconds
    limits = httpx.Limits(max_connections=None, max_keepalive_connections=4)
    async with httpx.AsyncClient(limits=limits, timeout=600) as http:
        rngs = [random.Random(seed * 1000 + i) for i in range(CLIENTS)]
        return sum(await asyncio.gather(*(client(url, http, rng, end) for rng in rngs)))


@pytest.mark.full
def test_memory_and_blocks_stay_flat():
    # Few tokens per step: torch's matrix products keep code for every number of rows they have
    # seen, so memory is flat only once all of them have been.
    engine = {"max_num_seqs": 32, "num_blocks": 256, "max_num_batched_tokens": 64}
    engine["speculative"] = "ngram"
    with serving(engine=engine, max_requests=4 * CLIENTS) as server:
        seconds = MINUTES * 60 / 10
        sizes, total = [], 0
        for part in range(10):
            # the clients are another process: their memory is not the question
            command = [sys.executable, __file__, server.url, str(seconds), str(part)]
            done = subprocess.run(command, capture_output=True, text=True)
            assert done.returncode == 0, done.stderr[-3000:]
            total += int(done.stdout)
            wait_until_idle(server.llm)
            sizes.append(resident_mb())
        threads = threading.active_count()
        print(
            f"\n{total} requests in {MINUTES:g} minutes, resident MB: {[round(s) for s in sizes]}"
        )
        assert sizes[-1] - sizes[5] < 12, sizes  # the first half fills caches and pools
        assert threading.active_count() == threads
        assert server.llm.failed_steps == 0


if __name__ == "__main__":
    print(asyncio.run(traffic(sys.argv[1], float(sys.argv[2]), int(sys.argv[3]))))
