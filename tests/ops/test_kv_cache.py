"""reshape_and_cache and gather_cache; moving blocks is in test_kv_cache_blocks.py."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

from fastinfer.ops._reference_kv_cache import gather_cache_reference, reshape_and_cache_reference
from fastinfer.ops.kv_cache import gather_cache, reshape_and_cache
from helpers import (
    FLOATS,
    available_isa_levels,
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
EIGHT_BIT = (FP8, torch.int8)
SCALES = ("scalar", "one", "head", "dynamic")
# heads, head dim, block size
SHAPES = (
    *((1, 1, 1), (2, 17, 3), (3, 63, 16), (1, 65, 5), (2, 127, 7), (1, 1000, 2), (4, 64, 16)),
    *((2, 128, 16), (3, 96, 5), (2, 512, 3)),
)


GPU = devices("reshape_and_cache")[1:]


@pytest.fixture(params=[*available_isa_levels(), *GPU, *(f"{gpu}-portable" for gpu in GPU)])
def device(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """The CPU at each of its instruction-set levels; the GPU with and without the fp8 conversions
    of its own.
    """
    if request.param not in available_isa_levels():
        monkeypatch.setenv("FASTINFER_FORCE_ARCH", "80" if "portable" in request.param else "")
        return "cuda"
    monkeypatch.setenv("FASTINFER_CPU_ISA", request.param)
    return "cpu"


def raw(t: Tensor) -> Tensor:
    """Bytes of a tensor: NaN compares equal to itself."""
    return t.contiguous().flatten().view(torch.uint8)


def make_scale(kind: str, blocks: int, positions: int, heads: int, seed: int = 0) -> Tensor:
    if kind == "dynamic":
        return poisoned(blocks, positions, heads)
    shape = {"scalar": (), "one": (1,), "head": (heads,)}[kind]
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed)) * 0.02 + 0.005


def slots_of(tokens: int, total: int, seed: int = 0) -> Tensor:
    """Distinct slots, the first of them replaced by -1."""
    slots = torch.randperm(total, generator=torch.Generator().manual_seed(seed))[:tokens]
    if tokens > 1:
        slots[0] = -1
    return slots


def write_both(
    key: Tensor, value: Tensor, caches: list[Tensor], slots: Tensor, scales: list, device: str
) -> None:
    """The operator on `device` and the reference on the CPU, on copies; every byte of caches and
    scales must agree.
    """
    results = []
    for write, d in ((reshape_and_cache, device), (reshape_and_cache_reference, "cpu")):
        c = [cache.clone().to(d) for cache in caches]
        s = [None if scale is None else scale.clone().to(d) for scale in scales]
        write(key.to(d), value.to(d), *c, slots.to(d), k_scale=s[0], v_scale=s[1])
        results.append([*c, *(scale for scale in s if scale is not None)])
    for a, b in zip(*results, strict=True):
        assert torch.equal(raw(a.cpu()), raw(b))


@pytest.mark.parametrize("dtype", FLOATS)
def test_write_float_caches(device: str, dtype: torch.dtype) -> None:
    for i, (heads, dim, block) in enumerate(SHAPES):
        tokens = 11
        k, v = (randn(tokens, heads, dim, seed=i + j, dtype=dtype) for j in (0, 50))
        k[1, 0, 0], v[2, 0, -1] = torch.nan, torch.inf
        blocks = 2 + -(-tokens // block)
        caches = [poisoned(blocks, block, heads, dim, dtype=dtype) for _ in range(2)]
        slots = slots_of(tokens, blocks * block, i).to((torch.int32, torch.int64)[i % 2])
        write_both(k, v, caches, slots, [None, None], device)


@pytest.mark.parametrize("cache_dtype", EIGHT_BIT)
@pytest.mark.parametrize("kind", SCALES)
@pytest.mark.parametrize("dtype", FLOATS)
def test_write_8bit_caches(
    device: str, dtype: torch.dtype, kind: str, cache_dtype: torch.dtype
) -> None:
    for i, (heads, dim, block) in enumerate(SHAPES):
        k, v = (4 * randn(9, heads, dim, seed=i + j, dtype=dtype) for j in (0, 50))
        k[3] = 0
        blocks = 2 + -(-9 // block)
        caches = [poisoned(blocks, block, heads, dim, dtype=cache_dtype) for _ in range(2)]
        scales = [make_scale(kind, blocks, block, heads, seed=j) for j in (1, 2)]
        write_both(k, v, caches, slots_of(9, blocks * block, i), scales, device)


@pytest.mark.parametrize("cache_dtype", EIGHT_BIT)
def test_dynamic_scale_edges(device: str, cache_dtype: torch.dtype) -> None:
    """Zero heads, the smallest numbers, NaN, inf: each only touches its own head."""
    k = randn(5, 2, 40, seed=1)
    k[0, 0] = 0
    k[1, 0] = 1e-45
    k[2, 0, 7] = torch.nan
    k[3, 0, 39] = torch.inf
    caches = [torch.zeros(1, 5, 2, 40).to(cache_dtype).to(device) for _ in range(2)]
    scales = [torch.zeros(1, 5, 2, device=device) for _ in range(2)]
    x, slots = k.to(device), torch.arange(5, device=device)
    reshape_and_cache(x, x, *caches, slots, k_scale=scales[0], v_scale=scales[1])
    caches, scales = [c.cpu() for c in caches], [s.cpu() for s in scales]
    for cache, scale in zip(caches, scales, strict=True):
        assert scale[0, 0, 0] == 1 and scale[0, 1, 0] == 1
        assert (raw(cache[0, :2, 0]) == 0).all()
        assert scale[0, 2, 0].isnan() and scale[0, 3, 0].isnan()
        assert scale[0, :, 1].isfinite().all() and scale[0, 4].isfinite().all()
        values = cache[0].float() * scale[0].unsqueeze(-1)
        step = scale[0].unsqueeze(-1) / 2 if cache_dtype == torch.int8 else k.abs() / 16 + 1e-4
        good = scale[0].isfinite()
        assert ((values - k).abs()[good] <= (step.expand_as(k) * 1.0001)[good]).all()
        assert values[2:4, 0].isnan().all()  # the NaN and the infinity are not lost
    # The same from the reference, and from the vector and the tail part of a row.
    write_both(k, k, caches, torch.arange(5), scales, device)
    for at in (0, 38):
        k[2, 1, at] = torch.nan
        k[4, 1, at] = -torch.inf
        write_both(k, k, caches, torch.arange(5), scales, device)


def test_write_strides(device: str) -> None:
    """Views of a fused QKV projection into caches with padding and with K and V interleaved."""
    qkv = randn(6, 4 + 2 + 2, 40, seed=1, dtype=torch.bfloat16, device=device)
    k, v = qkv[:, 4:6, :33], qkv[:, 6:, 3:36]
    slots = torch.tensor([1, 4, -1, -1, 8, 0])[torch.tensor([0, 1, 2, 4, 5, 3])].to(device)
    both = poisoned(4, 2, 3, 2, 48, dtype=torch.bfloat16, device=device)
    heads_first = poisoned(4, 2, 5, 48, dtype=torch.bfloat16, device=device).transpose(1, 2)
    for kc, vc in (
        (both[:, 0, ..., :33], both[:, 1, ..., 7:40]),
        (heads_first[:, :3, :, :33], both[:, 1, ..., :33]),
    ):
        before = [raw(both).clone(), raw(heads_first).clone()]
        dense = [kc.contiguous(), vc.contiguous()]
        reshape_and_cache(k, v, kc, vc, slots)
        reshape_and_cache(k.contiguous(), v.contiguous(), *dense, slots)
        assert torch.equal(raw(kc), raw(dense[0])) and torch.equal(raw(vc), raw(dense[1]))
        changed = sum(
            int((raw(t) != b).view(-1, 2).any(1).sum())
            for t, b in zip((both, heads_first), before, strict=True)
        )
        assert changed <= 2 * 4 * 2 * 33  # nothing beside the four written tokens
    scale = poisoned(4, 3, 4, device=device)[..., ::2]  # strided dynamic scales
    caches = [poisoned(4, 3, 2, 33, dtype=torch.int8, device=device) for _ in range(2)]
    strided_slots = torch.stack((slots, slots + 100), 1)[:, 0]
    reshape_and_cache(k, v, *caches, strided_slots, k_scale=scale, v_scale=scale.clone())
    assert scale.isfinite().sum() == 4 * 2


def test_write_empty_and_all_skipped(device: str) -> None:
    caches = [poisoned(2, 3, 2, 8, device=device) for _ in range(2)]
    before = raw(caches[0]).clone()
    for tokens in (0, 3):
        x = torch.ones(tokens, 2, 8, device=device)
        reshape_and_cache(x, x, *caches, torch.full((tokens,), -1, device=device))
    assert torch.equal(raw(caches[0]), before) and torch.equal(raw(caches[1]), before)
    none = [torch.empty(0, 3, 2, 8, device=device) for _ in range(2)]
    x = torch.ones(1, 2, 8, device=device)
    reshape_and_cache(x, x, *none, torch.tensor([-1], device=device))


def gather_case(block: int, seed: int) -> tuple[Tensor, Tensor, Tensor, int]:
    """Four sequences (one of them empty) in shuffled blocks; unused table entries are garbage."""
    lengths, starts = torch.tensor([7, 0, 1, 12]), torch.tensor([0, 3, 5, 2])
    needed = -(-(lengths + starts) // block)
    ids = torch.randperm(int(needed.sum()) + 3, generator=torch.Generator().manual_seed(seed))
    table = torch.full((4, int(needed.max()) + 2), -1)
    table[:, -1] = 2**31 - 1
    at = 0
    for b, n in enumerate(needed.tolist()):
        table[b, :n] = ids[at : at + n]
        table[b, : int(starts[b]) // block] = -7  # before the first wanted position
        at += n
    cu = torch.cat((torch.zeros(1, dtype=torch.long), lengths.cumsum(0)))
    return table, cu, starts, len(ids)


@pytest.mark.parametrize(
    "cache_dtype, dtype",
    [*itertools.product(FLOATS, (None, *FLOATS)), *itertools.product(EIGHT_BIT, FLOATS)],
)
def test_gather(device: str, cache_dtype: torch.dtype, dtype: torch.dtype | None) -> None:
    for i, (heads, dim, block) in enumerate(SHAPES):
        table, cu, starts, blocks = gather_case(block, i)
        if i % 2:
            table, cu, starts = table.int(), cu.int(), starts.int()
        caches = [(3 * randn(blocks, block, heads, dim, seed=i + j)) for j in (0, 50)]
        caches = [(40 * c if cache_dtype == torch.int8 else c).to(cache_dtype) for c in caches]
        kw: dict = {"k_scale": None, "v_scale": None, "seq_starts": starts, "dtype": dtype}
        if cache_dtype in EIGHT_BIT:
            kinds = SCALES[i % 4], SCALES[(i + 1) % 4]
            scales = [make_scale(kind, blocks, block, heads, seed=i) for kind in kinds]
            kw["k_scale"], kw["v_scale"] = (s.nan_to_num(0.01) for s in scales)
        n = int(cu[-1]) + 3
        out_dtype = dtype or cache_dtype
        out = tuple(poisoned(n, heads, dim, dtype=out_dtype, device=device) for _ in range(2))
        want = gather_cache_reference(*caches, table, cu, n, **kw)
        here = [t.to(device) for t in (*caches, table, cu)]
        kw = {k: v.to(device) if isinstance(v, Tensor) else v for k, v in kw.items()}
        got = gather_cache(*here, n, out=out, **kw)
        assert got[0] is out[0] and got[1] is out[1]
        for a, b in zip((t.cpu() for t in got), want, strict=True):
            assert torch.equal(a, b)
            assert (a[int(cu[-1]) :] == 0).all()


def test_gather_defaults_strides_and_empty(device: str) -> None:
    block, heads, dim = 3, 2, 10
    table, cu, _, blocks = gather_case(block, 1)
    table, cu = table.clamp_min(0).to(device), cu.to(device)
    both = randn(blocks, 2, block, heads, 16, seed=1, device=device)
    kc, vc = both[:, 0, ..., :dim], both[:, 1, ..., 4:14]
    want = gather_cache_reference(kc, vc, table, cu, 20)
    for got in (
        gather_cache(kc, vc, table, cu, 20),
        gather_cache(kc, vc, table.t().contiguous().t(), torch.stack((cu, cu), 1)[:, 0], 20),
    ):
        assert torch.equal(got[0], want[0]) and torch.equal(got[1], want[1])
    wide = torch.full((20, heads, 2 * dim + 2), 7.0, device=device)
    gather_cache(kc, vc, table, cu, 20, out=(wide[..., :dim], wide[..., dim + 1 : -1]))
    assert torch.equal(wide[..., :dim], want[0]) and torch.equal(wide[..., dim + 1 : -1], want[1])
    assert (wide[..., dim] == 7).all() and (wide[..., -1] == 7).all()
    assert gather_cache(kc, vc, table, cu * 0, 0)[0].shape == (0, heads, dim)
    assert (gather_cache(kc, vc, table[:0], cu[:1], 2)[0] == 0).all()


@pytest.mark.parametrize("cache_dtype", [torch.float16, *EIGHT_BIT])
def test_round_trip(device: str, cache_dtype: torch.dtype) -> None:
    """What was written comes back: exactly, or within half a code."""
    k, v = (randn(30, 2, 64, seed=i, dtype=torch.float16, device=device) for i in (1, 2))
    caches = [poisoned(5, 7, 2, 64, dtype=cache_dtype, device=device) for _ in range(2)]
    scales = [make_scale("dynamic", 5, 7, 2) if cache_dtype in EIGHT_BIT else None] * 2
    scales = [s if s is None else s.to(device, copy=True) for s in scales]
    table = torch.tensor([[3, 0, 4, 1, 2]], device=device)
    position = torch.arange(30, device=device)
    kw = {"k_scale": scales[0], "v_scale": scales[1]}
    reshape_and_cache(k, v, *caches, table[0][position // 7] * 7 + position % 7, **kw)
    cu = torch.tensor([0, 30], device=device)
    got = gather_cache(*caches, table, cu, 30, dtype=torch.float16, **kw)
    for a, b in zip(got, (k, v), strict=True):
        if cache_dtype == torch.float16:
            assert torch.equal(a, b)
        else:
            relative = (a.float() - b.float()).abs() / b.float().abs().amax(-1, keepdim=True)
            assert relative.max() <= (0.5 / 127 if cache_dtype == torch.int8 else 1 / 28) + 5e-4


@pytest.mark.parametrize("cache_dtype", [torch.bfloat16, FP8])
def test_threads_do_not_change_bits(cache_dtype: torch.dtype) -> None:
    k = randn(500, 4, 64, seed=1, dtype=torch.bfloat16)
    slots = slots_of(500, 640)
    table, cu = torch.arange(40).view(4, 10), torch.tensor([0, 100, 101, 250, 400])
    results = []
    for n in (1, 2, 3):
        caches = [torch.zeros(40, 16, 4, 64).to(cache_dtype) for _ in range(2)]
        scale = torch.ones(40, 16, 4) if cache_dtype == FP8 else None
        kw = {"k_scale": scale, "v_scale": None if scale is None else scale.clone()}
        with threads(n):
            reshape_and_cache(k, k, *caches, slots, **kw)
            results.append([*caches, *gather_cache(*caches, table, cu, 500, dtype=k.dtype, **kw)])
    for other in results[1:]:
        assert all(torch.equal(raw(a), raw(b)) for a, b in zip(results[0], other, strict=True))


def test_opcheck() -> None:
    """float8 is left to the other tests: opcheck itself cannot compute with it."""
    d = 16  # what 8-bit caches on a GPU ask for
    k, v = randn(4, 2, d, seed=1), randn(4, 2, d, seed=2)
    slots, table, cu = torch.tensor([4, -1, 0, 7]), torch.tensor([[1, 2], [0, 9]]), [0, 4, 5]
    for dtype, scale in (
        (torch.float32, None),
        (torch.int8, torch.tensor([0.01, 0.02])),
        (torch.int8, torch.ones(3, 3, 2)),
    ):
        caches = [torch.zeros(3, 3, 2, d).to(dtype) for _ in range(2)]
        s = [None if scale is None else scale.clone() for _ in range(2)]
        kw = {"k_scale": s[0], "v_scale": s[1]}
        opcheck(OPS.reshape_and_cache, (k, v, *caches, slots), kw, cuda=True)
        kw["seq_starts"] = None if scale is None else torch.tensor([1, 0])
        kw |= {"key_out": torch.empty(6, 2, d), "value_out": torch.empty(6, 2, d)}
        opcheck(OPS.gather_cache, (*caches, table, torch.tensor(cu)), kw, cuda=True)


@pytest.mark.parametrize("device", devices("reshape_and_cache"))
@pytest.mark.parametrize("dtype", [torch.float32, FP8, torch.int8])
def test_compiles(dtype: torch.dtype, device: str) -> None:
    def f(k: Tensor, kc: Tensor, vc: Tensor, slots: Tensor, ks, vs, table: Tensor, cu: Tensor):
        reshape_and_cache(k + 1, k, kc, vc, slots, k_scale=ks, v_scale=vs)
        a, b = gather_cache(kc, vc, table, cu, 6, k_scale=ks, v_scale=vs, dtype=k.dtype)
        return a + b

    runs = []
    for call in (lambda *a: compiles(f, *a), f):
        caches = [torch.zeros(3, 3, 2, 16).to(dtype) for _ in range(2)]
        s = [None if dtype == torch.float32 else torch.ones(3, 3, 2) for _ in range(2)]
        table, cu = torch.tensor([[1, 2], [0, 9]]), torch.tensor([0, 4, 5])
        args = (randn(4, 2, 16, seed=1), *caches, torch.tensor([4, -1, 0, 7]), *s, table, cu)
        args = tuple(None if a is None else a.to(device) for a in args)
        caches, s = args[1:3], args[4:6]
        runs.append([call(*args), *caches, *(t for t in s if t is not None)])
    for a, b in zip(*runs, strict=True):
        assert torch.equal(raw(a), raw(b))
    assert runs[0][1].float().any()


def test_write_refusals_leave_the_cache_unharmed(monkeypatch: pytest.MonkeyPatch) -> None:
    name = "reshape_and_cache: "
    k = torch.ones(3, 2, 8)
    caches = [torch.zeros(2, 3, 2, 8) for _ in range(2)]
    slots = torch.tensor([0, 5, -1])

    def go(**change: Tensor) -> None:
        base = {"key": k, "value": k, "key_cache": caches[0], "value_cache": caches[1]}
        reshape_and_cache(**(base | {"slot_mapping": slots} | change))

    refuses(lambda: go(key=k.double()), name + "key must be", "float64")
    refuses(lambda: go(key=k[0]), name + "key must have 3 dimensions")
    refuses(lambda: go(key=k[:, :1]), name + "key must have shape [*, 2, 8]")
    refuses(lambda: go(key=k.half(), value=k.half()), name + "key must have the dtype of key_cache")
    refuses(lambda: go(key=torch.ones(3, 8, 2).transpose(1, 2)), name + "key", "contiguous")
    refuses(lambda: go(value=k[:2]), name + "value must have shape [3, 2, 8]")
    refuses(lambda: go(value=k.half()), name + "value must have the dtype of key")
    refuses(lambda: go(value=torch.ones(3, 8, 2).transpose(1, 2)), name + "value", "contiguous")
    refuses(lambda: go(key_cache=caches[0][0]), name + "key_cache must have 4 dimensions")
    refuses(lambda: go(key_cache=caches[0].double()), name + "key_cache must be", "float64")
    refuses(lambda: go(value_cache=caches[1].half()), name + "value_cache must have the dtype")
    refuses(lambda: go(value_cache=caches[1][:1]), name + "value_cache must have shape")
    t = torch.zeros(2, 3, 8, 2).transpose(2, 3)
    refuses(lambda: go(key_cache=t), name + "key_cache", "contiguous")
    refuses(lambda: go(value_cache=t), name + "value_cache", "contiguous")
    refuses(lambda: go(slot_mapping=slots.float()), name + "slot_mapping must be torch.int32")
    refuses(lambda: go(slot_mapping=slots[:2]), name + "slot_mapping must have shape [3]")
    refuses(lambda: go(k_scale=torch.ones(())), name + "k_scale must be None")
    refuses(lambda: go(key=k.clone().requires_grad_()), "grad")
    for bad in (6, -2, 2**40):
        s = torch.tensor([1, bad, 0])
        refuses(lambda s=s: go(slot_mapping=s), name + "slot_mapping", f"got {bad} at index 1")
    eight = {
        "key_cache": torch.zeros(2, 3, 2, 8, dtype=torch.int8),
        "value_cache": torch.zeros(2, 3, 2, 8, dtype=torch.int8),
    }
    one = torch.ones(())
    refuses(lambda: go(**eight), name + "k_scale must be given", "torch.int8")
    refuses(lambda: go(**eight, k_scale=one), name + "v_scale must be given")
    for bad in (torch.ones(3), torch.ones(2, 3), torch.ones(2, 3, 1), torch.ones(1, 1, 1)):
        refuses(lambda b=bad: go(**eight, k_scale=b, v_scale=one), name + "k_scale", "[2, 3, 2]")
    refuses(lambda: go(**eight, k_scale=one.half(), v_scale=one), name + "k_scale", "float32")
    # Undefined without validation, refused with it.
    twice = torch.tensor([5, -1, 5])
    monkeypatch.delenv("FASTINFER_VALIDATE", raising=False)
    go(slot_mapping=twice)
    caches[0].zero_(), caches[1].zero_()
    monkeypatch.setenv("FASTINFER_VALIDATE", "1")
    refuses(lambda: go(slot_mapping=twice), name + "slot_mapping must not name a slot twice, got 5")
    for bad in (0.0, -1.0, torch.inf, torch.nan):
        s = torch.tensor([1.0, bad])
        refuses(lambda s=s: go(**eight, k_scale=one, v_scale=s), name + "v_scale", "head 1")
    assert not caches[0].any() and not caches[1].any()
    assert not any(c.any() for c in eight.values())
    go()
    assert caches[0].any()


def test_gather_refusals() -> None:
    name = "gather_cache: "
    caches = [torch.zeros(4, 3, 2, 8) for _ in range(2)]
    table, cu = torch.tensor([[0, 3], [2, 9]]), torch.tensor([0, 4, 6])

    def go(n: int = 6, **change: object) -> None:
        base = {"key_cache": caches[0], "value_cache": caches[1], "block_table": table}
        gather_cache(**(base | {"cu_seqlens": cu, "num_tokens": n} | change))

    go()
    refuses(lambda: go(block_table=table[0]), name + "block_table must have 2 dimensions")
    refuses(lambda: go(block_table=table.float()), name + "block_table must be torch.int32")
    refuses(lambda: go(cu_seqlens=cu[:2]), name + "cu_seqlens must have shape [3]")
    refuses(lambda: go(cu_seqlens=cu.short()), name + "cu_seqlens must be", "int16")
    refuses(lambda: go(seq_starts=cu), name + "seq_starts must have shape [2]")
    refuses(lambda: go(seq_starts=torch.zeros(2)), name + "seq_starts must be torch.int32")
    refuses(lambda: go(5), name + "cu_seqlens", "num_tokens (5)")
    refuses(lambda: go(-1), name + "num_tokens", "-1")
    refuses(lambda: go(cu_seqlens=torch.tensor([1, 4, 6])), name + "cu_seqlens must start with 0")
    refuses(lambda: go(cu_seqlens=torch.tensor([0, 4, 3])), name + "cu_seqlens must not decrease")
    refuses(lambda: go(8, cu_seqlens=torch.tensor([0, 7, 8])), name + "sequence 0", "0 to 6")
    refuses(lambda: go(seq_starts=torch.tensor([-1, 0])), name + "sequence 0", "-1 to 2")
    refuses(lambda: go(seq_starts=torch.tensor([2**63 - 1, 0])), name + "sequence 0")
    refuses(lambda: go(seq_starts=torch.tensor([0, 2])), name + "block_table", "9 at [1, 1]")
    bad = torch.tensor([[0, -1], [2, 9]])
    refuses(lambda: go(block_table=bad), name + "block_table", "-1 at [0, 1]")
    refuses(lambda: go(dtype=torch.float64), name + "key_out must be", "float64")
    refuses(lambda: go(v_scale=torch.ones(2)), name + "v_scale must be None")
    refuses(lambda: go(key_cache=caches[0][0]), name + "key_cache must have 4 dimensions")
    out = [torch.empty(6, 2, 8) for _ in range(2)]
    refuses(lambda: go(out=(out[0][:5], out[1])), name + "out must hold")
    refuses(lambda: go(out=out, dtype=torch.float16), name + "out must hold", "float16")
    refuses(lambda: go(out=(out[0], out[1][:5])), name + "value_out must have shape [6, 2, 8]")
    refuses(lambda: go(out=(out[0], out[1].half())), name + "value_out must have the dtype")
    refuses(lambda: go(out=(out[0][..., :7], out[1])), name + "key_out must have shape [*, 2, 8]")
    t = torch.empty(6, 8, 2).transpose(1, 2)
    refuses(lambda: go(out=(t, out[1])), name + "key_out", "contiguous")
    int8 = {c: torch.zeros(4, 3, 2, 8, dtype=torch.int8) for c in ("key_cache", "value_cache")}
    one = torch.ones(())
    refuses(lambda: go(**int8, k_scale=one, v_scale=one), name + "dtype must be given")
    refuses(lambda: go(**int8, dtype=torch.float32, k_scale=one), name + "v_scale must be given")


def test_fake_kernels_refuse_too() -> None:
    with torch.device("meta"):
        k, slots = torch.ones(3, 2, 8), torch.zeros(3, dtype=torch.int64)
        pair = [torch.zeros(2, 3, 2, 8) for _ in range(2)]
        reshape_and_cache(k, k, *pair, slots)
        refuses(lambda: reshape_and_cache(k[:2], k, *pair, slots), "reshape_and_cache: value")
        refuses(lambda: reshape_and_cache(k, k, *pair, slots[:2]), "slot_mapping", "[3]")
        refuses(lambda: reshape_and_cache(k.half(), k, *pair, slots), "key must be torch.float32")
        eight = [c.to(torch.int8) for c in pair]
        refuses(lambda: reshape_and_cache(k, k, *eight, slots), "k_scale must be given")
        table, cu = torch.zeros(2, 4, dtype=torch.int32), torch.zeros(3, dtype=torch.int32)
        assert gather_cache(*pair, table, cu, 5)[0].shape == (5, 2, 8)
        refuses(lambda: gather_cache(*pair, table, cu[:2], 5), "gather_cache: cu_seqlens", "[3]")
        refuses(lambda: gather_cache(*pair, table[0], cu, 5), "block_table", "2 dimensions")
        refuses(lambda: gather_cache(pair[0], eight[0], table, cu, 5), "value_cache must be")
