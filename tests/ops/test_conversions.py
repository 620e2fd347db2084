"""fp16, bf16, fp8 e4m3 and int8 conversions of the CPU kernels: every code, every rounding tie, on
every instruction-set level, against torch. They are reached through the cache operators, in rows
long enough for the vector loop and short enough for the scalar tail.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from fastinfer.ops.kv_cache import gather_cache, reshape_and_cache

FP8 = torch.float8_e4m3fn
# 64: only whole vectors at every level; 3: only the tail.
WIDTHS = (64, 3)


def decode(codes: Tensor, dtype: torch.dtype, width: int, scale: float | None = None) -> Tensor:
    """`codes` [n] of a cache dtype through gather_cache, as `dtype`."""
    pad = -codes.numel() % width
    raw = codes.view(torch.uint8 if codes.element_size() == 1 else codes.dtype)
    cache = torch.cat((raw, raw.new_zeros(pad))).view(codes.dtype).view(-1, 1, 1, width)
    rows = cache.shape[0]
    table = torch.arange(rows, dtype=torch.int32).view(1, rows)
    s = None if scale is None else torch.tensor(scale)
    k, v = gather_cache(
        cache,
        cache.clone(),
        table,
        torch.tensor([0, rows]),
        rows,
        dtype=dtype,
        k_scale=s,
        v_scale=s,
    )
    assert torch.equal(k.nan_to_num(123.0), v.nan_to_num(123.0))
    return k.flatten()[: codes.numel()]


def encode(x: Tensor, cache_dtype: torch.dtype, width: int, scale: float = 1.0) -> Tensor:
    """x [n] through reshape_and_cache with a static scale, as codes."""
    pad = -x.numel() % width
    rows = torch.cat((x, x.new_zeros(pad))).view(-1, 1, width)
    caches = [torch.zeros(rows.shape[0], 1, 1, width).to(cache_dtype) for _ in range(2)]
    s = torch.tensor(scale)
    reshape_and_cache(rows, rows, *caches, torch.arange(rows.shape[0]), k_scale=s, v_scale=s)
    assert torch.equal(caches[0].view(torch.uint8), caches[1].view(torch.uint8))
    return caches[0].flatten()[: x.numel()]


def round_float(x: Tensor, dtype: torch.dtype, width: int) -> Tensor:
    """fp32 x [n] rounded to dtype by a gather from an fp32 cache."""
    return decode(x, dtype, width)


def same(a: Tensor, b: Tensor) -> None:
    """Equal bits, NaN equal to any NaN."""
    assert a.dtype == b.dtype and a.shape == b.shape
    a32, b32 = a.float(), b.float()
    bad = ~((a32.view(torch.int32) == b32.view(torch.int32)) | (a32.isnan() & b32.isnan()))
    assert not bad.any(), (int(bad.sum()), a32[bad][:5], b32[bad][:5])


def all_16bit(dtype: torch.dtype) -> Tensor:
    return torch.arange(-32768, 32768, dtype=torch.int32).to(torch.int16).view(dtype)


def neighbours(x: Tensor) -> Tensor:
    """x and the fp32 numbers next to it."""
    up = torch.nextafter(x, torch.full_like(x, torch.inf))
    down = torch.nextafter(x, torch.full_like(x, -torch.inf))
    return torch.cat((x, up, down))


def ties(values: Tensor) -> Tensor:
    """All midpoints of sorted neighbours in `values` (exact in fp32), with their own neighbours."""
    v = values[values.isfinite()].float().unique()
    return neighbours(torch.cat((v, (v[1:].double() + v[:-1].double()).div(2).float())))


def special() -> Tensor:
    inf, nan = torch.inf, torch.nan
    values = [0.0, -0.0, inf, -inf, nan, 1e-45, -1e-45, 1.2e-38, 3.4e38, -3.4e38, 65504, 65519.996]
    more = [
        65520.0,
        65536.0,
        2**-24,
        2**-25,
        2**-26,
        448.0,
        464.0,
        463.9,
        480.0,
        1e5,
        2**-9,
        2**-10,
    ]
    return neighbours(torch.tensor([*values, *more, *(-m for m in more)]))


def any_float(n: int = 40_000) -> Tensor:
    """Random bit patterns: all exponents, NaN and infinities."""
    bits = torch.randint(-(2**31), 2**31, (n,), generator=torch.Generator().manual_seed(5))
    return bits.to(torch.int32).view(torch.float32)


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_every_16bit_value_to_float(isa: str, dtype: torch.dtype, width: int) -> None:
    x = all_16bit(dtype)
    same(decode(x, torch.float32, width), x.float())
    other = torch.bfloat16 if dtype == torch.float16 else torch.float16
    same(decode(x, other, width), x.float().to(other))


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_float_to_16bit_rounds_to_nearest_even(isa: str, dtype: torch.dtype, width: int) -> None:
    x = torch.cat((ties(all_16bit(dtype)), special(), any_float()))
    same(round_float(x, dtype, width), x.to(dtype))


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_every_fp8_and_int8_code(isa: str, dtype: torch.dtype, width: int) -> None:
    codes = torch.arange(256, dtype=torch.uint8)
    for cache_dtype in (FP8, torch.int8):
        c = codes.view(cache_dtype)
        for scale in (1.0, 0.0173):
            want = (c.float() * torch.tensor(scale)).to(dtype)
            same(decode(c, dtype, width, scale), want)


def fp8_saturated(x: Tensor) -> Tensor:
    """torch's conversion, with values beyond 448 (where it gives NaN) saturated first."""
    return x.clamp(-448, 448).to(FP8)


@pytest.mark.parametrize("width", WIDTHS)
def test_float_to_fp8_rounds_and_saturates(isa: str, width: int) -> None:
    codes = torch.arange(256, dtype=torch.uint8).view(FP8).float()
    x = torch.cat((ties(codes), special(), any_float()))
    got = encode(x, FP8, width)
    same(got.float(), fp8_saturated(x).float())
    for dtype in (torch.float16, torch.bfloat16):
        every = all_16bit(dtype)
        same(encode(every, FP8, width).float(), fp8_saturated(every.float()).float())


@pytest.mark.parametrize("width", WIDTHS)
def test_float_to_int8_rounds_and_saturates(isa: str, width: int) -> None:
    halves = torch.arange(-260, 261) / 2
    x = torch.cat((neighbours(halves), special(), any_float()))
    want = x.clamp(-127, 127).round().nan_to_num(0.0).to(torch.int8)
    assert torch.equal(encode(x, torch.int8, width), want)


@pytest.mark.parametrize("dtype", [FP8, torch.int8])
def test_encoding_divides_by_the_scale(isa: str, dtype: torch.dtype) -> None:
    """x / scale in fp32, not x * (1 / scale): the two differ in ties."""
    x = torch.randn(4096, generator=torch.Generator().manual_seed(1)) * 3
    s = torch.tensor(0.0247)
    q = (x / s).clamp(-448, 448).to(dtype) if dtype == FP8 else (x / s).round().clamp(-127, 127)
    assert torch.equal(encode(x, dtype, 64, float(s)).float(), q.float())
