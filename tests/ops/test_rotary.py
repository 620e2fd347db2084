"""apply_rotary (both styles, in place or not) and apply_rotary_and_cache."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from fastinfer.ops.kv_cache import reshape_and_cache
from fastinfer.ops.rotary import (
    apply_rotary,
    apply_rotary_and_cache,
    apply_rotary_and_cache_reference,
    apply_rotary_reference,
    rotary_reference,
)
from helpers import (
    FLOATS,
    assert_close_to_reference,
    compiles,
    devices,
    opcheck,
    poisoned,
    randn,
    refuses,
    threads,
)

OPS = torch.ops.fastinfer
FP8 = torch.float8_e4m3fn
DEVICES = pytest.mark.parametrize("device", devices("apply_rotary"))
STYLES = pytest.mark.parametrize("interleaved", [False, True])
# Head dim and rotary dim; half of it below, at and above the vector length of every level.
DIMS = ((2, 2), (17, 16), (63, 26), (64, 64), (65, 34), (80, 32), (127, 126), (128, 0), (1000, 66))


def tables(
    max_pos: int, rotary_dim: int, dtype: torch.dtype = torch.float32, device: str = "cpu"
) -> list[Tensor]:
    frequency = 1.0 / 10000 ** (torch.arange(0, rotary_dim, 2).double() / max(rotary_dim, 1))
    angle = torch.arange(max_pos).double()[:, None] * frequency
    return [angle.cos().to(device, dtype), angle.sin().to(device, dtype)]


def baseline(x: Tensor, cos: Tensor, sin: Tensor, positions: Tensor, interleaved: bool) -> Tensor:
    """The usual torch code at x's dtype."""
    c, s = (t.to(x.dtype)[positions.long()].unsqueeze(-2) for t in (cos, sin))
    n = 2 * cos.shape[1]
    head = x[..., :n]
    a, b = (head[..., 0::2], head[..., 1::2]) if interleaved else head.chunk(2, -1)
    pair = (a * c - b * s, b * c + a * s)
    out = torch.stack(pair, -1).flatten(-2) if interleaved else torch.cat(pair, -1)
    return torch.cat((out, x[..., n:]), -1)


def bits(t: Tensor) -> Tensor:
    """Raw bytes, so that NaN compares equal to itself."""
    return t.contiguous().view(torch.uint8)


@DEVICES
@STYLES
@pytest.mark.parametrize("table_dtype", ["fp32", "same"])
@pytest.mark.parametrize("dtype", FLOATS)
def test_matches_fp64(
    isa: str, dtype: torch.dtype, table_dtype: str, interleaved: bool, device: str
) -> None:
    for i, (dim, rotary_dim) in enumerate(DIMS):
        q = randn(5, 3, dim, seed=i, dtype=dtype, device=device)
        k = randn(5, 1, dim, seed=i + 50, dtype=dtype, device=device)
        cos, sin = tables(40, rotary_dim, torch.float32 if table_dtype == "fp32" else dtype, device)
        positions = torch.tensor([0, 39, 7, 7, 21], dtype=(torch.int32, torch.int64)[i % 2])
        positions = positions.to(device)
        out = [poisoned(*x.shape, dtype=dtype, device=device) for x in (q, k)]
        OPS.apply_rotary(
            q, k, cos, sin, positions, interleaved=interleaved, q_out=out[0], k_out=out[1]
        )
        for x, y in ((q, out[0]), (k, out[1])):
            want = rotary_reference(x.double(), cos, sin, positions, interleaved=interleaved)
            base = baseline(x, cos, sin, positions, interleaved)
            assert_close_to_reference(y, want, base)
            assert torch.equal(y[..., rotary_dim:], x[..., rotary_dim:])


@DEVICES
@STYLES
@pytest.mark.parametrize("dtype", FLOATS)
def test_fp32_accuracy_is_one_rounding(
    isa: str, dtype: torch.dtype, interleaved: bool, device: str
) -> None:
    """fp32 tables: every element within half a unit of its dtype, plus the fp32 arithmetic."""
    x = randn(64, 2, 64, seed=1, dtype=dtype, device=device)
    cos, sin = tables(64, 64, device=device)
    want = rotary_reference(x.double(), cos, sin, interleaved=interleaved)
    got = apply_rotary(x, None, cos, sin, interleaved=interleaved)[0].double()
    half_unit = torch.finfo(dtype).eps / 2
    assert ((got - want).abs() <= want.abs() * half_unit + 1e-6).all()


@DEVICES
@STYLES
def test_strided_views_inplace_and_neighbours(isa: str, interleaved: bool, device: str) -> None:
    """q and k as views of a fused QKV projection, packed and batched; the rest stays untouched."""
    cos, sin = tables(30, 20, device=device)
    for shape in ((7,), (2, 5)):
        qkv = randn(*shape, (4 + 2 + 2) * 24 + 3, seed=3, dtype=torch.float16, device=device)
        positions = torch.randint(0, 30, shape, device=device)
        before = qkv.clone()
        q = qkv[..., : 4 * 24].unflatten(-1, (4, 24))
        k = qkv[..., 4 * 24 : 6 * 24].unflatten(-1, (2, 24))
        want = apply_rotary(q, k, cos, sin, positions, interleaved=interleaved)
        assert torch.equal(qkv, before)
        assert all(w.is_contiguous() for w in want)
        got = apply_rotary(q, k, cos, sin, positions, interleaved=interleaved, inplace=True)
        assert got[0] is q and got[1] is k
        assert torch.equal(q, want[0]) and torch.equal(k, want[1])
        assert torch.equal(qkv[..., 6 * 24 :], before[..., 6 * 24 :])


@DEVICES
@STYLES
def test_positions_default_strides_and_missing_k(interleaved: bool, device: str) -> None:
    cos, sin = tables(12, 16, device=device)
    q = randn(3, 6, 2, 16, seed=1, device=device)
    ramp = torch.arange(6, device=device).expand(3, 6)  # batch stride 0
    want = apply_rotary_reference(q, None, cos, sin, interleaved=interleaved)[0]
    for positions in (None, ramp, ramp.to(torch.int32).contiguous()):
        got, none = apply_rotary(q, None, cos, sin, positions, interleaved=interleaved)
        assert none is None
        torch.testing.assert_close(got, want)
    # Packed tokens, positions with a stride, and caches of cos and sin that are views.
    packed = apply_rotary(q[1], None, cos, sin, interleaved=interleaved)[0]
    both = torch.cat((cos, sin), -1)
    strided = torch.arange(12, device=device)[::2] // 2
    assert torch.equal(
        apply_rotary(q[1], None, both[:, :8], both[:, 8:], strided, interleaved=interleaved)[0],
        packed,
    )
    assert torch.equal(
        apply_rotary(q.transpose(0, 1), None, cos, sin, ramp.t(), interleaved=interleaved)[0],
        got.transpose(0, 1),
    )


@DEVICES
def test_empty(device: str) -> None:
    cos, sin = tables(4, 8, device=device)
    for shape in ((0, 2, 8), (2, 0, 3, 8), (3, 0, 8)):
        q, k = torch.empty(shape, device=device), torch.empty(shape, device=device)
        assert apply_rotary(q, k, cos, sin)[0].shape == shape
        apply_rotary(q, k, cos, sin, inplace=True)
    q, k = randn(3, 2, 8, seed=1, device=device), torch.empty(3, 0, 8, device=device)
    assert torch.equal(apply_rotary(q, k, cos, sin)[0], apply_rotary(q, None, cos, sin)[0])


def test_threads_do_not_change_bits() -> None:
    q, k = randn(300, 8, 64, seed=1, dtype=torch.bfloat16), randn(300, 2, 64, seed=2).bfloat16()
    cos, sin = tables(300, 64)
    results = []
    for n in (1, 2, 3):
        with threads(n):
            results.append(apply_rotary(q, k, cos, sin))
    for other in results[1:]:
        assert torch.equal(results[0][0], other[0]) and torch.equal(results[0][1], other[1])
    one = apply_rotary(q[77:78], None, cos, sin, torch.tensor([77]))[0]
    assert torch.equal(one, results[0][0][77:78])


@pytest.mark.parametrize("device", devices("apply_rotary_and_cache"))
@STYLES
def test_many_tokens_have_the_bits_of_few(interleaved: bool, device: str) -> None:
    """Enough of them for the layout that a launch takes for many tokens; an odd number of heads."""
    tokens, style = (6000, {"interleaved": interleaved})
    cos, sin = tables(tokens, 64, device=device)
    q, k, v = (randn(tokens, h, 64, seed=h, dtype=torch.bfloat16, device=device) for h in (5, 3, 3))
    positions = torch.randperm(tokens, device=device)
    want = apply_rotary(q, k, cos, sin, positions, **style)
    some = slice(2000, 2010)
    few = apply_rotary(q[some], k[some], cos, sin, positions[some], **style)
    assert torch.equal(few[0], want[0][some]) and torch.equal(few[1], want[1][some])
    for dtype in (torch.bfloat16, torch.int8):
        pair = [torch.zeros(tokens, 1, 3, 64, device=device).to(dtype) for _ in range(2)]
        scales = {}
        if dtype == torch.int8:
            scales = {n: torch.zeros(tokens, 1, 3, device=device) for n in ("k_scale", "v_scale")}
        rotated = [q.clone(), k.clone()]
        slots = torch.arange(tokens, device=device).flip(0)
        apply_rotary_and_cache(*rotated, v, cos, sin, positions, *pair, slots, **style, **scales)
        assert torch.equal(rotated[0], want[0]) and torch.equal(rotated[1], want[1])
        on_cpu = [torch.zeros_like(c, device="cpu") for c in pair]
        cpu_scales = {n: torch.zeros_like(t, device="cpu") for n, t in scales.items()}
        reshape_and_cache(want[1].cpu(), v.cpu(), *on_cpu, slots.cpu(), **cpu_scales)
        for a, b in zip((*pair, *scales.values()), (*on_cpu, *cpu_scales.values()), strict=True):
            assert torch.equal(a.cpu(), b)


def caches(
    dtype: torch.dtype, heads: int, dim: int, device: str = "cpu"
) -> tuple[list[Tensor], Tensor | None]:
    # Made on the CPU: devices differ in the NaN they convert to.
    pair = [poisoned(5, 3, heads, dim, dtype=dtype).to(device) for _ in range(2)]
    scaled = dtype in (FP8, torch.int8)
    return pair, poisoned(5, 3, heads).to(device) if scaled else None


@pytest.mark.parametrize("device", devices("apply_rotary_and_cache"))
@STYLES
@pytest.mark.parametrize("cache", ["same", FP8, torch.int8])
@pytest.mark.parametrize("dtype", FLOATS)
def test_and_cache_equals_the_two_steps(
    isa: str, dtype: torch.dtype, cache: torch.dtype | str, interleaved: bool, device: str
) -> None:
    # Aligned or not, rotated in whole packs or not, in several rounds of a warp.
    for dim, rotary_dim in ((40, 34), (64, 64), (48, 32), (1024, 66)):
        check_the_two_steps(dtype, cache, interleaved, device, dim, rotary_dim)


def check_the_two_steps(
    dtype: torch.dtype,
    cache: torch.dtype | str,
    interleaved: bool,
    device: str,
    dim: int,
    rotary_dim: int,
) -> None:
    cos, sin = tables(20, rotary_dim, device=device)
    qkv = randn(9, 4 + 2 + 2, dim, seed=2, dtype=dtype, device=device)
    positions = torch.randint(0, 20, (9,), device=device)
    slots = torch.tensor([3, -1, 14, 0, 7, 8, -1, 1, 2], device=device)
    results = []
    for fused in (True, False):
        q, k, v = qkv.clone().split((4, 2, 2), 1)
        pair, scale = caches(dtype if cache == "same" else cache, 2, dim, device)
        scales = [None, None] if scale is None else [scale, scale.clone()]
        kw = {"k_scale": scales[0], "v_scale": scales[1]}
        if fused:
            apply_rotary_and_cache(
                q, k, v, cos, sin, positions, *pair, slots, interleaved=interleaved, **kw
            )
        else:
            apply_rotary(q, k, cos, sin, positions, interleaved=interleaved, inplace=True)
            if device != "cpu":  # the CPU's cache write, on what was rotated here
                k, v, slots = k.cpu(), v.cpu(), slots.cpu()
                pair, scale = caches(dtype if cache == "same" else cache, 2, dim)
                scales = [None, None] if scale is None else [scale, scale.clone()]
                kw = {"k_scale": scales[0], "v_scale": scales[1]}
            reshape_and_cache(k, v, *pair, slots, **kw)
        results.append([t.cpu() for t in (q, k, v, *pair, *(s for s in scales if s is not None))])
    for a, b in zip(*results, strict=True):
        assert torch.equal(bits(a), bits(b))
    if cache == "same":
        q, k, v = qkv.cpu().clone().split((4, 2, 2), 1)
        pair, _ = caches(dtype, 2, dim)
        apply_rotary_and_cache_reference(
            q,
            k,
            v,
            cos.cpu(),
            sin.cpu(),
            positions.cpu(),
            *pair,
            slots.cpu(),
            interleaved=interleaved,
        )
        for a, b in zip(results[0], (q, k, v, *pair), strict=True):
            torch.testing.assert_close(a, b, equal_nan=True)


@pytest.mark.parametrize("device", devices("apply_rotary")[1:])
def test_validation_on_cuda(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FASTINFER_VALIDATE", "1")
    cos, sin = tables(10, 8, device=device)
    q, k, v = (randn(3, h, 8, seed=h, device=device) for h in (4, 2, 1))
    before = q.clone()
    bad = torch.tensor([0, 10, 1], device=device)
    refuses(lambda: apply_rotary(q, k, cos, sin, bad), "apply_rotary", "positions", "10", "index 1")
    pair = [torch.zeros(2, 3, 1, 8, device=device) for _ in range(2)]
    fine, slots = torch.tensor([0, 9, 1], device=device), torch.tensor([0, 6, 1], device=device)
    for p, s, word in ((bad, fine, "positions"), (fine, slots, "slot_mapping")):
        refuses(lambda p=p, s=s: apply_rotary_and_cache(q, v, v, cos, sin, p, *pair, s), word)
    assert torch.equal(q, before)
    apply_rotary(q, k, cos, sin, fine)


def opcheck_inputs() -> tuple[Tensor, ...]:
    cos, sin = tables(9, 8)
    return randn(4, 3, 16, seed=1), randn(4, 2, 16, seed=2), randn(4, 2, 16, seed=3), cos, sin


def test_opcheck() -> None:
    q, k, v, cos, sin = opcheck_inputs()
    positions, slots = torch.tensor([1, 8, 0, 3]), torch.tensor([4, -1, 0, 7])
    for p in (None, positions, positions.int()):
        out = {"q_out": torch.empty_like(q), "k_out": torch.empty_like(k), "interleaved": True}
        opcheck(OPS.apply_rotary, (q, k, cos, sin, p), out, cuda=True)
    opcheck(
        OPS.apply_rotary_inplace, (q, None, cos, sin, positions), {"interleaved": False}, cuda=True
    )
    q4, k4 = randn(2, 3, 2, 16, seed=4), randn(2, 3, 1, 16, seed=4)
    opcheck(OPS.apply_rotary_inplace, (q4, k4, cos, sin, None), {"interleaved": False}, cuda=True)
    for dtype in (torch.float32, torch.int8):  # opcheck itself cannot handle float8
        pair, scale = caches(dtype, 2, 16)
        pair = [c.nan_to_num(0) for c in pair]
        scales = None if scale is None else torch.ones(2)
        args = (q, k, v, cos, sin, positions, *pair, slots)
        kw = {
            "interleaved": False,
            "k_scale": scales,
            "v_scale": None if scales is None else 2 * scales,
        }
        opcheck(OPS.apply_rotary_and_cache, args, kw, cuda=True)


@DEVICES
def test_compiles(device: str) -> None:
    def f(q: Tensor, k: Tensor, v: Tensor, cos: Tensor, sin: Tensor, p: Tensor, *rest: Tensor):
        a, b = apply_rotary(q + 0, k + 0, cos, sin, p)
        apply_rotary_and_cache(q, k, v, cos, sin, p, *rest)
        return a, b, q * 2

    q, k, v, cos, sin = opcheck_inputs()
    p, slots = torch.tensor([1, 8, 0, 3]), torch.tensor([4, -1, 0, 7])
    runs = []
    for call in (lambda *a: compiles(f, *a), f):
        state = [q.clone(), k.clone(), v, cos, sin, p, torch.zeros(3, 3, 2, 16)]
        state += [torch.zeros(3, 3, 2, 16), slots]
        state = [x.to(device) for x in state]
        runs.append((*call(*state), *state))
    for a, b in zip(*runs, strict=True):
        assert torch.equal(a, b)
    assert runs[0][-3].any()  # the cache was written


def test_refusals() -> None:
    cos, sin = tables(10, 8)
    q, k = torch.ones(3, 4, 8), torch.ones(3, 2, 8)
    name = "apply_rotary"
    for inplace in (False, True):

        def go(*args: Tensor | None, inplace: bool = inplace) -> object:
            return apply_rotary(*args, inplace=inplace)

        refuses(lambda: go(q.double(), k, cos, sin), name, "q", "float64")
        refuses(lambda: go(q[0], k, cos, sin), name, "q", "[B, S, Hq, D]")
        refuses(lambda: go(torch.ones(3, 8, 4).transpose(1, 2), k, cos, sin), "q", "contiguous")
        refuses(lambda: go(q, k.half(), cos, sin), name, "k", "dtype of q")
        refuses(lambda: go(q, k[:2], cos, sin), name, "k", "[3, *, 8]")
        refuses(lambda: go(q, torch.ones(3, 8, 2).transpose(1, 2), cos, sin), "k", "contiguous")
        refuses(lambda: go(q, k, cos.half(), sin), name, "cos", "float16")
        refuses(lambda: go(q, k, cos[0], sin), name, "cos", "2 dimensions")
        refuses(lambda: go(q, k, *tables(10, 10)), name, "cos", "rotary_dim <= 8")
        refuses(lambda: go(q, k, cos, sin.double()), name, "sin", "dtype of cos")
        refuses(lambda: go(q, k, cos, sin[:9]), name, "sin", "[10, 4]")
        refuses(lambda: go(q, k, cos.t().contiguous().t(), sin), name, "cos", "contiguous")
        refuses(lambda: go(q, k, cos, sin.t().contiguous().t()), name, "sin", "contiguous")
        refuses(lambda: go(q, k, cos, sin, torch.ones(3)), name, "positions", "int32")
        refuses(lambda: go(q, k, cos, sin, torch.ones(2).int()), name, "positions", "[3]")
        refuses(lambda: go(q[None], k[None], cos, sin, torch.ones(3).int()), "positions", "[1, 3]")
        refuses(lambda: go(q, k, cos[:2], sin[:2]), name, "cos", "3 positions")
        refuses(lambda: go(q.clone().requires_grad_(), k, cos, sin), name, "grad")
        for bad in (-1, 10, 2**40):
            before = q.clone()
            p = torch.tensor([0, bad, 1])
            refuses(lambda p=p: go(q, k, cos, sin, p), name, "positions", str(bad), "index 1")
            assert torch.equal(q, before)
    op = OPS.apply_rotary
    refuses(lambda: op(q, k, cos, sin, None, interleaved=False, q_out=q, k_out=None), "k_out must")
    kw = {"interleaved": False, "k_out": k}
    refuses(lambda: op(q, k, cos, sin, None, q_out=q[:2], **kw), "q_out", "[3, 4, 8]")
    refuses(lambda: op(q, k, cos, sin, None, q_out=q.half(), **kw), "q_out", "dtype")


@pytest.mark.parametrize("device", devices("apply_rotary_and_cache"))
def test_a_call_like_the_last_one_is_checked_and_reads_its_own_tensors(device: str) -> None:
    """Checks are skipped where shapes, strides, dtypes and flags are those of the last call."""
    cos, sin = tables(16, 8, device=device)

    def tensors(seed: int, heads: int = 2) -> list[Tensor]:
        q, k, v = (randn(3, h, 8, seed=seed + h, device=device) for h in (4, heads, heads))
        pair = [torch.zeros(2, 4, heads, 8, device=device) for _ in "kv"]
        p, slots = (torch.tensor(x, device=device) for x in ([1, 5, 2], [seed % 8, 3, -1]))
        return [q, k, v, cos, sin, p, *pair, slots]

    for seed in (10, 20):
        for interleaved in (False, True):
            got, want = tensors(seed), tensors(seed)
            apply_rotary_and_cache(*got, interleaved=interleaved)
            apply_rotary_and_cache_reference(*want, interleaved=interleaved)
            for a, b in zip(got, want, strict=True):
                torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)
            wrong = tensors(seed)
            wrong[2] = wrong[2].to(torch.float16)
            refuses(lambda wrong=wrong: apply_rotary_and_cache(*wrong), "v must have the dtype")
            wrong = tensors(seed)
            wrong[8] = wrong[8][:2]
            refuses(lambda wrong=wrong: apply_rotary_and_cache(*wrong), "slot_mapping")
            wrong = tensors(seed)
            wrong[1] = wrong[1].transpose(1, 2).contiguous().transpose(1, 2)
            refuses(lambda wrong=wrong: apply_rotary_and_cache(*wrong), "contiguous")


def test_and_cache_refusals_leave_everything_unharmed() -> None:
    name = "apply_rotary_and_cache"
    cos, sin = tables(10, 8)
    q, k, v = randn(3, 4, 8, seed=1), randn(3, 2, 8, seed=2), randn(3, 2, 8, seed=3)
    p, slots = torch.tensor([0, 1, 2]), torch.tensor([0, 1, -1])
    pair = [torch.zeros(2, 3, 2, 8) for _ in range(2)]

    def go(**change: Tensor) -> None:
        base = {"q": q, "k": k, "v": v, "cos": cos, "sin": sin, "positions": p}
        base |= {"key_cache": pair[0], "value_cache": pair[1], "slot_mapping": slots}
        apply_rotary_and_cache(**(base | change))

    before = [t.clone() for t in (q, k, *pair)]
    refuses(lambda: go(q=q[None]), name, "q", "3 dimensions")
    refuses(lambda: go(v=v[:2]), name, "v", "[3, 2, 8]")
    refuses(lambda: go(v=v.half()), name, "v", "dtype of k")
    refuses(lambda: go(positions=torch.tensor([0, 1, 10])), name, "positions", "10", "index 2")
    refuses(lambda: go(slot_mapping=torch.tensor([0, 6, 1])), name, "slot_mapping", "6", "index 1")
    refuses(lambda: go(slot_mapping=slots[:2]), name, "slot_mapping", "[3]")
    refuses(lambda: go(key_cache=pair[0].half()), name, "value_cache", "dtype of key_cache")
    refuses(lambda: go(k_scale=torch.ones(())), name, "k_scale", "None")
    refuses(lambda: go(v=v.clone().requires_grad_()), name, "grad")
    for t, b in zip((q, k, *pair), before, strict=True):
        assert torch.equal(t, b)


def test_fake_kernels_refuse_too() -> None:
    with torch.device("meta"):
        cos, q, k = torch.ones(10, 4), torch.ones(3, 4, 8), torch.ones(3, 2, 8)
        p, pair = torch.zeros(3, dtype=torch.int32), [torch.zeros(2, 3, 2, 8) for _ in range(2)]
        assert apply_rotary(q, k, cos, cos, p)[1].shape == k.shape
        apply_rotary_and_cache(q, k, k, cos, cos, p, *pair, p)
        refuses(lambda: apply_rotary(q[0], k, cos, cos), "apply_rotary: q", "[T, Hq, D]")
        refuses(lambda: apply_rotary(q, k[:2], cos, cos, inplace=True), "apply_rotary: k")
        refuses(lambda: apply_rotary(q, k, cos, cos[:5]), "apply_rotary: sin")
        refuses(lambda: apply_rotary(q, k, torch.ones(10, 5), cos), "cos", "rotary_dim <= 8")
        refuses(lambda: apply_rotary(q, k, cos, cos, p[:2]), "positions", "[3]")
        refuses(lambda: apply_rotary_and_cache(q, k, k, cos, cos, p, *pair, p[:2]), "slot_mapping")
