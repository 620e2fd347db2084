"""silu_and_mul, gelu_and_mul, silu_and_mul_quant: every instance, aligned and not, short rows that
share a block, and rows that shared memory cannot hold.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from gpu_case import Case, Made

_ops = torch.ops.fastinfer


def _gated(kind: str, m: int, inner: int, dtype: torch.dtype) -> Callable[[str, int], Made]:
    def make(device: str, seed: int) -> Made:
        g = torch.Generator(device=device).manual_seed(seed)
        x = torch.randn(m, 2 * inner, generator=g, device=device).to(dtype)
        out = torch.full((m, inner), float("nan"), dtype=dtype, device=device)

        def run() -> None:
            if kind == "silu":
                _ops.silu_and_mul(x, out=out)
            else:
                _ops.gelu_and_mul(x, tanh_approximation=kind == "tanh", out=out)

        return run, [out]

    return make


def _quant(zeros: bool, m: int, inner: int, dtype: torch.dtype) -> Callable[[str, int], Made]:
    def make(device: str, seed: int) -> Made:
        g = torch.Generator(device=device).manual_seed(seed)
        x = torch.randn(m, 2 * inner, generator=g, device=device).to(dtype)
        q = torch.full((m, inner), 77, dtype=torch.int8, device=device)
        scale = torch.full((m,), float("nan"), device=device)
        z = torch.full((m,), -7, dtype=torch.int32, device=device) if zeros else None
        return (
            lambda: _ops.silu_and_mul_quant(x, q=q, scale=scale, zeros=z),
            [q, scale] + ([] if z is None else [z]),
        )

    return make


CASES: list[Case] = []
for _dtype in (torch.bfloat16, torch.float16, torch.float32):
    for _m, _inner in ((3, 512), (40, 24), (5, 33)):
        _tail = f"{str(_dtype)[6:]}-{_m}x{_inner}"
        CASES += [
            Case(f"gated-{kind}-{_tail}", _gated(kind, _m, _inner, _dtype))
            for kind in ("silu", "none", "tanh")
        ]
        CASES.append(Case(f"silu_quant-{_tail}", _quant(_m == 5, _m, _inner, _dtype)))
    # A block and a cluster per row, many rows, rows beyond shared memory.
    for _m, _inner in ((2, 4096), (1, 14336), (300, 256), (2, 41000)):
        _tail = f"{str(_dtype)[6:]}-{_m}x{_inner}"
        CASES.append(Case(f"silu_quant-{_tail}", _quant(_m == 300, _m, _inner, _dtype)))
