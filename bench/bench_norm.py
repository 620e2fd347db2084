"""RMS norm, with residual and with int8 output, against torch."""

from __future__ import annotations

import torch
from common import OURS, Bench, Call, randn

import fastinfer


def main() -> None:
    bench = Bench("norm", __doc__)
    dtype, device = bench.dtype, bench.device
    weight = randn(4096, dtype=dtype, device=device)
    for m in (1, 16, 512, 8192):
        size = m * 4096 * dtype.itemsize

        def ours(m: int = m) -> Call:
            x = randn(m, 4096, dtype=dtype, device=device)
            out = torch.empty_like(x)
            return lambda: fastinfer.rms_norm(x, weight, out=out)

        def theirs(m: int = m) -> Call:
            x = randn(m, 4096, dtype=dtype, device=device)
            return lambda: torch.nn.functional.rms_norm(x, (4096,), weight, 1e-6)

        def fused(m: int = m) -> Call:
            x, r = (randn(m, 4096, dtype=dtype, device=device) for _ in range(2))
            return lambda: fastinfer.fused_add_rms_norm(x, r, weight)

        def separate(m: int = m) -> Call:
            x, r = (randn(m, 4096, dtype=dtype, device=device) for _ in range(2))
            return lambda: torch.nn.functional.rms_norm(r.add_(x), (4096,), weight, 1e-6)

        def quantised(m: int = m) -> Call:
            x = randn(m, 4096, dtype=dtype, device=device)
            return lambda: fastinfer.rms_norm_quant(x, weight)

        keys = {"op": "norm", "m": m, "dim": 4096}
        bench.case(
            {**keys, "case": "rms_norm"}, {OURS: ours, "torch": theirs}, moved_bytes=2 * size
        )
        bench.case(
            {**keys, "case": "fused_add_rms_norm"},
            {OURS: fused, "torch": separate},
            moved_bytes=4 * size,
        )
        bench.case(
            {**keys, "case": "rms_norm_quant"}, {OURS: quantised}, moved_bytes=size + m * 4096
        )
    bench.finish()


if __name__ == "__main__":
    main()
