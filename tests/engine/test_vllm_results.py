"""Result files of `vllm bench` are read as they are.

`tests/data/vllm_bench/serve*.json` were written by `vllm bench serve` of vLLM 0.33 against
`fastinfer serve` (`--save-result`; `--append-result`, of which the second with `--save-detailed`).
Its other two benchmarks are given here with the keys that its source writes.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from fastinfer.bench.report import compare, engine_of, read_results
from fastinfer.cli.main import main

ROOT = Path(__file__).parents[2]
FILES = ROOT / "tests/data/vllm_bench"
sys.path.insert(0, str(ROOT / "bench"))

import report_extras  # noqa: E402

LATENCY = {
    "model_id": "m",
    "avg_latency": 2.0,
    "latencies": [1.9, 2.1],
    "percentiles": {"10": 1.9, "25": 1.95, "50": 2.0, "75": 2.05, "90": 2.1, "99": 2.1},
}
THROUGHPUT = {
    "model_id": "m",
    "elapsed_time": 4.0,
    "num_requests": 4,
    "total_num_tokens": 96,
    "requests_per_second": 1.0,
    "tokens_per_second": 24.0,
}


def written(path: Path, data: Any) -> Path:
    path.write_text(json.dumps(data))
    return path


def test_a_file_of_bench_serve() -> None:
    (result,) = read_results(FILES / "serve.json")
    assert result["completed"] == 4 and result["total_output_tokens"] == 32
    assert result["median_ttft_ms"] > 0 and result["request_goodput"] is None
    assert engine_of(result) == "vllm bench, openai"
    assert engine_of({**result, "label": "vLLM 0.33"}) == "vLLM 0.33"


def test_appended_tests_are_one_per_line() -> None:
    results = read_results(FILES / "serve_appended.json")
    assert len(results) == 2
    assert "itls" not in results[0] and len(results[1]["itls"]) == 4
    text = compare(read_results(FILES / "serve.json"), results[:1])
    assert "output_throughput" in text and "median_ttft_ms" in text


def test_files_of_the_other_two(tmp_path: Path) -> None:
    (latency,) = read_results(written(tmp_path / "l.json", LATENCY))
    (throughput,) = read_results(written(tmp_path / "t.json", THROUGHPUT))
    assert latency["avg_latency"] == 2.0 and engine_of(latency) == "vllm"
    assert throughput["request_throughput"] == 1.0 and throughput["duration"] == 4.0
    assert throughput["total_token_throughput"] == 24.0 and throughput["completed"] == 4


def test_ours_beside_theirs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The same work on the engine here, compared and in the report."""
    folder = tmp_path / "engines"
    folder.mkdir()
    model = str(ROOT / "examples/tiny/model")
    sizes = ["--input-len", "16", "--output-len", "8", "--device", "cpu"]
    ours = {name: str(folder / f"ours_{name}.json") for name in ("latency", "throughput", "serve")}
    for kind, path in ours.items():
        more = ["--num-prompts", "4"] if kind != "latency" else ["--iters", "1", "--warmup", "0"]
        assert main(["bench", kind, "--model", model, *sizes, *more, "--output", path]) == 0
    theirs = {
        "latency": written(folder / "vllm_latency.json", LATENCY),
        "throughput": written(folder / "vllm_throughput.json", THROUGHPUT),
        "serve": folder / "vllm_serve.json",
    }
    theirs["serve"].write_text((FILES / "serve.json").read_text())
    figure = {"latency": "avg_latency", "throughput": "tokens_per_second", "serve": "p99_tpot_ms"}
    for kind, name in figure.items():
        capsys.readouterr()
        assert main(["bench", "compare", str(theirs[kind]), ours[kind]]) == 0
        line = next(li for li in capsys.readouterr().out.splitlines() if li.startswith(name))
        assert line.split()[-1] in ("better", "worse") or "1.0" in line
    rows = [line for line in report_extras.load_tests(folder) if line.startswith("| `")]
    assert [row.split(" | ")[1] for row in rows] == [
        *("fastinfer", "fastinfer", "fastinfer", "vllm", "vllm bench, openai", "vllm")
    ]
    ratios = {row.split("`")[1]: row.rsplit("|", 2)[1].strip() for row in rows}
    assert float(ratios["vllm_serve.json"]) > 0 and float(ratios["vllm_throughput.json"]) > 0
    assert ratios["vllm_latency.json"] == ""


def test_the_backend_calls_what_vllm_has() -> None:
    """Where vLLM is installed: the names and arguments that `--backend vllm` uses are its own."""
    vllm = pytest.importorskip("vllm")
    import dataclasses
    import inspect

    from vllm.engine.arg_utils import EngineArgs
    from vllm.v1.engine.llm_engine import LLMEngine

    names = {field.name for field in dataclasses.fields(EngineArgs)}
    assert {"dtype", "load_format", "max_num_seqs", "enable_prefix_caching"} <= names
    assert "skip_tokenizer_init" in inspect.signature(vllm.LLM.__init__).parameters
    assert list(inspect.signature(LLMEngine.add_request).parameters)[1:4] == [
        *("request_id", "prompt", "params")
    ]
    vllm.SamplingParams(temperature=0.0, max_tokens=4, ignore_eos=True, detokenize=False)
