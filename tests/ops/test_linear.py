"""linear: dense weights; accuracy, batch invariance, strides, empty cases, wrong input."""

from __future__ import annotations

import random

import pytest
import torch

from fastinfer import _lib
from fastinfer.ops._reference_linear import linear_reference
from fastinfer.ops.linear import linear
from helpers import (
    FLOATS,
    LINEAR_BOUNDS,
    assert_linear_error,
    compiles,
    opcheck,
    poisoned,
    randn,
    refuses,
    relative_error,
)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("batch_invariant", [False, True])
def test_against_fp64(isa: str, dtype: torch.dtype, batch_invariant: bool) -> None:
    rng = random.Random(str((isa, dtype, batch_invariant)))
    for m in (1, 2, 3, 4, 7, 16, 17, 65):
        n, k = rng.choice([1, 7, 16, 33, 130]), rng.choice([1, 5, 64, 333, 1030])
        x, w = randn(m, k, seed=m, dtype=dtype), randn(n, k, seed=m + 1, dtype=dtype)
        bias = randn(n, seed=m + 2, dtype=dtype)
        reference = linear_reference(x.double(), w.double(), bias.double())
        y = linear(x, w, bias, batch_invariant=batch_invariant)
        assert y.dtype == dtype
        assert_linear_error(y, reference, m, n, k)


@pytest.mark.parametrize("m", [2, 40])
def test_long_sums_large_means_and_outliers(isa: str, m: int) -> None:
    x, w = randn(m, 14336, seed=1), randn(24, 14336, seed=2)
    outlier = x.clone()
    outlier[:, 77] *= 100
    for inputs in (x, x + 10, outlier):
        y = linear(inputs, w, batch_invariant=True)
        assert_linear_error(y, inputs.double() @ w.double().t())


@pytest.mark.parametrize("dtype", FLOATS)
def test_batch_invariant_rows_keep_their_bits(isa: str, dtype: torch.dtype) -> None:
    x, w = randn(37, 205, seed=3, dtype=dtype), randn(70, 205, seed=4, dtype=dtype)
    whole = linear(x, w, batch_invariant=True)
    for m in (1, 2, 3, 4, 5, 16, 17):
        assert torch.equal(linear(x[:m], w, batch_invariant=True), whole[:m]), m
        assert torch.equal(linear(x[-m:], w, batch_invariant=True), whole[-m:]), m
    assert torch.equal(linear(x[:4], w), whole[:4])  # few tokens take the same kernel
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        assert torch.equal(linear(x, w, batch_invariant=True), whole)
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("m", [5, 30])
def test_strides_out_and_leading_dimensions(m: int) -> None:
    x, w, bias = randn(m, 40, seed=5), randn(24, 40, seed=6), randn(24, seed=7)
    expected = linear(x, w, bias)
    wide_x, wide_w, wide_out = poisoned(m, 50), poisoned(24, 64), poisoned(m, 30)
    wide_x[:, 7:47], wide_w[:, 3:43] = x, w
    y = linear(wide_x[:, 7:47], wide_w[:, 3:43], bias, out=wide_out[:, :24])
    assert torch.equal(y, expected) and torch.equal(wide_out[:, :24], expected)
    assert wide_out[:, 24:].isnan().all()
    out = poisoned(1, m, 24)
    assert linear(x[None], w, bias, out=out) is out
    assert torch.equal(out[0], expected)
    assert linear(x.view(m, 1, 40), w).shape == (m, 1, 24)
    assert linear(x[0], w).shape == (24,)


@pytest.mark.parametrize("m", [2, 40])
def test_out_must_not_share_memory_with_inputs(m: int) -> None:
    x, w = randn(m, 8, seed=1), randn(8, 8, seed=2)
    refuses(lambda: linear(x, w, out=x), "linear", "out must not share memory with x")
    refuses(lambda: linear(x[:2], w, out=w[:2]), "out must not share memory with weight")
    wide = torch.zeros(m, 20)
    wide[:, :8] = x
    refuses(lambda: linear(wide[:, :8], w, out=wide[:, 7:15]), "share memory with x")
    refuses(lambda: linear(wide[:, 4:12], w, out=wide[:, :8]), "share memory with x")
    y = linear(wide[:, :8], w, out=wide[:, 8:16])  # slices of one buffer that are apart
    assert torch.equal(y, linear(x, w)) and torch.equal(wide[:, :8], x)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("m", [1, 2, 3, 4, 5, 8, 13, 16, 64])
def test_cuda_against_fp64(dtype: torch.dtype, m: int) -> None:
    for n, k in ((40, 96), (4096, 4096), (65, 14336), (1, 8), (3000, 1496), (40, 99)):
        shapes = (m, k), (n, k), (n,)
        x, w, bias = (randn(*s, seed=m, dtype=dtype, device="cuda") for s in shapes)
        wide = poisoned(m, n + 8, dtype=dtype, device="cuda")
        wide_w = poisoned(n, k + 8, dtype=dtype, device="cuda")
        wide_w[:, :k] = w
        y = linear(x, wide_w[:, :k], bias, out=wide[:, :n])
        expected = linear_reference(x.double(), w.double(), bias.double())
        ours = (m <= 4 or (m <= 20 and n * k <= 1 << 18)) and k % 8 == 0
        if dtype != torch.float32 and not ours:  # torch's product: its error on such strides
            same_strides = torch.empty_like(wide)[:, :n]
            torch.addmm(bias, x, wide_w[:, :k].t(), out=same_strides)
            own = relative_error(same_strides, expected)
            assert relative_error(y, expected) <= max(1.05 * own, LINEAR_BOUNDS[dtype]), (n, k)
        else:
            assert_linear_error(y, expected, m, n, k)
        assert wide[:, n:].isnan().all()


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", FLOATS[1:])
@pytest.mark.parametrize(
    ("m", "programmatic"),
    [*((m, p) for m in (1, 2, 3, 4) for p in (False, True)), (5, True), (6, True), (8, True)],
)
def test_cuda_few_tokens_exactly(dtype: torch.dtype, m: int, programmatic: bool) -> None:
    """Integers whose sums fp32 holds: every element equals the rounded exact sum. x at any address,
    rows of w with a gap, values behind the end of both that must not be read.
    """
    g = torch.Generator(device="cuda").manual_seed(m)
    shapes = [(4096, 4096), (65, 2056), (133, 2048), (1, 8), (333, 1000), (4097, 72)]
    # x of more such tokens does not fit: cuBLAS
    for n, k in shapes + [(300, 14336)] + [(777, 28672)] * (m <= 2):
        x, w, bias = (
            torch.randint(-8, 9, shape, generator=g, device="cuda").to(dtype)
            for shape in ((m, k), (n, k), (n,))
        )
        wide_x = poisoned(m + 1, k + 3, dtype=dtype, device="cuda")
        wide_w = poisoned(n + 1, k + 8, dtype=dtype, device="cuda")
        wide = poisoned(m + 1, n + 8, dtype=dtype, device="cuda")
        wide_x[:m, 1 : k + 1], wide_w[:n, :k] = x, w
        expected = (linear_reference(x.double(), w.double(), None) + bias.double()).to(dtype)
        with _lib.programmatic_launch(programmatic):
            assert torch.equal(linear(x, w, bias), expected), (n, k)
            out = linear(wide_x[:m, 1 : k + 1], wide_w[:n, :k], bias, out=wide[:m, :n])
        assert torch.equal(out, expected), (n, k)
        assert wide[m:].isnan().all() and wide[:, n:].isnan().all()
        x[0, k - 1] = float("nan")
        with _lib.programmatic_launch(programmatic):
            y = linear(x, w, bias)
        assert y[0].isnan().all() and torch.equal(y[1:], expected[1:])


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", FLOATS[1:])
def test_cuda_large_layers_of_few_tokens_exactly(dtype: torch.dtype) -> None:
    g = torch.Generator(device="cuda").manual_seed(0)
    x, w, bias = (
        torch.randint(-8, 9, shape, generator=g, device="cuda").to(dtype)
        for shape in ((8, 4096), (28673, 4096), (28673,))
    )
    expected = (linear_reference(x.double(), w.double(), None) + bias.double()).to(dtype)
    few = w[:10241]  # alone five tokens and more of it are not left to cuBLAS
    for m in (5, 6, 8):
        assert torch.equal(linear(x[:m], few, bias[:10241]), expected[:m, :10241]), m
    for m in range(1, 9):
        # alone cuBLAS serves three tokens and more of such a layer, and rounds before the bias
        for programmatic in (False, True) if m <= 2 else (True,):
            with _lib.programmatic_launch(programmatic):
                assert torch.equal(linear(x[:m], w, bias), expected[:m]), (m, programmatic)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", FLOATS[1:])
def test_cuda_few_tokens_keep_their_bits(dtype: torch.dtype) -> None:
    """Few tokens are one kernel with one order of summation, whatever their number: up to four, and
    for the engine three to eight as well (but for many columns), in another order.
    """
    like = {"dtype": dtype, "device": "cuda"}
    for n, k in ((4096, 4096), (300, 14336), (65, 2056)):
        x, w = randn(4, k, seed=3, **like), randn(n, k, seed=4, **like)
        whole = linear(x, w)
        for m in (1, 2, 3):
            assert torch.equal(linear(x[:m], w), whole[:m]), (n, k, m)
        with _lib.programmatic_launch(True):
            assert torch.equal(linear(x[:2], w), whole[:2]), (n, k)
            if n == 65:  # tiny: groups of five
                many = linear(x.repeat(5, 1)[:17], w)
                assert torch.equal(many, whole.repeat(5, 1)[:17]), (n, k)
            four = linear(x, w)
            assert torch.equal(four, whole) or (n, k) == (4096, 4096)
            exact = linear_reference(x.double(), w.double(), None)
            assert relative_error(four, exact) <= LINEAR_BOUNDS[dtype]
            for m in (3, 5, 6, 8):
                if k > 8192:
                    continue
                y = linear(x.repeat(2, 1)[:m], w)
                assert torch.equal(y, four.repeat(2, 1)[:m]), (n, k, m)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", FLOATS[1:])
def test_cuda_batch_invariant_rows_keep_their_bits(dtype: torch.dtype) -> None:
    like = {"dtype": dtype, "device": "cuda"}
    for n, k in ((70, 200), (4096, 4096), (300, 14336)):
        x, w = randn(37, k, seed=3, **like), randn(n, k, seed=4, **like)
        whole = linear(x, w, batch_invariant=True)
        for m in (1, 2, 5, 8, 9, 16, 17):
            assert torch.equal(linear(x[:m], w, batch_invariant=True), whole[:m]), m
            assert torch.equal(linear(x[-m:], w, batch_invariant=True), whole[-m:]), m
    x, w = randn(2, 9, seed=3, **like), randn(4, 9, seed=4, **like)
    refuses(lambda: linear(x, w, batch_invariant=True), "linear", "batch_invariant on CUDA needs")
    refuses(lambda: linear(x.float(), w.float(), batch_invariant=True), "16-bit x")


def test_nan_stays_in_its_row(isa: str) -> None:
    x, w = randn(9, 70, seed=8), randn(20, 70, seed=9)
    expected = linear(x, w)
    x[4, 69] = float("nan")
    y = linear(x, w)
    assert y[4].isnan().all()
    rows = [0, 1, 2, 3, 5, 6, 7, 8]
    assert torch.equal(y[rows], expected[rows])


def test_empty_cases() -> None:
    w, bias = randn(6, 8, seed=1), randn(6, seed=2)
    assert linear(torch.empty(0, 8), w).shape == (0, 6)
    assert linear(torch.empty(2, 0, 8), w, bias).shape == (2, 0, 6)
    assert linear(torch.empty(3, 8), w[:0]).shape == (3, 0)
    for m in (3, 40):
        y = linear(torch.empty(m, 0), torch.empty(6, 0), bias)
        assert torch.equal(y, bias.expand(m, 6))
        assert torch.equal(linear(torch.empty(m, 0), torch.empty(6, 0)), torch.zeros(m, 6))


WRONG = {
    "x dtype": ({"x": torch.ones(2, 8).int()}, "x must be"),
    "x scalar": ({"x": torch.tensor(1.0)}, "x must have shape [..., in_features]"),
    "x stride": ({"x": torch.ones(8, 2).t()}, "x must be contiguous in its last dimension"),
    "weight dtype": ({"weight": torch.ones(6, 8).half()}, "weight must have the dtype of x"),
    "weight columns": ({"weight": torch.ones(6, 9)}, "weight must have shape [6, 8]"),
    "weight dim": ({"weight": torch.ones(6, 8, 1)}, "weight must have 2 dimensions"),
    "weight stride": ({"weight": torch.ones(8, 6).t()}, "weight must be contiguous in its last"),
    "bias dtype": ({"bias": torch.ones(6).half()}, "bias must have the dtype of out"),
    "bias shape": ({"bias": torch.ones(5)}, "bias must have shape [6]"),
    "out shape": ({"out": torch.ones(2, 7)}, "out must have shape [2, 6]"),
    "out dtype": ({"out": torch.ones(2, 6).half()}, "out must have the dtype of x"),
    "out stride": ({"out": torch.ones(6, 2).t()}, "out must be contiguous in its last dimension"),
    "out leading": (
        {"x": torch.ones(1, 2, 8), "out": torch.ones(2, 1, 6)},
        "out must be contiguous with shape [1, 2, 6]",
    ),
}


@pytest.mark.parametrize("wrong", WRONG)
def test_wrong_input_is_one_sentence(wrong: str) -> None:
    changes, words = WRONG[wrong]
    args = {"x": torch.ones(2, 8), "weight": torch.ones(6, 8)} | changes
    refuses(lambda: linear(**args), "linear", words)


def test_grad_is_refused() -> None:
    w = torch.ones(6, 8, requires_grad=True)
    refuses(lambda: linear(torch.ones(2, 8), w), "linear", "requires grad")
    with torch.no_grad():  # a parameter under no_grad, both paths
        for m in (2, 40):
            assert linear(torch.ones(m, 8), w).shape == (m, 6)


@pytest.mark.parametrize("m", [3, 30])
def test_opcheck(m: int) -> None:
    args = (randn(m, 8, seed=1), randn(6, 8, seed=2), randn(6, seed=3))
    opcheck(
        torch.ops.fastinfer.linear.default,
        args,
        {"batch_invariant": False, "out": torch.empty(m, 6)},
    )


@pytest.mark.parametrize("m", [3, 30])
def test_compile(m: int) -> None:
    x, w = randn(m, 8, seed=1), randn(6, 8, seed=2)
    assert torch.equal(compiles(lambda x, w: linear(x, w) + 1, x, w), linear(x, w) + 1)
