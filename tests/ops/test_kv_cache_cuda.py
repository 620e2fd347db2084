"""What only the CUDA kernels of the KV cache have: every fp8 conversion against the CPU's, indices
checked by FASTINFER_VALIDATE=1, agreement of CPU and CUDA on large random cases.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from fastinfer.ops.kv_cache import copy_blocks, gather_cache, reshape_and_cache
from helpers import poisoned, randn, refuses

pytestmark = pytest.mark.gpu
FP8 = torch.float8_e4m3fn
HALVES = (torch.bfloat16, torch.float16)


@pytest.fixture(params=["", "80"], ids=["native", "portable"])
def arch(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setenv("FASTINFER_FORCE_ARCH", request.param)
    return request.param


def raw(t: Tensor) -> Tensor:
    return t.cpu().contiguous().flatten().view(torch.uint8)


@pytest.mark.parametrize("heads", [1, 40, 64])  # 40, 64: the two kernels for much work
@pytest.mark.parametrize("cache_dtype", [FP8, torch.int8])
@pytest.mark.parametrize("dtype", HALVES)
def test_every_code(arch: str, dtype: torch.dtype, cache_dtype: torch.dtype, heads: int) -> None:
    """All 65536 patterns, NaN and infinities among them, under scales that hit ties, that nearly do
    (next to short numbers), and others.
    """
    patterns = torch.arange(65536, dtype=torch.int32).to(torch.int16).view(dtype).view(512, 1, 128)
    patterns = patterns.expand(512, heads, 128).contiguous()
    nan = torch.tensor([float("nan")])
    near = (1 + 2**-23, 1 - 2**-24, 1.375 + 2**-23, 0.01, 1 / 448, 1 / 127, 0.25 / 448)
    for scale in (1.0, 0.5, 0.0123, *near, 3.7e-20, 1.1e30, float(nan)):
        written = []
        for device in ("cpu", "cuda"):
            caches = [torch.zeros(32, 16, heads, 128).to(cache_dtype).to(device) for _ in "kv"]
            s = torch.tensor(scale, device=device)
            x, slots = patterns.to(device), torch.arange(512, device=device)
            reshape_and_cache(x, x, *caches, slots, k_scale=s, v_scale=s)
            written.append([raw(c) for c in caches])
        assert all(torch.equal(a, b) for a, b in zip(*written, strict=True)), scale


@pytest.mark.parametrize("cache_dtype", [FP8, torch.int8])
@pytest.mark.parametrize("dtype", [torch.float32, *HALVES])
def test_every_value(arch: str, dtype: torch.dtype, cache_dtype: torch.dtype) -> None:
    codes = torch.arange(256, dtype=torch.int32).to(torch.uint8).view(cache_dtype)
    got = []
    for device in ("cpu", "cuda"):
        cache = codes.view(1, 4, 1, 64).to(device)
        table, cu = (torch.tensor(x, device=device) for x in ([[0]], [0, 4]))
        s = torch.tensor(0.37, device=device)
        got.append(gather_cache(cache, cache, table, cu, 4, k_scale=s, v_scale=s, dtype=dtype))
    for a, b in zip(*got, strict=True):
        assert torch.equal(a.isnan(), b.cpu().isnan())
        assert torch.equal(raw(a.nan_to_num()), raw(b.nan_to_num()))


@pytest.mark.parametrize("cache_dtype", [None, FP8, torch.int8])
@pytest.mark.parametrize("dtype", [torch.float32, *HALVES])
def test_agrees_with_cpu(arch: str, dtype: torch.dtype, cache_dtype: torch.dtype | None) -> None:
    """Bit for bit, on enough tokens for many CTAs, with dynamic and static scales."""
    for heads, dim, block, tokens, kind in (
        (8, 128, 16, 1500, "dynamic"),
        (8, 128, 16, 2400, "dynamic"),
        (12, 96, 24, 2000, "head"),
        (2, 64, 16, 700, "head"),
        (3, 80, 24, 333, "dynamic"),
        (1, 576, 64, 100, "dynamic"),
        (5, 36, 7, 800, "head"),
        (3, 64, 16, 12001, "head"),  # from here on: the two kernels for much work
        (13, 64, 16, 2700, "dynamic"),
        (1, 128, 32, 17001, "dynamic"),
        (9, 128, 7, 2001, "head"),
        (8, 256, 16, 1101, "head"),
        (2, 256, 32, 4501, "dynamic"),
        (16, 64, 16, 2201, "head"),
        (4, 64, 8, 9001, "dynamic"),
        (8, 128, 16, 2401, "head"),
    ):
        blocks = tokens // block * 2 + 4
        k, v = (3 * randn(tokens, heads, dim, seed=i, dtype=dtype) for i in (1, 2))
        slots = torch.randperm(blocks * block)[:tokens].int()
        slots[::17] = -1
        table = torch.randperm(blocks).view(2, -1).int()
        cu = torch.tensor([0, tokens // 3, tokens - 5])
        starts = torch.tensor([block // 2, 3])
        results = []
        for device in ("cpu", "cuda"):
            c = torch.zeros if cache_dtype else poisoned
            caches = [
                c(blocks, block, heads, dim).to(cache_dtype or dtype).to(device) for _ in "kv"
            ]
            scale = [None, None]
            if cache_dtype:
                shape = (blocks, block, heads) if kind == "dynamic" else (heads,)
                scale = [torch.full(shape, s, device=device) for s in (0.021, 0.033)]
            kw = {"k_scale": scale[0], "v_scale": scale[1]}
            reshape_and_cache(k.to(device), v.to(device), *caches, slots.to(device), **kw)
            here = [t.to(device) for t in (table, cu)]
            kw |= {"seq_starts": starts.to(device), "dtype": dtype}
            out = gather_cache(*caches, *here, tokens, **kw)
            results.append([*caches, *(s for s in scale if s is not None)])
            results[-1] += [o.nan_to_num(7.0) for o in out]
        assert all(torch.equal(raw(a), raw(b)) for a, b in zip(*results, strict=True))


def test_validation(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FASTINFER_VALIDATE", "1")
    with torch.device("cuda"):
        k = torch.ones(3, 2, 8)
        caches = [torch.zeros(4, 3, 2, 8) for _ in "kv"]
        codes = [torch.zeros(4, 3, 2, 8, dtype=torch.int8) for _ in "kv"]
        for bad in (12, -2, 2**40):
            s = torch.tensor([1, bad, 0])
            refuses(
                lambda s=s: reshape_and_cache(k, k, *caches, s), "slot_mapping", f"got {bad} at"
            )
        twice = torch.tensor([5, -1, 5], dtype=torch.int32)
        refuses(lambda: reshape_and_cache(k, k, *caches, twice), "slot twice, got 5")
        scales = {"k_scale": torch.tensor([1.0, 2.0]), "v_scale": torch.tensor([1.0, 0.0])}
        slots = torch.tensor([5, -1, 4])
        refuses(lambda: reshape_and_cache(k, k, *codes, slots, **scales), "v_scale", "head 1")
        reshape_and_cache(k, k, *caches, slots)
        table, cu = torch.tensor([[0, 3], [2, 9]]), torch.tensor([0, 4, 6])

        def go(n: int = 6, **change: Tensor) -> None:
            gather_cache(
                *caches, **({"block_table": table, "cu_seqlens": cu} | change), num_tokens=n
            )

        go()
        refuses(lambda: go(5), "gather_cache: cu_seqlens", "num_tokens (5)")
        refuses(lambda: go(seq_starts=torch.tensor([0, 2])), "block_table", "9 at [1, 1]")
        refuses(lambda: go(seq_starts=torch.tensor([4, 0])), "sequence 0", "4 to 7")
        cache = torch.zeros(4, 5)
        for pairs, words in (
            ([[0, 4]], "destination blocks from 0 to 3, got 4"),
            ([[0, 1], [-1, 2]], "source blocks from 0 to 3, got -1 at row 1"),
            ([[0, 2], [1, 2]], "destination twice"),
            ([[0, 1], [1, 2]], "both as source and as destination"),
            ([[2**40, 2**41]], "source blocks"),
        ):
            refuses(lambda p=pairs: copy_blocks(cache, [], torch.tensor(p)), words)
        graph = torch.cuda.CUDAGraph()
        pairs = torch.tensor([[0, 1]])
        with torch.cuda.graph(graph):
            refuses(lambda: copy_blocks(cache, [], pairs), "FASTINFER_VALIDATE", "capture")
        monkeypatch.setenv("FASTINFER_VALIDATE", "0")
        copy_blocks(cache, [], torch.tensor([[2**40, 0], [-5, 1], [0, 77]]))  # skipped
        torch.cuda.synchronize()
