"""silu_and_mul, gelu_and_mul, silu_and_mul_quant."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fastinfer.ops.activation import (
    gelu_and_mul,
    gelu_and_mul_reference,
    silu_and_mul,
    silu_and_mul_quant,
    silu_and_mul_quant_reference,
    silu_and_mul_reference,
)
from helpers import (
    FLOATS,
    assert_close_to_reference,
    assert_codes_match,
    assert_same,
    compiles,
    devices,
    opcheck,
    poisoned,
    randn,
    refuses,
    special_rows,
    threads,
)

OPS = torch.ops.fastinfer
ODD = (1, 17, 63, 65, 127, 1000, 2049)
KINDS = ("silu", "none", "tanh")
DEVICES = pytest.mark.parametrize("device", devices("silu_and_mul"))
QUANT = pytest.mark.parametrize("device", devices("silu_and_mul_quant"))


def run(kind: str, x: Tensor, out: Tensor | None = None) -> Tensor:
    return silu_and_mul(x, out=out) if kind == "silu" else gelu_and_mul(x, kind, out=out)


def reference(kind: str, x: Tensor) -> Tensor:
    return silu_and_mul_reference(x) if kind == "silu" else gelu_and_mul_reference(x, kind)


def baseline(kind: str, x: Tensor) -> Tensor:
    gate, up = x.chunk(2, -1)
    return (F.silu(gate) if kind == "silu" else F.gelu(gate, approximate=kind)) * up


@DEVICES
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", FLOATS)
def test_matches_fp64(isa: str, dtype: torch.dtype, kind: str, device: str) -> None:
    for i, inner in enumerate(ODD):
        x = (2 * randn(3, 2 * inner, seed=i, device=device)).to(dtype)
        out = poisoned(3, inner, dtype=dtype, device=device)
        assert run(kind, x, out) is out
        assert_close_to_reference(out, reference(kind, x.double()), baseline(kind, x))


@DEVICES
@pytest.mark.parametrize("kind", KINDS)
def test_relative_error_over_the_whole_range(isa: str, kind: str, device: str) -> None:
    """No cancellation for large negative gates (torch's own GELU has some, in fp64 too, so the
    expected values are written without it).
    """
    gate = torch.linspace(-9, 9, 20001)
    g = gate.double()
    factor = {
        "silu": torch.sigmoid(g),
        "none": torch.special.erfc(-g / 2**0.5) / 2,
        "tanh": torch.sigmoid((8 / torch.pi) ** 0.5 * (g + 0.044715 * g**3)),
    }[kind]
    x = torch.cat((gate, torch.ones_like(gate))).view(1, -1)
    got = run(kind, x.to(device))[0].cpu().double()
    error = (got / (g * factor) - 1)[g != 0].abs().max()
    # An exponent of size e carries a rounding of e * 2^-24: e = 40 for erf, 66 for tanh.
    assert error < (4e-6 if kind != "tanh" else 1e-5), error


@DEVICES
@pytest.mark.parametrize("kind", KINDS)
def test_extreme_values(isa: str, kind: str, device: str) -> None:
    gate = torch.tensor([0.0, -0.0, 100.0, -100.0, 3e4, -3e4, torch.inf, torch.nan])
    x = torch.cat((gate, torch.ones_like(gate))).to(device)
    got, want = run(kind, x).cpu(), torch.tensor([0, 0, 100, 0, 3e4, 0, torch.inf, torch.nan])
    torch.testing.assert_close(got, want, equal_nan=True)
    # A NaN in one row stays there.
    rows = torch.ones(3, 34, device=device)
    rows[1, 5] = torch.nan
    assert run(kind, rows).isnan().sum() == 1


@DEVICES
@pytest.mark.parametrize("kind", KINDS)
def test_strides_leading_dims_and_empty(kind: str, device: str) -> None:
    x = randn(5, 4, 3, 80, seed=1, device=device)
    views = (x[..., :38], x[:, 1:3, :, 2:40], x.transpose(0, 2)[..., :38], x[1, 1, 1, :38])
    for v in views:
        want = run(kind, v.contiguous())
        assert torch.equal(run(kind, v), want)
        wide = torch.full((*want.shape[:-1], 50), 7.0, device=device)
        run(kind, v, wide[..., 3:22])
        assert torch.equal(wide[..., 3:22], want)
        assert (wide[..., :3] == 7).all() and (wide[..., 22:] == 7).all()
    for shape in ((0, 8), (3, 0), (2, 0, 6)):
        assert run(kind, torch.empty(shape, device=device)).shape == (*shape[:-1], shape[-1] // 2)


def test_threads_do_not_change_bits() -> None:
    x = randn(7, 2 * 5000, seed=2, dtype=torch.bfloat16)
    results = []
    for n in (1, 2, 3):
        with threads(n):
            results.append((*(run(k, x) for k in KINDS), *silu_and_mul_quant(x)[:2]))
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))
    assert torch.equal(silu_and_mul(x[3:4]), results[0][0][3:4])  # batch mates do not matter


@QUANT
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("dtype", FLOATS)
def test_quant_matches_reference(
    isa: str, dtype: torch.dtype, symmetric: bool, device: str
) -> None:
    for i, inner in enumerate(ODD):
        x = randn(3, 2 * inner, seed=i, dtype=dtype, device=device)
        assert_codes_match(
            silu_and_mul_quant(x, symmetric=symmetric),
            silu_and_mul_quant_reference(x, symmetric=symmetric),
            silu_and_mul_reference(x.double()),
        )
    x = randn(4, 3, 70, seed=9, dtype=dtype, device=device)
    a = silu_and_mul_quant(x.transpose(0, 1)[..., 1:67], symmetric=symmetric)
    b = silu_and_mul_quant(x.transpose(0, 1)[..., 1:67].contiguous(), symmetric=symmetric)
    assert a[0].shape == (3, 4, 33) and a[1].shape == (3, 4)
    assert all(torch.equal(s, t) for s, t in zip(a, b, strict=True) if s is not None)
    out = tuple(torch.empty_like(t) for t in b if t is not None)
    c = silu_and_mul_quant(x.transpose(0, 1)[..., 1:67], symmetric=symmetric, out=out)
    assert all(s is t for s, t in zip(out, c, strict=False))
    assert all(torch.equal(s, t) for s, t in zip(b, c, strict=True) if s is not None)


@DEVICES
def test_a_row_does_not_depend_on_the_path_nor_on_its_mates(device: str) -> None:
    """One row alone, one of many, aligned or not, staged or computed twice: the same bits."""
    for inner in (24, 512, 4096, 14336, 45000):
        x = randn(5, 2 * inner, seed=inner, dtype=torch.bfloat16, device=device)
        shifted = poisoned(5, 2 * inner + 5, dtype=x.dtype, device=device)[:, 3 : 2 * inner + 3]
        shifted.copy_(x)
        codes = silu_and_mul_quant(x)
        for kind in KINDS:
            want = run(kind, x)
            assert torch.equal(run(kind, x[3:4]), want[3:4])
            assert torch.equal(run(kind, shifted), want)
        for got, want in zip(silu_and_mul_quant(shifted)[:2], codes[:2], strict=True):
            assert torch.equal(got, want)
        assert torch.equal(silu_and_mul_quant(x[3:4])[0], codes[0][3:4])
        assert_codes_match(
            codes, silu_and_mul_quant_reference(x), silu_and_mul_reference(x.double())
        )


@DEVICES
def test_many_rows_have_the_bits_of_one(device: str) -> None:
    """Enough of them for the layouts that a launch takes for many rows."""
    for inner in (48, 4096, 14336) if device == "cuda" else (48,):
        x = special_rows(randn(600, 2 * inner, seed=inner, dtype=torch.bfloat16, device=device))
        outputs = [run(kind, x) for kind in KINDS]
        codes = [silu_and_mul_quant(x, symmetric=s) for s in (False, True)]
        for r in (*range(8), 599):
            row = x[r : r + 1]
            for kind, want in zip(KINDS, outputs, strict=True):
                assert_same(run(kind, row), want[r : r + 1])
            for symmetric in (False, True):
                alone = silu_and_mul_quant(row, symmetric=symmetric)
                for a, b in zip(alone, codes[symmetric], strict=True):
                    assert (a is None) == (b is None)
                    if a is not None and b is not None:
                        assert_same(a, b[r : r + 1])


@pytest.mark.parametrize("device", devices("silu_and_mul")[1:])
def test_cuda_agrees_with_the_cpu(device: str) -> None:
    for dtype in FLOATS:
        x = randn(5, 2000, seed=1, dtype=dtype)
        step = {torch.float32: 2e-6, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}[dtype]
        for kind in KINDS:
            torch.testing.assert_close(
                run(kind, x.to(device)).cpu(), run(kind, x), rtol=step, atol=1e-6
            )
        got, want = silu_and_mul_quant(x.to(device)), silu_and_mul_quant(x)
        torch.testing.assert_close(got[1].cpu(), want[1], rtol=1e-6, atol=0)
        assert (got[0].cpu().int() - want[0].int()).abs().max() <= 1


@QUANT
def test_quant_edge_rows(device: str) -> None:
    x = randn(4, 20, seed=3, device=device)
    x[1] = 0
    x[2, 0] = torch.nan
    q, scale, zeros = silu_and_mul_quant(x, symmetric=False)
    alone = silu_and_mul_quant(x[3:], symmetric=False)
    assert scale[1] == 1 and zeros[1] == 0 and (q[1] == 0).all()
    assert scale[2].isnan() and scale[[0, 3]].isfinite().all()
    assert torch.equal(q[3:], alone[0])
    q, scale, zeros = silu_and_mul_quant(torch.empty(0, 8, device=device))
    assert q.shape == (0, 4) and scale.shape == (0,) and zeros is None
    q, scale, _ = silu_and_mul_quant(torch.empty(3, 0, device=device))
    assert q.shape == (3, 0) and scale.tolist() == [1.0] * 3


def test_opcheck() -> None:
    x = randn(3, 34, seed=1)
    for view in (x, x[:, :20], x[:0]):
        out = torch.empty(view.shape[0], view.shape[1] // 2)
        opcheck(OPS.silu_and_mul, (view,), {"out": out}, cuda=True)
        kw = {"tanh_approximation": True, "out": out}
        opcheck(OPS.gelu_and_mul, (view,), kw, cuda=True)
        q, scale = torch.empty_like(out, dtype=torch.int8), torch.empty(view.shape[0])
        for zeros in (None, torch.empty(view.shape[0], dtype=torch.int32)):
            kw = {"q": q, "scale": scale, "zeros": zeros}
            opcheck(OPS.silu_and_mul_quant, (view,), kw, cuda=True)


@pytest.mark.parametrize("device", devices("silu_and_mul"))
def test_compiles(device: str) -> None:
    def f(x: Tensor) -> tuple[Tensor, ...]:
        q, scale, zeros = silu_and_mul_quant(x + 1, symmetric=False)
        return silu_and_mul(x) + 1, gelu_and_mul(x, "tanh"), q, scale, zeros

    x = randn(3, 34, seed=1, device=device)
    for got, want in zip(compiles(f, x), f(x), strict=True):
        assert torch.equal(got, want)


def test_refusals() -> None:
    x = torch.ones(2, 6)
    for name, fn in (
        ("silu_and_mul", silu_and_mul),
        ("gelu_and_mul", gelu_and_mul),
        ("silu_and_mul_quant", silu_and_mul_quant),
    ):
        refuses(lambda fn=fn: fn(torch.ones(2, 5)), name, "x", "2I")
        refuses(lambda fn=fn: fn(torch.tensor(1.0)), name, "x", "2I")
        refuses(lambda fn=fn: fn(x.double()), name, "x", "float64")
        refuses(lambda fn=fn: fn(torch.ones(6, 4).t()), name, "x", "contiguous")
        refuses(lambda fn=fn: fn(x.clone().requires_grad_()), name, "grad")
    wide = torch.zeros(2, 3, 40)
    refuses(lambda: silu_and_mul(wide[..., :24], out=wide[..., 23:35]), "out must not share memory")
    silu_and_mul(wide[..., :24], out=wide[..., 24:36])  # slices of one buffer that are apart
    refuses(lambda: silu_and_mul(x, out=torch.empty(2, 4)), "silu_and_mul", "out", "[2, 6]")
    refuses(lambda: silu_and_mul(x, out=torch.empty(2, 3).half()), "silu_and_mul", "out", "dtype")
    refuses(lambda: silu_and_mul(x, out=torch.empty(3, 2).t()), "silu_and_mul", "out", "contiguous")
    refuses(lambda: gelu_and_mul(x, "erf"), "gelu_and_mul", "approximate", "'erf'")
    many = torch.zeros(3, 3, 3, 3, 3, 4).permute(4, 3, 2, 1, 0, 5)[..., :2]
    refuses(lambda: silu_and_mul(many), "silu_and_mul", "row dimensions", "contiguous()")
    op, q, s = OPS.silu_and_mul_quant, torch.empty(2, 3, dtype=torch.int8), torch.empty(2)
    z = torch.empty(2, dtype=torch.int32)
    refuses(lambda: op(x, q=q[:, :2], scale=s, zeros=None), "q", "last size 3")
    refuses(lambda: op(x, q=q.float(), scale=s, zeros=None), "q", "int8")
    refuses(lambda: op(x, q=q, scale=s[:1], zeros=None), "scale", "leading sizes")
    refuses(lambda: op(x, q=q, scale=s, zeros=z.long()), "zeros", "int32")
    strided = torch.empty(2, 6, dtype=torch.int8)[:, :3]
    refuses(lambda: op(x, q=strided, scale=s, zeros=None), "q", "contiguous")


def test_fake_kernels_refuse_too() -> None:
    with torch.device("meta"):
        x = torch.ones(3, 8)
        assert silu_and_mul(x).shape == (3, 4)
        assert silu_and_mul_quant(x, symmetric=False)[2].dtype == torch.int32
        refuses(lambda: silu_and_mul(x, out=x), "silu_and_mul: out")
        refuses(lambda: gelu_and_mul(x[:, 1:]), "gelu_and_mul: x", "2I")
        refuses(lambda: gelu_and_mul(x.double()), "gelu_and_mul: x", "float64")
