"""Prefill attention on the GPU over the grid of shapes, head ratios, head dimensions, pages and
features, sampled by seed: fp64 reference, poison in everything unused, both kernel families. And
what only a GPU can show: repeats under contention, more than 2^31 elements.
"""

from __future__ import annotations

import itertools
import random

import pytest
import torch

from fastinfer.ops.flash_attention import (
    flash_attn_func,
    flash_attn_func_reference,
    flash_attn_varlen_func,
    flash_attn_varlen_func_reference,
)
from helpers import assert_close_to_reference, generator, poisoned

SHAPES = [
    (1, 1), (1, 3), (2, 1), (3, 513), (64, 128), (113, 203), (128, 217), (239, 1), (511, 1),
    (799, 3), (1023, 1024), (1024, 1023), (128, 128), (256, 640), (129, 4224),
]  # fmt: skip
HEADS = [(6, 6), (6, 2), (6, 1), (32, 8), (28, 4), (40, 8), (16, 1)]
DIMS = [64, 80, 96, 112, 128, 192, 256, 16, 136]
PAGES = [1, 4, 16, 64, 128, 256, 8, 24, 32]
NAN = float("nan")


def draw(*shape: int, dtype: torch.dtype, seed: int) -> torch.Tensor:
    return torch.randn(*shape, generator=generator(seed, "cuda"), device="cuda").to(dtype)


def draw_features(rng: random.Random, heads: int, batch: int, len_k: int) -> dict:
    """Any combination of masks, and at most one change of the scores."""
    made: dict = {}
    mask = rng.choice(["none", "causal", "causal", "window", "causal window"])
    if "causal" in mask:
        made["causal"] = True
    if "window" in mask:
        made["window_size"] = (rng.choice([-1, 0, 3, 40, 150, len_k]), rng.choice([-1, 0, 1, 170]))
    score = rng.choice(["", "", "softcap", "alibi", "alibi batch", "negative", "softcap alibi"])
    seed = rng.randrange(1 << 30)
    if "softcap" in score:
        made["softcap"] = rng.choice([1.0, 4.0, 30.0])
    if "alibi" in score:
        shape = (batch, heads) if "batch" in score else (heads,)
        made["alibi_slopes"] = draw(*shape, dtype=torch.float32, seed=seed).abs() * 0.1
    if score == "negative":
        made["softmax_scale"] = rng.choice([-0.1, 0.0])
    if rng.random() < 0.3:
        dtype = rng.choice([torch.float32, torch.float16, torch.bfloat16])
        made["sinks"] = draw(heads, dtype=dtype, seed=seed)
    return made


def check(got, reference, baseline, features: dict) -> None:
    out, lse = got[0], got[1]
    expected, expected_lse = reference
    factor = 3.0 if features.get("softcap") else 2.0
    assert_close_to_reference(out, expected, baseline[0], factor=factor)
    finite = torch.isfinite(expected_lse)
    assert torch.equal(lse[~finite].double(), expected_lse[~finite])
    error = (lse.double() - expected_lse)[finite].abs()
    assert (error <= 1e-4 + 1e-5 * expected_lse[finite].abs()).all(), float(error.max())
    if out.numel() > 4096:
        mean = (out.double() - expected).abs().mean()
        base = (baseline[0].double() - expected).abs().mean()
        assert mean <= 1.5 * base + 1e-5, (float(mean), float(base))


@pytest.mark.parametrize("arch", ["", "80"], ids=["native", "portable"])
@pytest.mark.parametrize("seed", range(40))
def test_dense(seed: int, arch: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FASTINFER_FORCE_ARCH", arch)
    rng = random.Random(seed)
    (len_q, len_k), (heads, heads_kv) = rng.choice(SHAPES), rng.choice(HEADS)
    dim, batch = DIMS[seed % len(DIMS)], rng.choice([1, 2, 3])
    dtype = rng.choice([torch.float16, torch.bfloat16])
    features = draw_features(rng, heads, batch, len_k)
    # Strided: heads of every tensor lie in wider rows full of NaN, at times off 16-byte alignment.
    spare = rng.choice([0, 0, 8, 3])
    tensors = []
    for i, (n, h) in enumerate([(len_q, heads), (len_k, heads_kv), (len_k, heads_kv)]):
        wide = torch.full((batch, n, h, dim + spare), NAN, device="cuda").to(dtype)
        wide[..., spare:] = draw(batch, n, h, dim, dtype=dtype, seed=3 * seed + i)
        tensors.append(wide[..., spare:])
    out = torch.full((batch, len_q, heads, dim + spare), NAN, device="cuda").to(dtype)[..., spare:]
    got = flash_attn_func(*tensors, return_attn_probs=True, out=out, **features)
    reference = flash_attn_func_reference(*tensors, **features)
    check(
        got,
        reference,
        flash_attn_func_reference(*tensors, compute_dtype=dtype, **features),
        features,
    )


def paged(k: torch.Tensor, v: torch.Tensor, cu_k: list[int], page: int, rng: random.Random):
    """Keys and values in shuffled pages full of poison; unused table entries are wild."""
    lengths = [b - a for a, b in itertools.pairwise(cu_k)]
    counts = [-(-n // page) for n in lengths]
    total = sum(counts) + 3
    caches = [poisoned(total, page, *k.shape[1:], dtype=k.dtype, device="cuda") for _ in range(2)]
    for cache in caches:
        cache[..., ::3] = float("inf")
    table = torch.full((len(lengths), max(counts) + 2), -1, dtype=torch.int32)
    table[:, 1::2] = 2**31 - 1
    ids = rng.sample(range(total), sum(counts))
    for b in range(len(lengths)):
        for i in range(counts[b]):
            table[b, i] = block = ids.pop()
            rows = slice(cu_k[b] + i * page, min(cu_k[b] + (i + 1) * page, cu_k[b + 1]))
            for cache, t in zip(caches, (k, v), strict=True):
                cache[block, : rows.stop - rows.start] = t[rows]
    return *caches, table.cuda()


@pytest.mark.parametrize("arch", ["", "80"], ids=["native", "portable"])
@pytest.mark.parametrize("seed", range(40))
def test_varlen(seed: int, arch: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nine sequences of random lengths, some empty; packed keys, used lengths, or pages."""
    monkeypatch.setenv("FASTINFER_FORCE_ARCH", arch)
    rng = random.Random(1000 + seed)
    (heads, heads_kv), dim = rng.choice(HEADS), DIMS[seed % len(DIMS)]
    dtype = rng.choice([torch.float16, torch.bfloat16])
    len_q = [rng.choice([0, 1, 2, rng.randrange(200), rng.randrange(500)]) for _ in range(9)]
    len_k = [rng.choice([0, 1, n, n + rng.randrange(300), rng.randrange(700)]) for n in len_q]
    cu_q, cu_k = ([0, *torch.tensor(n).cumsum(0).tolist()] for n in (len_q, len_k))
    q = draw(cu_q[-1] + 1, heads, dim, dtype=dtype, seed=seed)[: cu_q[-1]]
    k, v = (draw(cu_k[-1] + 1, heads_kv, dim, dtype=dtype, seed=seed + i)[:-1] for i in (1, 2))
    features = draw_features(rng, heads, 9, 300)
    on_gpu = [torch.tensor(c, dtype=torch.int32, device="cuda") for c in (cu_q, cu_k)]
    out = poisoned(*q.shape, dtype=dtype, device="cuda")
    options = dict(features, return_attn_probs=True, out=out)
    page = rng.choice([0, *PAGES])
    if page:
        k_cache, v_cache, table = paged(k, v, cu_k, page, rng)
        used = torch.tensor(len_k, dtype=torch.int32, device="cuda")
        got = flash_attn_varlen_func(
            q, k_cache, v_cache, on_gpu[0], None, max(len_q), max(len_k), block_table=table,
            seqused_k=used, **options,
        )  # fmt: skip
    else:
        got = flash_attn_varlen_func(q, k, v, *on_gpu, max(len_q), max(len_k), **options)
    reference = flash_attn_varlen_func_reference(q, k, v, *on_gpu, **features)
    baseline = flash_attn_varlen_func_reference(q, k, v, *on_gpu, compute_dtype=dtype, **features)
    check(got, reference, baseline, features)


@pytest.mark.parametrize("dim", [64, 128, 192, 256])
@pytest.mark.parametrize(("batch", "len_k"), [(7, 555), (6, 500)])
def test_same_bits_every_time(dim: int, batch: int, len_k: int) -> None:
    """200 repeats of many short tiles, where rings and turns wrap all the time; 500 keys: in tiles
    of short sequences."""
    q, k, v = (
        draw(batch, n, h, dim, dtype=torch.bfloat16, seed=dim)
        for n, h in [(300, 8), (len_k, 2), (len_k, 2)]
    )
    first = flash_attn_func(q, k, v, causal=True)
    out = torch.empty_like(first)
    different = torch.zeros((), dtype=torch.bool, device="cuda")
    for _ in range(200):
        out.fill_(NAN)
        different |= (flash_attn_func(q, k, v, causal=True, out=out) != first).any()
    assert not different.item()


@pytest.mark.parametrize("page", [0, 16, 64])
def test_freed_blocks_behind_a_window_are_not_read(page: int) -> None:
    """Block ids and keys in front of every row's window may be anything."""
    length, window, dim = 900, 100, 128
    q, k, v = (
        draw(n, h, dim, dtype=torch.bfloat16, seed=n)
        for n, h in [(64, 4), (length, 2), (length, 2)]
    )
    cu = [torch.tensor([0, n], dtype=torch.int32, device="cuda") for n in (64, length)]
    options = {"causal": True, "window_size": (window, 0)}
    expected = flash_attn_varlen_func(q, k, v, *cu, 64, length, **options)
    first_seen = length - 64 - window
    k[:first_seen], v[:first_seen] = NAN, NAN
    if not page:
        assert torch.equal(flash_attn_varlen_func(q, k, v, *cu, 64, length, **options), expected)
        return
    k_cache, v_cache, table = paged(k, v, [0, length], page, random.Random(0))
    table[:, : first_seen // page] = -1
    out = flash_attn_varlen_func(
        q, k_cache, v_cache, cu[0], None, 64, length, block_table=table, seqused_k=cu[1][1:],
        **options,
    )  # fmt: skip
    assert torch.equal(out, expected)


@pytest.mark.parametrize("arch", ["", "80"], ids=["native", "portable"])
def test_offsets_beyond_32_bits(arch: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A cache of more than 2^31 elements, and the same rows in a small one."""
    monkeypatch.setenv("FASTINFER_FORCE_ARCH", arch)
    blocks = 2**31 // (16 * 128) + 64
    cache = torch.empty(blocks, 16, 1, 128, dtype=torch.bfloat16, device="cuda")
    ids = [blocks - 1, 3, blocks - 2]
    rows = draw(3, 16, 1, 128, dtype=torch.bfloat16, seed=0)
    cache[ids] = rows
    q = draw(20, 2, 128, dtype=torch.bfloat16, seed=1)
    cu_q, used = (torch.tensor(x, dtype=torch.int32, device="cuda") for x in ([0, 20], [48]))
    out = [
        flash_attn_varlen_func(
            q, c, c, cu_q, None, 20, 48, causal=True, seqused_k=used,
            block_table=torch.tensor([at], dtype=torch.int32, device="cuda"),
        )
        for c, at in ((cache, ids), (rows, [0, 1, 2]))
    ]  # fmt: skip
    assert torch.equal(*out)


def test_wrong_device_data_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """FASTINFER_VALIDATE=1 looks at lengths and block ids on the GPU too."""
    monkeypatch.setenv("FASTINFER_VALIDATE", "1")
    q, k = (draw(n, 2, 64, dtype=torch.float16, seed=n) for n in (10, 30))
    good = torch.tensor([0, 10], dtype=torch.int32, device="cuda")
    keys = torch.tensor([0, 30], dtype=torch.int32, device="cuda")
    flash_attn_varlen_func(q, k, k, good, keys, 10, 30)
    with pytest.raises(RuntimeError, match="cu_seqlens_q must end within the tokens of q"):
        flash_attn_varlen_func(q, k, k, good + keys, keys, 10, 30)
    table = torch.tensor([[0, 5]], dtype=torch.int32, device="cuda")
    with pytest.raises(RuntimeError, match=r"block_table\[0, 1\] must be a block id below 2"):
        flash_attn_varlen_func(
            q, k.view(2, 15, 2, 64), k.view(2, 15, 2, 64), good, None, 10, 30, block_table=table,
            seqused_k=keys[1:],
        )  # fmt: skip


def test_fp32_is_refused() -> None:
    q = torch.zeros(1, 4, 2, 64, device="cuda")
    with pytest.raises(RuntimeError, match=r"q must be torch.float16 or torch.bfloat16 on CUDA"):
        flash_attn_func(q, q, q)


@pytest.mark.parametrize("arch", ["", "80"], ids=["native", "portable"])
@pytest.mark.parametrize("dim", [64, 72, 128])
@pytest.mark.parametrize("causal", [True, False])
def test_tiles_of_short_calls_give_the_same_bits(
    dim: int, causal: bool, arch: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One sequence alone, and its last rows alone, run in smaller tiles than twelve sequences."""
    monkeypatch.setenv("FASTINFER_FORCE_ARCH", arch)
    q, k, v = (
        draw(12, 500, h, dim, dtype=torch.bfloat16, seed=dim + i) for i, h in enumerate((32, 8, 8))
    )
    whole, lse, _ = flash_attn_func(q, k, v, causal=causal, return_attn_probs=True)
    for rows in (500, 100):
        one, one_lse, _ = flash_attn_func(
            q[7:8, 500 - rows :], k[7:8], v[7:8], causal=causal, return_attn_probs=True
        )
        assert torch.equal(one, whole[7:8, 500 - rows :])
        assert torch.equal(one_lse, lse[7:8, :, 500 - rows :])
    cu = torch.tensor([0, 500], dtype=torch.int32, device="cuda")
    packed = flash_attn_varlen_func(q[7], k[7], v[7], cu, cu, 500, 500, causal=causal)
    assert torch.equal(packed, whole[7])
