"""apply_rotary, apply_rotary_inplace, apply_rotary_and_cache: both styles, whole packs and single
elements, caches of every kind.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from gpu_case import Case, Made
from torch import Tensor

import fastinfer

_ops = torch.ops.fastinfer
_FP8 = torch.float8_e4m3fn
_POSITIONS = 50
_FEW, _MANY = 7, 2200


def _inputs(
    device: str, seed: int, dtype: torch.dtype, tokens: int, dim: int, half: int
) -> tuple[list[Tensor], list[Tensor], Tensor]:
    g = torch.Generator(device=device).manual_seed(seed)
    qkv = [torch.randn(tokens, h, dim, generator=g, device=device).to(dtype) for h in (6, 2, 2)]
    tables = [torch.rand(_POSITIONS, half, generator=g, device=device) for _ in "cs"]
    return qkv, tables, torch.randint(_POSITIONS, (tokens,), generator=g, device=device)


def _rotary(
    dtype: torch.dtype, tokens: int, dim: int, half: int, interleaved: bool, inplace: bool
) -> Callable[[str, int], Made]:
    def make(device: str, seed: int) -> Made:
        (q, k, _), (cos, sin), positions = _inputs(device, seed, dtype, tokens, dim, half)
        out = [torch.full_like(t, float("nan")) for t in (q, k)]
        style = {"interleaved": interleaved}

        def run() -> None:
            if inplace:
                for work, source in zip(out, (q, k), strict=True):
                    work.copy_(source)
                _ops.apply_rotary_inplace(*out, cos.to(dtype), sin.to(dtype), positions, **style)
            else:
                _ops.apply_rotary(
                    q, k, cos, sin, positions.int(), q_out=out[0], k_out=out[1], **style
                )

        return run, out

    return make


def _cached(
    dtype: torch.dtype, tokens: int, dim: int, half: int, cache: torch.dtype, dynamic: bool
) -> Callable[[str, int], Made]:
    def make(device: str, seed: int) -> Made:
        (q, k, v), (cos, sin), positions = _inputs(device, seed, dtype, tokens, dim, half)
        work = [torch.full_like(t, float("nan")) for t in (q, k)]
        # Every slot of the cache is written; the last token is skipped.
        g = torch.Generator(device=device).manual_seed(seed)
        slots = torch.randperm(tokens - 1, generator=g, device=device)
        slots = torch.cat((slots, slots.new_tensor([-1])))
        blocks = (tokens - 1) // 3
        pair = [torch.zeros(blocks, 3, 2, dim, device=device).to(cache) for _ in "kv"]
        scales: list[Tensor] = []
        if cache in (_FP8, torch.int8):
            shape = (blocks, 3, 2) if dynamic else (2,)
            scales = [torch.full(shape, 0.03, device=device) for _ in "kv"]
        kw: dict[str, Any] = dict(zip(("k_scale", "v_scale"), scales, strict=False))

        def run() -> None:
            for w, source in zip(work, (q, k), strict=True):
                w.copy_(source)
            fastinfer.apply_rotary_and_cache(*work, v, cos, sin, positions, *pair, slots, **kw)

        return run, [*work, *pair, *(scales if dynamic else [])]

    return make


CASES: list[Case] = []
for _dtype in (torch.bfloat16, torch.float16, torch.float32):
    for _tokens, _dim, _half, _style, _inplace in (
        (_FEW, 128, 64, False, False),
        (_FEW, 128, 64, True, True),
        (_MANY, 128, 64, False, False),
        (_FEW, 80, 20, False, True),
        (_FEW, 34, 17, True, False),
    ):
        _tail = f"{str(_dtype)[6:]}-{_tokens}x{_dim}-{_half}-{'pairs' if _style else 'halves'}"
        _case = _rotary(_dtype, _tokens, _dim, _half, _style, _inplace)
        CASES.append(Case(f"rotary-{_tail}", _case))
    for _tokens, _dim, _half, _cache, _dynamic in (
        (_FEW, 128, 64, _dtype, False),
        (_FEW, 128, 64, _FP8, True),
        (_MANY, 128, 64, _dtype, False),
        (_MANY, 128, 64, _FP8, True),
        (_FEW, 64, 32, torch.int8, False),
        (_FEW, 64, 16, torch.int8, False),
        (_FEW, 80, 20, torch.int8, True),
    ):
        _tail = f"{str(_dtype)[6:]}-{_tokens}x{_dim}-{_half}-{str(_cache)[6:]}"
        _case = _cached(_dtype, _tokens, _dim, _half, _cache, _dynamic)
        CASES.append(Case(f"rotary_and_cache-{_tail}{'-dynamic' if _dynamic else ''}", _case))
