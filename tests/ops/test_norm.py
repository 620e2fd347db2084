"""rms_norm, fused_add_rms_norm, rms_norm_quant."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from fastinfer.ops.linear import w8a8_linear
from fastinfer.ops.norm import (
    fused_add_rms_norm,
    fused_add_rms_norm_reference,
    rms_norm,
    rms_norm_quant,
    rms_norm_quant_reference,
    rms_norm_reference,
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
ODD = (1, 17, 63, 65, 127, 1000)


NORM = pytest.mark.parametrize("device", devices("rms_norm"))
QUANT = pytest.mark.parametrize("device", devices("rms_norm_quant"))


def baseline(x: Tensor, weight: Tensor, eps: float = 1e-6) -> Tensor:
    """The usual torch code of a model: fp32 inside, rounded before the weight."""
    y = x.float() * torch.rsqrt(x.float().square().mean(-1, keepdim=True) + eps)
    return y.to(x.dtype) * weight.to(x.dtype)


@NORM
@pytest.mark.parametrize("weight_dtype", FLOATS)
@pytest.mark.parametrize("dtype", FLOATS)
def test_rms_norm_matches_fp64(
    isa: str, dtype: torch.dtype, weight_dtype: torch.dtype, device: str
) -> None:
    for i, dim in enumerate(ODD):
        x = randn(3, dim, seed=i, dtype=dtype, device=device)
        w = randn(dim, seed=i + 50, dtype=weight_dtype, device=device)
        out = poisoned(3, dim, dtype=dtype, device=device)
        assert rms_norm(x, w, 1e-5, out=out) is out
        assert_close_to_reference(
            out, rms_norm_reference(x.double(), w, 1e-5), baseline(x, w, 1e-5)
        )


@NORM
@pytest.mark.parametrize("dtype", FLOATS)
def test_fused_add_matches_fp64(isa: str, dtype: torch.dtype, device: str) -> None:
    for i, dim in enumerate(ODD):
        x, r = (randn(3, dim, seed=i + n, dtype=dtype, device=device) for n in (0, 9))
        w = randn(dim, seed=i + 50, dtype=dtype, device=device)
        total = (x.float() + r.float()).to(dtype)
        y, new = fused_add_rms_norm_reference(x, r, w)
        assert torch.equal(new, total)
        got = fused_add_rms_norm(x, r, w)
        assert got[0] is x and got[1] is r
        assert torch.equal(r, total)
        assert_close_to_reference(x, rms_norm_reference(total.double(), w), baseline(total, w))
        assert y.dtype == dtype


@QUANT
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("dtype", FLOATS)
def test_quant_matches_reference(
    isa: str, dtype: torch.dtype, symmetric: bool, device: str
) -> None:
    for i, dim in enumerate(ODD):
        x, r = (randn(3, dim, seed=i + n, dtype=dtype, device=device) for n in (0, 9))
        w = randn(dim, seed=i + 50, dtype=dtype, device=device)
        for residual in (None, r.clone()):
            before = x.clone()
            *want, total = rms_norm_quant_reference(x, w, residual=residual, symmetric=symmetric)
            got = rms_norm_quant(x, w, residual=residual, symmetric=symmetric)
            normed = rms_norm_reference((x if total is None else total).double(), w)
            assert_codes_match(got, tuple(want), normed)
            assert torch.equal(x, before)
            if residual is not None:
                assert torch.equal(residual, total)


@QUANT
def test_quant_edge_rows(device: str) -> None:
    x, w = randn(4, 20, seed=1, device=device), randn(20, seed=2, device=device)
    x[1] = 0
    x[2, 3] = torch.nan
    q, scale, zeros = rms_norm_quant(x, w, symmetric=False)
    assert scale[1] == 1 and zeros is not None and zeros[1] == 0 and (q[1] == 0).all()
    assert scale[2].isnan() and scale[[0, 3]].isfinite().all()
    assert torch.equal(q[3:], rms_norm_quant(x[3:], w, symmetric=False)[0])


def strided(seed: int, dtype: torch.dtype = torch.float32, device: str = "cpu") -> list[Tensor]:
    """Views of one buffer: head slices, a transposed batch, one row, a broadcast row."""
    x = randn(4, 3, 5, 40, seed=seed, dtype=dtype, device=device)
    return [
        x[:, :, 1:3, :33],
        x.transpose(0, 2)[..., 4:37],
        x[0, 0, 0, :33],
        x[::2, 1, ::2, :33],
        x[:1, :1, :1, :33].expand(2, 3, 2, 33),
    ]


@NORM
@pytest.mark.parametrize("dtype", FLOATS)
def test_strides(dtype: torch.dtype, device: str) -> None:
    w = randn(80, seed=3, dtype=dtype, device=device)[:33]
    for v in strided(1, dtype, device):
        want = rms_norm(v.contiguous(), w)
        assert torch.equal(rms_norm(v, w), want)
        assert torch.equal(rms_norm_quant(v, w)[0], rms_norm_quant(v.contiguous(), w)[0])
        wide = torch.full((*v.shape[:-1], 50), 7.0, dtype=dtype, device=device)
        rms_norm(v, w, out=wide[..., 8:41])
        assert torch.equal(wide[..., 8:41], want)
        assert (wide[..., :8] == 7).all() and (wide[..., 41:] == 7).all()


@NORM
def test_fused_add_strides(device: str) -> None:
    w = randn(33, seed=3, device=device)
    views = (strided(seed, device=device)[:4] for seed in (1, 2))
    for a, r in zip(*views, strict=True):
        x, res = a.contiguous(), r.contiguous()
        fused_add_rms_norm(x, res, w)
        rms = rms_norm_quant(a, w, residual=r.clone())
        fused_add_rms_norm(a, r, w)  # in place on the views
        assert torch.equal(a, x) and torch.equal(r, res)
        assert rms[0].shape == a.shape


@NORM
def test_in_place_and_empty(device: str) -> None:
    x, w = randn(3, 17, seed=1, device=device), randn(17, seed=2, device=device)
    want = rms_norm(x, w)
    assert torch.equal(rms_norm(x, w, out=x), want)
    for shape in ((0, 8), (2, 0, 8), (3, 0)):
        e, we = torch.empty(shape, device=device), torch.ones(shape[-1], device=device)
        assert rms_norm(e, we).shape == e.shape
        fused_add_rms_norm(e, e.clone(), we)
        q, scale, _ = rms_norm_quant(e, we)
        assert q.shape == e.shape and scale.shape == e.shape[:-1]


def test_threads_and_batch_mates_do_not_change_bits() -> None:
    x, w = randn(37, 3000, seed=2, dtype=torch.bfloat16), randn(3000, seed=3)
    results = []
    for n in (1, 2, 3):
        with threads(n):
            results.append((rms_norm(x, w), *rms_norm_quant(x, w)[:2]))
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))
    assert torch.equal(rms_norm(x[5:6], w), results[0][0][5:6])


@NORM
def test_a_row_does_not_depend_on_the_path_nor_on_its_mates(device: str) -> None:
    """One row alone, one of many, aligned or not, read once or twice: the same bits."""
    for dim in (24, 64, 256, 4096, 5120, 16384, 20000):
        x = randn(9, dim, seed=dim, dtype=torch.bfloat16, device=device)
        w = randn(dim, seed=3, dtype=torch.bfloat16, device=device)
        want, codes = rms_norm(x, w), rms_norm_quant(x, w)
        shifted = poisoned(9, dim + 5, dtype=torch.bfloat16, device=device)[:, 3 : dim + 3]
        shifted.copy_(x)
        for same, got in (
            (rms_norm(x[4:5], w), rms_norm_quant(x[4:5], w)),
            (rms_norm(shifted, w)[4:5], [t[4:5] for t in rms_norm_quant(shifted, w)[:2]]),
            (rms_norm(x, w.float())[4:5], [t[4:5] for t in rms_norm_quant(x, w.float())[:2]]),
        ):
            assert torch.equal(same, want[4:5])
            assert torch.equal(got[0], codes[0][4:5]) and torch.equal(got[1], codes[1][4:5])
        assert_close_to_reference(want, rms_norm_reference(x.double(), w), baseline(x, w))


@NORM
def test_many_rows_have_the_bits_of_one(device: str) -> None:
    """Enough of them for the layouts that a launch takes for many rows."""
    for dim in (128, 2048, 4096, 5120, 8192) if device == "cuda" else (256,):
        for dtype in (torch.bfloat16, torch.float16, torch.float32):
            x = special_rows(randn(700, dim, seed=dim, dtype=dtype, device=device))
            w = randn(dim, seed=3, dtype=dtype, device=device)
            want, total = rms_norm(x, w), x.clone()
            fused = fused_add_rms_norm(x.clone(), total, w)[0]
            for r in (*range(8), 699):
                row, both = x[r : r + 1], x[r : r + 1].clone()
                assert_same(rms_norm(row, w), want[r : r + 1])
                assert_same(fused_add_rms_norm(row.clone(), both, w)[0], fused[r : r + 1])
                assert_same(both, total[r : r + 1])
            for symmetric in (False, True):
                for residual in (None, x):
                    kw = {"symmetric": symmetric}
                    held = None if residual is None else residual.clone()
                    codes = rms_norm_quant(x, w, residual=held, **kw)
                    for r in (*range(8), 699):
                        held = None if residual is None else residual[r : r + 1].clone()
                        alone = rms_norm_quant(x[r : r + 1], w, residual=held, **kw)
                        for a, b in zip(alone, codes, strict=True):
                            assert (a is None) == (b is None)
                            if a is not None and b is not None:
                                assert_same(a, b[r : r + 1])


@pytest.mark.parametrize("device", devices("rms_norm")[1:])
def test_cuda_agrees_with_the_cpu(device: str) -> None:
    for dtype in FLOATS:
        x, r = (randn(5, 1000, seed=n, dtype=dtype) for n in (1, 2))
        w = randn(1000, seed=3, dtype=dtype)
        step = {torch.float32: 2e-6, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}[dtype]
        on_cuda = [t.to(device) for t in (x, r, w)]
        got, want = rms_norm_quant(on_cuda[0], on_cuda[2]), rms_norm_quant(x, w)
        torch.testing.assert_close(got[1].cpu(), want[1], rtol=1e-6, atol=0)
        assert (got[0].cpu().int() - want[0].int()).abs().max() <= 1
        for a, b in zip(fused_add_rms_norm(*on_cuda), fused_add_rms_norm(x, r, w), strict=True):
            torch.testing.assert_close(a.cpu(), b, rtol=step, atol=step)
        assert torch.equal(on_cuda[1].cpu(), r)


@NORM
def test_nan_stays_in_its_row(device: str) -> None:
    x, w = randn(3, 17, seed=2, device=device), randn(17, seed=3, device=device)
    x[1, 4] = torch.nan
    y = rms_norm(x, w)
    assert y[1].isnan().all() and y[[0, 2]].isfinite().all()


@pytest.mark.parametrize("device", devices("rms_norm_quant"))
@pytest.mark.parametrize("symmetric", [True, False])
def test_quant_into_given_tensors(symmetric: bool, device: str) -> None:
    x, w = randn(2, 3, 40, seed=1).to(device), randn(40, seed=2).to(device)
    want = rms_norm_quant(x, w, symmetric=symmetric)
    out = tuple(torch.empty_like(t) for t in want if t is not None)
    got = rms_norm_quant(x, w, symmetric=symmetric, out=out)
    assert all(a is b for a, b in zip(out, got, strict=False))
    assert all(torch.equal(a, b) for a, b in zip(want, got, strict=True) if b is not None)
    refuses(lambda: rms_norm_quant(x, w, symmetric=not symmetric, out=out), "out must be (q, scale")
    refuses(lambda: rms_norm_quant(x, w, symmetric=symmetric, out=(x, *out[1:])), "q must be")


def test_opcheck() -> None:
    w = randn(17, seed=1)
    for x in (randn(3, 17, seed=2), randn(3, 4, 20, seed=2)[:, 1:3, :17], torch.empty(0, 17)):
        opcheck(OPS.rms_norm, (x, w, 1e-6), {"out": torch.empty(x.shape)}, cuda=True)
        opcheck(OPS.fused_add_rms_norm, (x.clone(), x.clone(), w, 1e-6), cuda=True)
        for residual, zeros in ((None, None), (x.clone(), x.new_empty(x.shape[:-1]).int())):
            out = {"q": torch.empty(x.shape).to(torch.int8), "scale": torch.empty(x.shape[:-1])}
            out |= {"residual": residual, "zeros": zeros}
            opcheck(OPS.rms_norm_quant, (x, w, 1e-6), out, cuda=True)


@pytest.mark.parametrize("device", devices("rms_norm"))
def test_compiles(device: str) -> None:
    def f(x: Tensor, residual: Tensor, w: Tensor) -> tuple[Tensor, ...]:
        y = rms_norm(x * 2, w)
        q, scale, zeros = rms_norm_quant(y, w, residual=residual, symmetric=False)
        z, _ = fused_add_rms_norm(y + 1, residual, w)
        return y, q, scale, zeros, z

    x, r = (randn(3, 34, seed=seed, device=device) for seed in (1, 2))
    w = randn(34, seed=3, device=device)
    r2 = r.clone()
    want = f(x, r2, w)
    got = compiles(f, x, r, w)
    assert torch.equal(r, r2)
    for a, b in zip(got, want, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("symmetric", [True, False])
def test_quantised_rows_of_any_shape_feed_w8a8_linear(symmetric: bool) -> None:
    x, weight = randn(2, 3, 32, seed=1), randn(8, 32, seed=2).mul(20).round().to(torch.int8)
    scale = torch.rand(8)
    q, s, z = rms_norm_quant(x, randn(32, seed=3), symmetric=symmetric)
    y = w8a8_linear(q, s, weight, scale, x_zeros=z, out_dtype=torch.float32)
    zero = 0 if z is None else z[..., None]
    want = ((q.double() - zero) @ weight.double().t()) * s[..., None].double() * scale.double()
    assert y.shape == (2, 3, 8)
    torch.testing.assert_close(y.double(), want, rtol=1e-5, atol=1e-5)


def test_refusals() -> None:
    x, w = torch.ones(2, 6), torch.ones(6)
    for name, fn in (
        ("rms_norm", lambda a, b: rms_norm(a, b)),
        ("fused_add_rms_norm", lambda a, b: fused_add_rms_norm(a, a.clone(), b)),
        ("rms_norm_quant", lambda a, b: rms_norm_quant(a, b)),
    ):
        refuses(lambda fn=fn: fn(x.double(), w), name, "x", "float64", ".to(dtype)")
        refuses(lambda fn=fn: fn(x, w.double()), name, "weight", "float64")
        refuses(lambda fn=fn: fn(x, w[:5]), name, "weight", "[6]", "[5]")
        refuses(lambda fn=fn: fn(x, torch.ones(12)[::2]), name, "weight", "contiguous")
        refuses(lambda fn=fn: fn(x.clone().requires_grad_(), w), name, "grad")
    refuses(lambda: rms_norm(torch.ones(6, 2).t(), w), "rms_norm", "x", "contiguous")
    refuses(lambda: rms_norm(torch.tensor(1.0), w), "rms_norm", "x", "dimension")
    refuses(lambda: rms_norm(x, w, out=x.half()), "rms_norm", "out", "dtype")
    refuses(lambda: rms_norm(x, w, out=torch.empty(3, 6)), "rms_norm", "out", "[2, 6]")
    refuses(lambda: rms_norm(x, w, out=torch.empty(6, 2).t()), "rms_norm", "out", "contiguous")
    rows = torch.ones(3, 6)
    refuses(lambda: rms_norm(rows[:2], w, out=rows[1:]), "rms_norm", "out", "share memory with x")
    for other in (rows[:2], rows[1:]):
        refuses(lambda r=other: fused_add_rms_norm(rows[:2], r, w), "residual", "share memory")
        refuses(lambda r=other: rms_norm_quant(rows[:2], w, residual=r), "residual", "share memory")
    refuses(lambda: fused_add_rms_norm(x, x.half(), w), "residual", "dtype")
    refuses(lambda: fused_add_rms_norm(x, x[:1], w), "residual", "[2, 6]")
    refuses(lambda: rms_norm_quant(x, w, residual=torch.ones(6, 2).t()), "residual", "contiguous")
    q, s = torch.empty(2, 6).to(torch.int8), torch.empty(2)

    def codes(**change: Tensor) -> None:
        base = {"residual": None, "q": q, "scale": s, "zeros": None}
        OPS.rms_norm_quant(x, w, 1e-6, **(base | change))

    codes()
    name = "rms_norm_quant: "
    refuses(lambda: codes(q=q[:1]), name + "q must have", "[2, 6]")
    refuses(lambda: codes(q=q.float()), name + "q must be torch.int8")
    refuses(lambda: codes(q=torch.empty(2, 8).to(torch.int8)[:, :6]), name + "q", "contiguous")
    refuses(lambda: codes(scale=s.double()), name + "scale must be torch.float32")
    refuses(lambda: codes(scale=s[:1]), name + "scale", "leading sizes")
    refuses(lambda: codes(zeros=s), name + "zeros must be torch.int32")
    refuses(lambda: codes(zeros=s[:1].int()), name + "zeros", "leading sizes")
    with torch.device("meta"):
        refuses(lambda: rms_norm(torch.ones(2, 6), torch.ones(5)), "rms_norm", "weight", "[6]")
