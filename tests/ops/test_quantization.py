"""quantize_weight, pack_weight, dequantize_weight, quantize_per_token."""

from __future__ import annotations

import random

import pytest
import torch

from fastinfer.ops import _reference_linear as R
from fastinfer.ops import quantization as Q
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

TINY = 1e-30


# ---- quantize_weight ---------------------------------------------------------------------------
@pytest.mark.parametrize(
    "bits, symmetric, group_size, expected",
    [
        (4, True, 32, 0.097),
        (4, True, 64, 0.108),
        (4, True, 128, 0.117),
        (4, True, -1, 0.157),
        (4, False, 32, 0.081),
        (4, False, 64, 0.091),
        (4, False, 128, 0.101),
        (4, False, -1, 0.140),
        (8, True, 32, 0.0053),
        (8, True, -1, 0.0087),
    ],
)
def test_error_on_gaussian_weights(
    bits: int, symmetric: bool, group_size: int, expected: float
) -> None:
    w = randn(128, 4096, seed=1)
    q = Q.quantize_weight(w, bits, group_size, symmetric=symmetric)
    error = relative_error(R.dequantize_codes_reference(*q, bits, group_size), w)
    assert error == pytest.approx(expected, rel=0.03)


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("symmetric", [False, True])
def test_bit_equal_to_the_reference(isa: str, bits: int, symmetric: bool) -> None:
    rng = random.Random(bits + symmetric)
    for scale_dtype in FLOATS:
        n, k, group_size = rng.choice([1, 5, 20]), rng.choice([8, 77, 200]), rng.choice([-1, 8, 64])
        w = randn(n, k, seed=n + k, dtype=rng.choice(FLOATS)) + rng.choice([0, 1])
        w[0, : min(k, 64)] = 0
        q = Q.quantize_weight(w, bits, group_size, symmetric=symmetric, scale_dtype=scale_dtype)
        reference = R.quantize_weight_reference(
            w, bits, group_size, symmetric=symmetric, scale_dtype=scale_dtype
        )
        for got, want in zip(q, reference, strict=True):
            assert (got is None and want is None) or torch.equal(got, want)


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("symmetric", [False, True])
def test_zero_tiny_huge_and_broken_groups(isa: str, bits: int, symmetric: bool) -> None:
    w = torch.ones(1, 5 * 16)
    w[:, :16] = 0
    w[:, 16:32] = TINY
    w[:, 32:48] = torch.tensor([1e7, -3e7]).repeat(8)
    w[:, 50] = float("nan")
    q = Q.quantize_weight(w, bits, 16, symmetric=symmetric, scale_dtype=torch.float16)
    middle = 2 ** (bits - 1)
    scales = q.scales[0].float()
    assert scales[0] == 1 and scales[1] == 1
    assert scales[2] == 65504 or scales[2] * 2**bits > 1e7
    assert scales[3].isnan() and not scales[4].isnan()
    dense = R.dequantize_codes_reference(*q, bits, 16)
    assert (dense[:, :32] == 0).all() and dense[:, 32:48].isfinite().all()
    zero = middle if symmetric else q.zeros[0, 3]
    assert (q.codes[:, 48:64] == zero).all()
    assert torch.allclose(dense[:, 64:], torch.ones(16), rtol=2e-3)


# ---- pack_weight, dequantize_weight ------------------------------------------------------------
def test_known_words_of_the_cuda_layout() -> None:
    row, col = torch.arange(64)[:, None], torch.arange(64)[None, :]
    codes = ((row + 3 * col) % 16).to(torch.uint8)
    words = Q.pack_weight(codes, torch.ones(64, 1), group_size=-1, layout="cuda").qweight
    assert words.shape == (1, 1, 512)
    lanes = words.view(4, 32, 4)[0, :, 0].long() & 0xFFFFFFFF
    assert [hex(int(lanes[i])) for i in (0, 5, 31)] == ["0x3bb30880", "0xa22a7ff7", "0xc44c9119"]


def test_known_words_of_the_cpu_layout() -> None:
    # 16 channels side by side, k = 0 in the lowest bits: GPTQ's order for one column of words.
    row, col = torch.arange(8)[:, None], torch.arange(8)[None, :]
    codes = ((3 * col + 5 * row) % 16).to(torch.uint8)
    words = Q.pack_weight(codes, torch.ones(8, 1), group_size=-1).qweight
    assert words.shape == (1, 1, 16)
    got = [f"{int(v) & 0xFFFFFFFF:08X}" for v in words[0, 0]]
    gptq = "52FC9630 A741EB85 FC9630DA 41EB852F 9630DA74 EB852FC9 30DA741E 852FC963"
    assert " ".join(got[:8]) == gptq
    assert got[8:] == ["88888888"] * 8
    codes = torch.tensor([[200, 1, 128, 255]], dtype=torch.uint8)
    words = Q.pack_weight(codes, torch.ones(1, 1), bits=8, group_size=-1).qweight
    assert int(words[0, 0, 0]) & 0xFFFFFFFF == 0xFF8001C8


@pytest.mark.parametrize("layout", ["cpu", "cuda"])
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("zeros", ["none", "int", "float"])
def test_packing_equals_the_reference_and_round_trips(layout: str, bits: int, zeros: str) -> None:
    rng = random.Random(f"{layout}{bits}{zeros}")
    for seed in range(4):
        g = generator(seed)
        n, k = rng.choice([1, 16, 40, 64, 70]), rng.choice([8, 64, 77, 130])
        group_size = rng.choice([-1, 8, 16, 24, 128])
        groups = -(-k // group_size) if group_size > 0 else 1
        codes = torch.randint(0, 2**bits, (n, k), generator=g, dtype=torch.uint8)
        dtype = FLOATS[seed % 3]
        scales = (torch.rand(n, groups, generator=g) + 0.1).to(dtype)
        z = None
        if zeros == "int":
            z = torch.randint(0, 2**bits, (n, groups), generator=g, dtype=torch.uint8)
        elif zeros == "float":
            z = torch.randn(n, groups, generator=g).to(dtype)
        perm = torch.randperm(k, generator=g).to(torch.int32) if seed % 2 else None
        args = {"bits": bits, "group_size": group_size, "perm": perm, "layout": layout}
        packed = Q.pack_weight(codes, scales, z, **args)
        for got, want in zip(
            packed, R.pack_weight_reference(codes, scales, z, **args), strict=True
        ):
            assert (got is None and want is None) or (
                got.dtype == want.dtype and torch.equal(got, want)
            )
        order = perm.long() if perm is not None else torch.arange(k)
        unpacked = R.unpack_weight_reference(*packed, bits, n, k)
        assert torch.equal(unpacked[0], codes[:, order])
        assert torch.equal(unpacked[1], scales.to(unpacked[1].dtype))
        for out_dtype in FLOATS:
            shape = {
                "bits": bits,
                "group_size": group_size,
                "out_features": n,
                "in_features": k,
                "perm": perm,
                "dtype": out_dtype,
            }
            dense = Q.dequantize_weight(*packed, **shape)
            assert torch.equal(dense, R.dequantize_weight_reference(*packed, **shape))
            direct = torch.empty(n, k)
            direct[:, order] = R.dequantize_codes_reference(
                codes[:, order], scales, z, bits, group_size
            )
            assert torch.equal(dense, direct.to(out_dtype))


def test_act_order_as_gptq_stores_it() -> None:
    n, k, group_size = 24, 64, 16
    w = randn(n, k, seed=1)
    g_idx = torch.arange(k)[torch.randperm(k, generator=generator(2))] // group_size
    scales = torch.stack([w[:, g_idx == g].abs().amax(1) / 7 for g in range(4)], 1)
    s = scales[:, g_idx]
    codes = ((w / s).round() + 8).to(torch.uint8)
    perm = torch.argsort(g_idx, stable=True)
    packed = Q.pack_weight(codes, scales, group_size=group_size, perm=perm)
    dense = Q.dequantize_weight(
        *packed, bits=4, group_size=group_size, out_features=n, in_features=k, perm=perm.int()
    )
    assert torch.equal(dense, (codes.float() - 8) * s)


def test_padding_stands_for_zero_weights() -> None:
    for layout in ("cpu", "cuda"):
        codes = torch.full((3, 9), 15, dtype=torch.uint8)
        zeros = torch.full((3, 2), 3, dtype=torch.uint8)
        packed = Q.pack_weight(codes, torch.ones(3, 2), zeros, group_size=8, layout=layout)
        rows, cols = (64, 64) if layout == "cuda" else (16, 16)
        full = R.unpack_weight_reference(*packed, 4, rows, cols)
        w = (full[0].float() - full[2].float()[:, [0] * 8 + [1] * (cols - 8)]) * 1.0
        w[:3, :9] = 0
        assert (w == 0).all() and (full[1][3:] == 0).all()


# ---- CUDA: the bits of the CPU ------------------------------------------------------------------
def same_bits(got: torch.Tensor | None, want: torch.Tensor | None) -> None:
    assert (got is None) == (want is None)
    if got is not None and want is not None:
        assert got.dtype == want.dtype
        torch.testing.assert_close(got.cpu(), want, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("device", devices("quantize_weight")[1:])
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("bits", [4, 8])
def test_quantize_weight_on_cuda_has_the_bits_of_the_cpu(
    dtype: torch.dtype, bits: int, device: str
) -> None:
    rng = random.Random(f"{dtype}{bits}")
    for n, k in ((1, 8), (70, 777), (512, 4096), (3, 14336), (130, 33)):
        wide = randn(n, k + 5, seed=n)
        wide *= torch.logspace(-36, 36, n)[:, None] if n == 512 else 1
        wide[0] = 0
        wide[n // 2, k // 2] = float("nan")
        wide[n // 3, k // 3] = float("inf")
        wide = wide.to(dtype)
        w, w_cuda = wide[:, 2 : 2 + k], wide.to(device)[:, 2 : 2 + k]
        for group_size in (-1, 8, 16, 128, rng.choice([24, 32, 64, 256])):
            options = {
                "symmetric": rng.random() < 0.5,
                "scale_dtype": rng.choice(FLOATS),
            }
            got = Q.quantize_weight(w_cuda, bits, group_size, **options)
            for a, b in zip(got, Q.quantize_weight(w, bits, group_size, **options), strict=True):
                same_bits(a, b)


@pytest.mark.parametrize("device", devices("pack_weight")[1:])
@pytest.mark.parametrize("layout", ["cpu", "cuda"])
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("zeros", ["none", "int", "float"])
def test_packing_on_cuda_has_the_bits_of_the_cpu(
    layout: str, bits: int, zeros: str, device: str
) -> None:
    rng = random.Random(f"{layout}{bits}{zeros}")
    for seed, (n, k) in enumerate(((1, 8), (64, 64), (70, 77), (130, 1111), (200, 520), (9, 130))):
        g = generator(seed)
        group_size = rng.choice([-1, 8, 16, 24, 128])
        groups = -(-k // group_size) if group_size > 0 else 1
        wide = torch.randint(0, 2**bits, (n, k + 3), generator=g, dtype=torch.uint8)
        codes, codes_cuda = wide[:, 1 : 1 + k], wide.to(device)[:, 1 : 1 + k]
        scales = (torch.rand(n, groups, generator=g) + 0.1).to(FLOATS[seed % 3])
        z = None
        if zeros == "int":
            z = torch.randint(0, 2**bits, (n, groups), generator=g, dtype=torch.uint8)
        elif zeros == "float":
            z = torch.randn(n, groups, generator=g).to(FLOATS[(seed + 1) % 3])
        perm = torch.randperm(k, generator=g).to(torch.int32) if seed % 2 else None

        def on_cuda(t: torch.Tensor | None) -> torch.Tensor | None:
            return None if t is None else t.to(device)

        args = {"bits": bits, "group_size": group_size, "layout": layout}
        packed = Q.pack_weight(codes, scales, z, perm=perm, **args)
        packed_cuda = Q.pack_weight(
            codes_cuda, on_cuda(scales), on_cuda(z), perm=on_cuda(perm), **args
        )
        for got, want in zip(packed_cuda, packed, strict=True):
            same_bits(got, want)
        shape = {"bits": bits, "group_size": group_size, "out_features": n, "in_features": k}
        for dtype in FLOATS:
            dense = Q.dequantize_weight(*packed_cuda, perm=on_cuda(perm), dtype=dtype, **shape)
            same_bits(dense, Q.dequantize_weight(*packed, perm=perm, dtype=dtype, **shape))
            out = poisoned(n, k + 8, dtype=dtype, device=device)
            torch.ops.fastinfer.dequantize_weight(
                *packed_cuda, bits=bits, group_size=group_size, perm=on_cuda(perm), out=out[:, :k]
            )
            same_bits(out[:, :k], dense.cpu())
            assert out[:, k:].isnan().all()


@pytest.mark.parametrize("device", devices("pack_weight")[1:])
def test_codes_and_perm_on_cuda_are_looked_at_when_asked(
    monkeypatch: pytest.MonkeyPatch, device: str
) -> None:
    codes = _codes().to(device)
    codes[1, 3] = 0x2A
    ones = torch.ones(4, 1, device=device)
    masked = Q.pack_weight(codes, ones, group_size=-1)
    codes[1, 3] = 0x0A
    assert torch.equal(masked.qweight, Q.pack_weight(codes, ones, group_size=-1).qweight)
    monkeypatch.setenv("FASTINFER_VALIDATE", "1")
    codes[1, 3] = 0x2A
    refuses(
        lambda: Q.pack_weight(codes, ones, group_size=-1),
        "codes must lie in [0, 15] for bits=4, got 42 at [1, 3]",
    )
    shape = {"bits": 4, "group_size": -1, "out_features": 4, "in_features": 16}
    perm = torch.full((16,), 99, dtype=torch.int32, device=device)
    refuses(
        lambda: Q.dequantize_weight(*masked, perm=perm, **shape),
        "perm must hold column numbers in [0, 16), got 99",
    )


# ---- quantize_per_token ------------------------------------------------------------------------
PER_TOKEN = pytest.mark.parametrize("device", devices("quantize_per_token"))


@PER_TOKEN
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("symmetric", [False, True])
def test_per_token_is_bit_equal_to_the_reference(
    isa: str, dtype: torch.dtype, symmetric: bool, device: str
) -> None:
    for k in (1, 7, 64, 515):
        x = randn(9, k, seed=k, dtype=dtype, device=device)
        x[1], x[2] = 0, x[2] + 5
        x[3] = -x[3].abs()
        x[4, 0] = 300
        got = Q.quantize_per_token(x, symmetric=symmetric)
        # On the CPU: torch divides by a constant with a multiplication on CUDA.
        want = R.quantize_per_token_reference(x.cpu(), symmetric=symmetric)
        for a, b in zip(got, want, strict=True):
            assert (a is None and b is None) or torch.equal(a.cpu(), b), k
        assert got[1][1] == 1 and (got[0][1] == 0).all()
        wide = poisoned(9, k + 9, dtype=dtype, device=device)
        wide[:, 4 : 4 + k] = x
        strided = Q.quantize_per_token(wide[:, 4 : 4 + k], symmetric=symmetric)
        assert torch.equal(strided[0], got[0])
        assert torch.equal(Q.quantize_per_token(x[5:6], symmetric=symmetric)[0], got[0][5:6])


@pytest.mark.parametrize("device", devices("quantize_per_token")[1:])
@pytest.mark.parametrize("dtype", FLOATS)
def test_per_token_on_cuda_has_the_bits_of_the_cpu(dtype: torch.dtype, device: str) -> None:
    """Every quotient is the IEEE one: rows of all magnitudes, many of their elements near a tie."""
    for m, k in ((400, 4096), (3, 14336), (2, 70000), (500, 129), (3, 0)):
        x = randn(m, k, seed=k)
        if k:
            x *= torch.logspace(-36, 36, m)[:, None]  # zeros, subnormal and infinite ones too
            ties = torch.randint(-254, 255, (m, k // 2), generator=generator(k)).double() / 2
            x[:, : k // 2] = (ties * (x.abs().amax(1, keepdim=True).double() / 127)).float()
        x = x.to(dtype)
        for symmetric in (True, False):
            got = Q.quantize_per_token(x.to(device), symmetric=symmetric)
            for a, b in zip(got, Q.quantize_per_token(x, symmetric=symmetric), strict=True):
                if a is not None and b is not None:
                    torch.testing.assert_close(a.cpu(), b, rtol=0, atol=0, equal_nan=True)
        for scale in (torch.tensor(0.01), torch.tensor([1e-38]), torch.tensor(3e30)):
            a, b = (
                Q.quantize_per_token(x.to(device), scale.to(device)),
                Q.quantize_per_token(x, scale),
            )
            assert torch.equal(a[0].cpu(), b[0]) and torch.equal(a[1].cpu(), b[1])


@PER_TOKEN
def test_per_token_error_and_static_scale(isa: str, device: str) -> None:
    x = randn(16, 4096, seed=3, device=device)
    q, s, zeros = Q.quantize_per_token(x)
    assert zeros is None and relative_error(q * s[:, None], x) == pytest.approx(0.0087, rel=0.05)
    q, s, z = Q.quantize_per_token(x + 2, symmetric=False)
    assert relative_error((q - z[:, None]) * s[:, None], x + 2) < 0.0087
    static = torch.tensor([0.01], device=device)
    q, s, _ = Q.quantize_per_token(x, static)
    assert torch.equal(s, static.expand(16))
    assert torch.equal(q.cpu(), R.quantize_per_token_reference(x.cpu(), static.cpu())[0])
    assert q.max() == 127 and q.min() == -127


@PER_TOKEN
@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_per_token_marks_broken_rows(isa: str, symmetric: bool, bad: float, device: str) -> None:
    x = randn(3, 40, seed=4, device=device)
    expected = Q.quantize_per_token(x, symmetric=symmetric)
    x[1, 38] = bad
    q, s, z = Q.quantize_per_token(x, symmetric=symmetric)
    assert s[1].isnan() and (q[1] == 0).all() and (z is None or z[1] == 0)
    assert torch.equal(q[::2], expected[0][::2]) and torch.equal(s[::2], expected[1][::2])


def test_leading_dimensions_out_and_empty_cases() -> None:
    x = randn(2, 3, 8, seed=1)
    out = poisoned(2, 3, 8, dtype=torch.int8)
    q, s, _ = Q.quantize_per_token(x, out=out)
    assert q is out and s.shape == (6,)
    scale, zeros = poisoned(6), torch.full((6,), 99, dtype=torch.int32)
    codes = out.clone()
    for given in ((codes, scale), (codes, scale, zeros)):
        want = Q.quantize_per_token(x, symmetric=len(given) == 2)
        got = Q.quantize_per_token(x, symmetric=len(given) == 2, out=given)
        assert all(a is b for a, b in zip(given, got, strict=False))
        assert all(torch.equal(a, b) for a, b in zip(want, got, strict=True) if b is not None)
    assert torch.equal(q.view(6, 8), Q.quantize_per_token(x.view(6, 8))[0])
    assert Q.quantize_per_token(x[0, 0])[1].shape == (1,)
    q, s, _ = Q.quantize_per_token(torch.empty(0, 8))
    assert q.shape == (0, 8) and s.shape == (0,)
    assert (Q.quantize_per_token(torch.empty(2, 0))[1] == 1).all()
    for n, k in ((0, 16), (3, 0), (0, 0)):
        weight = Q.quantize_weight(torch.empty(n, k), 4, 8, symmetric=False)
        for layout in ("cpu", "cuda"):
            packed = Q.pack_weight(*weight, group_size=8, layout=layout)
            dense = Q.dequantize_weight(
                *packed, bits=4, group_size=8, out_features=n, in_features=k
            )
            assert dense.shape == (n, k)


# ---- wrong input, grad, opcheck, compile ---------------------------------------------------------
def _codes(n: int = 4, k: int = 16) -> torch.Tensor:
    return torch.zeros(n, k, dtype=torch.uint8)


def _dequantize(**changes: object) -> torch.Tensor:
    packed = Q.pack_weight(_codes(), torch.ones(4, 2), group_size=8)
    args = dict(packed._asdict(), bits=4, group_size=8, out_features=4, in_features=16)
    return Q.dequantize_weight(**(args | changes))


ONES = torch.ones
WRONG = {
    "weight dtype": (lambda: Q.quantize_weight(ONES(4, 8).int()), "weight must be"),
    "weight dim": (lambda: Q.quantize_weight(ONES(8)), "weight must have 2 dimensions"),
    "weight stride": (lambda: Q.quantize_weight(ONES(8, 4).t()), "weight must be contiguous"),
    "weight bits": (lambda: Q.quantize_weight(ONES(4, 8), 3), "bits must be 4 or 8, got 3"),
    "weight group": (lambda: Q.quantize_weight(ONES(4, 8), 4, 0), "group_size must be -1"),
    "scale dtype": (
        lambda: Q.quantize_weight(ONES(4, 8), scale_dtype=torch.float64),
        "scales must be",
    ),
    "codes dtype": (lambda: Q.pack_weight(ONES(4, 8), ONES(4, 1)), "codes must be torch.uint8"),
    "codes dim": (lambda: Q.pack_weight(_codes()[0], ONES(4, 1)), "codes must have 2 dimensions"),
    "codes range": (
        lambda: Q.pack_weight(_codes() + 16, ONES(4, 1)),
        "codes must lie in [0, 15] for bits=4, got 16 at [0, 0]",
    ),
    "pack bits": (lambda: Q.pack_weight(_codes(), ONES(4, 1), bits=5), "bits must be 4 or 8"),
    "pack group": (lambda: Q.pack_weight(_codes(), ONES(4, 1), group_size=4), "group_size must"),
    "pack layout": (lambda: Q.pack_weight(_codes(), ONES(4, 1), layout="gpu"), "layout must be"),
    "pack scales dtype": (lambda: Q.pack_weight(_codes(), ONES(4, 1).double()), "scales must be"),
    "pack scales shape": (
        lambda: Q.pack_weight(_codes(), ONES(4, 2)),
        "scales must have shape [4, 1]",
    ),
    "pack zeros dtype": (
        lambda: Q.pack_weight(_codes(), ONES(4, 1), ONES(4, 1).int()),
        "zeros must be",
    ),
    "pack zeros shape": (
        lambda: Q.pack_weight(_codes(), ONES(4, 1), ONES(3, 1)),
        "zeros must have shape [4, 1]",
    ),
    "pack perm shape": (
        lambda: Q.pack_weight(_codes(), ONES(4, 1), perm=torch.arange(8)),
        "perm must be torch.int32 or torch.int64 [16]",
    ),
    "pack perm values": (
        lambda: Q.pack_weight(_codes(), ONES(4, 1), perm=torch.zeros(16).int()),
        "perm must hold every column number",
    ),
    "unpack layout": (lambda: _dequantize(in_features=24), "qweight must be 4-bit weights packed"),
    "unpack dtype": (lambda: _dequantize(dtype=torch.float64), "out must be"),
    "unpack bits": (lambda: _dequantize(bits=8), "qweight must be 8-bit weights packed"),
    "unpack scales": (lambda: _dequantize(scales=ONES(2, 8)), "scales must have shape [2, 16]"),
    "unpack perm": (
        lambda: _dequantize(perm=torch.full((16,), 99).int()),
        "perm must hold column numbers in [0, 16), got 99",
    ),
    "x dtype": (lambda: Q.quantize_per_token(ONES(2, 8).int()), "x must be"),
    "x stride": (lambda: Q.quantize_per_token(ONES(8, 2).t()), "x must be contiguous"),
    "x scalar": (lambda: Q.quantize_per_token(torch.tensor(1.0)), "x must have shape"),
    "out shape": (
        lambda: Q.quantize_per_token(ONES(2, 8), out=_codes()),
        "out must be contiguous with shape [2, 8]",
    ),
    "out of two": (
        lambda: Q.quantize_per_token(ONES(4, 16), symmetric=False, out=(_codes(), ONES(4))),
        "out must be (q, scale, zeros), got 2",
    ),
    "out dtype": (
        lambda: Q.quantize_per_token(ONES(4, 16), out=_codes()),
        "q must be torch.int8",
    ),
    "static shape": (
        lambda: Q.quantize_per_token(ONES(2, 8), ONES(2)),
        "static_scale must hold one value",
    ),
    "static dtype": (
        lambda: Q.quantize_per_token(ONES(2, 8), ONES(1).half()),
        "static_scale must be torch.float32",
    ),
    "static zeros": (
        lambda: Q.quantize_per_token(ONES(2, 8), ONES(1), symmetric=False),
        "pass symmetric=True",
    ),
}


@pytest.mark.parametrize("wrong", WRONG)
def test_wrong_input_is_one_sentence(wrong: str) -> None:
    call, words = WRONG[wrong]
    refuses(call, words)


def test_validate_looks_at_the_static_scale(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FASTINFER_VALIDATE", "1")
    refuses(lambda: Q.quantize_per_token(ONES(2, 8), torch.zeros(1)), "static_scale must be pos")


def test_grad_is_refused() -> None:
    w = torch.ones(4, 8, requires_grad=True)
    refuses(lambda: Q.quantize_weight(w), "quantize_weight", "requires grad")
    refuses(lambda: Q.quantize_per_token(w), "quantize_per_token", "requires grad")
    scales = torch.ones(4, 1, requires_grad=True)
    refuses(lambda: Q.pack_weight(_codes(4, 8), scales), "pack_weight", "requires grad")
    scales = torch.ones(2, 16, requires_grad=True)
    refuses(lambda: _dequantize(scales=scales), "dequantize_weight", "requires grad")


def test_opcheck() -> None:
    ops = torch.ops.fastinfer
    w, x = randn(4, 16, seed=1), randn(3, 16, seed=2)
    u8, i32 = torch.uint8, torch.int32
    q = {"codes": _codes(), "scales": torch.empty(4, 2), "zeros": torch.empty(4, 2, dtype=u8)}
    opcheck(ops.quantize_weight.default, (w,), dict(bits=4, group_size=8, **q))
    codes, scales, zeros = Q.quantize_weight(w, 4, 8, symmetric=False)
    packed = {
        "qweight": torch.empty(1, 2, 16, dtype=i32),
        "packed_scales": torch.empty(2, 16),
        "packed_zeros": torch.empty(2, 16, dtype=u8),
    }
    opcheck(ops.pack_weight.default, (codes, scales, zeros), dict(bits=4, group_size=8, **packed))
    args = Q.pack_weight(codes, scales, zeros, group_size=8)
    kwargs = {
        "bits": 4,
        "group_size": 8,
        "perm": torch.arange(16, dtype=i32),
        "out": torch.empty(4, 16),
    }
    opcheck(ops.dequantize_weight.default, tuple(args), kwargs)
    kwargs = {
        "static_scale": None,
        "q": torch.empty(3, 16, dtype=torch.int8),
        "scale": torch.empty(3),
        "zeros": torch.empty(3, dtype=i32),
    }
    opcheck(ops.quantize_per_token.default, (x,), kwargs, cuda=True)


def test_compile() -> None:
    def fn(w: torch.Tensor) -> torch.Tensor:
        packed = Q.pack_weight(*Q.quantize_weight(w, 4, 8, symmetric=False), group_size=8)
        return Q.dequantize_weight(
            *packed, bits=4, group_size=8, out_features=w.shape[0], in_features=w.shape[1]
        )

    w = randn(20, 24, seed=1)
    assert torch.equal(compiles(fn, w), fn(w))
