"""quantize_per_token: rows in registers and rows read twice, dynamic and static scales. Weights:
quantised, packed, dequantised. int4_linear, int8_linear, linear: every instance of the kernel for
few tokens.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable

import torch
from gpu_case import Case, Made

from fastinfer import _lib, pack_weight


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


def packed_linear(
    bits: int,
    m: int,
    n: int,
    k: int,
    group: int,
    zeros: str,
    dtype: torch.dtype,
    *,
    invariant: bool = False,
    perm: bool | None = None,
    scale_dtype: torch.dtype | None = None,
) -> Callable[[str, int], Made]:
    """int4_linear or int8_linear. perm None: with every other seed; scales of x's dtype if None."""

    def make(device: str, seed: int) -> Made:
        g = torch.Generator().manual_seed(seed)
        groups = -(-k // group) if group > 0 else 1
        codes = torch.randint(0, 2**bits, (n, k), generator=g, dtype=torch.uint8)
        scales = (torch.rand(n, groups, generator=g) * 0.02 + 0.001).to(scale_dtype or dtype)
        z = None
        if zeros == "int":
            z = torch.randint(0, 2**bits, (n, groups), generator=g, dtype=torch.uint8)
        elif zeros == "float":
            z = torch.randn(n, groups, generator=g)
        packed = pack_weight(codes, scales, z, bits=bits, group_size=group, layout="cuda")
        weight = [None if t is None else t.to(device) for t in packed]
        x = torch.randn(m, k, generator=g).to(dtype).to(device)
        bias = torch.randn(n, generator=g).to(dtype).to(device)
        permuted = seed % 2 == 1 if perm is None else perm
        order = torch.randperm(k, generator=g).to(torch.int32).to(device) if permuted else None
        out = torch.full((m, n), float("nan"), dtype=dtype, device=device)
        op = torch.ops.fastinfer.int4_linear if bits == 4 else torch.ops.fastinfer.int8_linear

        def run() -> None:
            op(
                x,
                *weight,
                bias,
                group_size=group,
                perm=order,
                batch_invariant=invariant,
                out=out,
                workspace=None,
            )

        return run, [out]

    return make


def _dense(
    m: int,
    n: int,
    k: int,
    dtype: torch.dtype,
    *,
    invariant: bool = False,
    programmatic: bool = False,
) -> Callable[[str, int], Made]:
    """programmatic: always launched as the engine does, which has other kernels for some calls."""

    def make(device: str, seed: int) -> Made:
        g = torch.Generator(device=device).manual_seed(seed)
        x, w, bias = (
            torch.randn(*shape, generator=g, device=device).to(dtype)
            for shape in ((m, k), (n, k), (n,))
        )
        out = torch.full((m, n), float("nan"), dtype=dtype, device=device)

        def run() -> None:
            with _lib.programmatic_launch() if programmatic else contextlib.nullcontext():
                torch.ops.fastinfer.linear(x, w, bias, batch_invariant=invariant, out=out)

        return run, [out]

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
        ("symmetric", 200, 4096),
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
CASES += [
    Case(
        f"int{bits}_linear-{str(dtype)[6:]}-{m}x{n}x{k}-g{group}-{zeros}",
        packed_linear(bits, m, n, k, group, zeros, dtype, invariant=m == 17),
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
# Without a ring: K cut across a cluster, warps that share rows, zero points; scales of both widths;
# x in bytes for one or two tokens.
CASES += [
    Case(
        f"int4_linear-{str(dtype)[6:]}-{m}x{n}x{k}-g{group}-{zeros}-{str(scale)[6:]}",
        packed_linear(4, m, n, k, group, zeros, dtype, scale_dtype=scale),
    )
    for dtype in (torch.bfloat16, torch.float16)
    for m, n, k, group, zeros, scale in (
        (8, 40, 16640, 128, "int", torch.float32),
        (5, 4300, 264, -1, "none", torch.bfloat16),
        (8, 2100, 1024, 256, "int", torch.float16),
        (2, 40, 16256, 128, "int", torch.float32),
        (1, 4300, 264, -1, "none", torch.bfloat16),
        (2, 2100, 1024, 256, "int", torch.float16),
    )
]
CASES += [
    Case(
        f"linear-{str(dtype)[6:]}-{m}x{n}x{k}{'-invariant' if invariant else ''}",
        _dense(m, n, k, dtype, invariant=invariant),
    )
    for dtype in (torch.bfloat16, torch.float16)
    for m, n, k, invariant in (
        (1, 200, 1040, True),
        (12, 70, 520, True),
        (1, 600, 2056, False),
        (2, 133, 4096, False),
        (3, 70, 520, False),
        (5, 70, 520, False),
    )
]
CASES += [
    Case(
        f"linear-{str(dtype)[6:]}-{m}x{n}x{k}-programmatic",
        _dense(m, n, k, dtype, programmatic=True),
    )
    for dtype in (torch.bfloat16, torch.float16)
    for m, n, k in ((3, 333, 1040), (5, 37, 14336), (8, 1061, 5128))
]
