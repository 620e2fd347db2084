"""quantize_per_token: rows in registers and rows read twice, dynamic and static scales. Weights:
quantised, packed, dequantised.
"""

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


def _weight(
    n: int, k: int, bits: int, group_size: int, zeros: str, layout: str, perm: bool = False
) -> Callable[[str, int], Made]:
    """float -> codes -> packed -> float, each step from the output of the one before."""

    def make(device: str, seed: int) -> Made:
        g = torch.Generator(device=device).manual_seed(seed)
        weight = torch.randn(n, k, generator=g, device=device)
        groups = -(-k // group_size) if group_size > 0 else 1
        u8 = {"dtype": torch.uint8, "device": device}
        codes, scales = torch.full((n, k), 77, **u8), torch.full((n, groups), 7.0, device=device)
        z = torch.full((n, groups), 77, **u8) if zeros == "int" else None
        float_zeros = torch.randn(n, groups, generator=g, device=device)
        if layout == "cuda":
            blocks, steps, inner = -(-n // 64), -(-k // 64), 128 * bits
            scale_shape: tuple[int, ...] = (groups, blocks, 8, 8)
        else:
            blocks, steps, inner = -(-n // 16), -(-k * bits // 32), 16
            scale_shape = (groups, blocks * 16)
        qweight = torch.full((blocks, steps, inner), 77, dtype=torch.int32, device=device)
        packed_scales = torch.full(scale_shape, 7.0, device=device)
        packed_zeros = {
            "none": None,
            "int": torch.full(scale_shape, 77, **u8),
            "float": torch.full(scale_shape, 7.0, device=device),
        }[zeros]
        order = torch.randperm(k, generator=g, device=device).int() if perm else None
        out = torch.full((n, k), float("nan"), dtype=torch.bfloat16, device=device)
        shape = {"bits": bits, "group_size": group_size}

        def run() -> None:
            ops = torch.ops.fastinfer
            ops.quantize_weight(weight, **shape, codes=codes, scales=scales, zeros=z)
            ops.pack_weight(
                codes,
                scales,
                float_zeros if zeros == "float" else z,
                **shape,
                qweight=qweight,
                packed_scales=packed_scales,
                packed_zeros=packed_zeros,
            )
            ops.dequantize_weight(
                qweight, packed_scales, packed_zeros, **shape, perm=order, out=out
            )

        outputs = [codes, scales, z, qweight, packed_scales, packed_zeros, out]
        return run, [t for t in outputs if t is not None]

    return make


CASES: list[Case] = [
    Case(f"quantize_per_token-{str(dtype)[6:]}-{mode}-{m}x{k}", _quantize(m, k, dtype, mode))
    for dtype in (torch.bfloat16, torch.float16, torch.float32)
    for mode, m, k in (
        ("symmetric", 3, 4096),
        ("asymmetric", 5, 129),
        ("static", 200, 520),
        ("symmetric", 1, 40000),
    )
] + [
    Case(f"weight-{'-'.join(map(str, arguments))}", _weight(*arguments))
    for arguments in (
        (70, 130, 4, 16, "int", "cuda"),
        (64, 256, 4, 128, "none", "cuda", True),
        (3, 9, 8, -1, "float", "cuda"),
        (40, 77, 4, 24, "float", "cpu"),
        (17, 70, 8, 32, "int", "cpu"),
    )
]
