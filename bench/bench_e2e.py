"""Whole models with random weights: time to first token, time per token, throughput.

Greedy, fixed lengths, the prefix cache empty. `ttft_ms` of a batch is the time until all its first
tokens are there (a run with one new token); `tpot_ms` is what the other tokens take on top, each.
On a GPU the shape is Llama-3-8B unless told otherwise, on a CPU a tiny one. The int4 rows have the
same shape with 4-bit weights in groups of 128. Steps of at most 8192 tokens and 256 requests, as
the engines that the rows are compared with had them. `host_us` is what the CPU does per step, the
time it waits for the GPU left out. `--batch-invariant both` runs every case without and with it and
says what it costs: `ttft_ratio`, `tpot_ratio`, and `out_tok_s_ratio` where no other is.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from common import Bench
from shapes import SHAPES
from shapes import write_config as write_shape

from fastinfer import LLM, SamplingParams
from fastinfer.bench.drive import LoadResult, run_load
from fastinfer.bench.workloads import Conversation, Turn, make_workload
from fastinfer.engine.config import EngineConfig
from fastinfer.engine.runner import ModelRunner
from fastinfer.engine.sampler import DrawnTokens

DTYPES = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32"}
# (requests at once, prompt tokens, new tokens)
BATCHES = [(b, n, 128) for b in (1, 8, 64) for n in (512, 2048)]
# name, requests, workload
LOADS = [
    ("256 req 512/128", 256, "random"),
    ("256 req mixed", 256, "mixed"),
    ("1024 req 512/128", 1024, "random"),
]
TINY_BATCHES = [(b, 64, 16) for b in (1, 8)]
TINY_LOADS = [("32 req 64/16", 32, "random"), ("32 req mixed", 32, "lognormal")]


def write_config(folder: Path, shape: str, dtype: str, int4: bool) -> None:
    write_shape(shape, folder, DTYPES[dtype], int4=int4)


def run_batch(llm: LLM, batch: int, prompt: int, new: int, seed: int) -> LoadResult:
    work = make_workload(
        "random",
        num_requests=batch,
        vocab_size=llm.core.runner.vocab_size,
        input_len=prompt,
        output_len=new,
        seed=seed,
        max_len=llm.max_model_len,
    )
    return run_load(llm.core, work, [0.0] * batch)


def batch_row(llm: LLM, batch: int, prompt: int, new: int, iters: int) -> dict[str, Any]:
    run_batch(llm, batch, prompt, min(new, 4), seed=0)
    first, total = [], []
    for i in range(iters):  # in turn: what else the machine does falls on both
        for tokens, seconds in ((1, first), (new, total)):
            seconds.append(run_batch(llm, batch, prompt, tokens, seed=i + 1).duration)
    ttft, whole = statistics.median(first), statistics.median(total)
    if whole <= ttft:
        raise RuntimeError(
            f"b{batch}: one token took {ttft:.3f} s and {new} tokens {whole:.3f}: the machine was "
            "too busy to measure; run it again, or with more --iters"
        )
    return {
        "ttft_ms": round(ttft * 1e3, 3),
        "tpot_ms": round((whole - ttft) / (new - 1) * 1e3, 3),
        "total_s": round(whole, 3),
        "out_tok_s": round(batch * new / whole, 3),
        "prefill_tok_s": round(batch * prompt / ttft, 3),
        "decode_tok_s": round(batch * (new - 1) / (whole - ttft), 3),
    }


def mixed_work(vocab_size: int) -> list[Conversation]:
    """256 requests of the lengths that the engines this is compared with had: lognormal prompts
    (median 512, longest 3796) and outputs (median 128, longest 290).
    """
    lengths = json.loads(Path(__file__).with_name("e2e_mixed.json").read_text())
    rng = random.Random(0)
    return [
        Conversation([Turn(rng.choices(range(vocab_size), k=prompt), output)])
        for prompt, output in zip(lengths["prompt"], lengths["output"], strict=True)
    ]


def load_row(llm: LLM, count: int, workload: str, lengths: tuple[int, int]) -> dict[str, Any]:
    vocab_size = llm.core.runner.vocab_size
    if workload == "mixed":
        work = mixed_work(vocab_size)
    else:
        work = make_workload(
            workload,
            num_requests=count,
            vocab_size=vocab_size,
            max_len=llm.max_model_len,
            input_len=lengths[0],
            output_len=lengths[1],
        )
    load = run_load(llm.core, work, [0.0] * count)
    asked = sum(record.num_prompt_tokens for record in load.records)
    made = sum(record.num_output_tokens for record in load.records)
    return {
        "in_tok": asked,
        "out_tok": made,
        "total_s": round(load.duration, 3),
        "req_s": round(count / load.duration, 3),
        "out_tok_s": round(made / load.duration, 3),
        "total_tok_s": round((asked + made) / load.duration, 3),
    }


def host_row(llm: LLM, count: int, prompt: int, steps: int) -> dict[str, Any]:
    """Steps of `count` decoding requests. On the CPU, where there is nothing to wait for, the model
    does nothing.
    """
    core, graphs = llm.core, llm.core.runner._graphs
    replays = {}
    if graphs is not None and llm.device.type == "cpu":
        for rows, bucket in graphs._buckets.items():
            replays[rows] = bucket.replay
            bucket.replay = dict.fromkeys((True, False), lambda: None)
    core.scheduler.pool.clear_cache()
    ids = list(range(1, prompt + 1))
    params = SamplingParams(temperature=0.0, max_tokens=steps + 20, ignore_eos=True)
    core.add([(None, [i + 1, *ids[1:]], params) for i in range(count)])
    while core.scheduler.waiting or any(r.num_output < 2 for r in core.scheduler.running):
        core.step()
    waited = 0.0
    original = DrawnTokens.wait

    def wait(drawn: DrawnTokens) -> None:
        nonlocal waited
        start = time.perf_counter()
        original(drawn)
        waited += time.perf_counter() - start

    DrawnTokens.wait = wait  # type: ignore[method-assign]
    whole, host = [], []
    for _ in range(steps):
        waited, start = 0.0, time.perf_counter()
        core.step()
        whole.append(time.perf_counter() - start)
        host.append(whole[-1] - waited)
    DrawnTokens.wait = original  # type: ignore[method-assign]
    core.abort_all()
    for rows, replay in replays.items():
        graphs._buckets[rows].replay = replay
    return {
        "step_us": round(statistics.median(whole) * 1e6, 1),
        "host_us": round(statistics.median(host) * 1e6, 1),
        "host_us_min": round(min(host) * 1e6, 1),
    }


def add_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--shape", choices=SHAPES, help="default: llama3-8b on a GPU, else tiny")
    parser.add_argument("--iters", type=int, default=3)
    parser.add_argument("--weights", nargs="+", default=["16", "int4"], choices=["16", "int4"])
    parser.add_argument("--skip", nargs="*", default=[], help="leave out cases that contain this")
    parser.add_argument(
        "--batch-invariant", nargs="?", const="on", default="off", choices=["off", "on", "both"]
    )
    parser.add_argument("--no-cuda-graphs", action="store_true")
    parser.add_argument("--max-num-seqs", type=int, default=256)
    parser.add_argument("--max-num-batched-tokens", type=int, default=8192)
    parser.add_argument("--kv-cache-dtype", default="auto")


def main() -> None:
    bench = Bench("e2e", __doc__ or "", add_flags)
    args = bench.args
    shape = args.shape or ("llama3-8b" if bench.device == "cuda" else "tiny")
    tiny = shape == "tiny"
    batches, loads = (TINY_BATCHES, TINY_LOADS) if tiny else (BATCHES, LOADS)
    lengths = (64, 16) if tiny else (512, 128)
    for weights in args.weights:
        peer = f"fastinfer {args.dtype}" if weights == "16" else "fastinfer int4 g128"
        cases: list[tuple[str, Any]] = [
            (
                f"b{batch} prompt{prompt} new{new}",
                lambda llm, b=batch, p=prompt, n=new: batch_row(llm, b, p, n, args.iters),
            )
            for batch, prompt, new in batches
        ]
        cases += [
            (case, lambda llm, c=count, w=workload: load_row(llm, c, w, lengths))
            for case, count, workload in loads
        ]
        running = min(256, args.max_num_seqs)
        cases.append(
            (f"host {running} running", lambda llm, n=running: host_row(llm, n, lengths[0], 64))
        )
        chosen = [
            (case, measure)
            for case, measure in cases
            if args.filter in f"{case} {peer}" and not any(text in case for text in args.skip)
        ]
        before: dict[str, dict[str, Any]] = {}
        for llm, invariant in engines(args, shape, bench.device, weights == "int4"):
            name = peer + (" batch_invariant" if invariant else "")
            for case, measure in chosen:
                row = {"op": "e2e", "case": case, "peer": name, "shape": shape, **measure(llm)}
                if invariant and case in before:
                    row |= price(row, before[case])
                before[case] = row
                bench.rows.append(row)
                bench.save()
                print(f"{case:<24} {name:<36} {figures(row)}", flush=True)
    bench.finish()


def engines(
    args: argparse.Namespace, shape: str, device: str, int4: bool
) -> Iterator[tuple[LLM, bool]]:
    """The engines to measure, one at a time over the same weights: (engine, batch_invariant)."""
    wanted = {"off": [False], "on": [True], "both": [False, True]}[args.batch_invariant]
    model = None
    for invariant in wanted:
        with tempfile.TemporaryDirectory() as name:
            write_config(Path(name), shape, args.dtype, int4)
            config = EngineConfig(
                model=name,
                device=device,
                load_format="dummy",
                max_num_seqs=args.max_num_seqs,
                max_num_batched_tokens=args.max_num_batched_tokens,
                enable_prefix_caching=False,
                kv_cache_dtype=args.kv_cache_dtype,
                batch_invariant=invariant,
                cuda_graphs=not args.no_cuda_graphs,
            )
            runner = ModelRunner(config, torch.device(device), model)
        model = runner.model
        with LLM.from_runner(config, runner) as llm:
            yield llm, invariant


def price(row: dict[str, Any], before: dict[str, Any]) -> dict[str, float]:
    """What this row takes, in parts of what the same case took before."""
    keys = ("ttft_ms", "tpot_ms") if "tpot_ms" in row else ("out_tok_s",)
    names = {key: key.removesuffix("_ms") + "_ratio" for key in keys}
    return {names[k]: round(row[k] / before[k], 3) for k in keys if k in row and k in before}


def figures(row: dict[str, Any]) -> str:
    shown = [
        f"{row[key]:>10.2f} {unit}" if key in row else " " * (11 + len(unit))
        for key, unit in (
            ("ttft_ms", "ms TTFT"),
            ("tpot_ms", "ms TPOT"),
            ("out_tok_s", "tok/s"),
            ("host_us", "us host"),
        )
    ]
    ratios = [f"{key} {row[key]:.3f}" for key in row if key.endswith("_ratio")]
    return " ".join([*shown, *ratios])


if __name__ == "__main__":
    main()
