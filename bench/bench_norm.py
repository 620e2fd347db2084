"""RMS norm, with residual and with int8 output, per head, and int8 rows, against torch.

Bytes are those each case has to move: x and y, x and residual twice, x and codes.
"""

from __future__ import annotations

import torch
from common import OURS, Bench, Call, randn

import fastinfer


def main() -> None:
    bench = Bench("norm", __doc__)
    dtype, device = bench.dtype, bench.device
    _rows(bench, 4096, (1, 16, 512, 8192))
    if device == "cuda":
        _rows(bench, 8192, (1, 8192))
        _rows(bench, 32768, (1, 2048))  # wider than the registers of a block
        _heads(bench)
    for m in (1, 16, 512, 8192):
        for k in (4096, 14336) if device == "cuda" else (4096,):

            def per_token(m: int = m, k: int = k) -> Call:
                x = randn(m, k, dtype=dtype, device=device)
                out = torch.empty(m, k, dtype=torch.int8, device=device)
                return lambda: fastinfer.quantize_per_token(x, out=out)

            bench.case(
                {"op": "norm", "m": m, "dim": k, "case": "quantize_per_token"},
                {OURS: per_token},
                moved_bytes=m * k * (dtype.itemsize + 1) + 4 * m,
            )
    bench.finish()


def _rows(bench: Bench, dim: int, sizes: tuple[int, ...]) -> None:
    dtype, device = bench.dtype, bench.device
    weight = randn(dim, dtype=dtype, device=device)
    for m in sizes:
        size = m * dim * dtype.itemsize

        def ours(m: int = m) -> Call:
            x = randn(m, dim, dtype=dtype, device=device)
            out = torch.empty_like(x)
            return lambda: fastinfer.rms_norm(x, weight, out=out)

        def theirs(m: int = m) -> Call:
            x = randn(m, dim, dtype=dtype, device=device)
            return lambda: torch.nn.functional.rms_norm(x, (dim,), weight, 1e-6)

        def fused(m: int = m) -> Call:
            x, r = (randn(m, dim, dtype=dtype, device=device) for _ in range(2))
            return lambda: fastinfer.fused_add_rms_norm(x, r, weight)

        def separate(m: int = m) -> Call:
            x, r = (randn(m, dim, dtype=dtype, device=device) for _ in range(2))
            return lambda: torch.nn.functional.rms_norm(r.add_(x), (dim,), weight, 1e-6)

        def quantised(m: int = m) -> Call:
            x = randn(m, dim, dtype=dtype, device=device)
            return lambda: fastinfer.rms_norm_quant(x, weight)

        def fused_quantised(m: int = m) -> Call:
            x, r = (randn(m, dim, dtype=dtype, device=device) for _ in range(2))
            return lambda: fastinfer.rms_norm_quant(x, weight, residual=r)

        keys = {"op": "norm", "m": m, "dim": dim}
        codes = m * dim + 4 * m
        bench.case(
            {**keys, "case": "rms_norm"}, {OURS: ours, "torch": theirs}, moved_bytes=2 * size
        )
        bench.case(
            {**keys, "case": "fused_add_rms_norm"},
            {OURS: fused, "torch": separate},
            moved_bytes=4 * size,
        )
        bench.case({**keys, "case": "rms_norm_quant"}, {OURS: quantised}, moved_bytes=size + codes)
        bench.case(
            {**keys, "case": "rms_norm_quant residual"},
            {OURS: fused_quantised},
            moved_bytes=3 * size + codes,
        )


def _heads(bench: Bench) -> None:
    """Per-head norm on the q part of a fused projection."""
    for t in (1, 8192):

        def heads(t: int = t) -> Call:
            qkv = randn(t, 48, 128, dtype=bench.dtype, device=bench.device)
            weight = randn(128, dtype=bench.dtype, device=bench.device)
            return lambda: fastinfer.rms_norm(qkv[:, :32], weight, out=qkv[:, :32])

        bench.case(
            {"op": "norm", "m": t, "dim": 128, "case": "rms_norm per head, 32 of 48"},
            {OURS: heads},
            moved_bytes=2 * t * 32 * 128 * bench.dtype.itemsize,
        )


if __name__ == "__main__":
    main()
