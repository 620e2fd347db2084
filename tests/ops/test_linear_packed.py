"""int4_linear and int8_linear: exact codes, every layout option, numerics, independence of rows."""

from __future__ import annotations

import dataclasses
import random

import pytest
import torch

from fastinfer.ops import quantization as Q
from fastinfer.ops._reference_linear import (
    dequantize_codes_reference,
    int4_linear_reference,
    int8_linear_reference,
)
from fastinfer.ops.linear import int4_linear, int8_linear
from helpers import (
    FLOATS,
    assert_linear_error,
    compiles,
    generator,
    opcheck,
    poisoned,
    randn,
    refuses,
)

ZERO_MODES = ("none", "int", "float")
M_VALUES = (1, 2, 3, 4, 5, 7, 8, 9, 15, 16, 17, 24, 31, 33, 48, 63, 64, 65, 96, 127, 129, 257)


@dataclasses.dataclass(slots=True)
class Case:
    """A packed weight and the dense weight [N, K] (original column order) it stands for."""

    bits: int
    n: int
    k: int
    group_size: int
    packed: Q.PackedWeight
    perm: torch.Tensor | None
    dense: torch.Tensor

    def __call__(self, x: torch.Tensor, bias: torch.Tensor | None = None, **kw) -> torch.Tensor:
        fn = int4_linear if self.bits == 4 else int8_linear
        return fn(
            x,
            *self.packed,
            bias,
            group_size=self.group_size,
            out_features=self.n,
            perm=self.perm,
            **kw,
        )


def make(
    bits: int = 4,
    n: int = 64,
    k: int = 128,
    group_size: int = 32,
    zeros: str = "none",
    act_order: bool = False,
    seed: int = 0,
    exact_scales: bool = False,
) -> Case:
    g = generator(seed)
    groups = -(-k // group_size) if group_size > 0 else min(k, 1)
    codes = torch.randint(0, 2**bits, (n, k), generator=g, dtype=torch.uint8)
    if exact_scales:  # a different power of two times a small odd number everywhere
        scales = torch.ldexp(
            torch.randint(0, 4, (n, groups), generator=g) * 2.0 + 1.0,
            torch.randint(-6, 3, (n, groups), generator=g),
        )
    else:
        scales = torch.rand(n, groups, generator=g) * 0.02 + 0.001
    z = None
    if zeros == "int":
        z = torch.randint(0, 2**bits, (n, groups), generator=g, dtype=torch.uint8)
    elif zeros == "float":
        z = torch.randn(n, groups, generator=g) * 0.05
    perm = torch.randperm(k, generator=g).to(torch.int32) if act_order else None
    dense = torch.empty(n, k)
    if perm is None:
        dense = dequantize_codes_reference(codes, scales, z, bits, group_size)
    else:
        dense[:, perm.long()] = dequantize_codes_reference(
            codes[:, perm.long()], scales, z, bits, group_size
        )
    packed = Q.pack_weight(codes, scales, z, bits=bits, group_size=group_size, perm=perm)
    return Case(bits, n, k, group_size, packed, perm, dense)


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("zeros", ZERO_MODES)
@pytest.mark.parametrize("group_size", [-1, 8, 16, 32, 64, 128, 256])
def test_one_hot_inputs_give_the_dequantised_weight_bit_for_bit(
    isa: str, bits: int, zeros: str, group_size: int
) -> None:
    rng = random.Random(f"{bits}{zeros}{group_size}")
    n, k = rng.choice([1, 8, 17, 40, 63, 66, 100]), rng.choice([8, 24, 77, 130, 257, 300])
    case = make(bits, n, k, group_size, zeros, act_order=rng.random() < 0.5, seed=group_size + 2)
    for dtype in FLOATS:
        y = case(torch.eye(k, dtype=dtype))
        assert torch.equal(y, case.dense.t().to(dtype)), (n, k, case.perm is not None, dtype)


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("zeros", ["none", "int"])
def test_integer_inputs_are_exact_for_every_m(isa: str, bits: int, zeros: str) -> None:
    n, k = 70, 200
    case = make(bits, n, k, 40, zeros, exact_scales=False, seed=5)
    scales = torch.full_like(case.packed.scales, 0.25)
    case.packed = case.packed._replace(scales=scales)
    dense = Q.dequantize_weight(
        *case.packed, bits=bits, group_size=40, out_features=n, in_features=k
    )
    for m in (1, 2, 3, 4, 6, 8, 11, 70):
        x = torch.randint(-3, 4, (m, k), generator=generator(m)).float()
        assert torch.equal(case(x).double(), x.double() @ dense.double().t()), m


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("zeros", ZERO_MODES)
def test_error_stays_at_the_rounding_of_the_output(
    isa: str, dtype: torch.dtype, bits: int, zeros: str
) -> None:
    k = 1100
    case = make(bits, 96, k, 128, zeros, act_order=zeros == "int", seed=7)
    x = randn(9, k, seed=1)
    outlier = x.clone()
    outlier[:, 5] *= 100
    for inputs in (x, x + 10, outlier):
        inputs = inputs.to(dtype)
        reference = inputs.double() @ case.dense.double().t()
        assert_linear_error(case(inputs), reference)


def test_one_long_group_keeps_fp32_accuracy(isa: str) -> None:
    case = make(4, 32, 14336, -1, seed=3)
    x = randn(2, 14336, seed=4)
    assert_linear_error(case(x), x.double() @ case.dense.double().t())


@pytest.mark.parametrize("seed", range(12))
def test_random_cases_against_the_reference(seed: int) -> None:
    rng = random.Random(seed)
    bits, m = rng.choice([4, 8]), rng.choice(M_VALUES)
    n, k = rng.choice([1, 8, 31, 100, 152]), rng.choice([8, 33, 136, 264, 608])
    case = make(
        bits, n, k, rng.choice([-1, 16, 32, 128]), rng.choice(ZERO_MODES), rng.random() < 0.5, seed
    )
    dtype = rng.choice(FLOATS)
    x, bias = randn(m, k, seed=seed, dtype=dtype), randn(n, seed=seed + 1, dtype=dtype)
    reference = (int4_linear_reference if bits == 4 else int8_linear_reference)(
        x.double(),
        *case.packed,
        bias.double(),
        group_size=case.group_size,
        out_features=n,
        perm=case.perm,
    )
    assert_linear_error(case(x, bias), reference, bits, m, n, k)


@pytest.mark.parametrize("bits", [4, 8])
def test_rows_do_not_depend_on_each_other_nor_on_threads(isa: str, bits: int) -> None:
    case = make(bits, 200, 136, 32, "int", seed=9)
    x = randn(67, 136, seed=2, dtype=torch.bfloat16)
    whole = case(x)
    for m in (1, 2, 3, 5, 8, 13):
        assert torch.equal(case(x[:m]), whole[:m])
        assert torch.equal(case(x[-m:], batch_invariant=True), whole[-m:])
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        assert torch.equal(case(x), whole)
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("zeros", ZERO_MODES)
def test_nan_in_padding_or_in_another_row_does_not_spread(isa: str, zeros: str) -> None:
    case = make(4, 37, 45, 16, zeros, seed=11)
    x = randn(6, 45, seed=3)
    expected = case(x)
    case.packed.scales[:, 37:] = float("nan")
    case.packed.qweight.view(torch.uint8)[-1].reshape(-1, 16, 4)[:, 37 % 16 :] = 0xFF
    if zeros == "float":
        case.packed.zeros[:, 37:] = float("nan")
    storage = poisoned(6, 80)
    storage[:, :45] = x
    out = poisoned(6, 50)
    assert torch.equal(case(storage[:, :45], out=out[:, :37]), expected)
    assert out[:, 37:].isnan().all()
    x[2] = float("nan")
    x[4, 7] = float("inf")
    y = case(x)
    assert y[2].isnan().all() and not y[4].isfinite().any()
    rest = [0, 1, 3, 5]
    assert torch.equal(y[rest], expected[rest])


def test_leading_dimensions_strides_bias_and_out() -> None:
    case = make(4, 24, 40, 8, seed=13)
    x, bias = randn(2, 3, 40, seed=5), randn(24, seed=6)
    flat = case(x.view(6, 40), bias)
    assert torch.equal(case(x, bias), flat.view(2, 3, 24))
    assert torch.equal(case(x[0, 0], bias), flat[0])
    wide = randn(6, 100, seed=7)
    wide[:, 3:43] = x.view(6, 40)
    assert torch.equal(case(wide[:, 3:43], bias), flat)
    assert torch.equal(case(x.view(6, 40)[::2], bias), flat[::2])
    out = poisoned(2, 3, 24)
    assert case(x, bias, out=out) is out
    assert torch.equal(out.view(6, 24), flat)


def test_empty_cases() -> None:
    case = make(4, 24, 40, 8)
    assert case(torch.empty(0, 40)).shape == (0, 24)
    assert case(torch.empty(3, 0, 40)).shape == (3, 0, 24)
    none = make(8, 24, 0, -1)
    bias = randn(24, seed=1)
    assert torch.equal(none(torch.empty(2, 0), bias), bias.expand(2, 24))
    assert make(4, 0, 16, 8)(torch.ones(2, 16)).shape == (2, 0)


def _call(case: Case, name: str, value: object) -> None:
    args = {
        "x": torch.ones(2, case.k),
        "qweight": case.packed.qweight,
        "scales": case.packed.scales,
        "zeros": case.packed.zeros,
        "bias": None,
        "group_size": case.group_size,
        "out_features": case.n,
        "perm": None,
    }
    args[name] = value
    int4_linear(**args)


WRONG = {
    "x dtype": ("x", torch.ones(2, 128, dtype=torch.int32), "x must be"),
    "x columns": ("x", torch.ones(2, 64), "qweight must be 4-bit weights packed for 64 x 64"),
    "x scalar": ("x", torch.tensor(1.0), "x must have shape"),
    "x stride": ("x", torch.ones(128, 2).t(), "x must be contiguous in its last dimension"),
    "qweight dtype": ("qweight", torch.zeros(4, 16, 16), "qweight must be torch.int32"),
    "qweight dim": ("qweight", torch.zeros(4, 16, dtype=torch.int32), "qweight must have 3"),
    "scales dtype": ("scales", torch.ones(4, 64, dtype=torch.float16), "scales must be"),
    "scales shape": ("scales", torch.ones(5, 64), "scales must have shape [4, 64]"),
    "zeros dtype": ("zeros", torch.ones(4, 64, dtype=torch.int32), "zeros must be"),
    "zeros shape": ("zeros", torch.ones(4, 48), "zeros must have shape [4, 64]"),
    "bias dtype": ("bias", torch.ones(64, dtype=torch.float16), "bias must have the dtype of out"),
    "bias shape": ("bias", torch.ones(63), "bias must have shape [64]"),
    "group size": ("group_size", 12, "group_size must be -1"),
    "out features": ("out_features", 128, "qweight must be 4-bit weights packed for 128 x 128"),
    "perm dtype": ("perm", torch.arange(128), "perm must be torch.int32"),
    "perm shape": ("perm", torch.arange(64, dtype=torch.int32), "perm must have shape [128]"),
}


@pytest.mark.parametrize("wrong", WRONG)
def test_wrong_input_is_one_sentence(wrong: str) -> None:
    name, value, words = WRONG[wrong]
    refuses(lambda: _call(make(), name, value), "int4_linear", words)


def test_more_wrong_input() -> None:
    case = make()
    refuses(lambda: case(torch.ones(2, 128), out=torch.empty(2, 65)), "qweight must be")
    refuses(lambda: case(torch.ones(2, 128), out=torch.empty(3, 64)), "out must have shape [2, 64]")
    refuses(
        lambda: case(torch.ones(1, 2, 128), out=torch.empty(1, 64, 2).transpose(1, 2)),
        "out must be contiguous",
    )
    refuses(lambda: case(torch.ones(2, 128).half(), out=torch.empty(2, 64)), "out must have the")
    cuda = Q.pack_weight(
        torch.zeros(64, 128, dtype=torch.uint8), torch.ones(64, 4), group_size=32, layout="cuda"
    )
    refuses(
        lambda: int4_linear(torch.ones(2, 128), *cuda, group_size=32, out_features=64),
        "packed for CUDA",
        'layout="cpu"',
    )
    case.perm = torch.full((128,), 128, dtype=torch.int32)
    refuses(lambda: case(torch.ones(2, 128)), "perm must hold column numbers in [0, 128), got 128")


def test_grad_is_refused() -> None:
    case = make()
    refuses(lambda: case(torch.ones(2, 128, requires_grad=True)), "requires grad", "no_grad")
    with torch.no_grad():
        assert case(torch.ones(2, 128, requires_grad=True)).shape == (2, 64)


@pytest.mark.parametrize("bits", [4, 8])
def test_opcheck(bits: int) -> None:
    case = make(bits, 24, 40, 8, "int", act_order=True)
    op = torch.ops.fastinfer.int4_linear if bits == 4 else torch.ops.fastinfer.int8_linear
    kwargs = {
        "group_size": 8,
        "perm": case.perm,
        "batch_invariant": False,
        "out": torch.empty(3, 24),
        "workspace": None,
    }
    opcheck(op.default, (randn(3, 40, seed=1), *case.packed, randn(24, seed=2)), kwargs)


def test_compile() -> None:
    case = make(4, 24, 40, 8, "float")
    x = randn(2, 5, 40, seed=1)
    with torch.no_grad():
        expected = case(x) + 1

    def fn(x: torch.Tensor) -> torch.Tensor:
        return int4_linear(x, *case.packed, group_size=8, out_features=24) + 1

    assert torch.equal(compiles(fn, x), expected)
