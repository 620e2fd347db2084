"""w8a8_linear: exact integer sums, one epilogue order, the same bits at every ISA level."""

from __future__ import annotations

import random

import pytest
import torch

from fastinfer.ops._reference_linear import w8a8_linear_reference
from fastinfer.ops.linear import w8a8_linear
from fastinfer.ops.quantization import quantize_per_token
from helpers import (
    FLOATS,
    compiles,
    devices,
    generator,
    opcheck,
    poisoned,
    randn,
    refuses,
    relative_error,
)


def codes(*shape: int, seed: int) -> torch.Tensor:
    return torch.randint(-128, 128, shape, generator=generator(seed), dtype=torch.int8)


def scales(n: int, seed: int) -> torch.Tensor:
    return torch.rand(n, generator=generator(seed)) * 0.02 + 0.001


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("zeros", [False, True])
@pytest.mark.parametrize("given_sum", [False, True])
def test_bit_equal_to_the_reference(
    isa: str, dtype: torch.dtype, zeros: bool, given_sum: bool
) -> None:
    rng = random.Random(str((dtype, zeros, given_sum)))
    for m in (1, 2, 3, 4, 5, 9, 33):
        n, k = rng.choice([1, 5, 16, 50, 130]), rng.choice([1, 9, 64, 129, 200, 1111])
        x, w, bias = codes(m, k, seed=m), codes(n, k, seed=m + 1), randn(n, seed=m, dtype=dtype)
        sx, sw = scales(m, m), scales(n, m + 9)
        zx = None
        if zeros:
            zx = torch.randint(-128, 128, (m,), generator=generator(m), dtype=torch.int32)
        total = w.sum(1, dtype=torch.int32) if given_sum else None
        y = w8a8_linear(x, sx, w, sw, bias, x_zeros=zx, weight_sum=total, out_dtype=dtype)
        reference = w8a8_linear_reference(x, sx, w, sw, bias, x_zeros=zx, out_dtype=dtype)
        assert torch.equal(y, reference), (m, n, k)


@pytest.mark.parametrize("device", devices("w8a8_linear")[1:])
@pytest.mark.parametrize("arch", ["", "80"])
@pytest.mark.parametrize("dtype", FLOATS)
def test_cuda_has_the_bits_of_the_cpu(
    device: str, arch: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every path: few tokens, mma.sync tiles, wgmma tiles of all widths, unaligned rows."""
    monkeypatch.setenv("FASTINFER_FORCE_ARCH", arch)
    rng = random.Random(f"{arch}{dtype}")
    tokens = (1, 7, 8, 9, 16, 17, 31, 32, 33, 64, 65, 128, 129, 257, 300, 1024, 2100)
    for m in tokens:
        n = rng.choice([1, 8, 50, 64, 130, 256, 264, 500, 1160])
        k = rng.choice([1, 16, 64, 100, 128, 144, 512, 1111, 2064])
        if m >= 1024:
            n, k = rng.choice([1536, 2048, 4100]), rng.choice([256, 400])
        pad = rng.choice([0, 0, 16 - k % 16, 3])  # row strides with and without TMA
        wide_x, wide_w = codes(m, k + pad, seed=m), codes(n, k + pad, seed=m + 1)
        x, w, bias = wide_x[:, :k], wide_w[:, :k], randn(n, seed=m, dtype=dtype)
        sx, sw = scales(m, m), scales(n, m + 9)
        zx = torch.randint(-128, 128, (m,), generator=generator(m), dtype=torch.int32)
        total = w.sum(1, dtype=torch.int32)
        on = [t.to(device) for t in (wide_x, wide_w, bias, sx, sw, zx, total)]
        xd, wd, bd, sxd, swd, zxd, td = on
        xd, wd = xd[:, :k], wd[:, :k]
        with_bias, zero_mode = rng.random() < 0.5, rng.randrange(3)
        kwargs = {"x_zeros": zx if zero_mode else None, "out_dtype": dtype}
        y = w8a8_linear(x, sx, w, sw, bias if with_bias else None, **kwargs)
        kwargs["x_zeros"] = zxd if zero_mode else None
        kwargs["weight_sum"] = td if zero_mode == 2 else None
        got = w8a8_linear(xd, sxd, wd, swd, bd if with_bias else None, **kwargs)
        where = (m, n, k, pad, zero_mode)
        assert torch.equal(got.cpu(), y), where
        out = poisoned(m, n + 3, dtype=dtype, device=device)[:, :n]
        w8a8_linear(xd, sxd, wd, swd, bd if with_bias else None, out=out, **kwargs)
        assert torch.equal(out.cpu(), y), where


def test_sums_at_the_edge_of_int32(isa: str) -> None:
    one = torch.ones(1)
    low = torch.full((1, 131071), -128, dtype=torch.int8)
    y = w8a8_linear(low, one, low, one, out_dtype=torch.float32)
    assert y.item() == float(torch.tensor(131071 * 128 * 128).float())
    high = torch.full((1, 65793), 127, dtype=torch.int8)
    zero = torch.tensor([-128], dtype=torch.int32)
    y = w8a8_linear(high, one, low[:, :65793], one, x_zeros=zero, out_dtype=torch.float32)
    assert y.item() == float(torch.tensor(-65793 * 255 * 128).float())


@pytest.mark.parametrize("symmetric", [False, True])
def test_quantised_linear_is_close_to_the_linear(symmetric: bool) -> None:
    x, w = randn(9, 512, seed=1) + (0 if symmetric else 1), randn(64, 512, seed=2)
    wq, ws, _ = quantize_per_token(w)
    xq, xs, xz = quantize_per_token(x, symmetric=symmetric)
    y = w8a8_linear(xq, xs, wq, ws, x_zeros=xz, out_dtype=torch.float32)
    assert relative_error(y, x.double() @ w.double().t()) < 0.02


def test_rows_threads_strides_and_leading_dimensions(isa: str) -> None:
    x, w, sx, sw = codes(35, 150, seed=1), codes(70, 150, seed=2), scales(35, 3), scales(70, 4)
    whole = w8a8_linear(x, sx, w, sw)
    assert whole.dtype == torch.bfloat16
    for m in (1, 2, 3, 7):
        assert torch.equal(w8a8_linear(x[-m:], sx[-m:], w, sw), whole[-m:])
    wide = codes(35, 200, seed=5)
    wide[:, 9:159] = x
    assert torch.equal(w8a8_linear(wide[:, 9:159], sx, w, sw, batch_invariant=True), whole)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        assert torch.equal(w8a8_linear(x, sx, w, sw), whole)
    finally:
        torch.set_num_threads(threads)
    out = poisoned(5, 7, 70, dtype=torch.float16)
    assert w8a8_linear(x.view(5, 7, 150), sx, w, sw, out=out) is out
    assert torch.equal(out.view(35, 70), w8a8_linear(x, sx, w, sw, out_dtype=torch.float16))


def test_nan_scale_stays_in_its_row(isa: str) -> None:
    x, w, sx, sw = codes(6, 70, seed=1), codes(9, 70, seed=2), scales(6, 3), scales(9, 4)
    expected = w8a8_linear(x, sx, w, sw)
    sx[2] = float("nan")
    y = w8a8_linear(x, sx, w, sw)
    assert y[2].isnan().all()
    rows = [0, 1, 3, 4, 5]
    assert torch.equal(y[rows], expected[rows])


def test_empty_cases() -> None:
    w, sw = codes(6, 8, seed=1), scales(6, 2)
    assert w8a8_linear(codes(0, 8, seed=1), scales(0, 1), w, sw).shape == (0, 6)
    assert w8a8_linear(codes(2, 8, seed=1), scales(2, 1), w[:0], sw[:0]).shape == (2, 0)
    bias = randn(6, seed=3)
    y = w8a8_linear(codes(2, 0, seed=1), scales(2, 1), w[:, :0], sw, bias, out_dtype=torch.float32)
    assert torch.equal(y, bias.expand(2, 6))


WRONG = {
    "x dtype": ({"x_q": torch.ones(2, 8)}, "x_q must be torch.int8"),
    "x stride": ({"x_q": torch.ones(8, 2, dtype=torch.int8).t()}, "x_q must be contiguous"),
    "x scalar": ({"x_q": torch.tensor(1, dtype=torch.int8)}, "x_q must have shape"),
    "x_scale dtype": ({"x_scale": torch.ones(2).half()}, "x_scale must be torch.float32"),
    "x_scale shape": ({"x_scale": torch.ones(3)}, "x_scale must have shape [2]"),
    "weight dtype": ({"weight": torch.ones(6, 8)}, "weight must be torch.int8"),
    "weight dim": ({"weight": torch.ones(8, dtype=torch.int8)}, "weight must have 2 dimensions"),
    "weight shape": ({"weight": torch.ones(6, 9, dtype=torch.int8)}, "weight must have shape"),
    "weight_scale dtype": ({"weight_scale": torch.ones(6).half()}, "weight_scale must be"),
    "weight_scale shape": ({"weight_scale": torch.ones(6, 1)}, "weight_scale must have shape [6]"),
    "bias dtype": ({"bias": torch.ones(6)}, "bias must have the dtype of out"),
    "bias shape": ({"bias": torch.ones(5).bfloat16()}, "bias must have shape [6]"),
    "x_zeros dtype": ({"x_zeros": torch.ones(2)}, "x_zeros must be torch.int32"),
    "x_zeros shape": ({"x_zeros": torch.ones(3).int()}, "x_zeros must have shape [2]"),
    "weight_sum dtype": ({"weight_sum": torch.ones(6)}, "weight_sum must be torch.int32"),
    "weight_sum shape": ({"weight_sum": torch.ones(7).int()}, "weight_sum must have shape [6]"),
    "out dtype": ({"out": torch.ones(2, 6).int()}, "out must be"),
    "out shape": ({"out": torch.ones(2, 7)}, "out must have shape [2, 6]"),
    "out_dtype": ({"out_dtype": torch.float64}, "out must be"),
}


@pytest.mark.parametrize("wrong", WRONG)
def test_wrong_input_is_one_sentence(wrong: str) -> None:
    changes, words = WRONG[wrong]
    args = {
        "x_q": torch.ones(2, 8, dtype=torch.int8),
        "x_scale": torch.ones(2),
        "weight": torch.ones(6, 8, dtype=torch.int8),
        "weight_scale": torch.ones(6),
    }
    refuses(lambda: w8a8_linear(**(args | changes)), "w8a8_linear", words)


def test_too_many_columns_for_exact_sums() -> None:
    x, one = torch.zeros(1, 131072, dtype=torch.int8), torch.ones(1)
    refuses(lambda: w8a8_linear(x, one, x, one), "w8a8_linear", "at most 131071 columns")
    zero = torch.zeros(1, dtype=torch.int32)
    x = x[:, :65794]
    refuses(lambda: w8a8_linear(x, one, x, one, x_zeros=zero), "at most 65793 columns with x_zeros")


def test_grad_is_refused() -> None:
    x = codes(2, 8, seed=1)
    sx = torch.ones(2, requires_grad=True)
    refuses(lambda: w8a8_linear(x, sx, x, torch.ones(2)), "w8a8_linear", "requires grad")


def test_opcheck_and_compile() -> None:
    x, w, sx, sw = codes(3, 20, seed=1), codes(6, 20, seed=2), scales(3, 3), scales(6, 4)
    zx = torch.tensor([1, -2, 3], dtype=torch.int32)
    kwargs = {
        "x_zeros": zx,
        "weight_sum": w.sum(1, dtype=torch.int32),
        "batch_invariant": False,
        "out": torch.empty(3, 6),
        "workspace": None,
    }
    opcheck(torch.ops.fastinfer.w8a8_linear.default, (x, sx, w, sw, randn(6, seed=5)), kwargs)

    def quantised(a: torch.Tensor) -> torch.Tensor:
        q, s, _ = quantize_per_token(a)
        return w8a8_linear(q, s, w, sw, out_dtype=torch.float32) + 1

    a = randn(2, 2, 20, seed=6)
    assert torch.equal(compiles(quantised, a), quantised(a))
