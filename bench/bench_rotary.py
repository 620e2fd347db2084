"""Rotary embedding of q and k, alone and together with the cache write."""

from __future__ import annotations

from functools import partial

import torch
from common import Bench, Call, alone_and_overlapped, randn

import fastinfer

HQ, HKV, D, POSITIONS, BLOCK = 32, 8, 128, 8192, 16


def rotate_half(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    first, second = x.chunk(2, dim=-1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)


def main() -> None:
    bench = Bench("rotary", __doc__)
    dtype, device = bench.dtype, bench.device
    # Angles: the calls rotate in place, again and again, and factors beyond 1 would grow to NaN.
    angles = torch.rand(POSITIONS, D // 2, device=device) * 2 * torch.pi
    cos, sin = angles.cos(), angles.sin()
    for t in (1, 64, 1024, 8192) if device == "cuda" else (1, 64, 1024):

        def inputs(t: int = t) -> list[torch.Tensor]:
            return [randn(t, h, D, dtype=dtype, device=device) for h in (HQ, HKV, HKV)]

        def ours(t: int = t) -> Call:
            q, k, _ = inputs(t)
            positions = torch.randint(POSITIONS, (t,), device=device)
            return lambda: fastinfer.apply_rotary(q, k, cos, sin, positions, inplace=True)

        def pairs(t: int = t) -> Call:
            q, k, _ = inputs(t)
            positions = torch.randint(POSITIONS, (t,), device=device)
            return lambda: fastinfer.apply_rotary(
                q, k, cos, sin, positions, interleaved=True, inplace=True
            )

        def theirs(t: int = t) -> Call:
            q, k, _ = inputs(t)
            positions = torch.randint(POSITIONS, (t,), device=device)

            def call() -> None:
                c, s = (table[positions][:, None].to(dtype) for table in (cos, sin))
                rotate_half(q, c, s)
                rotate_half(k, c, s)

            return call

        def fused(t: int = t, cache: torch.dtype = dtype) -> Call:
            q, k, v = inputs(t)
            positions = torch.randint(POSITIONS, (t,), device=device)
            blocks = max(64, t // BLOCK + 1)
            shape = (blocks, BLOCK, HKV, D)
            caches = [torch.empty(shape, dtype=cache, device=device) for _ in "kv"]
            slots = torch.randperm(blocks * BLOCK, device=device)[:t]
            scales = {}
            if cache != dtype:  # dynamic: one per token and head
                scales = {n: torch.ones(shape[:3], device=device) for n in ("k_scale", "v_scale")}
            return lambda: fastinfer.apply_rotary_and_cache(
                q, k, v, cos, sin, positions, *caches, slots, **scales
            )

        def fused_fp8(t: int = t) -> Call:
            return fused(t, torch.float8_e4m3fn)

        keys = {"op": "rotary", "tokens": t, "hq": HQ, "hkv": HKV, "d": D}
        rotated = 2 * t * (HQ + HKV) * D * dtype.itemsize

        both = partial(alone_and_overlapped, device)
        bench.case(
            {**keys, "case": "apply_rotary"}, {**both(ours), "torch": theirs}, moved_bytes=rotated
        )
        bench.case({**keys, "case": "apply_rotary interleaved"}, both(pairs), moved_bytes=rotated)
        bench.case(
            {**keys, "case": "apply_rotary_and_cache fp8"},
            both(fused_fp8),
            moved_bytes=rotated + t * HKV * (D * (dtype.itemsize + 2) + 8),
        )
        bench.case(
            {**keys, "case": "apply_rotary_and_cache"},
            both(fused),
            moved_bytes=rotated + 3 * t * HKV * D * dtype.itemsize,
        )
    bench.finish()


if __name__ == "__main__":
    main()
