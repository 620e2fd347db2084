"""copy_blocks, swap_blocks, repeat_kv."""

from __future__ import annotations

import warnings

import pytest
import torch
from torch import Tensor

from fastinfer.ops._reference_kv_cache import (
    copy_blocks_reference,
    repeat_kv_reference,
    swap_blocks_reference,
)
from fastinfer.ops.kv_cache import copy_blocks, repeat_kv, swap_blocks
from helpers import compiles, devices, opcheck, poisoned, randn, refuses, threads

OPS = torch.ops.fastinfer
ALL = (torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.int8, torch.int64)


each_device = pytest.mark.parametrize("device", devices("copy_blocks"))


def raw(t: Tensor) -> Tensor:
    return t.contiguous().flatten().view(torch.uint8)


def random_bytes(*shape: int, dtype: torch.dtype, seed: int, device: str = "cpu") -> Tensor:
    g = torch.Generator().manual_seed(seed)
    size = torch.empty(0, dtype=dtype).element_size()
    data = torch.randint(0, 256, (*shape[:-1], shape[-1] * size), generator=g, dtype=torch.uint8)
    return data.view(dtype).to(device)


def layouts(dtype: torch.dtype, seed: int, device: str = "cpu") -> list[Tensor]:
    """Caches of 9 blocks: dense, padded, K and V interleaved, heads first, scales, a vector."""
    x = random_bytes(9, 2, 5, 3, 24, dtype=dtype, seed=seed, device=device)
    return [
        random_bytes(9, 5, 3, 17, dtype=dtype, seed=seed + 1, device=device),
        x[:, 0, 1:4, :2, 3:20],
        x[:, 1],
        x.transpose(2, 3)[:, 0],
        x.permute(0, 4, 3, 2, 1)[:, ::2],
        random_bytes(9, dtype=dtype, seed=seed + 2, device=device),
    ]


@each_device
@pytest.mark.parametrize("dtype", ALL)
def test_copy_blocks(dtype: torch.dtype, device: str) -> None:
    mapping = torch.tensor([[0, 8], [3, 1], [0, 5], [7, 2]])
    for index in (torch.int64, torch.int32):
        a, b = layouts(dtype, 1, device), layouts(dtype, 1)
        # Neighbours of the views count too: compare the whole buffers behind them.
        copy_blocks(a[:3], a[3:], mapping.to(device, index))
        copy_blocks_reference([raw_view(t) for t in b], [], mapping)
        for x, y in zip(a, b, strict=True):
            assert torch.equal(raw(x.cpu()), raw(y))
        assert torch.equal(raw(a[1]._base.cpu()), raw(b[1]._base))


def raw_view(t: Tensor) -> Tensor:
    """The same elements as integers, so that torch can copy every dtype."""
    as_int = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[t.element_size()]
    if t.stride(-1) == 1:
        return t.view(as_int)
    return t._base.view(as_int).as_strided(t.size(), t.stride(), t.storage_offset())


@each_device
def test_copy_blocks_single_tensors_lists_and_strided_mapping(device: str) -> None:
    k, v = (randn(6, 4, 2, 8, seed=i, device=device) for i in (1, 2))
    scale = randn(6, 4, 2, seed=3, device=device)
    want = [t.clone() for t in (k, v, scale)]
    for t in want:
        t[4] = t[2]
    wide = torch.tensor([[2, 9, 4, 9]], device=device)
    copy_blocks([k, scale], v, wide[:, ::2])
    assert all(torch.equal(a, b) for a, b in zip((k, v, scale), want, strict=True))
    copy_blocks(k, v, torch.empty(0, 2, dtype=torch.int32, device=device))
    copy_blocks(k, v, torch.tensor([[1, 1]], device=device))  # onto itself
    copy_blocks(torch.empty(6, 0, device=device), [], torch.tensor([[1, 2]], device=device))
    assert all(torch.equal(a, b) for a, b in zip((k, v, scale), want, strict=True))


# Where the blocks come from and go to; pinned memory is read by a kernel, pageable memory copied.
ROUTES = [("cpu", "cpu")]
if devices("swap_blocks")[1:]:
    ROUTES += [("cuda", "cpu"), ("cpu", "cuda"), ("cuda", "pinned"), ("pinned", "cuda")]
    ROUTES += [("cuda", "cuda"), *([("cuda:0", "cuda:1")] if torch.cuda.device_count() > 1 else [])]


def put(t: Tensor, place: str) -> Tensor:
    """t on a device or in pinned memory, with its layout and what lies around it."""
    base = t if t._base is None else t._base
    moved = base.pin_memory() if place == "pinned" else base.to(place)
    return moved.as_strided(t.size(), t.stride(), t.storage_offset())


@pytest.mark.filterwarnings("ignore:swap_blocks")
@pytest.mark.parametrize("route", ROUTES, ids=lambda r: f"{r[0]}-{r[1]}")
@pytest.mark.parametrize("dtype", ALL)
def test_swap_blocks(dtype: torch.dtype, route: tuple[str, str]) -> None:
    """Between different layouts of the same block shape, both ways."""
    mapping = torch.tensor([[0, 3], [8, 0], [0, 1]], dtype=torch.int32)
    src = layouts(dtype, 1)
    dst = [random_bytes(4, *t.shape[1:], dtype=dtype, seed=9) for t in src]
    want = [raw_view(t).clone() for t in dst]
    swap_blocks_reference([raw_view(t) for t in src], want, mapping)
    there = [put(t, route[1]) for t in dst]
    swap_blocks([put(t, route[0]) for t in src], there, mapping)
    synchronize()
    for got, expected in zip(there, want, strict=True):
        assert torch.equal(raw(got.cpu()), raw(expected))
    back = torch.tensor([[2, 7], [1, 0]])
    for i, block in enumerate(want):  # one by one: the views share a buffer
        view = put(layouts(dtype, 5)[i], route[0])
        copy = layouts(dtype, 5)[i]
        swap_blocks(there[i], view, back)
        swap_blocks_reference([block], [raw_view(copy)], back)
        synchronize()
        for got, expected in ((view, copy), (view._base, copy._base)):  # neighbours too
            if expected is not None:
                assert torch.equal(raw(got.cpu()), raw(expected))


def synchronize() -> None:
    for i in range(torch.cuda.device_count()):
        torch.cuda.synchronize(i)


@pytest.mark.gpu
def test_swap_blocks_says_that_pageable_memory_is_slow(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fastinfer.ops.kv_cache._warned_of_pageable", False)
    x, host = randn(3, 5, seed=1, device="cuda"), torch.zeros(3, 5)
    pairs = torch.tensor([[2, 0]])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        swap_blocks(x, host.pin_memory(), pairs)
    with pytest.warns(UserWarning, match="swap_blocks: .*pin_memory"):
        swap_blocks(x, host, pairs)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # once
        swap_blocks(x, host, pairs)
    torch.cuda.synchronize()
    assert torch.equal(host[0], x[2].cpu())


@pytest.mark.gpu
def test_many_caches_pairs_and_dimensions() -> None:
    """More than one launch holds: 500 caches, 700 pairs; six dimensions that do not merge."""
    pool = random_bytes(500, 30, 33, dtype=torch.int8, seed=1)
    ids = torch.randperm(30, generator=torch.Generator().manual_seed(2)).view(-1, 2)
    want = pool.clone()
    want[:, ids[:, 1]] = pool[:, ids[:, 0]]
    there = pool.cuda()
    copy_blocks(list(there), [], ids.cuda())
    assert torch.equal(there.cpu(), want)
    src, dst = randn(1000, 40, seed=3), torch.zeros(800, 40)
    order = torch.stack([torch.randperm(n)[:700] for n in (1000, 800)], 1)
    want = dst.index_copy(0, order[:, 1], src[order[:, 0]])
    for a, b in ((src.cuda(), dst.pin_memory()), (src.pin_memory(), dst.cuda())):
        swap_blocks(a, b, order)
        torch.cuda.synchronize()
        assert torch.equal(b.cpu(), want)
    x = randn(2, 6, 4, 6, 4, 6, 4, 5, seed=4, device="cuda")[:, ::2, :2, ::3, :3, ::2, :3]
    assert torch.equal(repeat_kv(x, 3), x.repeat_interleave(3, -2))


@pytest.mark.gpu
@pytest.mark.filterwarnings("ignore:swap_blocks")
@pytest.mark.parametrize("strided, pinned", [(False, True), (True, True), (False, False)])
def test_swap_blocks_in_long_stretches(strided: bool, pinned: bool) -> None:
    """Host blocks in a row: through a buffer, or directly where the device's are in a row too."""
    n = 2200  # blocks of 32 KiB: more than the buffer holds at a time
    here = randn(n, 16, 8, 64, seed=1, device="cuda")
    if strided:
        here = here.transpose(1, 2).contiguous().transpose(1, 2)
    host = torch.zeros(5000, 16, 8, 64, pin_memory=pinned)
    shuffled = torch.randperm(n, generator=torch.Generator().manual_seed(3))
    in_a_row = torch.arange(100, 100 + n)
    in_a_row[500:] += 1500  # two stretches
    for ids in (shuffled, torch.arange(n)):
        order = torch.randperm(n, generator=torch.Generator().manual_seed(4))
        pairs = torch.stack([ids, in_a_row], 1)[order]
        swap_blocks(here, host, pairs)
        back = torch.zeros_like(here)
        swap_blocks(host, back, pairs.flip(1))
        torch.cuda.synchronize()
        assert torch.equal(host[in_a_row], here.cpu()[ids])
        assert not host[:100].any() and not host[600:2100].any()
        assert torch.equal(back, here)
        host.zero_()


@pytest.mark.gpu
def test_huge_and_misaligned() -> None:
    """Offsets and sizes beyond 2^31, where addresses allow single bytes only."""
    n = (1 << 31) + 4099
    x = torch.randint(0, 100, (2, n), dtype=torch.int8, device="cuda")[:, 1:]
    out = repeat_kv(x, 2)
    for i in range(4):
        assert torch.equal(out[i], x[i // 2])
    del out
    copy_blocks(x, [], torch.tensor([[0, 1]], device="cuda"))
    assert torch.equal(x[0], x[1])


def test_swap_single_tensors_and_inside_one_cache() -> None:
    x, y = randn(3, 5, seed=1), poisoned(4, 5)
    swap_blocks(x, y, torch.tensor([[2, 0]]))
    assert torch.equal(y[0], x[2]) and y[1:].isnan().all()
    swap_blocks(y, y, torch.tensor([[0, 3]]))
    assert torch.equal(y[3], x[2])
    swap_blocks(x, y, torch.empty(0, 2, dtype=torch.int64))


@each_device
@pytest.mark.parametrize("dtype", ALL)
@pytest.mark.parametrize("n_rep", [1, 2, 7])
def test_repeat_kv(dtype: torch.dtype, n_rep: int, device: str) -> None:
    x = random_bytes(3, 2, 5, 34, dtype=dtype, seed=1, device=device)
    for view in (x, x[..., 3:20], x.transpose(0, 2), x[:, :1], x[::2, 1], x[1, 1, :, :17]):
        for dim in range(-view.dim(), -1):
            want = repeat_kv_reference(raw_view(view), n_rep, dim=dim)
            assert torch.equal(raw(repeat_kv(view, n_rep, dim=dim)), raw(want))
            assert torch.equal(raw(repeat_kv(view, n_rep, dim=dim + view.dim())), raw(want))


@each_device
def test_repeat_kv_out_and_empty(device: str) -> None:
    x = randn(3, 2, 17, seed=1, device=device)
    wide = torch.full((3, 6, 20), 7.0, device=device)
    out = wide[..., 2:19]
    assert repeat_kv(x, 3, out=out) is out
    assert torch.equal(out, x.repeat_interleave(3, -2))
    assert (wide[..., :2] == 7).all() and (wide[..., 19:] == 7).all()
    assert repeat_kv(torch.empty(0, 2, 4, device=device), 3).shape == (0, 6, 4)
    assert repeat_kv(torch.empty(2, 0, 4, device=device), 3).shape == (2, 0, 4)


def test_threads() -> None:
    mapping = torch.stack((torch.arange(32), torch.arange(32) + 32), 1)
    for n in (1, 3):
        cache = randn(64, 16, 4, 32, seed=1)
        want = torch.cat((cache[:32], cache[:32]))
        with threads(n):
            copy_blocks([cache], [], mapping)
            assert torch.equal(repeat_kv(cache, 4), cache.repeat_interleave(4, -2))
        assert torch.equal(cache, want)


def test_opcheck() -> None:
    caches, mapping = [randn(4, 3, 5, seed=1), randn(4, 7, seed=2)], torch.tensor([[0, 2], [1, 3]])
    opcheck(OPS.copy_blocks, (caches, mapping), cuda=True)
    others = [c.clone() for c in caches]
    opcheck(OPS.swap_blocks, (others, caches, mapping), cuda=True, stays=(mapping,))
    x = randn(3, 2, 5, seed=1)
    opcheck(OPS.repeat_kv, (x, 3), {"dim": -2, "out": torch.empty(3, 6, 5)}, cuda=True)
    opcheck(OPS.repeat_kv, (x[:, :1, 1:4], 3), {"dim": 0, "out": torch.empty(9, 1, 3)}, cuda=True)


@pytest.mark.parametrize("device", devices("copy_blocks"))
def test_compiles(device: str) -> None:
    def f(k: Tensor, v: Tensor, host: Tensor, mapping: Tensor, on_host: Tensor) -> Tensor:
        copy_blocks([k], [v], mapping)
        swap_blocks(k, host, on_host)
        return repeat_kv(k, 2) + 1

    runs = []
    for call in (lambda *a: compiles(f, *a), f):
        args = [x.to(device) for x in (randn(4, 3, 5, seed=1), randn(4, 3, 5, seed=2))]
        args.append(torch.zeros(4, 3, 5, pin_memory=device != "cpu"))
        mapping = torch.tensor([[0, 2], [1, 3]])
        runs.append([call(*args, mapping.to(device), mapping), *args])
        if device != "cpu":
            torch.cuda.synchronize()
    for a, b in zip(*runs, strict=True):
        assert torch.equal(a, b)
    assert torch.equal(runs[0][1][2], runs[0][1][0]) and runs[0][3].any()


def test_copy_blocks_refusals(monkeypatch: pytest.MonkeyPatch) -> None:
    name = "copy_blocks: "
    k = randn(4, 3, seed=1)
    before = k.clone()
    pairs = torch.tensor([[0, 1]])
    refuses(lambda: copy_blocks(k, k, pairs.float()), name + "block_mapping must be torch.int32")
    refuses(lambda: copy_blocks(k, k, pairs[0]), name + "block_mapping must have shape [*, 2]")
    refuses(lambda: copy_blocks([], [], pairs), name)
    refuses(
        lambda: copy_blocks(torch.tensor(1.0), [], pairs), name + "caches[0]", "first dimension"
    )
    for row, side in (([0, 4], "destination"), ([-1, 1], "source"), ([4, 1], "source")):
        m = torch.tensor([[0, 2], row])
        refuses(lambda m=m: copy_blocks(k, k.clone(), m), name + "block_mapping", side, "row 1")
    smaller = torch.tensor([[0, 3]])
    refuses(lambda: copy_blocks(k, k[:3], smaller), name + "block_mapping", "0 to 2")
    monkeypatch.setenv("FASTINFER_VALIDATE", "1")
    m = torch.tensor([[0, 2], [1, 2]])
    refuses(lambda: copy_blocks(k, [], m), name, "destination twice, got block 2")
    m = torch.tensor([[0, 1], [1, 2]])
    refuses(lambda: copy_blocks(k, [], m), name, "both as source and as destination", "block 1")
    assert torch.equal(k, before)
    copy_blocks(k, [], torch.tensor([[0, 1], [0, 2]]))
    assert torch.equal(k[2], before[0])


def test_swap_blocks_refusals(monkeypatch: pytest.MonkeyPatch) -> None:
    name = "swap_blocks: "
    a, b = randn(4, 3, seed=1), randn(5, 3, seed=2)
    before = b.clone()
    pairs = torch.tensor([[0, 1]])
    refuses(lambda: swap_blocks(a, b, pairs.short()), name + "block_mapping must be torch.int32")
    refuses(lambda: swap_blocks(a, b, pairs.t()), name + "block_mapping must have shape [*, 2]")
    refuses(lambda: swap_blocks([a, a], [b], pairs), name, "same length", "2 and 1")
    refuses(lambda: swap_blocks(a, b.half(), pairs), name + "dst must have the dtype of src")
    refuses(lambda: swap_blocks(a, b[:, :2], pairs), name + "blocks of dst", "dst[0]")
    refuses(lambda: swap_blocks(a, b[None], pairs), name + "blocks of dst")
    refuses(lambda: swap_blocks(torch.tensor(1.0), torch.tensor(1.0), pairs), name + "src[0]")
    for row, side in (([0, 5], "destination"), ([4, 1], "source"), ([0, -1], "destination")):
        m = torch.tensor([[0, 0], row])
        refuses(lambda m=m: swap_blocks(a, b, m), name + "block_mapping", side, "row 1")
    monkeypatch.setenv("FASTINFER_VALIDATE", "1")
    m = torch.tensor([[0, 2], [1, 2]])
    refuses(lambda: swap_blocks(a, b, m), name, "destination twice, got block 2")
    m = torch.tensor([[0, 1], [1, 2]])
    refuses(lambda: swap_blocks(b, b, m), name, "both as source and as destination")
    assert torch.equal(b, before)
    swap_blocks(a, b, m)  # different caches: no overlap
    assert torch.equal(b[2], a[1])


def test_repeat_kv_refusals() -> None:
    x = torch.ones(2, 3, 4)
    name = "repeat_kv: "
    both = torch.zeros(6, 4)
    refuses(lambda: repeat_kv(both[:2], 3, dim=0, out=both), name + "out must not share memory")
    for dim in (-1, 2, 3, -4):
        refuses(lambda d=dim: repeat_kv(x, 2, dim=d), name + "dim must name", f"got {dim}")
        out = torch.empty(2, 6, 4)
        refuses(lambda d=dim, o=out: OPS.repeat_kv(x, 2, dim=d, out=o), name + "dim must name")
    refuses(lambda: repeat_kv(x, 0), name + "n_rep must be at least 1, got 0")
    refuses(lambda: OPS.repeat_kv(x, 0, dim=1, out=x), name + "n_rep must be at least 1, got 0")
    refuses(lambda: repeat_kv(x[0, 0], 2), name + "dim must name")
    refuses(lambda: repeat_kv(x.transpose(1, 2), 2), name + "x must be contiguous")
    refuses(lambda: repeat_kv(x, 2, out=torch.empty(2, 5, 4)), name + "out must have the shape")
    refuses(lambda: repeat_kv(x, 2, out=torch.empty(2, 6, 4).half()), name + "out", "dtype of x")
    refuses(lambda: repeat_kv(x, 2, out=torch.empty(2, 4, 6).transpose(1, 2)), name + "out", "cont")
    refuses(lambda: repeat_kv(x.clone().requires_grad_(), 2), "repeat_kv", "grad")


def test_fake_kernels_refuse_too() -> None:
    with torch.device("meta"):
        k, mapping = torch.ones(4, 3, 2, 8), torch.zeros(3, 2, dtype=torch.int64)
        copy_blocks(k, k, mapping)
        refuses(lambda: copy_blocks(k, k, mapping.t()), "copy_blocks: block_mapping", "2]")
        refuses(lambda: swap_blocks(k, k[:, :2], mapping), "swap_blocks: dst")
        refuses(lambda: swap_blocks([k], [k, k], mapping), "swap_blocks", "same length")
        assert repeat_kv(k, 3, dim=1).shape == (4, 9, 2, 8)
        refuses(lambda: repeat_kv(k, 3, out=torch.ones(4, 3, 2, 8)), "repeat_kv: out")
