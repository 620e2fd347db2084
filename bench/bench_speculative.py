"""Speculative decoding: tokens per second with and without, and what a check of drafts costs.

`ngram` and `draft`: the trained pair in examples/tiny, one request, greedy; `speedup` is the time
per token without over with. `verify q5`: one step that checks four drafts against one that decodes
one token, replayed (on a GPU: the graph alone). `batch 64`: random weights, adaptive, on over off.
On a GPU the last two have the shape of Llama-3-8B unless told otherwise, on a CPU a tiny one.
Rows that something was asked of have it beside them: `bar`, and `stretch` for more than that.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from bench_e2e import write_config
from common import Bench
from shapes import SHAPES

from fastinfer import LLM, SamplingParams

TINY = Path(__file__).parents[1] / "examples" / "tiny"
# Greedy answers that repeat themselves (the first two), and a story that does not.
TEXTS = {
    "repetitive": "Count from one to twenty.",
    "list": "On Monday, Tom made soup. On Tuesday, Tom made soup. On Wednesday, Tom made soup.",
    "story": "Once upon a time, there was a small cat named Tom.",
}
NEW = 400
BARS = {  # of speedup (the pair's: with four guesses or more), of ratio
    "ngram": {"bar": 1.5, "stretch": 2.2},
    "draft": {"bar": 1.3, "stretch": 1.8},
    "verify": {"bar": 1.15, "stretch": 1.05},
    "on/off": {"bar": 0.98, "stretch": 1.0},
}


class RandomDrafts:
    """Four guesses that are nearly always wrong: what a check costs, and no gain."""

    uses_blocks = False

    def propose(self, wanted: Sequence[tuple[Any, int]]) -> list[list[int]]:
        return [[1 + i for i in range(count)] for _, count in wanted]


def off_and_on(llm: LLM, prompts: list[Any], new: int, iters: int) -> tuple[float, float, Any, Any]:
    """Seconds per token after the first without and with drafts, and the last outputs.

    In the order on, off, off, on, ...: whatever drifts meanwhile is in both.
    """
    params = SamplingParams(temperature=0.0, max_tokens=new, ignore_eos=True)
    core = llm.core
    speculator = core.speculator
    times: dict[bool, list[float]] = {True: [], False: []}
    last: dict[bool, Any] = {}
    for i in range(2 * iters + 2):
        on = i % 4 in (0, 3)
        core.speculator = speculator if on else None
        core.scheduler.pool.clear_cache()
        last[on] = llm.generate(prompts, params)
        if i >= 2:
            times[on].append(statistics.mean(o.metrics.tpot for o in last[on]))
    core.speculator = speculator
    off, with_ = (statistics.median(times[key]) for key in (False, True))
    return off, with_, last[False], last[True]


def first_difference(llm: LLM, ours: Any, theirs: Any) -> dict[str, Any]:
    """Where two answers go apart, and how far apart the two tokens are there, in nats: steps of
    different numbers of tokens round differently, so a near tie may end either way.
    """
    a, b = ours.outputs[0].token_ids, theirs.outputs[0].token_ids
    at = next((i for i, (x, y) in enumerate(zip(a, b, strict=True)) if x != y), None)
    if at is None:
        return {}
    params = SamplingParams(temperature=0.0, max_tokens=1, logprobs=8, ignore_eos=True)
    (again,) = llm.generate([{"prompt_token_ids": [*ours.prompt_token_ids, *a[:at]]}], params)
    scores = again.outputs[0].logprobs[0]
    gap = abs(scores[a[at]].logprob - scores[b[at]].logprob)
    return {"differs_at": at, "nats_apart": round(gap, 4)}


def pair_rows(bench: Bench, drafters: dict[str, dict[str, Any]], iters: int) -> None:
    settings = {"device": bench.device, "num_blocks": 256, "max_num_seqs": 8, "progress": False}
    for name, options in drafters.items():
        k = options["num_speculative_tokens"]
        if bench.args.filter not in name:
            continue
        with LLM(TINY / "model", **settings, **options) as llm:
            for text, prompt in TEXTS.items():
                base, seconds, (plain,), (output,) = off_and_on(llm, [prompt], NEW, iters)
                m = output.metrics
                pairs = zip(output.outputs[0].token_ids, plain.outputs[0].token_ids, strict=True)
                same = sum(a == b for a, b in pairs)
                show(
                    bench,
                    {
                        "op": "speculative",
                        "case": f"{name} b1 {text}",
                        "peer": "fastinfer",
                        "off_us": round(base * 1e6, 1),
                        "on_us": round(seconds * 1e6, 1),
                        "speedup": round(base / seconds, 3),
                        "acceptance": round(m.num_accepted_tokens / max(m.num_draft_tokens, 1), 3),
                        "accepted_length": round(m.accepted_length or 1.0, 2),
                        "same_tokens": round(same / NEW, 3),
                        **first_difference(llm, output, plain),
                        **(BARS[name.split()[0]] if text == "repetitive" and k >= 4 else {}),
                    },
                )


def replay_us(run: Callable[[], object], device: str, count: int = 50) -> float:
    """Microseconds of a call, repeated."""
    run()
    if device == "cpu":
        times = []
        for _ in range(count):
            start = time.perf_counter()
            run()
            times.append(time.perf_counter() - start)
        return statistics.median(times) * 1e6
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    begin.record()
    for _ in range(count):
        run()
    end.record()
    torch.cuda.synchronize()
    return begin.elapsed_time(end) * 1e3 / count


def verify_row(bench: Bench, llm: LLM, prompt: int) -> None:
    """The last steps that were run, with one and with five tokens of a request, once more."""
    core, runner = llm.core, llm.core.runner
    params = SamplingParams(temperature=0.0, max_tokens=24, ignore_eos=True)
    ids = {"prompt_token_ids": list(range(1, prompt + 1))}
    drafter, core.speculator.drafter = core.speculator.drafter, RandomDrafts()
    pace, core.speculator.pace = core.speculator.pace, None
    llm.generate([ids], params)
    most, core.speculator.max_drafts = core.speculator.max_drafts, 0
    llm.generate([ids], params)
    core.speculator.max_drafts = most
    core.speculator.drafter, core.speculator.pace = drafter, pace
    one = runner._graphs._buckets[1]
    five = runner._verify._buckets[1, 5]
    captured = one.graphs.get(True)  # none without a GPU
    plain = captured.replay if captured is not None else one.replay[True]
    runs = (plain, five.replay[True]) * 2
    with torch.inference_mode():
        figures = [replay_us(run, bench.device) for run in runs]
    show(
        bench,
        {
            "op": "speculative",
            "case": f"verify q5 b1 prompt{prompt}",
            "peer": "fastinfer",
            "off_us": round(min(figures[::2]), 1),
            "on_us": round(min(figures[1::2]), 1),
            "ratio": round(min(figures[1::2]) / min(figures[::2]), 3),
            **BARS["verify"],
        },
    )


def batch_row(bench: Bench, llm: LLM, batch: int, prompt: int, new: int, iters: int) -> None:
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(
        1, llm.core.runner.vocab_size, (batch, prompt), generator=generator
    ).tolist()
    prompts = [{"prompt_token_ids": each} for each in ids]
    before = llm.stats().num_draft_tokens
    off, on, _, _ = off_and_on(llm, prompts, new, iters)
    stats = llm.stats()
    show(
        bench,
        {
            "op": "speculative",
            "case": f"on/off b{batch} prompt{prompt} new{new}",
            "peer": "fastinfer",
            "off_us": round(off * 1e6, 1),
            "on_us": round(on * 1e6, 1),
            "speedup": round(off / on, 3),
            "acceptance": round(stats.num_accepted_tokens / max(stats.num_draft_tokens, 1), 3),
            "drafted": stats.num_draft_tokens - before,
            **(BARS["on/off"] if batch == 64 else {}),
        },
    )


def show(bench: Bench, row: dict[str, Any]) -> None:
    bench.rows.append(row)
    bench.save()
    skipped = ("op", "case", "peer")
    figures = "  ".join(f"{key} {value}" for key, value in row.items() if key not in skipped)
    print(f"{row['case']:<34} {figures}", flush=True)


def add_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--shape", choices=SHAPES, help="default: llama3-8b on a GPU, else tiny")
    parser.add_argument("--iters", type=int, default=3)
    parser.add_argument("--skip", nargs="*", default=[], choices=["pair", "verify", "batch"])
    parser.add_argument("--weights", default="16", choices=["16", "int4"])
    parser.add_argument("--drafts", type=int, nargs="+", default=[2, 4, 8])
    parser.add_argument("--batch", type=int, default=64)


def main() -> None:
    bench = Bench("speculative", __doc__ or "", add_flags)
    args = bench.args
    shape = args.shape or ("llama3-8b" if bench.device == "cuda" else "tiny")
    prompt, new = (64, 32) if shape == "tiny" else (512, 128)
    if "pair" not in args.skip:
        drafters = {
            f"{name} k{k}": {"speculative": where, "num_speculative_tokens": k}
            for name, where in (("ngram", "ngram"), ("draft", TINY / "draft"))
            for k in args.drafts
        }
        pair_rows(bench, drafters, args.iters)
    if {"verify", "batch"} - set(args.skip):
        with tempfile.TemporaryDirectory() as name:
            write_config(Path(name), shape, args.dtype, args.weights == "int4")
            llm = LLM(
                name,
                device=bench.device,
                load_format="dummy",
                max_num_seqs=args.batch,
                max_num_batched_tokens=8192,
                num_blocks=(args.batch + 2) * -(-(prompt + new + 32) // 16),
                cuda_graphs=True,
                speculative="ngram",
                num_speculative_tokens=4,
            )
        with llm:
            if "verify" not in args.skip:
                verify_row(bench, llm, prompt)
            if "batch" not in args.skip:
                batch_row(bench, llm, args.batch, prompt, new, args.iters)
    bench.finish()


if __name__ == "__main__":
    main()
