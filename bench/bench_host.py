"""Host time of one call: the Python function, the operator under it, and torch for scale.

A loop of calls whose kernels are shorter than the call, so that the host is what takes time; the
launch itself (some 4 us, last row) is part of every row. All rows take turns, round after round,
each next to a loop of bare launches: `us` is the median of the rounds, `us_min` the fastest,
`over_launch` the median of what a round took beyond the bare launches next to it, so that a core
that is slow for a while falls on both.
"""

from __future__ import annotations

import argparse
import gc
import statistics
import time

import torch
from common import OURS, Bench, Call, randn

import fastinfer

CALLS = 200


def add_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--rounds", type=int, default=21)


@torch.inference_mode()
def main() -> None:
    bench = Bench("host", __doc__, add_flags)
    dtype, device = bench.dtype, bench.device
    ops = torch.ops.fastinfer
    x, y, r = (randn(1, 4096, dtype=dtype, device=device) for _ in range(3))
    w = randn(4096, dtype=dtype, device=device)
    gated = randn(1, 8192, dtype=dtype, device=device)
    codes = torch.empty(1, 4096, dtype=torch.int8, device=device)
    scale = torch.empty(1, device=device)
    q, k, v = (randn(1, h, 128, dtype=dtype, device=device) for h in (32, 8, 8))
    angles = torch.rand(64, 64, device=device)
    cos, sin = angles.cos(), angles.sin()
    position = torch.tensor([3], device=device)
    caches = [torch.empty(8, 16, 8, 128, dtype=dtype, device=device) for _ in "kv"]

    rows: dict[str, dict[str, Call]] = {
        "rms_norm": {
            OURS: lambda: fastinfer.rms_norm(x, w, out=y),
            "operator": lambda: ops.rms_norm(x, w, 1e-6, out=y),
            "torch": lambda: torch.nn.functional.rms_norm(x, (4096,), w, 1e-6),
        },
        "fused_add_rms_norm": {
            OURS: lambda: fastinfer.fused_add_rms_norm(x, r, w),
            "operator": lambda: ops.fused_add_rms_norm(x, r, w, 1e-6),
        },
        "rms_norm_quant": {
            OURS: lambda: fastinfer.rms_norm_quant(x, w, out=(codes, scale)),
            "fastinfer, allocating": lambda: fastinfer.rms_norm_quant(x, w),
            "operator": lambda: ops.rms_norm_quant(
                x, w, 1e-6, residual=None, q=codes, scale=scale, zeros=None
            ),
        },
        "silu_and_mul": {
            OURS: lambda: fastinfer.silu_and_mul(gated, out=y),
            "torch, silu alone": lambda: torch.nn.functional.silu(x),
        },
        "silu_and_mul_quant": {
            OURS: lambda: fastinfer.silu_and_mul_quant(gated, out=(codes, scale)),
            "fastinfer, allocating": lambda: fastinfer.silu_and_mul_quant(gated),
        },
        "quantize_per_token": {
            OURS: lambda: fastinfer.quantize_per_token(x, out=(codes, scale)),
            "fastinfer, allocating": lambda: fastinfer.quantize_per_token(x),
            "operator": lambda: ops.quantize_per_token(
                x, static_scale=None, q=codes, scale=scale, zeros=None
            ),
        },
        "apply_rotary, in place": {
            OURS: lambda: fastinfer.apply_rotary(q, k, cos, sin, position, inplace=True)
        },
        "apply_rotary_and_cache": {
            OURS: lambda: fastinfer.apply_rotary_and_cache(
                q, k, v, cos, sin, position, *caches, position
            ),
            "operator": lambda: ops.apply_rotary_and_cache(
                q,
                k,
                v,
                cos,
                sin,
                position,
                *caches,
                position,
                interleaved=False,
                k_scale=None,
                v_scale=None,
            ),
        },
        "reshape_and_cache": {
            OURS: lambda: fastinfer.reshape_and_cache(k, v, *caches, position),
        },
        "torch add_": {"torch": lambda: x.add_(1)},
        "torch empty, 1 byte": {"torch": lambda: torch.empty(1, dtype=torch.int8, device=device)},
    }
    if device == "cuda":
        rows["a launch (torch.cuda._sleep)"] = {"torch": lambda: torch.cuda._sleep(1)}
    calls = {
        (case, peer): call
        for case, peers in rows.items()
        if bench.wanted(f"case={case}")
        for peer, call in peers.items()
    }
    us: dict[tuple[str, str], list[float]] = {key: [] for key in calls}
    over: dict[tuple[str, str], list[float]] = {key: [] for key in calls}
    gc.disable()
    for turn in range(bench.args.rounds + 1):
        for key, call in calls.items():
            launch = _loop(lambda: torch.cuda._sleep(1), device) if device == "cuda" else 0.0
            took = _loop(call, device)
            if turn > 0:  # the first warms up
                us[key].append(took)
                over[key].append(took - launch)
    gc.enable()
    for (case, peer), times in us.items():
        row = {"op": "host", "case": case, "peer": peer}
        row |= {"us": round(statistics.median(times), 2), "us_min": round(min(times), 2)}
        text = f"case={case:<30} {peer:<22} {row['us']:>8.2f} us (min {row['us_min']:.2f})"
        if device == "cuda":
            row["over_launch"] = round(statistics.median(over[case, peer]), 2)
            row["over_launch_max"] = round(max(over[case, peer]), 2)
            text += f"  {row['over_launch']:>6.2f} over a launch (max {row['over_launch_max']:.2f})"
        bench.rows.append(row)
        print(text, flush=True)
    bench.finish()


def _loop(call: Call, device: str) -> float:
    """Microseconds of one call."""
    if device == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter()
    for _ in range(CALLS):
        call()
    return (time.perf_counter() - start) / CALLS * 1e6


if __name__ == "__main__":
    main()
