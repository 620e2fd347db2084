"""The engine over two or four GPUs gives what it gives on one, with and without graphs; faults."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

sys.path.insert(0, str(Path(__file__).parents[1] / "parallel"))
sys.path.insert(0, str(Path(__file__).parents[1] / "models"))
sys.path.insert(0, str(Path(__file__).parents[1] / "quant"))
from _model_harness import TINY, build_reference, save
from grid_rank import logits_of
from parallel_grid import CHANGES, LAYOUTS, run_grid
from quant_checkpoints import CASES, write_checkpoint

from fastinfer import LLM, SamplingParams
from fastinfer.distributed.control import RankError

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs"),
]
SETTINGS: dict[str, Any] = {
    "num_blocks": 512,
    "max_num_seqs": 8,
    "progress": False,
    "distributed_timeout": 30,
}
PROMPTS = [{"prompt_token_ids": [7 * i * j % 997 + 3 for j in range(5 + 9 * i)]} for i in range(8)]
GREEDY = SamplingParams(max_tokens=16, temperature=0.0, ignore_eos=True)
SCORED = SamplingParams(max_tokens=1, temperature=0.0, ignore_eos=True, logprobs=8)
NOISE = 0.05  # of a log-probability in bf16, from sums in another order


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model whose greedy tokens bf16 noise does not change: the output head is large."""
    path = tmp_path_factory.mktemp("tiny")
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=1003,
        hidden_size=512,
        intermediate_size=1408,
        num_hidden_layers=4,
        num_attention_heads=8,
        num_key_value_heads=2,
        head_dim=64,
        max_position_embeddings=512,
        initializer_range=0.05,
        bos_token_id=1,
        eos_token_id=2,
        tie_word_embeddings=False,
    )
    transformers.LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(path)
    return path


def answers(folder: Path, **options: Any) -> tuple[list[list[int]], list[dict[int, float]]]:
    """Greedy tokens of all prompts, and the most likely first tokens."""
    with LLM(str(folder), **SETTINGS, **options) as llm:
        tokens = [out.outputs[0].token_ids for out in llm.generate(PROMPTS, GREEDY)]
        again = [out.outputs[0].token_ids for out in llm.generate(PROMPTS, GREEDY)]
        assert tokens == again
        scored = llm.generate(PROMPTS, SCORED)
    return tokens, [
        {token: entry.logprob for token, entry in out.outputs[0].logprobs[0].items()}
        for out in scored
    ]


@pytest.fixture(scope="module")
def alone(folder: Path) -> tuple[list[list[int]], list[dict[int, float]]]:
    return answers(folder)


@pytest.mark.parametrize(
    "options",
    [
        {"tensor_parallel_size": 2},
        {"tensor_parallel_size": 2, "cuda_graphs": False},
        {"tensor_parallel_size": 2, "speculative": "ngram", "adaptive_speculation": False},
        {"tensor_parallel_size": 2, "speculative": "folder", "adaptive_speculation": False},
        {"tensor_parallel_size": 2, "batch_invariant": True},
        {"tensor_parallel_size": 2, "enable_prefix_caching": False, "async_scheduling": False},
        {"tensor_parallel_size": 2, "peer": "0"},
        {"pipeline_parallel_size": 2},
        {"pipeline_parallel_size": 2, "pipeline_stages": [1, 3], "speculative": "ngram"},
        {"tensor_parallel_size": 4},
        {"tensor_parallel_size": 2, "pipeline_parallel_size": 2},
    ],
    ids=[
        "tp2",
        "tp2_eager",
        "tp2_speculation",
        "tp2_draft_model",
        "tp2_batch_invariant",
        "tp2_plain",
        "tp2_nccl",
        "pp2",
        "pp2_given_speculation",
        "tp4",
        "tp2_pp2",
    ],
)
def test_answers_are_those_of_one_gpu(
    folder: Path, alone: Any, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    need = options.get("tensor_parallel_size", 1) * options.get("pipeline_parallel_size", 1)
    if torch.cuda.device_count() < need:
        pytest.skip(f"needs {need} GPUs")
    monkeypatch.setenv("FASTINFER_PEER_ALL_REDUCE", options.get("peer", "1"))
    options = {name: value for name, value in options.items() if name != "peer"}
    if options.get("speculative") == "folder":  # the draft stays on rank 0
        options = options | {"speculative": str(folder)}
    tokens, scored = answers(folder, **options)
    want_tokens, want_scored = alone
    for want, got in zip(want_scored, scored, strict=True):
        best = max(want, key=want.__getitem__)
        assert abs(want[best] - got[best]) < NOISE
    # a tie that rounding decides changes all that follows
    agree = sum(a == b for a, b in zip(want_tokens, tokens, strict=True))
    assert agree >= len(tokens) // 2, (want_tokens, tokens)


@pytest.mark.parametrize("gpus", [2, 4])
@pytest.mark.parametrize("what", ["families", "formats"])
def test_logits_of_every_family_and_format(tmp_path: Path, what: str, gpus: int) -> None:
    """Of parts on several GPUs against those of one, in 16 bits: TP2 and PP2; TP4 and TP2 x PP2."""
    if torch.cuda.device_count() < gpus:
        pytest.skip(f"needs {gpus} GPUs")
    cases = {name: tmp_path / name for name in (TINY if what == "families" else CASES)}
    for name, path in cases.items():
        if what == "families":
            save(name, build_reference(name, **CHANGES.get(name, {})), path)
        else:
            path.mkdir()
            write_checkpoint(CASES[name], path)
    layouts = LAYOUTS[gpus]
    results = run_grid(tmp_path, cases, layouts, device="cuda", dtype="float16")
    bad = {}
    for name in cases:
        want = torch.cat(logits_of(str(cases[name]), None, "cuda", torch.float16))
        for tp, pp in layouts:
            got = results[name, tp, pp]
            if isinstance(got, str):
                bad[name, tp, pp] = got
                continue
            error = float((torch.cat(got) - want).norm() / want.norm())
            # scales of activations per rank are other numbers
            activations = name in CASES and CASES[name].activations
            if not error <= (1e-3 if tp == 1 else 0.1 if activations else 0.01):
                bad[name, tp, pp] = str(error)
    assert not bad, bad


def test_stages_are_divided_by_measured_time(tmp_path: Path) -> None:
    """A head as heavy as several layers: fewer of them are with it, and both stages are planned to
    take about as long; the real steps are not far from that.
    """
    config = transformers.LlamaConfig(
        vocab_size=128256,
        hidden_size=4096,
        intermediate_size=14336,
        num_hidden_layers=8,
        num_attention_heads=32,
        num_key_value_heads=8,
        max_position_embeddings=512,
        tie_word_embeddings=False,
        torch_dtype="bfloat16",
        architectures=["LlamaForCausalLM"],
    )
    config.save_pretrained(tmp_path)
    options = {"load_format": "dummy", "pipeline_parallel_size": 2, "num_blocks": 1024}
    with LLM(str(tmp_path), **SETTINGS | options) as llm:
        llm.generate(PROMPTS, GREEDY)
        llm.pipeline_stats(reset=True)
        llm.generate(PROMPTS, SamplingParams(max_tokens=64, temperature=0.0, ignore_eos=True))
        stages = llm.pipeline_stats()
    print(stages)
    layers = [stage["layers"] for stage in stages]
    assert sum(layers) == 8 and layers[1] < layers[0]
    for stage in stages:
        assert stage["planned_ms"] == pytest.approx(stage["step_ms"], rel=0.3)


@contextlib.contextmanager
def hog(device: int, left: int) -> Iterator[None]:
    """Holds all memory of a GPU but so many bytes."""
    with torch.cuda.device(device):
        torch.cuda.empty_cache()
        torch.zeros(1, device=device)
        free, _ = torch.cuda.mem_get_info(device)
        held = torch.empty(max(free - left, 1), dtype=torch.uint8, device=device)
    try:
        yield
    finally:
        del held
        torch.cuda.empty_cache()


def test_a_rank_has_no_memory_to_start(folder: Path) -> None:
    options = {"tensor_parallel_size": 2, "kv_cache_memory": 40 << 30, "num_blocks": None}
    with hog(1, 3 << 30):  # enough for its context and NCCL, not for its cache
        begin = time.monotonic()
        with pytest.raises((RankError, ValueError), match=r"rank 1 of 2.*memory"):
            LLM(str(folder), **SETTINGS | options)
        assert time.monotonic() - begin < 40


@pytest.mark.parametrize("rank", [0, 1])
def test_a_rank_runs_out_of_memory_in_a_step(folder: Path, rank: int) -> None:
    """The memory is really used up when a long prompt comes."""
    options = {"tensor_parallel_size": 2, "max_num_batched_tokens": 32768, "max_num_seqs": 256}
    llm = LLM(str(folder), **SETTINGS | options | {"num_blocks": 4096, "cuda_graphs": False})
    (process,) = llm.core.runner._run._processes
    llm.generate(PROMPTS[0], GREEDY)
    prompts = [{"prompt_token_ids": [i + 3] * 400} for i in range(80)]
    with hog(rank, 8 << 20):
        begin = time.monotonic()
        with pytest.raises(RuntimeError, match=rf"rank {rank} of 2.*memory"):
            llm.generate(prompts, GREEDY)
        assert time.monotonic() - begin < 15
        with pytest.raises(RankError, match=f"rank {rank}"):  # and from now on
            llm.generate(PROMPTS[0], GREEDY)
        llm.close()
        assert process.poll() is not None


def test_kernels_do_not_wait_for_a_rank_that_died(folder: Path) -> None:
    """With a time limit of minutes: error, close and the next run come in seconds."""
    options = {"distributed_timeout": 300, "tensor_parallel_size": 2}
    llm = LLM(str(folder), **SETTINGS | options)
    (process,) = llm.core.runner._run._processes
    stream = llm.stream(PROMPTS[0], SamplingParams(max_tokens=450, ignore_eos=True))
    for _ in range(3):
        next(stream)
    process.kill()
    begin = time.monotonic()
    with pytest.raises(RuntimeError, match="rank 1"):
        for _ in stream:
            pass
    said = time.monotonic() - begin
    llm.close()
    torch.cuda.synchronize()
    print(f"said after {said:.2f} s, closed after {time.monotonic() - begin:.2f} s")
    assert time.monotonic() - begin < 10
    with LLM(str(folder), **SETTINGS | options) as again:
        assert again.generate(PROMPTS[0], GREEDY)


@pytest.mark.parametrize("stop", [signal.SIGKILL, signal.SIGSTOP], ids=["dies", "hangs"])
def test_a_rank_is_lost(folder: Path, stop: signal.Signals) -> None:
    llm = LLM(str(folder), **SETTINGS | {"distributed_timeout": 5, "tensor_parallel_size": 2})
    (process,) = llm.core.runner._run._processes
    stream = llm.stream(PROMPTS[0], SamplingParams(max_tokens=450, ignore_eos=True))
    for _ in range(3):
        next(stream)
    os.kill(process.pid, stop)
    begin = time.monotonic()
    with pytest.raises(RuntimeError, match="rank 1"):
        for _ in stream:
            pass
    assert time.monotonic() - begin < 15
    with pytest.raises(RankError):
        llm.generate(PROMPTS[0], GREEDY)
    llm.close()
    assert process.poll() is not None
