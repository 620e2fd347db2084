"""int4_linear and int8_linear with more tokens than the skinny kernel takes: all tiles of the wgmma
kernel, K cut across a cluster, and weights dequantised for torch's matrix product.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from gpu_case import Case, Made

from fastinfer.ops import quantization as Q


def _packed(
    bits: int,
    m: int,
    n: int,
    k: int,
    group: int,
    zeros: str,
    dtype: torch.dtype,
    perm: bool,
    scale_dtype: torch.dtype = torch.float32,
) -> Callable[[str, int], Made]:
    def make(device: str, seed: int) -> Made:
        g = torch.Generator().manual_seed(seed)
        groups = -(-k // group) if group > 0 else 1
        codes = torch.randint(0, 2**bits, (n, k), generator=g, dtype=torch.uint8)
        scales = (torch.rand(n, groups, generator=g) * 0.02 + 0.001).to(scale_dtype)
        z = None
        if zeros == "int":
            z = torch.randint(0, 2**bits, (n, groups), generator=g, dtype=torch.uint8)
        elif zeros == "float":
            z = torch.randn(n, groups, generator=g) * 0.05
        order = torch.randperm(k, generator=g).to(torch.int32) if perm else None
        packed = Q.pack_weight(
            codes, scales, z, bits=bits, group_size=group, perm=order, layout="cuda"
        )
        qweight, packed_scales, packed_zeros = (None if t is None else t.to(device) for t in packed)
        x = torch.randn(m, k, generator=g).to(dtype).to(device)
        bias = torch.randn(n, generator=g).to(dtype).to(device)
        out = torch.full((m, n), float("nan"), dtype=dtype, device=device)
        order = None if order is None else order.to(device)
        op = torch.ops.fastinfer.int4_linear if bits == 4 else torch.ops.fastinfer.int8_linear

        def run() -> None:
            op(
                x,
                qweight,
                packed_scales,
                packed_zeros,
                bias,
                group_size=group,
                perm=order,
                batch_invariant=False,
                out=out,
                workspace=None,
            )

        return run, [out]

    return make


CASES: list[Case] = [
    Case(
        f"int{bits}_linear-{str(dtype)[6:]}-{m}x{n}x{k}-g{group}-{zeros}{'-perm' if perm else ''}",
        _packed(bits, m, n, k, group, zeros, dtype, perm),
    )
    for dtype in (torch.bfloat16, torch.float16)
    for bits in (4, 8)
    for m, n, k, group, zeros, perm in (
        (64, 192, 520, 64, "int", False),  # K cut in two
        (40, 20000, 128, 64, "none", False),  # 64 tokens x 256 rows
        (600, 9000, 128, 64, "int", False),  # 256 tokens x 128 rows
        (65, 130, 1024, 32, "none", False),  # K cut in parts, two groups to a step
        (130, 200, 200, -1, "none", True),  # columns gathered first
        (300, 1000, 264, 128, "int", False),  # several tiles, rows and columns to spare
        (300, 100, 136, 16, "float", False),  # dequantised
    )
]
# Scales of x's type: 16-bit multiplication, other tiles.
CASES += [
    Case(
        f"int4_linear-{str(dtype)[6:]}-{m}x{n}x{k}-g{group}-{zeros}-same",
        _packed(4, m, n, k, group, zeros, dtype, False, dtype),
    )
    for dtype in (torch.bfloat16, torch.float16)
    for m, n, k, group, zeros in (
        (40, 200, 520, 64, "int"),
        (100, 300, 264, 128, "none"),
        (64, 20000, 128, 32, "int"),
        (128, 20000, 128, 128, "none"),
        (600, 9000, 128, 64, "int"),
        (1000, 4096, 512, 128, "none"),
        (40, 192, 4096, 128, "int"),
    )
]
