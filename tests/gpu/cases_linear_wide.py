"""int4_linear and int8_linear with more tokens than the skinny kernel takes: all tiles of the wgmma
kernel, K cut across a cluster, and weights dequantised for torch's matrix product.
"""

from __future__ import annotations

import torch
from cases_linear import packed_linear
from gpu_case import Case

CASES: list[Case] = [
    Case(
        f"int{bits}_linear-{str(dtype)[6:]}-{m}x{n}x{k}-g{group}-{zeros}{'-perm' if perm else ''}",
        packed_linear(bits, m, n, k, group, zeros, dtype, perm=perm, scale_dtype=torch.float32),
    )
    for dtype in (torch.bfloat16, torch.float16)
    for bits in (4, 8)
    for m, n, k, group, zeros, perm in (
        # 4 bit; 8 bit: tokens x rows
        (12, 4400, 520, 64, "int", False),  # 16 x 320, K cut; 16 x 256, K cut
        (16, 60000, 128, 128, "none", False),  # 16 x 512
        (16, 51000, 128, 128, "int", False),  # 16 x 448; 16 x 512
        (12, 45000, 520, 128, "none", False),  # 16 x 384; 32 x 384
        (12, 17000, 1040, 128, "none", False),  # 16 x 320, K cut; 16 x 512, K cut
        (20, 200, 1040, 64, "int", False),  # 32 x 192, K cut; 32 x 256, K cut
        (20, 7000, 520, 128, "int", False),  # 32 x 256, K cut
        (20, 26000, 128, 128, "none", False),  # 32 x 256
        (20, 10000, 1040, 128, "none", False),  # 32 x 192, K cut; 32 x 384, K cut
        (20, 34000, 264, 128, "none", False),  # 32 x 384
        (20, 200, 1040, 32, "int", False),  # two groups to a step, K cut
        (40, 20000, 128, 64, "none", False),  # 64 tokens
        (64, 192, 520, 64, "int", False),  # 64 x 192, K cut; 128 x 128
        (130, 3000, 2056, 128, "none", False),  # 64 x 256, K cut
        (600, 3000, 264, 64, "none", False),  # 64 x 256; 128 x 128
        (600, 9000, 128, 64, "int", False),  # 256 x 128; 128 x 128
        (1000, 1600, 4104, 128, "none", False),  # 256 x 128, K cut
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
        packed_linear(4, m, n, k, group, zeros, dtype, perm=False),
    )
    for dtype in (torch.bfloat16, torch.float16)
    for m, n, k, group, zeros in (
        (12, 200, 1040, 64, "int"),
        (16, 60000, 128, 128, "none"),
        (20, 6000, 2056, 128, "none"),
        (40, 200, 520, 64, "int"),
        (100, 300, 264, 128, "none"),
        (64, 20000, 128, 32, "int"),
        (130, 3000, 2056, 128, "none"),
        (1000, 3000, 1040, 128, "none"),
        (600, 1000, 2056, 128, "int"),
        (600, 9000, 128, 64, "int"),
        (1000, 4096, 512, 128, "none"),
        (40, 192, 4096, 128, "int"),
    )
]
