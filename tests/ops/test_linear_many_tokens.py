"""int4_linear and int8_linear with many tokens: every path that the CUDA dispatch may take (and the
CPU, where the same calls have to hold).
"""

from __future__ import annotations

import random

import pytest
import torch

from fastinfer.ops import quantization as Q
from fastinfer.ops._reference_linear import dequantize_codes_reference
from fastinfer.ops.linear import int4_linear, int8_linear
from helpers import HALF, LINEAR_BOUNDS, devices, generator, poisoned, randn, relative_error

DEVICES = devices("int4_linear")
ZERO_MODES = ("none", "int", "float")


class Layer:
    """Random packed weights on a device, and the dense fp32 weight [N, K] they stand for."""

    def __init__(
        self,
        device: str,
        bits: int,
        n: int,
        k: int,
        group_size: int,
        zeros: str = "none",
        act_order: bool = False,
        scale_dtype: torch.dtype = torch.float32,
        seed: int = 0,
    ) -> None:
        g = generator(seed)
        groups = -(-k // group_size) if group_size > 0 else 1
        codes = torch.randint(0, 2**bits, (n, k), generator=g, dtype=torch.uint8)
        scales = (torch.rand(n, groups, generator=g) * 0.02 + 0.001).to(scale_dtype)
        z = None
        if zeros == "int":
            z = torch.randint(0, 2**bits, (n, groups), generator=g, dtype=torch.uint8)
        elif zeros == "float":
            z = torch.randn(n, groups, generator=g) * 0.05
        perm = torch.randperm(k, generator=g).to(torch.int32) if act_order else None
        order = slice(None) if perm is None else perm.long()
        self.dense = torch.empty(n, k)
        self.dense[:, order] = dequantize_codes_reference(
            codes[:, order], scales.float(), z, bits, group_size
        )
        packed = Q.pack_weight(
            codes, scales, z, bits=bits, group_size=group_size, perm=perm, layout=device
        )
        self.packed = [t if t is None else t.to(device) for t in packed]
        self.perm = None if perm is None else perm.to(device)
        self.device, self.bits, self.n, self.group_size = device, bits, n, group_size

    def __call__(self, x: torch.Tensor, bias: torch.Tensor | None = None, **kw) -> torch.Tensor:
        op = int4_linear if self.bits == 4 else int8_linear
        return op(
            x,
            *self.packed,
            bias,
            group_size=self.group_size,
            out_features=self.n,
            perm=self.perm,
            **kw,
        )


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("zeros", ZERO_MODES)
@pytest.mark.parametrize("group_size", [-1, 16, 32, 64, 128, 256])
def test_one_hot_rows_give_the_dequantised_weight(
    device: str, bits: int, zeros: str, group_size: int
) -> None:
    rng = random.Random(f"{bits}{zeros}{group_size}{device}")
    n, k = rng.choice([1, 40, 65, 130, 200]), rng.choice([40, 72, 130, 264, 300])
    act_order = rng.random() < 0.4
    for scales in (torch.float32, torch.float16, torch.bfloat16) if device == "cuda" else (None,):
        layer = Layer(
            device, bits, n, k, group_size, zeros, act_order, scales or torch.float32, seed=3
        )
        for dtype in HALF:
            for m in (k, min(k, 12), min(k, 30), min(k, 35), min(k, 100)):
                y = layer(torch.eye(k, dtype=dtype, device=device)[:m])
                want = layer.dense.t()[:m].to(dtype)
                assert torch.equal(y.cpu(), want), (n, k, m, dtype, scales)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("seed", range(16))
def test_error_for_many_tokens(device: str, seed: int) -> None:
    rng = random.Random(seed)
    bits, dtype = rng.choice([4, 8]), rng.choice(HALF)
    m, n = rng.choice([9, 16, 24, 33, 64, 100, 128, 129, 257, 520]), rng.choice([8, 100, 384, 1000])
    k = rng.choice([104, 264, 520, 1100])
    layer = Layer(
        device,
        bits,
        n,
        k,
        rng.choice([-1, 16, 32, 64, 128]),
        rng.choice(ZERO_MODES),
        rng.random() < 0.3,
        rng.choice([torch.float32, torch.float16, torch.bfloat16])
        if device == "cuda"
        else torch.float32,
        seed,
    )
    x, bias = randn(m, k, seed=seed, dtype=dtype), randn(n, seed=seed + 1, dtype=dtype)
    outlier = x.clone()
    outlier[:, 5] *= 100
    # Weights rounded to 16 bits before the product add their own error to that of the output.
    bound = (
        {torch.float16: 5e-4, torch.bfloat16: 3.5e-3}[dtype]
        if device == "cuda"
        else (LINEAR_BOUNDS[dtype])
    )
    for inputs in (x, x + 10, outlier):
        reference = inputs.double() @ layer.dense.double().t() + bias.double()
        y = layer(inputs.to(device), bias.to(device))
        assert relative_error(y.cpu(), reference) <= bound, (m, n, k)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("m", [12, 20, 40, 130, 300])
def test_strides_alignment_and_padding(device: str, m: int) -> None:
    n, k = 131, 200
    layer = Layer(device, 4, n, k, 64, "int", seed=5)
    x = randn(m, k, seed=1, dtype=torch.bfloat16, device=device)
    expected = layer(x)
    for first in (0, 3, 8):  # columns of a wider tensor, everything around them NaN
        wide = poisoned(m, k + 64, dtype=torch.bfloat16, device=device)
        wide[:, first : first + k] = x
        out = poisoned(m, n + 13, dtype=torch.bfloat16, device=device)
        y = layer(wide[:, first : first + k], out=out[:, first : first + n])
        assert torch.equal(y, expected)
        assert out[:, :first].isnan().all() and out[:, first + n :].isnan().all()


@pytest.mark.parametrize("device", DEVICES)
def test_nan_stays_in_its_row(device: str) -> None:
    layer = Layer(device, 4, 100, 136, 32, seed=6)
    x = randn(70, 136, seed=2, dtype=torch.bfloat16, device=device)
    expected = layer(x)
    x[3], x[66, 5] = float("nan"), float("inf")
    y = layer(x)
    assert y[3].isnan().all() and not y[66].isfinite().any()
    rest = [i for i in range(70) if i not in (3, 66)]
    assert torch.equal(y[rest], expected[rest])


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("bits", [4, 8])
def test_integer_sums_are_exact_however_they_are_cut(device: str, bits: int) -> None:
    n, k = 192, 2048
    layer = Layer(device, bits, n, k, 128, "int", seed=8)
    layer.packed[1].fill_(0.25)
    dense = Q.dequantize_weight(
        *layer.packed, bits=bits, group_size=128, out_features=n, in_features=k
    ).double()
    for m in (9, 16, 17, 32, 33, 64, 128, 256):
        x = torch.randint(-1, 2, (m, k), generator=generator(m)).double().to(device)
        exact = x @ dense.t()
        assert torch.equal(layer(x.half()), exact.half()), m
