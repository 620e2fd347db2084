"""`fastinfer bench --backend`: transformers as it is, vLLM as far as a stand-in can tell."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from fastinfer.bench import backends
from fastinfer.bench.workloads import make_workload
from fastinfer.cli.main import main

MODEL = str(Path(__file__).parents[2] / "examples/tiny/model")


def bench(capsys: pytest.CaptureFixture[str], *arguments: str) -> dict[str, Any]:
    assert main(["bench", *arguments, "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def test_transformers_throughput(capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("transformers")
    sizes = ("--num-prompts", "4", "--input-len", "12", "--output-len", "5", "--max-num-seqs", "2")
    options = ("--backend", "transformers", "--device", "cpu", "--detailed")
    result = bench(capsys, "throughput", "--model", MODEL, *options, *sizes)
    assert result["backend"] == "transformers" and result["completed"] == 4
    assert result["total_output_tokens"] == 20 and result["total_input_tokens"] == 48
    assert result["input_lens"] == [12] * 4 and result["output_lens"] == [5] * 4
    assert 0 < result["mean_ttft_ms"] < result["mean_e2el_ms"]


def test_transformers_latency_of_random_weights(capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("transformers")
    sizes = ("--input-len", "8", "--output-len", "3", "--batch-size", "2", "--iters", "2")
    options = ("--backend", "transformers", "--device", "cpu", "--load-format", "dummy")
    result = bench(capsys, "latency", "--model", MODEL, *options, *sizes, "--warmup", "0")
    assert result["completed"] == 4 and len(result["latencies"]) == 2


def test_transformers_gives_the_tokens_asked_for() -> None:
    """Requests of one batch end at their own lengths."""
    pytest.importorskip("transformers")
    engine = backends.make_backend("transformers", MODEL, device="cpu")
    work = make_workload("random", num_requests=3, vocab_size=64, input_len=4, output_len=6)
    work[1].turns[0].max_tokens = 2
    shown: list[int] = []
    load = engine.run(work, 3, shown.append)
    assert [record.num_output_tokens for record in load.records] == [6, 2, 6]
    assert shown == [3]


class FakeEngine:
    """One token per request and step, two requests at a time."""

    model_config = SimpleNamespace(get_vocab_size=lambda: 64, max_model_len=128)

    def __init__(self) -> None:
        self.left: dict[str, tuple[int, list[int]]] = {}
        self.most = 0

    def add_request(self, name: str, prompt: dict[str, list[int]], params: Any) -> None:
        assert prompt["prompt_token_ids"] and params.ignore_eos
        self.left[name] = (params.max_tokens, [])
        self.most = max(self.most, len(self.left))

    def step(self) -> list[Any]:
        outputs = []
        for name, (count, tokens) in list(self.left.items()):
            tokens.append(1)
            done = len(tokens) == count
            if done:
                del self.left[name]
            answer = SimpleNamespace(token_ids=list(tokens))
            outputs.append(SimpleNamespace(request_id=name, outputs=[answer], finished=done))
        return outputs


def test_vllm(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    engine = FakeEngine()
    fake: Any = ModuleType("vllm")
    fake.__version__ = "0.99"
    fake.LLM = lambda model, **options: SimpleNamespace(llm_engine=engine)
    fake.SamplingParams = SimpleNamespace
    monkeypatch.setitem(sys.modules, "vllm", fake)
    monkeypatch.setattr(backends.importlib.util, "find_spec", lambda name: fake)
    sizes = ("--num-prompts", "6", "--input-len", "12", "--output-len", "5", "--max-num-seqs", "2")
    result = bench(capsys, "throughput", "--model", "x", "--backend", "vllm", *sizes)
    assert result["backend_version"] == "0.99" and engine.most == 2
    assert result["completed"] == 6 and result["total_output_tokens"] == 30


def test_refusals(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(backends.importlib.util, "find_spec", lambda name: None)
    assert main(["bench", "throughput", "--model", MODEL, "--backend", "vllm"]) == 2
    assert "pip install vllm" in capsys.readouterr().err
    assert main(["bench", "serve", "--model", MODEL, "--backend", "transformers"]) == 2
    assert "give --url" in capsys.readouterr().err
    work = make_workload("chat", num_requests=1, vocab_size=8, input_len=2, output_len=2)
    with pytest.raises(ValueError, match="one turn"):
        backends.single_turns(work)
