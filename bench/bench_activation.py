"""Gated activations against torch."""

from __future__ import annotations

import torch
from common import OURS, Bench, Call, randn

import fastinfer


def main() -> None:
    bench = Bench("activation", __doc__)
    dtype, device = bench.dtype, bench.device
    on_gpu = device == "cuda"
    cases = [
        (m, inner)
        for inner in ((4096, 14336) if on_gpu else (4096,))
        for m in (1, 16, 512, 8192 if on_gpu else 2048)
    ]
    for m, inner in cases:
        size = m * inner * dtype.itemsize

        def silu(m: int = m, inner: int = inner) -> Call:
            x = randn(m, 2 * inner, dtype=dtype, device=device)
            return lambda: fastinfer.silu_and_mul(x)

        def silu_torch(m: int = m, inner: int = inner) -> Call:
            x = randn(m, 2 * inner, dtype=dtype, device=device)
            return lambda: torch.nn.functional.silu(x[:, :inner]) * x[:, inner:]

        def gelu(m: int = m, inner: int = inner) -> Call:
            x = randn(m, 2 * inner, dtype=dtype, device=device)
            return lambda: fastinfer.gelu_and_mul(x, "tanh")

        def gelu_torch(m: int = m, inner: int = inner) -> Call:
            x = randn(m, 2 * inner, dtype=dtype, device=device)
            return lambda: torch.nn.functional.gelu(x[:, :inner], approximate="tanh") * x[:, inner:]

        def gelu_erf(m: int = m, inner: int = inner) -> Call:
            x = randn(m, 2 * inner, dtype=dtype, device=device)
            return lambda: fastinfer.gelu_and_mul(x)

        def quantised(m: int = m, inner: int = inner) -> Call:
            x = randn(m, 2 * inner, dtype=dtype, device=device)
            return lambda: fastinfer.silu_and_mul_quant(x)

        keys = {"op": "activation", "m": m, "inner": inner}
        bench.case(
            {**keys, "case": "silu"}, {OURS: silu, "torch": silu_torch}, moved_bytes=3 * size
        )
        bench.case(
            {**keys, "case": "gelu"}, {OURS: gelu, "torch": gelu_torch}, moved_bytes=3 * size
        )
        bench.case({**keys, "case": "gelu_erf"}, {OURS: gelu_erf}, moved_bytes=3 * size)
        bench.case(
            {**keys, "case": "silu_quant"},
            {OURS: quantised},
            moved_bytes=2 * size + m * inner + 4 * m,
        )
    bench.finish()


if __name__ == "__main__":
    main()
