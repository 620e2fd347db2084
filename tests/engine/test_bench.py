"""Workloads, arrivals, the load driver, reports, and `fastinfer bench` from end to end."""

from __future__ import annotations

import io
import json
import math
import statistics
import sys
from itertools import pairwise
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
from engine_checkpoint import save_checkpoint
from engine_toy import VOCAB, ToyModel, toy_greedy, toy_llm
from hypothesis import given, settings
from hypothesis import strategies as st

from fastinfer import LLM
from fastinfer.bench import report
from fastinfer.bench.drive import Progress, run_load
from fastinfer.bench.workloads import (
    SHAPES,
    Conversation,
    Turn,
    arrival_times,
    make_workload,
    read_trace,
)
from fastinfer.cli.bench import parse_goodput, parse_rates
from fastinfer.cli.main import main


def work(name: str, **more: object) -> list[Conversation]:
    return make_workload(name, **{"num_requests": 40, "vocab_size": VOCAB, **more})


@pytest.mark.parametrize("name", SHAPES)
def test_workloads_are_seeded_and_within_the_vocabulary(name: str) -> None:
    made = work(name, seed=3)
    assert made == work(name, seed=3) != work(name, seed=4)
    assert len(made) == 40 and all(each.arrival is None for each in made)
    for each in made:
        assert all(0 <= token < VOCAB for turn in each.turns for token in turn.tokens)
        assert all(turn.max_tokens >= 1 and turn.tokens for turn in each.turns)
        assert len(each.turns) == (4 if name == "chat" else 1)


def test_shapes_of_the_workloads() -> None:
    for name in ("random", "decode", "balanced"):
        (shape,) = {(len(w.turns[0].tokens), w.turns[0].max_tokens) for w in work(name)}
        assert shape == SHAPES[name][:2]
    lengths = [len(w.turns[0].tokens) for w in work("uniform", num_requests=400)]
    assert min(lengths) >= 100 and max(lengths) <= 1024
    assert statistics.mean(lengths) == pytest.approx(562, rel=0.1)
    spread = [w.turns[0] for w in work("lognormal", num_requests=4000, max_len=10**6)]
    assert statistics.median(len(t.tokens) for t in spread) == pytest.approx(380, rel=0.1)
    assert statistics.median(t.max_tokens for t in spread) == pytest.approx(100, rel=0.1)
    assert statistics.mean(len(t.tokens) for t in spread) == pytest.approx(696, rel=0.1)
    shared = work("prefix", num_prefixes=3, prefix_len=20, input_len=5, output_len=2)
    assert {len(w.turns[0].tokens) for w in shared} == {25}
    assert len({tuple(w.turns[0].tokens[:20]) for w in shared}) == 3


@settings(max_examples=30, deadline=None)
@given(st.sampled_from(["uniform", "lognormal"]), st.integers(2, 300), st.integers(0, 99))
def test_random_lengths_fit(name: str, max_len: int, seed: int) -> None:
    for each in work(name, max_len=max_len, seed=seed):
        assert each.total_tokens <= max_len and each.turns[0].tokens


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"name": "nothing"}, "workload must be one of random, decode"),
        ({"name": "random", "input_len": 0}, "--input-len must be at least 1"),
        ({"name": "chat", "turns": 0}, "--turns must be at least 1"),
        ({"name": "random", "max_len": 1000}, "fit into 1000 tokens.*got 1152"),
        ({"name": "chat", "input_len": 10, "output_len": 10, "max_len": 79}, "got 80"),
    ],
)
def test_wrong_workloads(arguments: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        work(**arguments)


@settings(max_examples=50, deadline=None)
@given(st.floats(0.01, 1000), st.floats(0.05, 20), st.integers(0, 2**31), st.integers(1, 50))
def test_arrivals_are_ordered_and_seeded(rate: float, burst: float, seed: int, count: int) -> None:
    times = arrival_times(count, rate=rate, burstiness=burst, seed=seed)
    assert times == sorted(times) and len(times) == count and times[0] >= 0
    assert times == arrival_times(count, rate=rate, burstiness=burst, seed=seed)


def test_arrival_models() -> None:
    assert arrival_times(3) == [0.0, 0.0, 0.0]
    spread = {}
    for burstiness in (0.1, 1.0, 10.0):
        times = [0.0, *arrival_times(20_000, rate=5, burstiness=burstiness, seed=1)]
        gaps = [b - a for a, b in pairwise(times)]
        assert statistics.mean(gaps) == pytest.approx(0.2, rel=0.05)
        spread[burstiness] = statistics.stdev(gaps) / statistics.mean(gaps)
    # a gamma distribution of shape k has a coefficient of variation of 1 / sqrt(k)
    for burstiness, value in spread.items():
        assert value == pytest.approx(burstiness**-0.5, rel=0.05)
    for arguments in ({"rate": 0}, {"rate": math.nan}, {"burstiness": 0}):
        with pytest.raises(ValueError, match="must be > 0"):
            arrival_times(1, **arguments)


def test_trace_files(tmp_path: Path) -> None:
    path = tmp_path / "trace.jsonl"
    path.write_text(
        '{"arrival": 1.5, "input_length": 3, "output_length": 2}\n\n'
        '{"timestamp": 250, "prompt_token_ids": [4, 5], "output_length": 1}\n'
    )
    first, second = read_trace(path, vocab_size=VOCAB)
    assert (first.arrival, first.turns[0].tokens, first.turns[0].max_tokens) == (0.25, [4, 5], 1)
    assert (second.arrival, len(second.turns[0].tokens)) == (1.5, 3)
    with pytest.raises(ValueError, match="fit into 4 tokens"):
        read_trace(path, vocab_size=VOCAB, max_len=4)
    for line in ("[]", "{}", "x", '{"input_length": 0, "output_length": 1}', '{"arrival": -1}'):
        path.write_text('{"input_length": 3, "output_length": 2}\n' + line)
        with pytest.raises(ValueError, match=r"line 2 of .* must be a JSON object with arrival"):
            read_trace(path, vocab_size=VOCAB)
    path.write_text("\n")
    with pytest.raises(ValueError, match="at least one request"):
        read_trace(path, vocab_size=VOCAB)


class SteppedClock:
    """Time that passes by `tick` with every step of the model, and while nobody has work."""

    def __init__(self, tick: float) -> None:
        self.now, self.tick = 100.0, tick

    def __call__(self) -> float:
        return self.now

    def advance(self, seconds: float | None = None) -> None:
        self.now += self.tick if seconds is None else seconds


def timed_llm(monkeypatch: pytest.MonkeyPatch, tick: float = 1.0, **more: object) -> LLM:
    clock = SteppedClock(tick)
    model = ToyModel()
    model.before = clock.advance
    llm = toy_llm(model, **more)
    llm.core.clock = llm.core.scheduler.clock = clock
    fake = SimpleNamespace(sleep=clock.advance)
    monkeypatch.setattr(sys.modules["fastinfer.bench.drive"], "time", fake)
    return llm


def single(count: int, prompt: int = 2, answer: int = 3) -> list[Conversation]:
    return [Conversation([Turn([i] * prompt, answer)]) for i in range(count)]


def test_open_loop_counts_from_the_moment_a_request_is_due(monkeypatch: pytest.MonkeyPatch) -> None:
    llm = timed_llm(monkeypatch)
    load = run_load(llm.core, single(3), [0.0, 0.5, 10.0])
    by_arrival = sorted(load.records, key=lambda record: record.arrival_time)
    # the second comes in the middle of the first step and has to wait for its end
    assert [record.arrival_time - 100 for record in by_arrival] == [0.0, 0.5, 10.0]
    assert [record.ttft for record in by_arrival] == pytest.approx([1.0, 1.5, 1.0], abs=0.06)
    assert [record.tpot for record in by_arrival] == pytest.approx([1.0, 1.0, 1.0])
    assert load.duration == pytest.approx(13.0, abs=0.06)
    assert load.engine.num_steps == 4 + 3
    figures = report.describe_load(load, goodput={"ttft": 1100})
    assert figures["request_goodput"] == pytest.approx(2 / load.duration)
    assert figures["max_concurrent_requests"] == 2


def test_closed_loop_keeps_so_many_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    llm = timed_llm(monkeypatch)
    load = run_load(llm.core, single(5), [0.0] * 5, max_concurrency=2)
    assert report.describe_load(load)["max_concurrent_requests"] == 2
    assert {record.ttft for record in load.records} == {1.0}  # who waits for a place does not ask
    assert load.duration == 9.0


def test_conversations_carry_their_past(monkeypatch: pytest.MonkeyPatch) -> None:
    llm = timed_llm(monkeypatch)
    talk = Conversation([Turn([1, 2, 3, 4, 5], 6), Turn([7], 3), Turn([8, 9], 2)])
    seen: list[list[int]] = []
    add = llm.core.add

    def spy(prompts: list, **more: object) -> list:
        seen.append(list(prompts[0][1]))
        return add(prompts, **more)

    llm.core.add = spy
    load = run_load(llm.core, [talk], [0.0])
    first = [1, 2, 3, 4, 5]
    second = [*first, *toy_greedy(first, 6), 7]
    third = [*second, *toy_greedy(second, 3), 8, 9]
    assert seen == [first, second, third]
    assert [record.num_prompt_tokens for record in load.records] == [5, 12, 17]
    assert load.records[1].arrival_time == load.records[0].last_token_time
    assert load.records[1].num_cached_tokens == 8 and load.engine.prefix_hit_tokens > 0
    detailed = report.describe_load(load, detailed=True)
    assert detailed["input_lens"] == [5, 12, 17] and detailed["output_lens"] == [6, 3, 2]
    assert len(detailed["itls"][0]) == 5 and detailed["ttfts"] == [1.0, 1.0, 1.0]


def test_the_same_work_twice_is_the_same_work(monkeypatch: pytest.MonkeyPatch) -> None:
    llm = timed_llm(monkeypatch)
    loads = [run_load(llm.core, single(3, prompt=20), [0.0] * 3) for _ in range(2)]
    assert [load.engine.prefix_hit_tokens for load in loads] == [0, 0]
    assert loads[0].engine.kv_blocks_peak == loads[1].engine.kv_blocks_peak == 3 * 6


def test_a_failing_step_ends_the_test_and_frees_everything(monkeypatch: pytest.MonkeyPatch) -> None:
    llm = timed_llm(monkeypatch)

    def explode() -> None:
        raise MemoryError("no memory left")

    llm.core.runner.model.before = explode
    with pytest.raises(MemoryError):
        run_load(llm.core, single(3), [0.0] * 3)
    assert llm.stats().kv_blocks_used == 0 and not llm.core.has_work


def test_progress_is_a_line_on_a_terminal_and_nothing_elsewhere() -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    llm = toy_llm()
    terminal, file = Terminal(), io.StringIO()
    for stream in (terminal, file):
        progress = Progress(9, "rate 3: ", stream)
        progress.show(4, 50, 2.0, llm.stats())
        progress.show(5, 50, 2.1, llm.stats())  # too soon
        progress.clear()
    assert file.getvalue() == ""
    assert terminal.getvalue().count("done") == 1
    assert "rate 3: 4/9 done, 0 running, 0 waiting, 25 tok/s, cache 0%" in terminal.getvalue()
    assert terminal.getvalue().endswith("\r\x1b[K")


VLLM_SERVE = {
    "backend": "vllm",
    "model_id": "m",
    "request_rate": "inf",
    "completed": 10,
    "total_input_tokens": 100,
    "total_output_tokens": 50,
    "request_throughput": 2.0,
    "output_throughput": 10.0,
    "mean_ttft_ms": 20.0,
    "p99_itl_ms": 5.0,
    "itls": [[0.1]],
}


def test_compare_reads_both_formats(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    ours = {
        **VLLM_SERVE,
        "output_throughput": 15.0,
        "mean_ttft_ms": 30.0,
        "total_output_tokens": 60,
        "p99_itl_ms": 5.001,
        "request_goodput": 1.0,
    }
    paths = [tmp_path / "a.json", tmp_path / "b.json"]
    for path, data in zip(paths, (VLLM_SERVE, ours), strict=True):
        path.write_text(json.dumps(data))
    assert main(["bench", "compare", *map(str, paths)]) == 0
    lines = {line.split()[0]: line for line in capsys.readouterr().out.splitlines() if line}
    assert lines["output_throughput"].split()[1:] == ["10.000", "15.000", "1.500", "better"]
    assert lines["mean_ttft_ms"].split()[1:] == ["20.000", "30.000", "1.500", "worse"]
    assert lines["p99_itl_ms"].split()[1:] == ["5.000", "5.001", "1.000"]
    assert "request_goodput" not in lines
    assert "total_output_tokens is 50 in A and 60 in B" in lines["not"]
    paths[1].write_text(json.dumps({"avg_latency": 1.0, "latencies": [1.0]}))
    assert main(["bench", "compare", *map(str, paths)]) == 2
    assert "figures in common" in capsys.readouterr().err
    for text, message in (
        ("{", "must be a JSON file"),
        ("[]", "must hold results"),
        ("{}", "must"),
    ):
        paths[1].write_text(text)
        assert main(["bench", "compare", *map(str, paths)]) == 2
        assert message in capsys.readouterr().err


def test_sweeps_are_compared_rate_by_rate() -> None:
    def sweep(*pairs: tuple[object, float]) -> list[dict]:
        return [{"request_rate": rate, "mean_ttft_ms": ttft} for rate, ttft in pairs]

    text = report.compare(sweep((1.0, 10.0), ("inf", 50.0)), sweep(("inf", 25.0), (1.0, 20.0)))
    first, second = text.split("request rate inf")
    assert "request rate 1.0" in first and "2.000  worse" in first and "0.500  better" in second


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("llama")
    save_checkpoint(path, tokenizer=False)
    return path


def bench(folder: Path, kind: str, *more: str) -> list[str]:
    engine = ("--model", str(folder), "--device", "cpu", "--num-blocks", "64")
    return ["bench", kind, *engine, *more]


def test_bench_latency(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--input-len", "9", "--output-len", "4", "--batch-size", "3", "--iters", "2"]
    assert main(bench(folder, "latency", *arguments, "--warmup", "1", "--json")) == 0
    result = json.loads(capsys.readouterr().out)
    assert len(result["latencies"]) == 2
    assert result["avg_latency"] == pytest.approx(sum(result["latencies"]) / 2)
    assert set(result["percentiles"]) == {"10", "25", "50", "75", "90", "99"}
    assert result["completed"] == 6 and result["total_output_tokens"] == 24
    assert result["mean_tpot_ms"] > 0 and result["prefix_hit_rate"] == 0
    assert result["engine"]["dtype"] == "float32" and result["backend"] == "fastinfer"


def test_bench_throughput(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "result.json"
    shape = ["--workload", "uniform", "--input-len", "20", "--output-len", "6"]
    command = bench(folder, "throughput", *shape, "--num-prompts", "12", "--output", str(out))
    assert main([*command, "--detailed", "--label", "first"]) == 0
    shown = capsys.readouterr().out
    assert "12 of 12" in shown and "output tokens/s" in shown and "TPOT" in shown
    (result,) = report.read_results(out)
    assert result["num_requests"] == 12 and result["label"] == "first"
    assert result["tokens_per_second"] == pytest.approx(
        result["total_num_tokens"] / result["elapsed_time"]
    )
    assert sum(result["output_lens"]) == result["total_output_tokens"]
    assert main(["bench", "compare", str(out), str(out)]) == 0
    assert "worse" not in capsys.readouterr().out


def test_bench_serve_sweeps_rates(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    load = ["--request-rate", "200,inf", "--burstiness", "0.5", "--goodput", "ttft:60000", "tpot:1"]
    shape = ["--workload", "chat", "--turns", "2", "--input-len", "6", "--output-len", "3"]
    command = bench(folder, "serve", *shape, "--num-prompts", "4", *load)
    assert main([*command, "--mode", "latency"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split()[:3] == ["rate", "req/s", "out"] and len(lines) == 3
    assert main([*command, "--json"]) == 0
    results = json.loads(capsys.readouterr().out)
    assert [result["request_rate"] for result in results] == [200.0, "inf"]
    for result in results:
        assert result["completed"] == result["num_prompts"] == 8
        assert result["prefix_hit_rate"] >= 0 and result["goodput_limits"]["tpot"] == 1
        assert result["request_goodput"] <= result["request_throughput"]


def test_bench_trace(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    trace = tmp_path / "trace.jsonl"
    rows = [{"arrival": i / 50, "input_length": 5 + i, "output_length": 3} for i in range(4)]
    trace.write_text("\n".join(json.dumps(row) for row in rows))
    command = bench(folder, "serve", "--trace", str(trace), "--json", "--detailed")
    assert main(command) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["input_lens"] == [5, 6, 7, 8] and result["duration"] > 0.06


@pytest.mark.parametrize(
    ("kind", "arguments", "message"),
    [
        ("serve", ["--request-rate", "0"], "--request-rate must be positive numbers or inf"),
        ("serve", ["--goodput", "speed:3"], "--goodput must be KEY:MS"),
        ("serve", ["--max-concurrency", "0"], "--max-concurrency must be at least 1"),
        ("throughput", [], "requests must fit into 256 tokens"),
        ("throughput", ["--workload", "x"], "workload must be one of"),
        ("throughput", ["--trace", "/no/such/file"], "No such file"),
        ("throughput", ["--output", "/no/such/folder/x.json"], "--output must be in a folder"),
        ("latency", ["--iters", "0"], "--iters must be at least 1"),
        ("latency", ["--kv-cache-dtype", "fp4"], "kv_cache_dtype must be 'auto', 'fp8' or 'int8'"),
    ],
)
def test_wrong_bench_options(
    folder: Path, kind: str, arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(bench(folder, kind, *arguments)) == 2
    assert message in capsys.readouterr().err


def test_rates_and_limits() -> None:
    assert parse_rates("1,2.5,inf") == [1.0, 2.5, math.inf]
    assert parse_goodput(["ttft:200", "e2el:1e3"]) == {"ttft": 200.0, "e2el": 1000.0}


def test_a_plot_needs_matplotlib_before_anything_runs(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.setattr("fastinfer.cli.bench.make_llm", lambda args: pytest.fail("started"))
    assert main(bench(folder, "serve", "--plot", "x.png")) == 2
    assert "--plot needs matplotlib" in capsys.readouterr().err


def test_plot_draws_median_and_p99_over_the_load(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lines: list[tuple[str, list[float], list[float]]] = []
    saved: list[object] = []

    class Axis:
        def plot(self, x: list[float], y: list[float], *, label: str, **style: object) -> None:
            lines.append((label, x, y))

        def __getattr__(self, name: str) -> object:
            return lambda *args, **named: None

    figure = SimpleNamespace(
        suptitle=lambda text: None, tight_layout=lambda: None, savefig=saved.append
    )
    pyplot = ModuleType("matplotlib.pyplot")
    pyplot.subplots = lambda *args, **named: (figure, [Axis(), Axis()])
    pyplot.close = lambda figure: None
    matplotlib = ModuleType("matplotlib")
    matplotlib.use = lambda backend: None
    matplotlib.pyplot = pyplot
    monkeypatch.setitem(sys.modules, "matplotlib", matplotlib)
    monkeypatch.setitem(sys.modules, "matplotlib.pyplot", pyplot)
    results = [
        {
            "output_throughput": 10.0 * i,
            "median_ttft_ms": i,
            "p99_ttft_ms": 2 * i,
            "median_tpot_ms": 3 * i,
            "p99_tpot_ms": 4 * i,
        }
        for i in (2, 1)
    ]
    report.plot_sweep(results, tmp_path / "x.png")
    load = [10.0, 20.0]
    assert lines == [
        ("median", load, [1, 2]),
        ("p99", load, [2, 4]),
        ("median", load, [3, 6]),
        ("p99", load, [4, 8]),
    ]
    assert saved == [tmp_path / "x.png"]
