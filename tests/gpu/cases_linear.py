"""quantize_per_token: rows in registers and rows read twice, dynamic and static scales."""

from __future__ import annotations

from collections.abc import Callable

import torch
from gpu_case import Case, Made


def _quantize(m: int, k: int, dtype: torch.dtype, mode: str) -> Callable[[str, int], Made]:
    def make(device: str, seed: int) -> Made:
        g = torch.Generator(device=device).manual_seed(seed)
        x = torch.randn(m, k, generator=g, device=device).to(dtype)
        q = torch.full((m, k), 77, dtype=torch.int8, device=device)
        scale = torch.full((m,), float("nan"), device=device)
        zeros = torch.full((m,), -7, dtype=torch.int32, device=device)
        static = torch.tensor(0.02, device=device) if mode == "static" else None
        z = zeros if mode == "asymmetric" else None

        def run() -> None:
            torch.ops.fastinfer.quantize_per_token(
                x, static_scale=static, q=q, scale=scale, zeros=z
            )

        return run, [q, scale] + ([] if z is None else [z])

    return make


CASES: list[Case] = [
    Case(f"quantize_per_token-{str(dtype)[6:]}-{mode}-{m}x{k}", _quantize(m, k, dtype, mode))
    for dtype in (torch.bfloat16, torch.float16, torch.float32)
    for mode, m, k in (
        ("symmetric", 3, 4096),
        ("asymmetric", 5, 129),
        ("static", 200, 520),
        ("symmetric", 200, 4096),
        ("symmetric", 1, 40000),
    )
]
