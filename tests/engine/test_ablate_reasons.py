"""What `fastinfer ablate` says of a row that is worse: the sentence follows what was measured."""

from __future__ import annotations

from typing import Any

import pytest

from fastinfer.bench import ablate_report
from fastinfer.bench.ablate_reasons import Machine, judge

CPU = Machine("cpu", cores=2, threads=1, workers=2)
GPU = Machine("cuda", cores=16, threads=4, workers=2)
PARTS = {"compute": 0.2, "weights": 0.5, "cache": 0.1, "scores": 0.0, "launch": 0.2}


def row(key: str, **more: Any) -> dict[str, Any]:
    """A row of 100 steps in a second, 64 requests at once."""
    figures = {"out_tok_s": 100.0, "ttft_ms": 10.0, "tpot_ms": 1.0, "itl_p99_ms": 2.0}
    work = {"seconds": 1.0, "steps": 100, "tokens": 5000, "tokens_out": 1000, "at_once": 64}
    parts = {"parts_s": PARTS | more.pop("parts", {}), "bound": "weights", "requests": 128}
    return {"row": key, "title": key, **figures, **work, **parts, **more}


def why(now: dict[str, Any], before: dict[str, Any], machine: Machine = GPU) -> str:
    judge(now, before, machine)
    assert now["worse"]
    return str(now["why_worse"])


def test_better_rows_say_nothing() -> None:
    now = row("graphs", out_tok_s=150.0)
    judge(now, row("cache8"), GPU)
    assert now["speedup"] == 1.5 and "worse" not in now and "why_worse" not in now
    alone = row("flash")
    judge(alone, {}, GPU)
    assert "speedup" not in alone


def test_a_figure_of_zero_is_compared_with_nothing() -> None:
    """Outputs of one token have no time between tokens."""
    now = row("static", tpot_ms=1.0, itl_p99_ms=1.0)
    judge(now, row("paging", tpot_ms=0.0, itl_p99_ms=0.0), CPU)
    assert "worse" not in now and now["speedup"] == 1.0


def test_what_got_worse_and_how_it_is_shown() -> None:
    now = row("paging", out_tok_s=50.0, ttft_ms=30.0, parts={"launch": 1.2}, kv_waste=0.01)
    why(now, row("gqa", kv_waste=0.92))
    assert now["worse"] == ["throughput / 2.00", "TTFT x 3.00"]
    assert "takes 2.00 -> 12.00 ms of a step" in now["why_worse"]
    assert "92% of the cache reserved and unused before, 1% now" in now["why_worse"]
    assert "--repeats 3 tells noise from effect" in now["why_worse"]
    told = ablate_report.notes([row("gqa"), now])
    assert told.startswith("* paging: throughput / 2.00, TTFT x 3.00. what it buys is memory")
    assert ablate_report.line(now).startswith("paging *")


def test_rows_that_differ_as_much_as_their_own_runs_have_no_effect() -> None:
    noisy = {"spread": {"ttft_ms": 1.3, "tpot_ms": 1.02}}
    told = why(row("paging", ttft_ms=12.0, **noisy), row("gqa", **noisy))
    assert told == (
        "the same steps and the same work: runs of one and the same row differ as much here "
        "(TTFT up to x 1.30)"
    )
    told = why(row("paging", ttft_ms=12.0, tpot_ms=2.0, **noisy), row("gqa"))
    assert "reserved and unused" in told and told.endswith(
        "differ as much here (TTFT up to x 1.30)"
    )
    other = why(row("prefix", ttft_ms=12.0, tokens=3000, steps=90, **noisy), row("chunked"))
    assert other == "runs of one and the same row differ as much here (TTFT up to x 1.30)"


def test_no_cache_says_how_many_tokens_ran() -> None:
    told = why(row("naive", out_tok_s=20.0, tokens=300_000), row("transformers"))
    assert told.startswith("300 tokens went through the model per token of output")


def test_prefill_of_a_row_with_a_cache_is_the_same() -> None:
    told = why(row("kv_cache", ttft_ms=12.0), row("naive"))
    assert told.startswith("a first token takes the same prefill in both rows; ")


def test_attention_says_how_large_its_part_was() -> None:
    told = why(row("flash", tpot_ms=2.0), row("kv_cache", parts={"scores": 0.1, "launch": 0.1}))
    assert told.startswith("scores in memory were 10.0% of the time of the row before")
    told = why(row("gqa", tpot_ms=2.0), row("flash", parts={"cache": 0.5}))
    assert told.startswith("the cache was 50.0% of the bytes of a step")


def test_batches() -> None:
    before = row("paging", at_once=1, tokens=200, steps=100)
    told = why(row("static", ttft_ms=900.0), before)
    assert "waits for the prompts of all 64" in told and "its end, 500 ms on average" in told
    assert "tokens on average" not in told
    told = why(row("static", tpot_ms=3.0, seconds=3.0), before)
    assert told == (
        "a step carries 50 tokens on average instead of 2 and takes 30.00 ms instead of 10.00"
    )
    told = why(
        row("continuous", itl_p99_ms=20.0, mixed_steps=40, largest_step=4096),
        row("static", mixed_steps=1),
    )
    assert told == (
        "40 of 100 steps run prompts beside requests that decode (1 of 100 before), up to 4,096 "
        "tokens in one: those wait for it"
    )


def test_chunked_prefill_weighs_first_tokens_against_the_others() -> None:
    before = row("continuous", itl_p99_ms=90.0, mixed_steps=20)
    whole = row("chunked", ttft_ms=12.0, prompt_pieces=128, largest_step=500)
    assert why(whole, before).startswith("no prompt was cut (the largest step had 500 tokens)")
    later = row(
        "chunked", ttft_ms=20.0, itl_p99_ms=30.0, prompt_pieces=320, steps=150, mixed_steps=90
    )
    later["parts_s"] = PARTS | {"weights": 0.75}
    told = why(later, before)
    assert told.startswith("a prompt runs in 2.5 pieces on average; its first token waits for")
    assert "150 steps instead of 100 read the weights (500 ms -> 750 ms)" in told
    assert told.endswith("what it buys are short gaps: 90.0 -> 30.0 ms")
    slower = row("chunked", tpot_ms=2.0, itl_p99_ms=95.0, prompt_pieces=320, mixed_steps=90)
    told = why(slower, before)
    assert "90 steps have a piece beside requests that decode (20 before)" in told
    assert "first token waits" not in told and "short gaps" not in told


def test_prefix_reuse_depends_on_what_was_found() -> None:
    told = why(row("prefix", ttft_ms=12.0, prefix_hits=0.01), row("chunked"))
    assert told == "1% of the prompts' tokens were found: hashing was in vain"
    told = why(row("prefix", ttft_ms=12.0, prefix_hits=0.4, tokens=3500), row("chunked"))
    assert told.startswith("30% of the tokens were not run again")


@pytest.mark.parametrize("key", ["int8", "int4"])
def test_codes_are_explained_by_the_times_of_the_linear_layers(key: str) -> None:
    slow = {"linear_ms": {"64": 0.4, "330": 9.0}}
    now = row(key, tpot_ms=2.0, parts={"weights": 0.25}, linear_ms={"64": 1.2, "330": 12.0})
    told = why(now, row("prefix", **slow), CPU)
    assert "reading weights was 50% of the time of the row before" in told
    assert "codes save 250 ms of 1.00 s" in told
    assert "0.40 -> 1.20 ms for 64 tokens, 9.00 -> 12.00 ms for 330 tokens: codes become" in told
    launched = row("prefix", bound="launch", **slow)
    assert why(now, launched).endswith("a call costs the host more than that of a plain layer")
    now = row(key, tpot_ms=2.0, linear_ms={"64": 0.3, "330": 8.0}, parts={"launch": 0.5})
    told = why(now, row("prefix", **slow), CPU)
    assert "are no slower (0.40 -> 0.30 ms" in told and "2.00 -> 5.00 ms of a step" in told
    assert "codes become" not in told
    assert "5.00 ms of a step" in why(row(key, tpot_ms=2.0, parts={"launch": 0.5}), row("prefix"))


def test_quality_is_a_reason_of_its_own() -> None:
    now = row("int4", perplexity=1.44)
    assert why(now, row("int8", perplexity=1.43)) == (
        "fewer bits say less: +0.70% perplexity on held-out text"
    )
    assert now["worse"] == ["perplexity 1.43 -> 1.44"]
    same = row("int4", perplexity=1.4301)
    judge(same, row("int8", perplexity=1.43), GPU)
    assert "worse" not in same


def test_an_8_bit_cache_says_how_much_the_cache_was() -> None:
    told = why(row("cache8", tpot_ms=2.0), row("int4"))
    assert told.startswith("the cache was 10.0% of the time of the row before")


def test_graphs_gain_no_more_than_launches_took() -> None:
    told = why(row("graphs", ttft_ms=12.0, prompt_steps=30), row("cache8"))
    assert "launches and the host were 20% of the row before, which was bound by weights" in told
    assert "30 of 100 steps have prompts in them and are launched kernel by kernel" in told
    bound = row("cache8", bound="launch", parts={"launch": 2.0})
    assert "there is no more than that to gain" not in why(row("graphs", ttft_ms=12.0), bound)
    told = why(row("graphs", ttft_ms=12.0, prompt_steps=30), row("cache8"), CPU)
    assert told.startswith("a CPU has no graphs") and "kernel by kernel" not in told


def test_overlap() -> None:
    told = why(row("overlap", ttft_ms=20.0), row("graphs"))
    assert told == "a token is seen one step later, a first one too: a step takes 10.0 ms"
    told = why(row("overlap", tpot_ms=2.0, steps=104), row("graphs"))
    assert told == "an ended request is noticed a step late (100 -> 104 steps)"
    told = why(row("overlap", tpot_ms=2.0, steps=104), row("graphs"), CPU)
    assert told.startswith("on a CPU there is no device beside the host to overlap with; an ended")


def test_speculation_is_judged_by_what_stood_and_what_it_took() -> None:
    now = row("speculation", out_tok_s=80.0, seconds=1.25, drafts=200, drafts_accepted=0.17)
    told = why(now | {"steps": 90}, row("overlap"))
    assert told.startswith(
        "17% of 200 drafts stood: with 64 requests at once a step yields x 1.11 tokens and takes x "
        "1.39 as long; the host has to see"
    )
    assert "the host has to see" not in why(now, row("overlap"), CPU)
    told = why(row("speculation", out_tok_s=80.0), row("overlap"))
    assert told.startswith("no draft was checked")


def test_tensor_parallel_says_who_shares_what() -> None:
    now = row("tensor_parallel", tpot_ms=3.0, parts={"weights": 0.25, "launch": 2.2})
    told = why(now, row("speculation"), CPU)
    start = "2 processes share 2 cores, where the row before was one process with 1 thread:"
    assert told.startswith(start)
    assert "each reads weights for 250 ms instead of 500 ms" in told
    assert "2.00 -> 22.00 ms of a step" in told
    assert "processes share" not in why(now, row("speculation"), GPU)


def test_a_row_that_was_not_counted_is_no_witness() -> None:
    peer = row("transformers")
    del peer["parts_s"]
    assert "was not counted" in why(row("flash", tpot_ms=3.0), peer)
