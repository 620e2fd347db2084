"""`fastinfer bench --backend`: the same tests on transformers' `generate` or on vLLM."""

from __future__ import annotations

import argparse
import math
from typing import Any

from ..bench.backends import Backend, make_backend
from ..bench.drive import LoadResult
from ..bench.workloads import Conversation, make_workload

_AT_ONCE = 256  # requests together, where nobody says: the engine's own default


def run_on_backend(args: argparse.Namespace) -> list[dict[str, Any]]:
    """The test that the options describe.

    Raises:
        ValueError: The backend is not installed, or an option is not for it.
    """
    from ..bench import report
    from ..bench.provenance import device_name
    from ..engine.device import choose_device
    from ..engine.metrics import percentile
    from .bench import PERCENTILES, describe_test, parse_goodput, workload
    from .options import engine_options

    if args.kind == "serve":
        raise ValueError(
            f"bench: serve takes no --backend, got {args.backend}; start its server and give --url"
        )
    served = {"model", "dtype", "load_format", "max_num_seqs", "device"}
    if extra := sorted(set(engine_options(args)) - served):
        raise ValueError(
            f"bench: --backend {args.backend} takes none of {', '.join(extra)}; leave them out, or "
            "measure fastinfer"
        )
    backend = make_backend(
        args.backend,
        args.model,
        device=args.device,
        dtype=args.dtype or "auto",
        load_format=args.load_format or "auto",
        max_num_seqs=args.max_num_seqs,
    )
    at_once = args.max_num_seqs or (args.batch_size if args.kind == "latency" else _AT_ONCE)
    result = describe_test(args, math.inf) | {
        "backend": args.backend,
        "backend_version": backend.version,
        "model_id": args.model,
        "device": device_name(choose_device(args.device)),
    }
    _run(backend, _warm_up(backend), at_once)
    if args.kind == "latency":
        loads = [
            _run(backend, _batch(args, backend, i), at_once)
            for i in range(args.warmup + args.iters)
        ][args.warmup :]
        latencies = [load.duration for load in loads]
        merged = LoadResult([r for load in loads for r in load.records], sum(latencies))
        result |= report.describe_load(merged, detailed=args.detailed)
        result |= {
            "avg_latency": sum(latencies) / len(latencies),
            "latencies": latencies,
            "percentiles": {str(q): percentile(latencies, q) for q in PERCENTILES},
            "batch_size": args.batch_size,
        }
        return [result]
    goodput = parse_goodput(args.goodput)
    work = workload(args, backend.vocab_size, backend.max_model_len, args.seed_workload)
    load = _run(backend, work, at_once, show=True)
    arrived = min(record.arrival_time for record in load.records)
    for record in load.records:  # all requests are there from the start; those of a batch wait
        record.arrival_time = arrived
    result |= report.describe_load(load, goodput=goodput, detailed=args.detailed)
    tokens = result["total_input_tokens"] + result["total_output_tokens"]
    result |= {
        "goodput_limits": goodput,
        "num_prompts": len(work),
        "elapsed_time": load.duration,
        "num_requests": len(work),
        "total_num_tokens": tokens,
        "requests_per_second": result["request_throughput"],
        "tokens_per_second": result["total_token_throughput"],
    }
    return [result]


def _run(
    backend: Backend, work: list[Conversation], at_once: int, *, show: bool = False
) -> LoadResult:
    from tqdm import tqdm

    with tqdm(total=len(work), unit="request", disable=None if show else True) as bar:
        return backend.run(work, at_once, lambda done: bar.update(done - bar.n))


def _batch(args: argparse.Namespace, backend: Backend, number: int) -> list[Conversation]:
    return make_workload(
        "random",
        num_requests=args.batch_size,
        vocab_size=backend.vocab_size,
        seed=args.seed_workload * 10_000 + number,
        input_len=args.input_len,
        output_len=args.output_len,
        max_len=backend.max_model_len,
    )


def _warm_up(backend: Backend) -> list[Conversation]:
    return make_workload(
        "random",
        num_requests=1,
        vocab_size=backend.vocab_size,
        seed=-1,
        input_len=min(32, backend.max_model_len // 2),
        output_len=2,
    )
