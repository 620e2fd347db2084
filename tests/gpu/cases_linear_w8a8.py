"""w8a8_linear on all its paths."""

from __future__ import annotations

from collections.abc import Callable

import torch
from gpu_case import Case, Made


def _w8a8(
    m: int, n: int, k: int, dtype: torch.dtype, zeros: bool, pad: int
) -> Callable[[str, int], Made]:
    """pad: bytes between rows; rows that do not start at multiples of 16 take other loads."""

    def make(device: str, seed: int) -> Made:
        g = torch.Generator(device=device).manual_seed(seed)

        def codes(rows: int) -> torch.Tensor:
            shape = (rows, k + pad)
            return torch.randint(-128, 128, shape, generator=g, device=device, dtype=torch.int8)

        x, weight = codes(m)[:, :k], codes(n)[:, :k]
        x_scale, weight_scale = (torch.rand(r, generator=g, device=device) for r in (m, n))
        bias = torch.randn(n, generator=g, device=device).to(dtype)
        x_zeros = weight_sum = None
        if zeros:
            x_zeros = torch.randint(-128, 128, (m,), generator=g, device=device).int()
            weight_sum = weight.sum(1, dtype=torch.int32) if pad or n > 1000 else None
        out = torch.full((m, n), float("nan"), dtype=dtype, device=device)

        def run() -> None:
            torch.ops.fastinfer.w8a8_linear(
                x,
                x_scale,
                weight,
                weight_scale,
                bias,
                x_zeros=x_zeros,
                weight_sum=weight_sum,
                batch_invariant=False,
                out=out,
                workspace=None,
            )

        return run, [out]

    return make


CASES: list[Case] = [
    Case(f"w8a8-{m}x{n}x{k}-{str(dtype)[6:]}-{pad}", _w8a8(m, n, k, dtype, zeros, pad))
    for m, n, k, dtype, zeros, pad in (
        (1, 40, 80, torch.bfloat16, False, 0),
        (9, 72, 1111, torch.float16, True, 1),
        (20, 200, 272, torch.bfloat16, True, 0),
        (40, 330, 1100, torch.float16, True, 4),
        (70, 260, 2064, torch.float32, False, 0),
        (70, 130, 144, torch.float32, False, 16),
        (70, 130, 77, torch.float16, True, 3),
        (300, 8200, 256, torch.bfloat16, False, 0),
        (260, 6200, 144, torch.float16, True, 0),
        (1100, 4100, 128, torch.bfloat16, True, 0),
        (600, 5000, 128, torch.float32, False, 0),
    )
]
