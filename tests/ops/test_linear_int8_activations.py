"""int4_linear and int8_linear under FASTINFER_CPU_INT8_ACTIVATIONS=1: the definition, bit equality
of ISA levels, M and threads, NaN, distance from the exact path, and off by default.
"""

from __future__ import annotations

import random

import pytest
import torch
from test_linear_packed import ZERO_MODES, Case, make

from fastinfer.ops import quantization as Q
from fastinfer.ops._reference_linear import (
    quantize_per_token_reference,
    unpack_weight_reference,
)
from helpers import (
    FLOATS,
    assert_linear_error,
    available_isa_levels,
    generator,
    poisoned,
    randn,
    relative_error,
    threads,
)

SWITCH = "FASTINFER_CPU_INT8_ACTIVATIONS"
RUN = 32768  # longer groups are quantised in pieces of this many columns


@pytest.fixture
def int8(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(SWITCH, "1")


def quantised_runs(
    case: Case, x: torch.Tensor
) -> list[tuple[int, slice, torch.Tensor, torch.Tensor]]:
    """(group, columns, xq, scale) of every run of columns, in packed order."""
    x = x.float() if case.perm is None else x.float()[:, case.perm.long()]
    size = case.group_size if case.group_size > 0 else max(case.k, 1)
    runs = []
    for begin in range(0, case.k, size):
        end = min(begin + size, case.k)
        for start in range(begin, end, RUN):
            part = slice(start, min(start + RUN, end))
            q, scale, _ = quantize_per_token_reference(x[:, part])
            runs.append((begin // size, part, q, scale[:, None]))
    return runs


def reference(case: Case, x: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """The definition, in fp64 after the quantisation of x."""
    codes, scales, zeros = unpack_weight_reference(*case.packed, case.bits, case.n, case.k)
    middle = 1 << (case.bits - 1)
    y = torch.zeros(len(x), case.n, dtype=torch.float64)
    for g, part, q, scale in quantised_runs(case, x):
        w = codes[:, part].double()
        integer = zeros is not None and zeros.dtype == torch.uint8
        w = w - (zeros[:, g, None].double() if integer else middle)
        w = w * scales[:, g, None].double()
        if zeros is not None and not integer:
            w = w + zeros[:, g, None].double()
        y += (q.double() * scale.double()) @ w.t()
    return y if bias is None else y + bias.double()


@pytest.mark.parametrize("seed", range(24))
def test_against_the_definition(isa: str, int8: None, seed: int) -> None:
    rng = random.Random(seed)
    bits, m = rng.choice([4, 8]), rng.choice([1, 2, 3, 4, 5, 7, 8, 9, 15, 17, 63, 64, 65, 129])
    n, k = rng.choice([1, 8, 31, 100, 152]), rng.choice([8, 33, 136, 264, 300, 608])
    group_size = rng.choice([-1, 8, 16, 32, 64, 128])
    case = make(bits, n, k, group_size, ZERO_MODES[seed % 3], rng.random() < 0.5, seed)
    dtype = rng.choice(FLOATS)
    x, bias = randn(m, k, seed=seed, dtype=dtype), randn(n, seed=seed + 1, dtype=dtype)
    assert_linear_error(case(x, bias), reference(case, x, bias), bits, m, n, k, group_size)
    assert_linear_error(case(x), reference(case, x), bits, m, n, k, group_size)


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("zeros", ZERO_MODES)
@pytest.mark.parametrize("group_size", [-1, 8, 32, 128])
def test_one_hot_inputs_give_the_dequantised_weight(
    isa: str, int8: None, bits: int, zeros: str, group_size: int
) -> None:
    """127 quantises to itself with scale 1, so every code, permutation and scale shows."""
    n, k = 40, 77
    case = make(bits, n, k, group_size, zeros, act_order=group_size == 32, seed=group_size + 2)
    x = torch.eye(k) * 127
    y = case(x)
    torch.testing.assert_close(y, case.dense.t() * 127, rtol=2e-6, atol=2e-6)
    if zeros != "float":  # an exact integer times the scale: one rounding
        assert torch.equal(y, reference(case, x).float())


def test_every_isa_level_gives_the_same_bits(int8: None, monkeypatch: pytest.MonkeyPatch) -> None:
    for seed in range(24):
        rng = random.Random(seed)
        bits, zeros = rng.choice([4, 8]), ZERO_MODES[seed % 3]
        case = make(
            bits,
            70,
            rng.choice([45, 264, 1100]),
            rng.choice([-1, 8, 128]),
            zeros,
            rng.random() < 0.5,
            seed,
        )
        x = randn(rng.choice([1, 2, 4, 13]), case.k, seed=seed, dtype=rng.choice(FLOATS)) * 3
        bias = randn(70, seed=1, dtype=x.dtype)
        results = []
        for level in available_isa_levels():
            monkeypatch.setenv("FASTINFER_CPU_ISA", level)
            results.append(case(x, bias))
        assert all(torch.equal(r, results[0]) for r in results), seed


@pytest.mark.parametrize("bits", [4, 8])
def test_rows_do_not_depend_on_each_other_nor_on_threads(isa: str, int8: None, bits: int) -> None:
    case = make(bits, 200, 136, 32, "int", seed=9)
    x = randn(67, 136, seed=2, dtype=torch.bfloat16)
    whole = case(x)
    for m in (1, 2, 3, 5, 8, 13):
        assert torch.equal(case(x[:m]), whole[:m])
        assert torch.equal(case(x[-m:], batch_invariant=True), whole[-m:])
    with threads(1):
        assert torch.equal(case(x), whole)


@pytest.mark.parametrize("zeros", ZERO_MODES)
@pytest.mark.parametrize("act_order", [False, True])
def test_nan_stays_in_its_row_and_padding_never_matters(
    isa: str, int8: None, zeros: str, act_order: bool
) -> None:
    case = make(4, 37, 45, 16, zeros, act_order, seed=11)
    x = randn(6, 45, seed=3)
    expected = case(x)
    case.packed.scales[:, 37:] = float("nan")
    case.packed.qweight.view(torch.uint8)[-1].reshape(-1, 16, 4)[:, 37 % 16 :] = 0xFF
    if zeros == "float":
        case.packed.zeros[:, 37:] = float("nan")
    storage, out = poisoned(6, 80), poisoned(6, 50)
    storage[:, :45] = x
    assert torch.equal(case(storage[:, :45], out=out[:, :37]), expected)
    assert out[:, 37:].isnan().all()
    x[2] = float("nan")
    x[4, 7] = float("inf")
    x[5, 44] = float("-inf")
    y = case(x)
    assert y[[2, 4, 5]].isnan().all()
    assert torch.equal(y[[0, 1, 3]], expected[[0, 1, 3]])


@pytest.mark.parametrize("bits", [4, 8])
def test_one_group_longer_than_an_int32_sum(isa: str, int8: None, bits: int) -> None:
    """70000 columns of the largest code times 127 leave int32; runs of 32768 do not."""
    n, k = 16, 70000
    codes = torch.full((n, k), 2**bits - 1, dtype=torch.uint8)
    zeros = torch.zeros(n, 1, dtype=torch.uint8)
    packed = Q.pack_weight(codes, torch.ones(n, 1), zeros, bits=bits, group_size=-1)
    case = Case(bits, n, k, -1, packed, None, codes.float())
    y = case(torch.full((2, k), 127.0))
    assert torch.equal(y, torch.full((2, n), float(k * 127 * (2**bits - 1))))
    x = randn(1, k, seed=1)
    x[0, 40000] = 50.0  # the scale of one run must not reach the others
    torch.testing.assert_close(case(x).double(), reference(case, x), rtol=1e-5, atol=1e-2)


# Relative error of the output against the exact path for normal x and weights. Measured at K =
# 4096: 0.0053 with groups of 32, 0.0064 of 128, 0.0085 with one group.
@pytest.mark.parametrize(("group_size", "bound"), [(32, 0.006), (128, 0.007), (-1, 0.01)])
@pytest.mark.parametrize("bits", [4, 8])
def test_distance_from_the_exact_path(
    monkeypatch: pytest.MonkeyPatch, bits: int, group_size: int, bound: float
) -> None:
    weight = Q.quantize_weight(randn(96, 1024, seed=1), bits, group_size)
    packed = Q.pack_weight(*weight, bits=bits, group_size=group_size)
    case = Case(bits, 96, 1024, group_size, packed, None, torch.empty(0))
    x = randn(16, 1024, seed=2)
    exact = case(x)
    monkeypatch.setenv(SWITCH, "1")
    error = relative_error(case(x), exact)
    assert 1e-3 < error < bound, error


def test_off_by_default_and_read_at_every_call(monkeypatch: pytest.MonkeyPatch) -> None:
    for bits in (4, 8):
        case = make(bits, 64, 256, 64, seed=bits)
        x = randn(3, 256, seed=1)
        monkeypatch.delenv(SWITCH, raising=False)
        exact = case(x)
        assert_linear_error(exact, x.double() @ case.dense.double().t())
        monkeypatch.setenv(SWITCH, "0")
        assert torch.equal(case(x), exact)
        monkeypatch.setenv(SWITCH, "1")
        assert not torch.equal(case(x), exact)
        monkeypatch.delenv(SWITCH)
        assert torch.equal(case(x), exact)


def test_zero_and_empty_inputs(int8: None) -> None:
    case, bias = make(4, 24, 40, 8, "float"), randn(24, seed=1)
    assert torch.equal(case(torch.zeros(3, 40), bias), bias.expand(3, 24))
    assert case(torch.empty(0, 40)).shape == (0, 24)
    none = make(8, 24, 0, -1)
    assert torch.equal(none(torch.empty(2, 0), bias), bias.expand(2, 24))
    assert make(4, 0, 16, 8)(torch.ones(2, 16)).shape == (2, 0)


def test_strides_leading_dimensions_and_out(int8: None) -> None:
    case = make(8, 24, 40, 8, seed=13)
    x, bias = randn(2, 3, 40, seed=5), randn(24, seed=6)
    flat = case(x.view(6, 40), bias)
    assert torch.equal(case(x, bias), flat.view(2, 3, 24))
    wide = torch.randn(6, 100, generator=generator(7))
    wide[:, 3:43] = x.view(6, 40)
    assert torch.equal(case(wide[:, 3:43], bias), flat)
    out = poisoned(2, 3, 24)
    assert case(x, bias, out=out) is out
    assert torch.equal(out.view(6, 24), flat)
