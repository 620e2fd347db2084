"""Decode steps over static buffers, on the CPU: same tokens, whatever was in the buffers before."""

from __future__ import annotations

import ctypes
import re
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from engine_checkpoint import save_checkpoint
from hypothesis import given
from hypothesis import strategies as st

from fastinfer import LLM, SamplingParams, ops
from fastinfer.engine import replay, runner
from fastinfer.engine.graphs import DecodeGraphs, bucket_sizes


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("llama")
    save_checkpoint(path, tokenizer=False)
    return path


def load(folder: Path, **settings: object) -> LLM:
    return LLM(folder, **{"device": "cpu", "num_blocks": 90, "max_num_seqs": 12, **settings})


@given(st.integers(1, 1000))
def test_buckets(limit: int) -> None:
    sizes = bucket_sizes(limit)
    assert sizes == sorted(set(sizes)) and sizes[-1] == limit and sizes[0] == 1
    waste = [upper - lower - 1 for lower, upper in pairwise(sizes)]
    assert all(w <= max(7, size // 7) for w, size in zip(waste, sizes[1:], strict=True))
    assert len(bucket_sizes(512)) == 35


PROMPTS = [[5] * n for n in (1, 3, 17, 30, 8, 2, 41)]
PARAMS = [
    SamplingParams(temperature=0, max_tokens=24, ignore_eos=True),
    SamplingParams(seed=1, max_tokens=9, ignore_eos=True),
    SamplingParams(seed=2, top_k=5, max_tokens=17, ignore_eos=True),
    SamplingParams(seed=3, top_p=0.8, min_p=0.02, temperature=0.7, max_tokens=12),
    SamplingParams(seed=4, max_tokens=12, logprobs=2),  # not in a graph: asks for more than tokens
    SamplingParams(seed=5, max_tokens=12, repetition_penalty=1.2),
    SamplingParams(seed=6, n=2, min_tokens=4, max_tokens=20),
]


@pytest.mark.parametrize("overlap", [False, True])
@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"num_blocks": 9},
        {"block_size": 3, "max_num_batched_tokens": 9},
        {"kv_cache_dtype": "int8"},
        {"batch_invariant": True, "dtype": "bfloat16"},
    ],
    ids=str,
)
def test_static_steps_give_the_same_tokens(folder: Path, settings: dict, overlap: bool) -> None:
    batches = [
        (PROMPTS[:4], PARAMS[:4]),
        (PROMPTS, [PARAMS[0]] * 7),
        (PROMPTS, PARAMS),
        (PROMPTS[2:3], PARAMS[:1]),
    ]
    with load(folder, cuda_graphs=False, **settings) as llm:
        expected = [llm.generate(*batch) for batch in batches]
    with load(folder, cuda_graphs=True, async_scheduling=overlap, **settings) as llm:
        llm.core.runner.cache.view(torch.uint8).fill_(0x7F)
        graphs = llm.core.runner._graphs
        graphs._tables.fill_(10**6)  # never read where nothing was written
        used: list[int] = []
        launch = graphs.launch
        graphs.launch = lambda plan: (used.append(len(plan.chunks)), launch(plan))[1]
        for batch, outputs in zip(batches, expected, strict=True):
            got = llm.generate(*batch)
            assert [[c.token_ids for c in o.outputs] for o in got] == [
                [c.token_ids for c in o.outputs] for o in outputs
            ]
        assert len(used) > 20 and len(set(used)) >= 4  # several buckets, partly filled ones too
        if settings.get("num_blocks") == 9:
            assert llm.stats().num_preemptions > 0
        assert llm.stats().kv_blocks_used == 0


def test_a_static_step_sees_nothing_but_its_buffers(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What a captured graph would replay: the same tensors in every step of a bucket."""
    calls: list[tuple] = []
    varlen, kvcache, sample = (
        ops.flash_attn_varlen_func,
        ops.flash_attn_with_kvcache,
        ops.sample,
    )

    def spy(original: Callable[..., object]) -> Callable[..., object]:
        def call(*arguments: object, **named: object) -> object:
            values = [*arguments, *named.values()]
            fixed = [v.data_ptr() for v in named.values() if isinstance(v, torch.Tensor)]
            numbers = [v for v in values if isinstance(v, (int, float, tuple))]
            shapes = [tuple(v.shape) for v in values if isinstance(v, torch.Tensor)]
            calls.append((original.__name__, numbers, shapes, fixed))
            return original(*arguments, **named)

        return call

    with load(folder, cuda_graphs=True, max_num_seqs=4) as llm:
        assert isinstance(llm.core.runner._graphs, DecodeGraphs)
        for name, original in (
            ("flash_attn_varlen_func", varlen),
            ("flash_attn_with_kvcache", kvcache),
            ("sample", sample),
        ):
            monkeypatch.setattr(ops, name, spy(original))
        llm.generate(PROMPTS[:3], SamplingParams(temperature=0, max_tokens=20, ignore_eos=True))
    # the first step, a mixed one, also decodes in each layer and samples
    decodes = [call for call in calls if call[0] != "flash_attn_varlen_func"][3 + 1 :]
    assert len(decodes) == 19 * (3 + 1)
    per_step = [decodes[i : i + 4] for i in range(0, len(decodes), 4)]
    assert all(step == per_step[0] for step in per_step)


@pytest.mark.parametrize("graphs", [False, True])
def test_decodes_share_one_workspace(
    folder: Path, monkeypatch: pytest.MonkeyPatch, graphs: bool
) -> None:
    scratch = torch.zeros(64, dtype=torch.uint8)
    monkeypatch.setattr(runner, "make_workspace", lambda config, device: scratch)
    seen: list[object] = []
    original = ops.flash_attn_with_kvcache

    def spy(*arguments: object, **named: object) -> object:
        seen.append(named["workspace"])
        return original(*arguments, **named)

    monkeypatch.setattr(ops, "flash_attn_with_kvcache", spy)
    with load(folder, cuda_graphs=graphs, max_num_seqs=2) as llm:
        seen.clear()
        llm.generate([[1, 2, 3]], SamplingParams(temperature=0, max_tokens=4, ignore_eos=True))
    assert len(seen) == 3 * 3 and all(each is scratch for each in seen)


def test_the_workspace_is_only_for_shapes_it_is_large_enough_for(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def make(device: str, **sizes: int) -> torch.Tensor | None:
        shape = {"head_dim": 128, "num_heads": 32, "num_kv_heads": 8, **sizes}
        return runner.make_workspace(SimpleNamespace(**shape), torch.device(device))

    zeros = torch.zeros
    monkeypatch.setattr(torch, "zeros", lambda n, dtype, device: zeros(n, dtype=dtype))
    assert make("cpu") is None  # the CPU kernels need none
    for sizes in ({}, {"num_kv_heads": 1}, {"head_dim": 64}):
        assert make("cuda", **sizes).numel() == 16 << 20
    for sizes in ({"head_dim": 256}, {"num_heads": 33, "num_kv_heads": 1}):
        assert make("cuda", **sizes) is None


def test_requests_that_ask_for_more_run_without_a_graph(folder: Path) -> None:
    with load(folder, cuda_graphs=True) as llm:
        graphs = llm.core.runner._graphs
        used: list[bool] = []
        accepts = graphs.accepts
        graphs.accepts = lambda plan: (used.append(accepts(plan)), used[-1])[1]
        plain = {"temperature": 0, "max_tokens": 4, "ignore_eos": True}
        for more, expected in (
            ({}, [False, True, True, True]),  # the prompt, then decodes
            ({"logprobs": 0}, [False] * 4),
            ({"presence_penalty": 0.1}, [False] * 4),
            ({"min_tokens": 2}, [False, False, True, True]),
        ):
            used.clear()
            llm.generate([[1, 2, 3]], SamplingParams(**plain, **more))
            assert used == expected, more
        used.clear()
        llm.generate([[7]], SamplingParams(**plain))  # a prompt of one token is a decode
        assert used == [True] * 4


def test_the_library_and_python_agree_on_a_step() -> None:
    source = Path(__file__).parents[2] / "csrc" / "cuda" / "common" / "step.cu"
    body = source.read_text().split("struct FastinferStep {")[1].split("};")[0]
    fields = re.findall(r"(void\*|int64_t) (\w+);", body)
    kinds = {"void*": ctypes.c_void_p, "int64_t": ctypes.c_int64}
    assert [(name, kinds[kind]) for kind, name in fields] == replay._Step._fields_
