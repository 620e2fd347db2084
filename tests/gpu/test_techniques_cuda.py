"""The settings that turn a technique off, on the GPU: every token is (nearly) the likeliest one."""

from __future__ import annotations

from typing import Any

import pytest
from test_engine import (  # noqa: F401
    GAPS,
    NEW,
    Oracle,
    greedy,
    load,
    oracle,
    prompts,
    pytestmark,
)

SETTINGS: dict[str, dict[str, Any]] = {
    "no cache": {"use_kv_cache": False},
    "no cache, kernel by kernel": {"use_kv_cache": False, "async_scheduling": False},
    "scores in memory": {"fused_attention": False},
    "scores in memory, kernel by kernel": {"fused_attention": False, "cuda_graphs": False},
    "scores in memory, int8": {"fused_attention": False, "kv_cache_dtype": "int8"},
    "scores in memory, fp8": {"fused_attention": False, "kv_cache_dtype": "fp8"},
    "a copy of keys per head": {"share_kv_heads": False},
    "all of it": {"fused_attention": False, "share_kv_heads": False, "use_kv_cache": False},
    "a block per request": {"block_size": 256, "num_blocks": 12, "max_model_len": 256},
    "static batches": {"batching": "static", "max_num_seqs": 5},
    "prompts in one piece": {"enable_chunked_prefill": False},
    "weights of 8 bits": {"quantization": "int8"},
}


@pytest.mark.parametrize("name", SETTINGS)
def test_greedy_tokens(name: str, oracle: Oracle, prompts: list[list[int]]) -> None:  # noqa: F811
    settings = {"enable_prefix_caching": False, **SETTINGS[name]}
    allowed = GAPS[str(settings.get("kv_cache_dtype", settings.get("quantization", "float16")))]
    with load(**settings) as llm:
        answers = greedy(llm, prompts)
        assert llm.stats().kv_blocks_used == 0
    for prompt, tokens in zip(prompts, answers, strict=True):
        assert len(tokens) == NEW
        assert oracle.gap(prompt, tokens) <= allowed
