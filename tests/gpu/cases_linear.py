"""quantize_per_token: rows in registers and rows read twice, dynamic and static scales.
int4_linear, int8_linear, linear: every instance of the kernel for few tokens.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from gpu_case import Case, Made

from fastinfer import pack_weight


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


def _packed(
    bits: int, m: int, n: int, k: int, group: int, zeros: str, dtype: torch.dtype, invariant: bool
) -> Callable[[str, int], Made]:
    def make(device: str, seed: int) -> Made:
        g = torch.Generator().manual_seed(seed)
        groups = -(-k // group)
        codes = torch.randint(0, 2**bits, (n, k), generator=g, dtype=torch.uint8)
        scales = (torch.rand(n, groups, generator=g) * 0.02 + 0.001).to(dtype)
        z = None
        if zeros == "int":
            z = torch.randint(0, 2**bits, (n, groups), generator=g, dtype=torch.uint8)
        elif zeros == "float":
            z = torch.randn(n, groups, generator=g)
        packed = pack_weight(codes, scales, z, bits=bits, group_size=group, layout="cuda")
        weight = [None if t is None else t.to(device) for t in packed]
        x = torch.randn(m, k, generator=g).to(dtype).to(device)
        bias = torch.randn(n, generator=g).to(dtype).to(device)
        perm = torch.randperm(k, generator=g).to(torch.int32).to(device) if seed % 2 else None
        out = torch.full((m, n), float("nan"), dtype=dtype, device=device)
        op = torch.ops.fastinfer.int4_linear if bits == 4 else torch.ops.fastinfer.int8_linear

        def run() -> None:
            op(
                x,
                *weight,
                bias,
                group_size=group,
                perm=perm,
                batch_invariant=invariant,
                out=out,
                workspace=None,
            )

        return run, [out]

    return make


def _dense(m: int, n: int, k: int, dtype: torch.dtype) -> Callable[[str, int], Made]:
    def make(device: str, seed: int) -> Made:
        g = torch.Generator(device=device).manual_seed(seed)
        x, w, bias = (
            torch.randn(*shape, generator=g, device=device).to(dtype)
            for shape in ((m, k), (n, k), (n,))
        )
        out = torch.full((m, n), float("nan"), dtype=dtype, device=device)

        def run() -> None:
            torch.ops.fastinfer.linear(x, w, bias, batch_invariant=True, out=out)

        return run, [out]

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
]
CASES += [
    Case(
        f"int{bits}_linear-{str(dtype)[6:]}-{m}x{n}x{k}-g{group}-{zeros}",
        _packed(bits, m, n, k, group, zeros, dtype, m == 17),
    )
    for bits in (4, 8)
    for dtype in (torch.bfloat16, torch.float16)
    for m, n, k, group, zeros in (
        (1, 200, 1040, 128, "none"),
        (9, 130, 520, 64, "none"),
        (32, 70, 256, 256, "int" if bits == 4 else "none"),
        (3, 65, 200, 24, "int"),
        (17, 64, 320, 32, "float"),
    )
]
CASES += [
    Case(f"linear-{str(dtype)[6:]}-{m}x{n}x{k}", _dense(m, n, k, dtype))
    for dtype in (torch.bfloat16, torch.float16)
    for m, n, k in ((1, 200, 1040), (12, 70, 520))
]
