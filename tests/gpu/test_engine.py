"""The engine on the GPU: greedy tokens are those of the CPU in fp32, in every mode; graphs and
programmatic launch change no token; memory stays flat.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from collections.abc import Sequence

import pytest
import torch
from bundled import NEEDS_GPU, TINY, story_prompts

from fastinfer import LLM, SamplingParams
from fastinfer.engine import graphs
from fastinfer.engine.config import EngineConfig
from fastinfer.engine.runner import ModelRunner
from fastinfer.models import device_read

pytestmark = NEEDS_GPU
MODEL = TINY / "model"
NEW = 24
# A token may be less likely than the likeliest by this much (natural logarithm), in fp32 on the
# CPU: the error of the 16-bit model, of the 8-bit cache.
GAPS = {"float16": 0.05, "bfloat16": 0.3, "int8": 0.2, "fp8": 0.6}


@pytest.fixture(scope="module")
def prompts() -> list[list[int]]:
    return story_prompts((1, 3, 17, 66, 33, 5, 100, 16, 48, 2, 29, 31))


class Oracle:
    """Log-probabilities of the fp32 model on the CPU."""

    def __init__(self) -> None:
        self._llm = LLM(MODEL, device="cpu", dtype="float32", num_blocks=400)
        self._known: dict[tuple[int, ...], float] = {}  # most modes give the same tokens

    def gap(self, prompt: Sequence[int], tokens: Sequence[int]) -> float:
        """How much less likely than the likeliest token the worst of these is."""
        key = (len(prompt), *prompt, *tokens)
        if key in self._known:
            return self._known[key]
        contexts = [[*prompt, *tokens[:i]] for i in range(len(tokens))]
        params = SamplingParams(temperature=0, max_tokens=1, logprobs=64, ignore_eos=True)
        worst = 0.0
        for token, output in zip(tokens, self._llm.generate(contexts, params), strict=True):
            scores = output.outputs[0].logprobs[0]
            best = max(entry.logprob for entry in scores.values())
            worst = max(worst, best - scores[token].logprob if token in scores else 99.0)
        self._known[key] = worst
        return worst


@pytest.fixture(scope="module")
def oracle() -> Oracle:
    return Oracle()


def load(**settings: object) -> LLM:
    defaults = {"device": "cuda", "dtype": "float16", "num_blocks": 400, "max_num_seqs": 12}
    return LLM(MODEL, **{**defaults, **settings})


def greedy(llm: LLM, prompts: Sequence[list[int]], new: int = NEW) -> list[list[int]]:
    params = SamplingParams(temperature=0, max_tokens=new, ignore_eos=True)
    return [output.outputs[0].token_ids for output in llm.generate(list(prompts), params)]


MODES: dict[str, dict[str, object]] = {
    "default": {},
    "no graphs": {"cuda_graphs": False},
    "no overlap": {"async_scheduling": False},
    "chunks": {"max_num_batched_tokens": 13},
    "preempted": {"num_blocks": 24},
    "preempted, no graphs": {"num_blocks": 24, "cuda_graphs": False},
    "blocks of 3": {"block_size": 3, "num_blocks": 900},
    "blocks of 64": {"block_size": 64, "num_blocks": 60},
    "bfloat16": {"dtype": "bfloat16"},
    "int8 cache": {"kv_cache_dtype": "int8"},
    "fp8 cache": {"kv_cache_dtype": "fp8"},
    "int8 cache, chunks, no graphs": {
        "kv_cache_dtype": "int8",
        "max_num_batched_tokens": 13,
        "cuda_graphs": False,
    },
}


@pytest.mark.parametrize("mode", MODES)
def test_greedy_tokens(mode: str, oracle: Oracle, prompts: list[list[int]]) -> None:
    settings = MODES[mode]
    allowed = GAPS[str(settings.get("kv_cache_dtype", settings.get("dtype", "float16")))]
    with load(**settings) as llm:
        runs = [
            (prompts, greedy(llm, prompts)),
            (prompts[3:4], greedy(llm, prompts[3:4])),  # alone, its prefix in the cache
            (prompts[:3], greedy(llm, prompts[:3])),
        ]
        stats = llm.stats()
    assert stats.kv_blocks_used == 0
    assert (stats.num_preemptions > 0) == mode.startswith("preempted")
    if "preempted" not in mode:
        assert stats.prefix_hit_tokens > 0
    for asked, answers in runs:
        for prompt, tokens in zip(asked, answers, strict=True):
            assert len(tokens) == NEW
            assert oracle.gap(prompt, tokens) <= allowed


@pytest.mark.parametrize("count", [1, 4, 12])
@pytest.mark.parametrize("cache", ["auto", "fp8", "int8"])
def test_graphs_change_nothing(
    cache: str, count: int, prompts: list[list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Bit for bit, where a bucket has as many rows as there are requests: with and without graphs,
    programmatic launch, a plan for all layers.
    """
    params = [
        SamplingParams(temperature=0, max_tokens=40, ignore_eos=True),
        SamplingParams(temperature=0.9, seed=3, max_tokens=40, ignore_eos=True),
        SamplingParams(temperature=1.2, top_p=0.9, seed=5, max_tokens=40, ignore_eos=True),
        SamplingParams(top_k=20, min_p=0.02, seed=6, max_tokens=40, ignore_eos=True),
    ] * 3
    asked = prompts[:count]

    def tokens(graph: bool, early: bool = True, planned: int = 33) -> list[list[int]]:
        monkeypatch.setattr(graphs, "PROGRAMMATIC_LAUNCH", early)
        monkeypatch.setattr(graphs, "PLANNED_ROWS", planned)
        with load(kv_cache_dtype=cache, cuda_graphs=graph) as llm:
            answers = greedy(llm, asked, 40)
            outputs = llm.generate(asked, params[:count])
            return answers + [output.outputs[0].token_ids for output in outputs]

    expected = tokens(False)
    assert tokens(True) == expected
    assert tokens(True, early=False) == expected
    assert tokens(True, planned=1) == expected


def test_batch_invariant(prompts: list[list[int]]) -> None:
    """Tokens and log-probabilities to the last bit: alone, together, in chunks, with a cached
    prefix, preempted; tokens also from graphs.
    """
    asked = SamplingParams(temperature=0, max_tokens=16, logprobs=2, ignore_eos=True)

    def run(batches: list[list[list[int]]], **settings: object) -> list[object]:
        with load(batch_invariant=True, **settings) as llm:
            outputs = [output for batch in batches for output in llm.generate(batch, asked)]
        return [
            (output.outputs[0].token_ids, output.outputs[0].cumulative_logprob)
            for output in outputs
        ]

    expected = run([prompts])
    assert run([[prompt] for prompt in prompts]) == expected
    assert run([prompts], max_num_batched_tokens=13) == expected
    assert run([prompts, prompts]) == expected * 2
    assert run([prompts], num_blocks=24) == expected
    with load(batch_invariant=True) as llm:
        tokens = greedy(llm, prompts, 16)
        assert tokens == [each[0] for each in expected]
        assert [greedy(llm, [prompt], 16)[0] for prompt in prompts] == tokens


def test_completions_share_a_prompt(prompts: list[list[int]]) -> None:
    """n completions copy the block that they do not share, in front of a graph too."""
    params = SamplingParams(n=4, temperature=0, max_tokens=20, ignore_eos=True)
    with load() as llm:
        first = greedy(llm, prompts[4:5], 20)[0]
        for completion in llm.generate([prompts[4]], params)[0].outputs:
            assert completion.token_ids == first
        assert llm.stats().kv_blocks_used == 0


def test_logprobs_and_penalties(oracle: Oracle, prompts: list[list[int]]) -> None:
    """Steps that no graph takes, mixed with those that one does."""
    params = [
        SamplingParams(temperature=0, max_tokens=12, logprobs=3, ignore_eos=True),
        SamplingParams(temperature=0, max_tokens=12, repetition_penalty=1.3, ignore_eos=True),
        SamplingParams(temperature=0, max_tokens=30, ignore_eos=True),
    ]
    with load() as llm:
        outputs = llm.generate(prompts[3:6], params)
    with LLM(MODEL, device="cpu", dtype="float32", num_blocks=400) as cpu:
        expected = cpu.generate(prompts[3:6], params)
    assert oracle.gap(prompts[5], outputs[2].outputs[0].token_ids) <= GAPS["float16"]
    for got, want in zip(outputs[:2], expected[:2], strict=True):
        assert got.outputs[0].token_ids == want.outputs[0].token_ids
    pairs = zip(outputs[0].outputs[0].logprobs, expected[0].outputs[0].logprobs, strict=True)
    for got, want in pairs:
        best = next(iter(want))
        assert got[best].logprob == pytest.approx(want[best].logprob, abs=0.05)


def test_weights_may_arrive_when_all_else_is_ready(
    prompts: list[list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    with load(dtype="auto", num_blocks=None) as llm:
        expected = greedy(llm, prompts)
    gate, fetch, set_up = threading.Event(), device_read._Slots.fetch, ModelRunner._set_up

    def held(*arguments: object) -> object:
        assert gate.wait(60)
        return fetch(*arguments)  # type: ignore[arg-type]

    def late(runner: ModelRunner, config: EngineConfig, model: object) -> None:
        set_up(runner, config, model)
        torch.cuda.synchronize()
        assert not any(bool(param.any()) for param in model.parameters())
        gate.set()

    monkeypatch.setattr(device_read._Slots, "fetch", held)
    monkeypatch.setattr(ModelRunner, "_set_up", late)
    with load(dtype="auto", num_blocks=None) as llm:
        assert greedy(llm, prompts) == expected


def test_a_failed_start_says_what_did_not_fit() -> None:
    for settings, words in (
        ({"num_blocks": 10**8}, "the KV cache"),
        ({"gpu_memory_utilization": 0.0001, "num_blocks": None}, "memory for the KV cache"),
    ):
        with pytest.raises(ValueError, match=words):
            load(**settings)
    torch.cuda.empty_cache()
    with load() as llm:
        assert len(greedy(llm, [[5, 6, 7]])[0]) == NEW


def test_memory_is_measured_and_stays_flat(prompts: list[list[int]]) -> None:
    """Blocks from the memory that is free; then 600 requests, some of them abandoned."""
    with load(num_blocks=None) as llm:
        params = SamplingParams(temperature=0.8, max_tokens=6, seed=1)
        llm.generate(prompts * 4, params)
        before = torch.cuda.memory_allocated()
        for _ in range(50):
            stream = llm.stream(prompts[6], params)
            next(iter(stream))
            stream.close()
            llm.generate(prompts, params)
        assert torch.cuda.memory_allocated() - before < 1 << 20
        assert llm.stats().kv_blocks_used == 0


@pytest.mark.parametrize("flags", [[], ["--no-cuda-graphs"]], ids=["graphs", "no graphs"])
def test_command(flags: list[str], oracle: Oracle, prompts: list[list[int]]) -> None:
    """`fastinfer generate` takes the GPU by itself."""
    ids = ",".join(map(str, prompts[3]))
    command = [sys.executable, "-m", "fastinfer", "generate", "--model", str(MODEL), "--json"]
    more = ["--dtype", "float16", "--temperature", "0", "--max-tokens", "20", "--ignore-eos"]
    done = subprocess.run(
        [*command, "--token-ids", ids, *more, "--kv-cache-memory", "50000000", *flags],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(TINY.parents[1] / "python")},
    )
    assert done.returncode == 0, done.stderr
    assert "running on the CPU" not in done.stderr
    tokens = json.loads(done.stdout)["outputs"][0]["completions"][0]["token_ids"]
    assert len(tokens) == 20 and oracle.gap(prompts[3], tokens) <= GAPS["float16"]
