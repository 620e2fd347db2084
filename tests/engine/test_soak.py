"""Many short requests of all kinds: memory stays flat and nothing is left behind."""

from __future__ import annotations

import gc
import random
from pathlib import Path

import pytest
from engine_checkpoint import save_checkpoint

from fastinfer import LLM, SamplingParams


def resident_megabytes() -> float:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * 4096 / 1e6


def serve_some(llm: LLM, rng: random.Random, count: int) -> None:
    """A round of requests, some of them abandoned, cancelled or refused."""
    prompts = [[rng.randrange(256) for _ in range(rng.randrange(1, 9))] for _ in range(count)]
    params = [
        SamplingParams(
            max_tokens=rng.choice([1, 2, 3, 4, 20]),
            temperature=rng.choice([0.0, 1.0]),
            n=rng.choice([1, 1, 1, 2]),
            logprobs=rng.choice([None, None, 2]),
            frequency_penalty=rng.choice([0.0, 0.0, 0.3]),
        )
        for _ in prompts
    ]
    streams = [llm.stream(prompts[0], params[0]) for _ in range(3)]
    next(streams[0])
    streams[1].close()
    with pytest.raises(ValueError, match="token ids must be in"):
        llm.generate([[1], [10**6]])
    outputs = llm.generate(prompts, params)
    assert all(output.finished for output in outputs)
    del streams, outputs


def soak(llm: LLM, total: int, per_round: int) -> tuple[float, float]:
    """Resident memory after half of the requests and after all."""
    rng = random.Random(0)
    halfway = 0.0
    for served in range(0, total, per_round):
        if not halfway and served >= total // 2:
            gc.collect()
            halfway = resident_megabytes()
        serve_some(llm, rng, per_round)
    gc.collect()
    stats = llm.stats()
    assert (stats.running, stats.waiting, stats.kv_blocks_used) == (0, 0, 0)
    llm.core.scheduler.pool.check_invariants()
    assert not llm.core._completions and not llm.core.scheduler.requests
    return halfway, resident_megabytes()


@pytest.mark.parametrize("overlap", [False, True])
@pytest.mark.parametrize("total", [600, pytest.param(20_000, marks=pytest.mark.full)])
def test_memory_stays_flat(tmp_path: Path, total: int, overlap: bool) -> None:
    save_checkpoint(tmp_path, tokenizer=False)
    settings = {"num_blocks": 60, "block_size": 4, "max_num_seqs": 48}
    with LLM(tmp_path, device="cpu", async_scheduling=overlap, **settings) as llm:
        halfway, end = soak(llm, total, 100)
        assert llm.stats().num_preemptions > 0 or total < 20_000
    assert end - halfway < 8, f"{halfway:.1f} MB after half of the requests, {end:.1f} MB after all"
