"""`fastinfer bench`: latency, throughput, serving under load; and comparing the results."""

from __future__ import annotations

import argparse
import functools
import json
import math
import operator
import os
from datetime import datetime, timezone
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .._version import __version__
from ..bench import BACKENDS
from ..bench.workloads import SHAPES, Conversation, arrival_times, make_workload, read_trace
from .options import add_engine_options, make_llm

if TYPE_CHECKING:
    from ..engine import LLM

PERCENTILES = (10, 25, 50, 75, 90, 99)  # of vLLM's latency benchmark


def add_parser(commands: Any) -> None:
    """Declare the command."""
    parser = commands.add_parser(
        "bench",
        help="measure latency, throughput and serving under load; compare results",
        description="Measure the engine. Token ids are random and outputs have fixed lengths, so "
        "no tokenizer is needed; --load-format dummy needs no weights either.",
    )
    kinds = parser.add_subparsers(dest="kind", required=True, metavar="KIND")
    latency = kinds.add_parser(
        "latency",
        help="one batch at a time",
        description="Time to run one batch of prompts of one length to its end, repeatedly.",
    )
    latency.add_argument("--input-len", type=int, default=512, metavar="N", help="default: 512")
    latency.add_argument("--output-len", type=int, default=128, metavar="N", help="default: 128")
    latency.add_argument("--batch-size", type=int, default=1, metavar="N", help="default: 1")
    latency.add_argument("--iters", type=int, default=10, metavar="N", help="default: 10")
    latency.add_argument("--warmup", type=int, default=2, metavar="N", help="default: 2")
    throughput = kinds.add_parser(
        "throughput",
        help="all requests at once",
        description="Tokens per second when all requests are there from the start.",
    )
    add_workload_options(throughput)
    serve = kinds.add_parser(
        "serve",
        help="requests that arrive over time",
        description="Latency under load: requests arrive at a rate (Poisson, or in bursts), or as "
        "soon as one of a fixed number of clients is free (closed loop). Several rates make a "
        "sweep and a plot of latency against load.",
    )
    add_workload_options(serve)
    load = serve.add_argument_group("load")
    load.add_argument(
        "--request-rate",
        default="inf",
        metavar="R[,R...]",
        help="requests per second, inf is all at once (default); several make a sweep",
    )
    load.add_argument(
        "--burstiness",
        type=float,
        default=1.0,
        metavar="B",
        help="1 is Poisson (default), less comes in bursts, more is steadier",
    )
    load.add_argument(
        "--max-concurrency", type=int, metavar="N", help="closed loop: most requests at once"
    )
    server = serve.add_argument_group("a server instead of an engine in this process")
    server.add_argument("--url", help="OpenAI-compatible server, http://host:port")
    server.add_argument("--served-model-name", metavar="NAME", help="default: its first model")
    server.add_argument(
        "--api-key", metavar="KEY", help="default: the environment's FASTINFER_API_KEY"
    )
    server.add_argument(
        "--vocab-size", type=int, default=1000, metavar="N", help="prompt ids are below (1000)"
    )
    load.add_argument("--plot", metavar="FILE", help="latency against load (needs matplotlib)")
    for kind in (latency, throughput, serve):
        kind.add_argument("--seed-workload", type=int, default=0, metavar="N", help="default: 0")
        output = kind.add_argument_group("output")
        output.add_argument("--json", action="store_true", help="print JSON instead of the table")
        output.add_argument("--output", metavar="FILE", help="write the JSON there too")
        output.add_argument("--detailed", action="store_true", help="JSON with every request")
        output.add_argument("--label", metavar="TEXT", help="name of this test in its results")
        add_engine_options(kind, model_required=kind is not serve)
        kind.add_argument(
            "--backend",
            default="fastinfer",
            choices=BACKENDS,
            help="run the test on another engine that is installed (default: fastinfer)",
        )
    compare = kinds.add_parser(
        "compare",
        help="two result files side by side",
        description="Figures of two JSON files of `fastinfer bench` or `vllm bench`.",
    )
    compare.add_argument("first", metavar="A.json")
    compare.add_argument("second", metavar="B.json")
    parser.set_defaults(run=run)


def add_workload_options(parser: argparse.ArgumentParser, *, goodput: bool = True) -> None:
    """What is asked for; `goodput` also adds the limits to count by."""
    group = parser.add_argument_group("workload")
    listed = "; ".join(f"{name}: {what}" for name, (_, _, what) in SHAPES.items())
    group.add_argument("--workload", default="random", metavar="NAME", help=f"{listed}")
    group.add_argument("--trace", metavar="FILE", help="requests from a JSON-lines file instead")
    group.add_argument(
        "--num-prompts", type=int, default=256, metavar="N", help="requests (default: 256)"
    )
    group.add_argument("--input-len", type=int, metavar="N", help="default: the workload's")
    group.add_argument("--output-len", type=int, metavar="N", help="default: the workload's")
    group.add_argument("--num-prefixes", type=int, default=8, metavar="N", help="default: 8")
    group.add_argument("--prefix-len", type=int, default=512, metavar="N", help="default: 512")
    group.add_argument("--turns", type=int, default=4, metavar="N", help="of chat (default: 4)")
    if goodput:
        group.add_argument(
            "--goodput",
            nargs="+",
            default=[],
            metavar="KEY:MS",
            help="count requests within limits: ttft:200 tpot:50 e2el:5000",
        )


def run(args: argparse.Namespace) -> int:
    """Run the command."""
    from ..bench import report

    if args.kind == "compare":
        first, second = (report.read_results(path) for path in (args.first, args.second))
        print(f"A = {args.first}\nB = {args.second}")
        print(report.compare(first, second))
        return 0
    if args.output and not Path(args.output).resolve().parent.is_dir():
        raise ValueError(f"bench: --output must be in a folder that is there, got {args.output!r}")
    if getattr(args, "plot", None):
        report.require_matplotlib()
    goodput = parse_goodput(getattr(args, "goodput", []))
    rates = parse_rates(getattr(args, "request_rate", "inf"))
    if getattr(args, "url", None):
        results = run_on_server(args, rates, goodput)
    elif args.backend != "fastinfer":
        from .bench_other import run_on_backend

        results = run_on_backend(args)
    elif args.model is None:
        raise ValueError("bench: --model or --url must be given")
    else:
        results = run_on_engine(args, rates, goodput)
    document = results if len(results) > 1 else results[0]
    if args.output:
        Path(args.output).write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")
    if args.json:
        print(json.dumps(document, indent=2))
    else:
        print(report.table(results[0]) if len(results) == 1 else report.sweep_table(results))
    if getattr(args, "plot", None):
        report.plot_sweep(results, args.plot)
    return 0


def run_on_engine(
    args: argparse.Namespace, rates: list[float], goodput: dict[str, float]
) -> list[dict[str, Any]]:
    """The tests on an engine of this process."""
    with make_llm(args) as llm:
        if args.kind == "latency":
            return [run_latency(args, llm)]
        return [run_rate(args, llm, rate, goodput) for rate in rates]


def run_on_server(
    args: argparse.Namespace, rates: list[float], goodput: dict[str, float]
) -> list[dict[str, Any]]:
    """The tests on a server, one per rate. Its prefix cache stays as it is."""
    try:
        from ..bench.http_drive import ServerLoad
        from ..bench.provenance import without_user

        key = args.api_key or os.environ.get("FASTINFER_API_KEY")
        server = ServerLoad(args.url, model=args.served_model_name, api_key=key)
    except ImportError:
        raise ValueError("bench: --url needs httpx; pip install 'fastinfer[bench]'") from None
    from ..bench import report
    from ..bench.drive import Progress

    results = []
    for number, rate in enumerate(rates):
        seed = (
            args.seed_workload * 10_000 + number
        )  # what one test left in the cache helps no other
        work = workload(args, args.vocab_size, server.max_model_len, seed)
        times = arrival_times(len(work), rate=rate, burstiness=args.burstiness, seed=seed)
        total = sum(len(conversation.turns) for conversation in work)
        label = "" if math.isinf(rate) else f"rate {rate:g}: "
        load = server.run(
            work, times, max_concurrency=args.max_concurrency, progress=Progress(total, label)
        )
        result = describe_test(args, rate) | {
            "backend": "openai",
            "model_id": server.model,
            "device": None,
            "endpoint": without_user(args.url),
        }
        result |= report.describe_load(load, goodput=goodput, detailed=args.detailed)
        result |= {"num_prompts": total, "max_concurrency": args.max_concurrency}
        result |= {"burstiness": args.burstiness, "goodput_limits": goodput}
        results.append(result)
    return results


def parse_goodput(pairs: list[str]) -> dict[str, float]:
    """{"ttft": 200.0} of ["ttft:200"].

    Raises:
        ValueError: An entry is not such a pair, or its limit is unknown.
    """
    from ..engine.metrics import GOODPUT_KEYS

    limits = {}
    for pair in pairs:
        name, _, value = pair.partition(":")
        try:
            limits[name] = float(value)
        except ValueError:
            name = ""
        if name not in GOODPUT_KEYS or not limits[name] > 0:
            raise ValueError(f"bench: --goodput must be KEY:MS with ttft, tpot, e2el, got {pair!r}")
    return limits


def parse_rates(text: str) -> list[float]:
    """Rates separated by commas.

    Raises:
        ValueError: One is not a positive number or inf.
    """
    try:
        rates = [float(part) for part in text.split(",")]
    except ValueError:
        rates = [-1.0]
    if not all(rate > 0 for rate in rates):
        raise ValueError(f"bench: --request-rate must be positive numbers or inf, got {text!r}")
    return rates


def run_latency(args: argparse.Namespace, llm: LLM) -> dict[str, Any]:
    """`--iters` batches, one after the other."""
    from ..bench import report
    from ..bench.drive import LoadResult, Progress, run_load
    from ..engine.metrics import percentile

    if args.iters < 1 or args.warmup < 0:
        raise ValueError("bench: --iters must be at least 1 and --warmup at least 0")
    loads: list[LoadResult] = []
    for i in range(args.warmup + args.iters):
        batch = make_workload(
            "random",
            num_requests=args.batch_size,
            vocab_size=llm.core.runner.vocab_size,
            seed=args.seed_workload * 10_000 + i,  # fresh prompts: nothing is in the prefix cache
            input_len=args.input_len,
            output_len=args.output_len,
            max_len=llm.max_model_len,
        )
        warm = i < args.warmup
        label = "warm-up " if warm else f"batch {i - args.warmup + 1} of {args.iters}: "
        progress = Progress(args.batch_size, label)
        if i == args.warmup:
            llm.pipeline_stats(reset=True)
        load = run_load(llm.core, batch, [0.0] * args.batch_size, progress=progress)
        if not warm:
            loads.append(load)
    merged = LoadResult(
        records=[record for load in loads for record in load.records],
        duration=sum(load.duration for load in loads),
        engine=functools.reduce(operator.add, [load.engine for load in loads]),
    )
    latencies = [load.duration for load in loads]
    result = _described(args, llm, math.inf) | _pipeline(llm)
    result |= report.describe_load(merged, detailed=args.detailed)
    result |= {
        "avg_latency": sum(latencies) / len(latencies),
        "latencies": latencies,
        "percentiles": {str(q): percentile(latencies, q) for q in PERCENTILES},
        "batch_size": args.batch_size,
    }
    return result


def run_rate(
    args: argparse.Namespace, llm: LLM, rate: float, goodput: dict[str, float]
) -> dict[str, Any]:
    """One test of `throughput`, or of `serve` at one rate."""
    from ..bench import report
    from ..bench.drive import Progress, run_load

    limit = getattr(args, "max_concurrency", None)
    if limit is not None and limit < 1:
        raise ValueError(f"bench: --max-concurrency must be at least 1, got {limit}")
    work = workload(args, llm.core.runner.vocab_size, llm.max_model_len, args.seed_workload)
    run_load(llm.core, make_warmup(llm), [0.0])  # what happens only once is not part of the test
    if args.kind == "throughput":
        for conversation in work:
            conversation.arrival = 0.0
    burstiness = getattr(args, "burstiness", 1.0)
    times = arrival_times(len(work), rate=rate, burstiness=burstiness, seed=args.seed_workload)
    label = "" if math.isinf(rate) else f"rate {rate:g}: "
    total = sum(len(conversation.turns) for conversation in work)
    llm.pipeline_stats(reset=True)
    load = run_load(llm.core, work, times, max_concurrency=limit, progress=Progress(total, label))
    result = _described(args, llm, rate) | _pipeline(llm)
    result |= report.describe_load(load, goodput=goodput, detailed=args.detailed)
    result |= {"num_prompts": total, "max_concurrency": limit, "burstiness": burstiness}
    result["goodput_limits"] = goodput
    if args.kind == "throughput":
        tokens = result["total_input_tokens"] + result["total_output_tokens"]
        result |= {
            "elapsed_time": load.duration,
            "num_requests": total,
            "total_num_tokens": tokens,
            "requests_per_second": result["request_throughput"],
            "tokens_per_second": result["total_token_throughput"],
        }
    return result


def _pipeline(llm: LLM) -> dict[str, Any]:
    stages = llm.pipeline_stats()
    return {"pipeline": stages} if stages else {}


def workload(
    args: argparse.Namespace, vocab_size: int, max_len: int | None, seed: int
) -> list[Conversation]:
    """What the options ask for."""
    if args.trace:
        return read_trace(args.trace, vocab_size=vocab_size, seed=seed, max_len=max_len)
    return make_workload(
        args.workload,
        num_requests=args.num_prompts,
        vocab_size=vocab_size,
        seed=seed,
        input_len=args.input_len,
        output_len=args.output_len,
        max_len=max_len,
        num_prefixes=args.num_prefixes,
        prefix_len=args.prefix_len,
        turns=args.turns,
    )


def make_warmup(llm: LLM) -> list[Conversation]:
    """One short request."""
    length = min(32, max(1, llm.max_model_len // 2))
    return make_workload(
        "random",
        num_requests=1,
        vocab_size=llm.core.runner.vocab_size,
        seed=-1,
        input_len=length,
        output_len=min(4, llm.max_model_len - length),
    )


def describe_test(args: argparse.Namespace, rate: float) -> dict[str, Any]:
    """What was asked for, and when."""
    from ..bench.provenance import command_line, commit
    from ..bench.report import json_rate

    return {
        "date": datetime.now(timezone.utc).strftime("%Y%m%d-%H%M%S"),
        "version": __version__,
        "kind": args.kind,
        "label": args.label,
        "commit": commit(),
        "command": command_line(),
        "workload": None if args.kind == "latency" else args.trace or args.workload,
        "request_rate": json_rate(rate),
    }


def _described(args: argparse.Namespace, llm: LLM, rate: float) -> dict[str, Any]:
    """What was tested, when, on what."""
    from ..bench.provenance import device_name

    config = llm.config
    return describe_test(args, rate) | {
        "backend": "fastinfer",
        "model_id": args.model,
        "device": device_name(llm.device),
        "engine": {
            "dtype": str(llm.core.runner.model.dtype).removeprefix("torch."),
            "mode": config.mode,
            "kv_cache_dtype": config.kv_cache_dtype,
            "block_size": config.block_size,
            "max_num_seqs": config.max_num_seqs,
            "max_num_batched_tokens": config.max_num_batched_tokens,
            "enable_prefix_caching": config.enable_prefix_caching,
            "batch_invariant": config.batch_invariant,
        },
    }
