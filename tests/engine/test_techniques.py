"""The settings that turn a technique off: the tokens stay, the work is what the setting says."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from fastinfer import LLM, SamplingParams
from fastinfer.engine.config import EngineConfig
from fastinfer.engine.step_plan import SchedulePlan

MODEL = Path(__file__).parents[2] / "examples/tiny/model"
PROMPTS = ["Once upon a time", "The cat", "Count from three to seven.", "One", "A" * 90]
GREEDY = SamplingParams(temperature=0.0, max_tokens=10, ignore_eos=True)
SETTINGS: dict[str, dict[str, Any]] = {
    "no cache": {"use_kv_cache": False, "enable_prefix_caching": False},
    "no cache, overlapped, in chunks": {
        "use_kv_cache": False,
        "enable_prefix_caching": False,
        "async_scheduling": True,
        "max_num_batched_tokens": 40,
    },
    "scores in memory": {"fused_attention": False},
    "scores in memory, static buffers": {"fused_attention": False, "cuda_graphs": True},
    "scores in memory, drafts": {"fused_attention": False, "speculative": "ngram"},
    "scores in memory, drafts, static buffers": {
        "fused_attention": False,
        "speculative": "ngram",
        "cuda_graphs": True,
        "adaptive_speculation": False,
    },
    "a copy of keys per head": {"share_kv_heads": False},
    "a copy of keys per head, static buffers": {"share_kv_heads": False, "cuda_graphs": True},
    "all of it": {
        "fused_attention": False,
        "share_kv_heads": False,
        "use_kv_cache": False,
        "enable_prefix_caching": False,
        "block_size": 128,
        "num_blocks": 5,
    },
    "a block per request": {"block_size": 128, "num_blocks": 5},
    "static batches": {"batching": "static", "max_num_seqs": 2},
    "prompts in one piece": {"enable_chunked_prefill": False, "max_num_seqs": 2},
    "prompts in one piece, overlapped": {"enable_chunked_prefill": False, "async_scheduling": True},
}


def make(**settings: Any) -> LLM:
    defaults = {"device": "cpu", "dtype": "float32", "num_blocks": 64, "progress": False}
    defaults |= {"max_model_len": 128, "max_num_seqs": 8}
    return LLM(MODEL, **{**defaults, **settings})


def greedy(llm: LLM) -> list[list[int]]:
    return [output.outputs[0].token_ids for output in llm.generate(PROMPTS, GREEDY)]


@pytest.fixture(scope="module")
def expected() -> Iterator[list[list[int]]]:
    with make() as llm:
        yield greedy(llm)


@pytest.mark.parametrize("name", SETTINGS)
def test_tokens_stay(name: str, expected: list[list[int]]) -> None:
    with make(**SETTINGS[name]) as llm:
        assert greedy(llm) == expected
        assert llm.stats().kv_blocks_used == 0


def plans(llm: LLM) -> list[tuple[int, list[tuple[str, int, int]]]]:
    """(tokens, (request, start, count) of each chunk) of every step."""
    seen = []

    def note(plan: SchedulePlan) -> None:
        chunks = [(c.request.request_id, c.start, c.count) for c in plan.chunks]
        seen.append((plan.num_tokens, chunks))

    llm.core.on_plan = note
    llm.generate(PROMPTS, GREEDY)
    return seen


def test_without_a_cache_every_step_runs_the_whole_text() -> None:
    with make(**SETTINGS["no cache"]) as llm:
        seen = plans(llm)
    lengths: dict[str, list[int]] = {}
    for _, chunks in seen:
        for request, start, count in chunks:
            assert start == 0
            lengths.setdefault(request, []).append(count)
    assert len(lengths) == len(PROMPTS)
    for counts in lengths.values():
        assert counts == list(range(counts[0], counts[0] + 10))


def test_a_static_batch_ends_before_the_next_begins() -> None:
    with make(batching="static", max_num_seqs=2) as llm:
        together = [{request for request, _, _ in chunks} for _, chunks in plans(llm)]
    batches = [batch for i, batch in enumerate(together) if i == 0 or batch - together[i - 1]]
    assert [sorted(b) for b in batches] == [["0.0", "1.0"], ["2.0", "3.0"], ["4.0"]]


def test_prompts_in_one_piece() -> None:
    with make(enable_chunked_prefill=False, max_num_batched_tokens=128) as llm:
        prompt = [[1] * 100, [2] * 50, [3] * 20]
        seen: list[int] = []
        llm.core.on_plan = lambda plan: seen.append(plan.num_tokens)
        llm.generate([{"prompt_token_ids": p} for p in prompt], GREEDY)
    assert seen[:3] == [100, 71, 3]  # the second did not fit beside the first
    with pytest.raises(ValueError, match="enable_chunked_prefill=False must go with"):
        make(enable_chunked_prefill=False, max_num_batched_tokens=126)


def test_cache_sizes() -> None:
    with make(num_blocks=8) as llm:
        shared = llm.core.runner.block_bytes
    with make(num_blocks=8, share_kv_heads=False) as llm:
        assert llm.core.runner.block_bytes == 3 * shared  # 6 query heads, 2 key/value heads
        assert llm.core.runner.layers[0].k.shape[2] == 6


@pytest.mark.parametrize(("scheme", "share"), [("int8", 0.55), ("int4", 0.33)])
def test_weights_rounded_at_load(scheme: str, share: float) -> None:
    from fastinfer.bench.ablate_cost import weight_bytes
    from fastinfer.models import load_model

    plain = load_model(MODEL, dtype="float32").layers[0].mlp
    with make(quantization=scheme) as llm:
        layer = llm.core.runner.model.layers[0].mlp
        assert weight_bytes(layer) < share * weight_bytes(plain)
        x = torch.randn(5, 192)
        error = (layer(x) - plain(x)).norm() / plain(x).norm()
        assert error < (0.02 if scheme == "int8" else 0.2)
        again = greedy(llm)
        assert [len(tokens) for tokens in again] == [10] * len(PROMPTS)


@pytest.mark.parametrize("cache", ["int8", "fp8"])
def test_scores_in_memory_of_an_8_bit_cache(cache: str) -> None:
    """Both ways to attend read the same codes: log-probabilities differ by rounding only."""
    params = SamplingParams(temperature=0.0, max_tokens=1, logprobs=0)
    found = []
    for fused in (True, False):
        with make(kv_cache_dtype=cache, fused_attention=fused) as llm:
            outputs = llm.generate(PROMPTS, params)
            found.append([output.outputs[0].cumulative_logprob for output in outputs])
    assert found[0] == pytest.approx(found[1], abs=1e-4)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"use_kv_cache": False}, "use_kv_cache=False must go with"),
        ({"batching": "dynamic"}, "batching must be 'continuous' or 'static'"),
        ({"quantization": "int3"}, "quantization must be 'int8' or 'int4'"),
        ({"fused_attention": 1}, "fused_attention must be True or False"),
    ],
)
def test_wrong_settings(settings: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        EngineConfig(model="x", **settings)


def test_a_quantised_checkpoint_is_not_rounded_again(tmp_path: Path) -> None:
    from fastinfer.cli.main import main

    arguments = ["--method", "rtn", "--group-size", "64", "--format", "gptq"]
    folder = str(tmp_path / "q")
    assert main(["quantize", "--model", str(MODEL), "--out", folder, *arguments]) == 0
    with pytest.raises(ValueError, match="quantised already"):
        LLM(folder, device="cpu", quantization="int8", progress=False)
