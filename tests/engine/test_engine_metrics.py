"""TTFT, TPOT, ITL, E2EL, throughput, goodput and percentiles on timelines made by hand."""

from __future__ import annotations

import math
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fastinfer.engine.metrics import EngineStats, RequestMetrics, percentile, summarize


def timeline(arrival: float, *times: float, prompt: int = 10, **more: object) -> RequestMetrics:
    record = RequestMetrics(arrival_time=arrival, num_prompt_tokens=prompt, **more)
    for time in times:
        record.record_tokens(1, time)
    return record


def test_one_request() -> None:
    record = timeline(1.0, 1.5, 1.7, 2.1, first_scheduled_time=1.2)
    assert record.ttft == pytest.approx(0.5)
    assert record.e2el == pytest.approx(1.1)
    assert record.tpot == pytest.approx(0.3)  # (1.1 - 0.5) / 2
    assert record.itl == pytest.approx([0.2, 0.4])
    assert record.time_in_queue == pytest.approx(0.2)
    assert (record.first_token_time, record.last_token_time) == (1.5, 2.1)
    assert record.num_output_tokens == 3
    figures = record.to_dict()
    assert figures["ttft_ms"] == pytest.approx(500) and figures["tpot_ms"] == pytest.approx(300)


def test_a_timeline_prints_as_one_line() -> None:
    assert str(timeline(1.0, 1.5, 1.7, 2.1)) == (
        "TTFT 500.0 ms, TPOT 300.0 ms, E2EL 1100.0 ms, 10 tokens in, 3 out"
    )
    assert str(timeline(0.0)) == "10 tokens in, 0 out"


def test_one_token_has_no_tpot_and_none_has_no_ttft() -> None:
    single = timeline(0.0, 0.25)
    assert single.tpot is None and single.itl == [] and single.e2el == single.ttft == 0.25
    nothing = timeline(0.0)
    assert nothing.ttft is None and nothing.e2el is None and nothing.tpot is None
    assert nothing.time_in_queue is None and nothing.first_token_time is None
    assert nothing.to_dict()["ttft_ms"] is None


def test_several_tokens_per_delivery_tell_itl_from_tpot() -> None:
    record = RequestMetrics(arrival_time=0.0)
    record.record_tokens(1, 1.0)
    record.record_tokens(3, 1.3)
    assert record.itl == pytest.approx([0.3])
    assert record.tpot == pytest.approx(0.1)


def test_aggregate() -> None:
    records = [
        timeline(0.0, 0.1, 0.2, 0.3, prompt=5),
        timeline(0.2, 0.5, 0.9, prompt=7),
        timeline(1.0, 2.0, prompt=1),
        timeline(0.0, 0.1, failed=True),
        timeline(0.0),
    ]
    result = summarize(records)
    assert (result["completed"], result["failed"]) == (3, 2)
    assert (result["total_input_tokens"], result["total_output_tokens"]) == (13, 6)
    assert result["duration"] == pytest.approx(2.0)
    assert result["request_throughput"] == pytest.approx(1.5)
    assert result["output_throughput"] == pytest.approx(3.0)
    assert result["total_token_throughput"] == pytest.approx(9.5)
    assert result["mean_ttft_ms"] == pytest.approx((100 + 300 + 1000) / 3)
    assert result["median_ttft_ms"] == pytest.approx(300)
    assert result["mean_tpot_ms"] == pytest.approx((100 + 400) / 2)  # the single token has none
    assert result["mean_itl_ms"] == pytest.approx((100 + 100 + 400) / 3)  # pooled
    assert result["median_e2el_ms"] == pytest.approx(700)
    assert result["max_output_tokens_per_s"] == 5.0
    assert result["max_concurrent_requests"] == 2
    assert summarize(records, duration=6.0)["request_throughput"] == pytest.approx(0.5)


def test_every_key_that_tools_read_is_there() -> None:
    keys = {
        *["completed", "failed", "total_input_tokens", "total_output_tokens", "request_throughput"],
        *["request_goodput", "output_throughput", "total_token_throughput"],
        *["max_output_tokens_per_s", "max_concurrent_requests", "duration"],
    }
    for stat in ("mean", "median", "std", "p99"):
        keys |= {f"{stat}_{name}_ms" for name in ("ttft", "tpot", "itl", "e2el")}
    assert keys <= set(summarize([timeline(0.0, 1.0)]))
    empty = summarize([])
    assert keys <= set(empty) and all(value == 0 for value in empty.values())


def test_goodput_needs_every_limit() -> None:
    records = [timeline(0.0, 0.1, 0.2), timeline(0.0, 0.1, 0.6), timeline(0.0, 0.4)]
    assert summarize(records)["request_goodput"] == 0
    good = summarize(records, duration=1.0, goodput={"ttft": 200, "tpot": 150})
    assert good["request_goodput"] == pytest.approx(1.0)
    # a single token counts as TPOT 0
    assert summarize(records, duration=1.0, goodput={"tpot": 150})["request_goodput"] == 2.0
    assert summarize(records, duration=1.0, goodput={"e2el": 450})["request_goodput"] == 2.0
    with pytest.raises(ValueError, match="goodput must name ttft, tpot, e2el, got speed"):
        summarize(records, goodput={"speed": 1})
    with pytest.raises(ValueError, match="duration must be > 0"):
        summarize(records, duration=0.0)


@pytest.mark.parametrize("size", [1, 2, 3, 10, 101])
@pytest.mark.parametrize("q", [0, 1, 50, 90, 99, 100])
def test_percentile_and_spread_agree_with_numpy(size: int, q: float) -> None:
    values = np.random.default_rng(size).random(size).tolist()
    assert percentile(values, q) == pytest.approx(np.percentile(values, q))
    result = summarize([timeline(0.0, value) for value in values], duration=1.0)
    assert result["std_ttft_ms"] == pytest.approx(np.std(values) * 1e3)
    assert result["p90_ttft_ms"] == pytest.approx(np.percentile(values, 90) * 1e3)


@st.composite
def timelines(draw: st.DrawFn) -> list[RequestMetrics]:
    records = []
    for _ in range(draw(st.integers(1, 8))):
        now = draw(st.integers(0, 5000)) / 1000
        record = RequestMetrics(arrival_time=now, num_prompt_tokens=draw(st.integers(1, 50)))
        for _ in range(draw(st.integers(0, 6))):
            now += draw(st.integers(0, 2000)) / 1000
            record.record_tokens(draw(st.integers(1, 4)), now)
        record.failed = draw(st.integers(0, 9)) == 0
        records.append(record)
    return records


@settings(max_examples=100, deadline=None)
@given(timelines(), st.floats(1, 9000), st.floats(1, 9000))
def test_any_timelines(records: list[RequestMetrics], ttft: float, e2el: float) -> None:
    """The aggregate against the definitions, written down once more."""
    result = summarize(records, duration=2.0, goodput={"ttft": ttft, "e2el": e2el})
    done = [r for r in records if not r.failed and r.token_times]
    assert result["completed"] + result["failed"] == len(records)
    assert result["completed"] == len(done)
    first = [(r.token_times[0] - r.arrival_time) * 1e3 for r in done]
    last = [(r.token_times[-1] - r.arrival_time) * 1e3 for r in done]
    good = sum(a <= ttft and b <= e2el for a, b in zip(first, last, strict=True))
    assert result["request_goodput"] == good / 2.0 <= result["request_throughput"]
    produced = sum(sum(r.token_counts) for r in done)
    assert result["output_throughput"] == produced / 2.0
    asked = sum(r.num_prompt_tokens for r in done)
    assert result["total_token_throughput"] == (produced + asked) / 2.0
    gaps = [b - a for r in done for a, b in pairwise(r.token_times)]
    assert result["mean_itl_ms"] == pytest.approx(np.mean(gaps) * 1e3 if gaps else 0.0)
    paces = [
        (r.token_times[-1] - r.token_times[0]) / (sum(r.token_counts) - 1)
        for r in done
        if sum(r.token_counts) > 1
    ]
    assert result["median_tpot_ms"] == pytest.approx(np.median(paces) * 1e3 if paces else 0.0)
    assert result["mean_ttft_ms"] == pytest.approx(np.mean(first) if first else 0.0)
    assert result["p99_e2el_ms"] == pytest.approx(np.percentile(last, 99) if last else 0.0)
    for name in ("ttft", "tpot", "itl", "e2el"):
        order = [result[f"{stat}_{name}_ms"] for stat in ("median", "p90", "p99")]
        assert order == sorted(order)
    spans = [(r.arrival_time, r.token_times[-1]) for r in done]
    most = max((sum(a <= t < b for a, b in spans) for t, _ in spans), default=0)
    assert result["max_concurrent_requests"] >= most
    assert result["max_concurrent_requests"] <= len(done)
    assert result["max_output_tokens_per_s"] <= produced


def test_percentile_of_nothing() -> None:
    assert math.isnan(percentile([], 50))


def test_requests_that_follow_each_other_do_not_overlap() -> None:
    records = [timeline(0.0, 1.0), timeline(1.0, 2.0), timeline(1.5, 2.5)]
    assert summarize(records)["max_concurrent_requests"] == 2


def test_stats_usage() -> None:
    stats = EngineStats(
        running=1,
        waiting=0,
        kv_blocks_used=3,
        kv_blocks_total=12,
        kv_blocks_peak=5,
        kv_block_bytes=100,
        num_steps=2,
        num_preemptions=0,
        prefix_hit_tokens=0,
        prefix_query_tokens=0,
    )
    assert stats.kv_cache_usage == 0.25
