"""rms_norm, fused_add_rms_norm, rms_norm_quant: every instance on both of its paths (a row in
registers, a row read again), rows that share a warp, a block, and that fill one, few and many.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from gpu_case import Case, Made
from torch import Tensor

import fastinfer

_ops = torch.ops.fastinfer
_SHAPES = ((3, 5, 128), (2, 4096), (3, 33), (1, 20000), (1100, 512))


def _inputs(device: str, seed: int, shape: tuple[int, ...], dtype: torch.dtype) -> list[Tensor]:
    g = torch.Generator(device=device).manual_seed(seed)
    x, residual = (torch.randn(shape, generator=g, device=device).to(dtype) for _ in "xr")
    return [x, residual, torch.randn(shape[-1], generator=g, device=device).to(dtype)]


def _norm(shape: tuple[int, ...], dtype: torch.dtype) -> Callable[[str, int], Made]:
    def make(device: str, seed: int) -> Made:
        x, _, w = _inputs(device, seed, shape, dtype)
        out = torch.full_like(x, float("nan"))
        return lambda: fastinfer.rms_norm(x, w, out=out), [out]

    return make


def _fused(shape: tuple[int, ...], dtype: torch.dtype) -> Callable[[str, int], Made]:
    def make(device: str, seed: int) -> Made:
        x, residual, w = _inputs(device, seed, shape, dtype)
        y, r = (torch.full_like(x, float("nan")) for _ in "yr")

        def run() -> None:
            y.copy_(x)
            r.copy_(residual)
            fastinfer.fused_add_rms_norm(y, r, w)

        return run, [y, r]

    return make


def _quant(
    shape: tuple[int, ...], dtype: torch.dtype, zeros: bool, residual: bool = True
) -> Callable[[str, int], Made]:
    def make(device: str, seed: int) -> Made:
        x, before, w = _inputs(device, seed, shape, dtype)
        r = torch.full_like(x, float("nan")) if residual else None
        q = torch.full(shape, 77, dtype=torch.int8, device=device)
        scale = torch.full(shape[:-1], float("nan"), device=device)
        z = torch.full(shape[:-1], -7, dtype=torch.int32, device=device) if zeros else None

        def run() -> None:
            if r is not None:
                r.copy_(before)
            _ops.rms_norm_quant(x, w, 1e-6, residual=r, q=q, scale=scale, zeros=z)

        return run, [t for t in (q, scale, r, z) if t is not None]

    return make


CASES: list[Case] = []
for _dtype in (torch.bfloat16, torch.float16, torch.float32):
    for _i, _shape in enumerate(_SHAPES):
        _tail = f"{str(_dtype)[6:]}-{'x'.join(map(str, _shape))}"
        CASES += [
            Case(f"rms_norm-{_tail}", _norm(_shape, _dtype)),
            Case(f"fused_add_rms_norm-{_tail}", _fused(_shape, _dtype)),
            Case(f"rms_norm_quant-{_tail}", _quant(_shape, _dtype, bool(_i % 2))),
        ]
    # Four packs per thread.
    _tail = f"{str(_dtype)[6:]}-many"
    CASES += [
        Case(f"rms_norm-{_tail}", _norm((550, 4096), _dtype)),
        Case(f"rms_norm_quant-{_tail}", _quant((550, 4096), _dtype, False, False)),
    ]
    # A row per block, symmetric codes.
    for _shape in ((2, 4096), (1, 8192), (3, 264)):
        for _residual in (False, True):
            _tail = f"{str(_dtype)[6:]}-{'x'.join(map(str, _shape))}"
            _name = f"rms_norm_quant-few-{_tail}{'-residual' if _residual else ''}"
            CASES.append(Case(_name, _quant(_shape, _dtype, False, _residual)))
