"""The engine over several processes gives what it gives in one: tokens, log-probabilities, text."""

from __future__ import annotations

import contextlib
import os
import random
import socket
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from engine_checkpoint import save_checkpoint

from fastinfer import LLM, SamplingParams
from fastinfer.engine.outputs import RequestOutput

SETTINGS: dict[str, Any] = {
    "device": "cpu",
    "dtype": "float32",
    "num_blocks": 64,
    "progress": False,
    "max_num_seqs": 6,
    "distributed_timeout": 60,
}
PROMPTS = ["hello", "one two three four five", "a b a b a b a b", "the end " * 5, "x"]
PARAMS = [
    SamplingParams(max_tokens=9, temperature=0.0),
    SamplingParams(max_tokens=9, seed=1, top_p=0.9, logprobs=3),
    SamplingParams(max_tokens=9, temperature=0.0, repetition_penalty=1.3, logprobs=0),
    SamplingParams(max_tokens=9, seed=2, temperature=0.6, top_k=9, min_tokens=5, n=2),
    SamplingParams(max_tokens=9, seed=3, min_p=0.02, presence_penalty=0.5),
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("tiny")
    save_checkpoint(path)
    return path


def assert_same(want: list[RequestOutput], got: list[RequestOutput]) -> None:
    for a, b in zip(want, got, strict=True):
        for x, y in zip(a.outputs, b.outputs, strict=True):
            assert (x.token_ids, x.text) == (y.token_ids, y.text)
            assert (x.logprobs is None) == (y.logprobs is None)
            for p, q in zip(x.logprobs or [], y.logprobs or [], strict=True):
                assert p.keys() == q.keys()
                assert all(abs(p[t].logprob - q[t].logprob) < 1e-4 for t in p)


def several_rounds(llm: LLM) -> list[RequestOutput]:
    """Everything at once, twice (the second finds prefixes); then only plain decodes; a stream
    that is left early in between.
    """
    out = [*llm.generate(PROMPTS, PARAMS), *llm.generate(PROMPTS, PARAMS)]
    stream = llm.stream("gone soon", SamplingParams(max_tokens=100, ignore_eos=True))
    next(stream)
    stream.close()
    plain = [SamplingParams(max_tokens=20, temperature=t, seed=7) for t in (0.0, 0.8, 0.0, 0.0, 1)]
    return out + llm.generate(PROMPTS, plain) + llm.generate(PROMPTS[0], plain[0])


# Few blocks: some requests give way and come back.
CASES: dict[str, dict[str, Any]] = {
    "tp2": {"tensor_parallel_size": 2, "cuda_graphs": True},
    "pp2": {"pipeline_parallel_size": 2, "num_blocks": 9, "block_size": 8, "swap_space": 1 << 20},
    "tp2_speculation": {
        "tensor_parallel_size": 2,
        "speculative": "ngram",
        "adaptive_speculation": False,
        "cuda_graphs": True,
    },
}
FULL: dict[str, dict[str, Any]] = {
    "tp2_eager_preemption": {"tensor_parallel_size": 2, "num_blocks": 9, "block_size": 8},
    "tp2_batch_invariant": {"tensor_parallel_size": 2, "batch_invariant": True},
    "tp2_int8_cache": {"tensor_parallel_size": 2, "kv_cache_dtype": "int8"},
    "tp2_async": {"tensor_parallel_size": 2, "cuda_graphs": True, "async_scheduling": True},
    "tp2_draft_model": {
        "tensor_parallel_size": 2,
        "speculative": "folder",
        "adaptive_speculation": False,
        "cuda_graphs": True,
    },
    "pp2_draft_model": {
        "pipeline_parallel_size": 2,
        "speculative": "folder",
        "adaptive_speculation": False,
        "pipeline_stages": [1, 2],
    },
    "tp2_swap": {
        "tensor_parallel_size": 2,
        "num_blocks": 9,
        "block_size": 8,
        "swap_space": 1 << 20,
    },
    "pp2_graphs": {"pipeline_parallel_size": 2, "cuda_graphs": True},
    "pp3_chunks": {"pipeline_parallel_size": 3, "max_num_batched_tokens": 8},
    "pp2_speculation": {
        "pipeline_parallel_size": 2,
        "speculative": "ngram",
        "adaptive_speculation": False,
        "cuda_graphs": True,
    },
    "tp2_pp2": {"tensor_parallel_size": 2, "pipeline_parallel_size": 2, "cuda_graphs": True},
    "tp6": {"tensor_parallel_size": 6},
}


def run_case(folder: Path, options: dict[str, Any]) -> None:
    if options.get("speculative") == "folder":
        options = options | {"speculative": str(folder)}
    settings = SETTINGS | options
    several = ("tensor_parallel_size", "pipeline_parallel_size", "pipeline_stages")
    alone = {k: v for k, v in settings.items() if k not in several}
    environment = dict(os.environ)
    with LLM(str(folder), **alone) as llm:
        want = several_rounds(llm)
    with LLM(str(folder), **settings) as llm:
        got = several_rounds(llm)
        stats = llm.stats()
        processes = list(llm.core.runner._run._processes)
    assert os.environ == environment  # what NCCL and gloo read of it is as it was
    assert stats.running == stats.waiting == 0
    assert [process.poll() for process in processes] == [0] * len(processes)
    assert_same(want, got)


@pytest.mark.parametrize("case", CASES)
def test_the_same_answers(folder: Path, case: str) -> None:
    run_case(folder, CASES[case])


@pytest.mark.full
@pytest.mark.parametrize("case", FULL)
def test_the_same_answers_in_every_mode(folder: Path, case: str) -> None:
    run_case(folder, FULL[case])


def free_port() -> int:
    """Below the ports that the system gives out by itself: one of those may be another's by the
    time that it is used.
    """
    while True:
        port = random.SystemRandom().randrange(20000, 32000)
        with contextlib.suppress(OSError), socket.create_server(("127.0.0.1", port)):
            return port


def start_ranks(
    size: int,
    arguments: list[str],
    models: list[Path],
    program: Sequence[str] = ("-m", "fastinfer"),
) -> list[subprocess.Popen[str]]:
    """What torchrun does: the same command for every rank, told apart by the environment."""
    port = str(free_port())
    processes = []
    for rank in range(size):
        environment = {
            **os.environ,
            "RANK": str(rank),
            "LOCAL_RANK": str(rank),
            "WORLD_SIZE": str(size),
            "LOCAL_WORLD_SIZE": str(size),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": port,
            "OMP_NUM_THREADS": "1",
            "GLOO_SOCKET_IFNAME": "lo",
            "PYTHONPATH": os.pathsep.join(p for p in sys.path if p.endswith("python")),
        }
        command = [sys.executable, *program, *arguments, "--model", str(models[rank])]
        processes.append(
            subprocess.Popen(
                command,
                env=environment,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
            )
        )
    return processes


def test_cores_are_shared(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Processes on a CPU have a share of the cores each, this one too, until they end."""
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr(os, "cpu_count", lambda: 6)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(4)
        with LLM(str(folder), tensor_parallel_size=2, **SETTINGS):
            assert torch.get_num_threads() == 3
        assert torch.get_num_threads() == 4
    finally:
        torch.set_num_threads(before)


GENERATE = ["generate", "--prompt", "hello", "--max-tokens", "6", "--temperature", "0"]
OPTIONS = ["--device", "cpu", "--dtype", "float32", "--num-blocks", "32"]


def test_processes_that_torchrun_started(folder: Path) -> None:
    ranks = start_ranks(2, [*GENERATE, *OPTIONS, "--tp", "2"], [folder, folder])
    outputs = [rank.communicate(timeout=120) for rank in ranks]
    assert [rank.returncode for rank in ranks] == [0, 0], outputs
    with LLM(str(folder), **SETTINGS) as llm:
        text = llm.generate("hello", SamplingParams(max_tokens=6, temperature=0.0))[0].text
    assert text.strip() in outputs[0][0]
    assert outputs[1][0] == ""


MEETINGS = {
    "static": "--master-addr 127.0.0.1 --master-port {port} --node-rank {host}",
    "c10d": "--rdzv-backend c10d --rdzv-endpoint 127.0.0.1:{port} --rdzv-id one",
}


def torchrun_hosts(
    hosts: int, each: int, meeting: str, arguments: list[str]
) -> list[subprocess.Popen[str]]:
    """A torchrun per host, all of them on this machine."""
    port = free_port()
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "GLOO_SOCKET_IFNAME": "lo",
        "PYTHONPATH": os.pathsep.join(p for p in sys.path if p.endswith("python")),
    }
    start = [sys.executable, "-m", "torch.distributed.run", "--nnodes", str(hosts)]
    start += ["--nproc-per-node", str(each)]
    where = MEETINGS[meeting]
    return [
        subprocess.Popen(
            [*start, *where.format(port=port, host=host).split(), "-m", "fastinfer", *arguments],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for host in range(hosts)
    ]


def check_hosts(folder: Path, each: int, meeting: str, *sizes: str) -> None:
    hosts = torchrun_hosts(2, each, meeting, [*GENERATE, *OPTIONS, *sizes, "--model", str(folder)])
    outputs = [host.communicate(timeout=180) for host in hosts]
    assert [host.returncode for host in hosts] == [0, 0], outputs
    with LLM(str(folder), **SETTINGS) as llm:
        text = llm.generate("hello", SamplingParams(max_tokens=6, temperature=0.0))[0].text
    assert text.strip() in outputs[0][0] + outputs[1][0]
    assert sum(bool(out) for out, _ in outputs) == 1, "one process prints"


def test_two_hosts(folder: Path) -> None:
    check_hosts(folder, 1, "c10d", "--tp", "2")


@pytest.mark.full
def test_two_hosts_with_two_processes_each(folder: Path) -> None:
    check_hosts(folder, 2, "static", "--tp", "2", "--pp", "2")
