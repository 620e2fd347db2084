"""flash_attn_func and flash_attn_varlen_func: numerics against fp64, empty cases, poison, strides,
bit equality of equivalent calls, compile and opcheck."""

from __future__ import annotations

import random

import pytest
import torch
import torch.nn.functional as F

from fastinfer import _lib
from fastinfer.ops.flash_attention import (
    flash_attn_func,
    flash_attn_func_reference,
    flash_attn_varlen_func,
    flash_attn_varlen_func_reference,
)
from helpers import (
    FLOATS,
    HALF,
    assert_close_to_reference,
    compiles,
    devices,
    opcheck,
    poisoned,
    randn,
)

DEVICES = devices("flash_attn_fwd")
each_device = pytest.mark.parametrize("device", DEVICES)

SHAPES = [
    (1, 1), (1, 3), (2, 1), (3, 513), (64, 128), (113, 203), (128, 217), (239, 1), (511, 1),
    (799, 3), (65, 64), (1, 1025), (7, 2100), (130, 1090),
]  # fmt: skip
LONG_SHAPES = [(1023, 1024), (1024, 1023), (4224, 4224)]
HEADS = [(6, 6), (6, 2), (6, 1), (32, 8), (28, 4), (40, 8), (64, 4), (32, 1)]
DIMS = [16, 24, 40, 64, 80, 96, 104, 112, 128, 192, 248, 256]
NAN = float("nan")


def dtypes(device: str) -> tuple[torch.dtype, ...]:
    """fp32 is for the CPU only."""
    return FLOATS if device == "cpu" else HALF


each_dtype = pytest.mark.parametrize(
    "device,dtype", [(device, dtype) for device in DEVICES for dtype in dtypes(device)], ids=str
)


def feature_sets(heads: int, batch: int, seed: int, device: str = "cpu") -> list[dict]:
    """Every option alone and some together."""
    rng = random.Random(seed)
    window = (rng.choice([-1, 0, 3, 40, 700]), rng.choice([-1, 0, 1, 17]))
    slopes = randn(heads, seed=seed, device=device).abs()
    sinks = randn(heads, seed=seed + 1, device=device)
    return [
        {},
        {"causal": True},
        {"window_size": window},
        {"causal": True, "window_size": (rng.choice([0, 5, 130]), -1)},
        {"causal": True, "softcap": 4.0},
        {"alibi_slopes": slopes, "causal": True},
        {"alibi_slopes": randn(batch, heads, seed=seed, device=device).abs(), "softmax_scale": 0.3},
        {"sinks": sinks},
        {
            "sinks": randn(heads, seed=seed, device=device) + 3,
            "causal": True,
            "window_size": (9, 0),
        },
    ]


def check(out, lse, reference, baseline, **features):
    """The error rule of the project, and the LSE within 1e-4 + 1e-5 |lse|."""
    expected, expected_lse = reference
    factor = 3.0 if features.get("softcap") else 2.0
    assert_close_to_reference(out, expected, baseline[0], factor=factor)
    assert lse.dtype == torch.float32 and lse.shape == expected_lse.shape
    finite = torch.isfinite(expected_lse)
    assert torch.equal(lse[~finite].double(), expected_lse[~finite]), "LSE of empty rows"
    error = (lse.double() - expected_lse)[finite].abs()
    assert (error <= 1e-4 + 1e-5 * expected_lse[finite].abs()).all(), float(error.max())


def check_dense(q, k, v, **features):
    out, lse, nothing = flash_attn_func(q, k, v, return_attn_probs=True, **features)
    assert nothing is None and out.shape == q.shape and out.dtype == q.dtype
    reference = flash_attn_func_reference(q, k, v, **features)
    check(
        out,
        lse,
        reference,
        flash_attn_func_reference(q, k, v, compute_dtype=q.dtype, **features),
        **features,
    )


def make_dense(batch, len_q, len_k, heads, heads_kv, dim, dtype=None, seed=0, device="cpu"):
    dtype = dtype or dtypes(device)[0]
    q = randn(batch, len_q, heads, dim, seed=seed, dtype=dtype, device=device)
    k = randn(batch, len_k, heads_kv, dim, seed=seed + 1, dtype=dtype, device=device)
    v = randn(batch, len_k, heads_kv, dim, seed=seed + 2, dtype=dtype, device=device)
    return q, k, v


@each_dtype
@pytest.mark.parametrize("lengths", SHAPES, ids=str)
def test_against_fp64(lengths, device, dtype):
    rng = random.Random(repr((lengths, dtype)))
    heads, heads_kv = rng.choice(HEADS[:3] + HEADS[4:5])
    dim = rng.choice(DIMS[:4] if max(lengths) > 500 else DIMS)
    tensors = make_dense(2, *lengths, heads, heads_kv, dim, dtype, lengths[0], device)
    for features in rng.sample(feature_sets(heads, 2, lengths[1], device), 3):
        check_dense(*tensors, **features)


@each_device
@pytest.mark.parametrize("dim", DIMS)
def test_head_dims(dim, device):
    for dtype in dtypes(device):
        check_dense(*make_dense(1, 9, 70, 4, 2, dim, dtype, dim, device), causal=True)


@each_device
@pytest.mark.parametrize("heads", HEADS, ids=str)
def test_head_ratios(heads, device):
    check_dense(*make_dense(1, 19, 77, *heads, 32, torch.bfloat16, 3, device), causal=True)


def test_every_feature(isa):
    tensors = make_dense(2, 37, 150, 6, 2, 40, seed=5)
    for features in feature_sets(6, 2, seed=5):
        check_dense(*tensors, **features)


@pytest.mark.skipif("cuda" not in DEVICES, reason="the CPU runs it per instruction-set level")
def test_every_feature_on_cuda():
    for dtype in HALF:
        tensors = make_dense(2, 137, 250, 6, 2, 40, dtype, 5, "cuda")
        for features in feature_sets(6, 2, 5, "cuda"):
            check_dense(*tensors, **features)


@pytest.mark.full
@each_device
@pytest.mark.parametrize("lengths", LONG_SHAPES, ids=str)
def test_long(lengths, device):
    for dtype in dtypes(device):
        for features in ({}, {"causal": True}, {"window_size": (300, 20)}):
            check_dense(*make_dense(1, *lengths, 4, 2, 64, dtype, 0, device), **features)


@each_device
def test_against_sdpa(device):
    for dtype in dtypes(device):
        q, k, v = make_dense(2, 50, 50, 4, 4, 64, dtype, 0, device)
        for causal in (False, True):
            peer, exact = (
                F.scaled_dot_product_attention(
                    *(t.transpose(1, 2).to(at) for t in (q, k, v)), is_causal=causal
                ).transpose(1, 2)
                for at in (dtype, torch.float64)
            )
            assert_close_to_reference(flash_attn_func(q, k, v, causal=causal), exact, peer)


@each_device
def test_extreme_logits(device):
    dtype = torch.float32 if device == "cpu" else torch.bfloat16  # fp16 has no room for such q
    q, k, v = make_dense(1, 20, 90, 2, 1, 32, dtype, 0, device)
    for magnitude in (1e4, -1e4):
        loud = q * abs(magnitude) / (q @ k[:, :1, 0, :, None])[..., :1].abs().clamp_min(1)
        check_dense(loud if magnitude > 0 else -loud, k, v, causal=True)
    equal = torch.ones_like(k)
    out = flash_attn_func(q, equal, v)
    expected = v.double().mean(1, keepdim=True).expand(1, 20, 1, 32).repeat(1, 1, 2, 1)
    if device == "cpu":
        torch.testing.assert_close(out.double(), expected, atol=1e-6, rtol=1e-5)
    else:
        assert_close_to_reference(out, expected, expected.to(dtype))


@each_device
def test_empty_cases(device):
    q, k, v = make_dense(2, 5, 0, 4, 2, 32, device=device)
    out, lse, _ = flash_attn_func(q, k, v, return_attn_probs=True)
    assert (out == 0).all() and torch.isneginf(lse).all()
    out, lse, _ = flash_attn_func(
        q, k, v, sinks=torch.zeros(4, device=device), return_attn_probs=True
    )
    assert (out == 0).all() and torch.isneginf(lse).all()
    q, k, v = make_dense(2, 0, 7, 4, 2, 32, device=device)
    assert flash_attn_func(q, k, v).shape == (2, 0, 4, 32)
    q, k, v = make_dense(0, 3, 7, 4, 2, 32, device=device)
    assert flash_attn_func(q, k, v).shape == (0, 3, 4, 32)
    # More queries than keys: the first ones see nothing.
    q, k, v = make_dense(1, 9, 4, 4, 2, 32, device=device)
    out, lse, _ = flash_attn_func(q, k, v, causal=True, return_attn_probs=True)
    assert (out[:, :5] == 0).all() and torch.isneginf(lse[:, :, :5]).all()
    assert torch.isfinite(lse[:, :, 5:]).all() and (out[:, 5:] != 0).any()


@each_device
def test_nan_reaches_only_who_sees_it(device):
    q, k, v = make_dense(1, 200, 200, 2, 1, 32, device=device)
    clean = flash_attn_func(q, k, v, window_size=(10, 0))
    for t in (k, v):
        spoiled = t.clone()
        spoiled[:, 100] = NAN
        args = (q, spoiled, v) if t is k else (q, k, spoiled)
        out = flash_attn_func(*args, window_size=(10, 0))
        assert out[:, 100:111].isnan().all()
        assert torch.equal(out[:, 128:], clean[:, 128:])


def strided(t: torch.Tensor, kind: int) -> torch.Tensor:
    """The same values behind other strides; what lies between is NaN."""
    if kind == 0:
        wide = poisoned(*t.shape[:-2], 2 * t.shape[-2] + 1, t.shape[-1] + 24, dtype=t.dtype)
        wide = wide.to(t.device)
        view = wide[..., 1::2, 8 : 8 + t.shape[-1]]
    else:
        view = torch.full_like(t.transpose(-2, -3), NAN).contiguous().transpose(-2, -3)
    view.copy_(t)
    return view


@each_device
@pytest.mark.parametrize("kind", [0, 1])
def test_strides(kind, device):
    for dtype in dtypes(device):
        q, k, v = make_dense(2, 33, 140, 6, 2, 40, dtype, 0, device)
        expected = flash_attn_func(q, k, v, causal=True)
        out = strided(torch.zeros_like(q), kind)
        args = [strided(t, kind) for t in (q, k, v)]
        assert not args[0].is_contiguous() and not out.is_contiguous()
        result = flash_attn_func(*args, causal=True, out=out)
        assert result is out and torch.equal(out, expected)


def packed(
    lengths_q, lengths_k, heads=6, heads_kv=2, dim=40, dtype=None, seed=0, device="cpu"
):  # fmt: skip
    dtype = dtype or dtypes(device)[0]
    cu_q = torch.tensor([0, *lengths_q]).cumsum(0).int().to(device)
    cu_k = torch.tensor([0, *lengths_k]).cumsum(0).int().to(device)
    q = randn(int(cu_q[-1]), heads, dim, seed=seed, dtype=dtype, device=device)
    k = randn(int(cu_k[-1]), heads_kv, dim, seed=seed + 1, dtype=dtype, device=device)
    v = randn(int(cu_k[-1]), heads_kv, dim, seed=seed + 2, dtype=dtype, device=device)
    return q, k, v, cu_q, cu_k, max(lengths_q), max(lengths_k)


def paged(k, cu_k, block_size, seed, spare=3, extra_columns=2):
    """The packed keys in a cache of shuffled blocks full of poison, and the block table; entries
    past a sequence's length are wild."""
    lengths = cu_k.diff().tolist()
    counts = [-(-n // block_size) for n in lengths]
    total = sum(counts) + spare
    cache = poisoned(total, block_size, *k.shape[1:], dtype=k.dtype, device=str(k.device))
    cache[..., ::3] = float("inf")
    table = torch.full((len(lengths), max(counts) + extra_columns), -1, dtype=torch.int32)
    cu_k = cu_k.tolist()
    table[:, 1::2] = 2**31 - 1
    ids = random.Random(seed).sample(range(total), sum(counts))
    for b, _n in enumerate(lengths):
        for i in range(counts[b]):
            table[b, i] = ids.pop()
            rows = k[cu_k[b] + i * block_size : min(cu_k[b] + (i + 1) * block_size, cu_k[b + 1])]
            cache[int(table[b, i]), : rows.shape[0]] = rows
    return cache, table.to(k.device)


MIXED_Q = [5, 0, 70, 1, 129, 3, 0, 64, 17]
MIXED_K = [9, 33, 70, 500, 1100, 0, 0, 20, 130]


@each_dtype
def test_varlen(device, dtype):
    args = packed(MIXED_Q, MIXED_K, dtype=dtype, device=device)
    for features in feature_sets(6, len(MIXED_Q), 11, device):
        out, lse, _ = flash_attn_varlen_func(*args, return_attn_probs=True, **features)
        reference = flash_attn_varlen_func_reference(*args[:5], **features)
        baseline = flash_attn_varlen_func_reference(*args[:5], compute_dtype=dtype, **features)
        check(out, lse, reference, baseline, **features)


BLOCK_SIZES = [1, 4, 16, 23, 64, 128, 256]


def check_paged_equals_packed(block_size, device="cpu"):
    for dtype in dtypes(device)[::2] if device == "cpu" else HALF:
        args = packed(MIXED_Q, MIXED_K, dim=48, dtype=dtype, device=device)
        q, k, v, cu_q, cu_k, max_q, max_k = args
        k_cache, table = paged(k, cu_k, block_size, seed=1)
        v_cache, _ = paged(v, cu_k, block_size, seed=1)
        for features in ({"causal": True}, {"window_size": (33, 5)}):
            expected = flash_attn_varlen_func(*args, return_attn_probs=True, **features)
            for lengths in ((cu_k, None), (None, cu_k.diff().int())):
                out = flash_attn_varlen_func(
                    q, k_cache, v_cache, cu_q, lengths[0], max_q, max_k, block_table=table,
                    seqused_k=lengths[1], return_attn_probs=True, **features,
                )  # fmt: skip
                assert torch.equal(out[0], expected[0]) and torch.equal(out[1], expected[1])


@pytest.mark.parametrize("block_size", BLOCK_SIZES)
def test_paged_equals_packed(block_size, isa):
    check_paged_equals_packed(block_size)


@pytest.mark.skipif("cuda" not in DEVICES, reason="needs a CUDA device")
@pytest.mark.parametrize("block_size", BLOCK_SIZES)
def test_paged_equals_packed_on_cuda(block_size, monkeypatch):
    """TMA and portable kernels differ in their bits, and only the portable ones read any block."""
    monkeypatch.setenv("FASTINFER_FORCE_ARCH", "80")
    check_paged_equals_packed(block_size, "cuda")
    monkeypatch.delenv("FASTINFER_FORCE_ARCH")
    if block_size % 8 == 0:
        check_paged_equals_packed(block_size, "cuda")


@each_device
def test_seqused_k(device):
    q, k, v, cu_q, cu_k, max_q, max_k = packed([3, 8, 1], [40, 70, 90], device=device)
    used = torch.tensor([40, 0, 65], dtype=torch.int32, device=device)
    args = (q, k, v, cu_q, cu_k, max_q, max_k)
    k[cu_k[1] : cu_k[2]] = NAN
    v[cu_k[2] + 65 :] = NAN
    out, lse, _ = flash_attn_varlen_func(*args, seqused_k=used, causal=True, return_attn_probs=True)
    reference = flash_attn_varlen_func_reference(*args[:5], seqused_k=used, causal=True)
    check(out, lse, reference, (reference[0].to(q.dtype),))
    assert (out[3:11] == 0).all()


@each_device
def test_rows_of_no_sequence_are_left_alone(device):
    q, k, v, _, _, _, _ = packed([12], [30], device=device)
    out = poisoned(*q.shape, dtype=q.dtype, device=device)
    cu_q, cu_k = (torch.tensor(c, device=device).int() for c in ([2, 5, 9], [0, 10, 30]))
    flash_attn_varlen_func(q, k, v, cu_q, cu_k, 4, 20, out=out)
    assert out[:2].isnan().all() and out[9:].isnan().all() and out[2:9].isfinite().all()


# ---- bits ----


CHUNK_FEATURES = [{"causal": True}, {"causal": True, "window_size": (200, 0)}]


def check_chunks(features, device="cpu"):
    """Whole prefill, chunks over a paged cache, and one token at a time."""
    for dtype, dim in ((dtypes(device)[0], 64), (torch.bfloat16, 80)):
        length = 1300
        q, k, v, cu, _, _, _ = packed([length], [length], 4, 2, dim, dtype, device=device)
        whole = flash_attn_varlen_func(q, k, v, cu, cu, length, length, **features)
        k_cache, table = paged(k, cu, 16, seed=2)
        v_cache, _ = paged(v, cu, 16, seed=2)
        for begin, end in ((0, 100), (100, 101), (101, 777), (777, 779), (1290, 1300)):
            part = flash_attn_varlen_func(
                q[begin:end], k_cache, v_cache, torch.tensor([0, end - begin]).int().to(device),
                None, end - begin, end, block_table=table, batch_invariant=True,
                seqused_k=torch.tensor([end]).int().to(device), **features,
            )  # fmt: skip
            assert torch.equal(part, whole[begin:end]), (begin, end)


@pytest.mark.parametrize("features", CHUNK_FEATURES)
def test_chunked_prefill_and_lone_rows_have_the_same_bits(features, isa):
    check_chunks(features)


@pytest.mark.skipif("cuda" not in DEVICES, reason="needs a CUDA device")
@pytest.mark.parametrize("arch", ["", "80"])
@pytest.mark.parametrize("features", CHUNK_FEATURES)
def test_chunked_prefill_has_the_same_bits_on_cuda(features, arch, monkeypatch):
    monkeypatch.setenv("FASTINFER_FORCE_ARCH", arch)
    check_chunks(features, "cuda")


def check_batch_mates(device="cpu"):
    q, k, v = make_dense(5, 3, 2100, 6, 2, 64, device=device)
    together = flash_attn_func(q, k, v, causal=True)
    for b in (0, 3):
        alone = flash_attn_func(q[b : b + 1], k[b : b + 1], v[b : b + 1], causal=True)
        assert torch.equal(alone, together[b : b + 1])


def test_batch_mates_do_not_matter(isa):
    check_batch_mates()


@pytest.mark.skipif("cuda" not in DEVICES, reason="needs a CUDA device")
def test_batch_mates_do_not_matter_on_cuda():
    check_batch_mates("cuda")


def test_thread_count_does_not_matter():
    q, k, v = make_dense(1, 70, 3000, 2, 1, 64)
    threads = torch.get_num_threads()
    try:
        results = []
        for n in (1, 2, 3, 8):
            torch.set_num_threads(n)
            results.append(flash_attn_func(q, k, v, causal=True, return_attn_probs=True)[:2])
            results.append(results[0])
            lone = flash_attn_func(q[:, -1:], k, v)
            assert torch.equal(lone, results[0][0][:, -1:])
    finally:
        torch.set_num_threads(threads)
    for out, lse in results[1:]:
        assert torch.equal(out, results[0][0]) and torch.equal(lse, results[0][1])


@each_device
def test_repeated_calls_give_the_same_bits_also_in_place(device):
    q, k, v = make_dense(2, 70, 1300, 4, 2, 80, device=device)
    first = flash_attn_func(q, k, v, causal=True)
    assert torch.equal(flash_attn_func(q, k, v, causal=True, batch_invariant=True), first)
    assert flash_attn_func(q, k, v, causal=True, out=q) is q and torch.equal(q, first)


@pytest.mark.full
def test_offsets_beyond_32_bits():
    """A cache of more than 2^31 elements, of which only the needed blocks are ever touched."""
    blocks = 2**31 // (16 * 16) + 5
    cache = torch.empty(blocks, 16, 1, 16, dtype=torch.int8)
    ids = [blocks - 1, 3, blocks - 2]
    for i in ids:
        cache[i] = randn(16, 1, 16, seed=i).mul(30).to(torch.int8)
    table = torch.tensor([ids], dtype=torch.int32)
    lengths = (torch.tensor([0, 2]).int(), torch.tensor([0, 48]).int())
    q = randn(2, 2, 16, seed=0)
    scale = torch.tensor(0.02)
    options = {"k_scale": scale, "v_scale": scale, "causal": True}
    out = flash_attn_varlen_func(q, cache, cache, *lengths, 2, 48, block_table=table, **options)
    rows = cache[ids].flatten(0, 1)
    assert torch.equal(out, flash_attn_varlen_func(q, rows, rows, *lengths, 2, 48, **options))


# ---- 8 bit ----


def quantized(t: torch.Tensor, dtype: torch.dtype, kind: str, seed: int = 0):
    """8-bit codes of t and a scale of the given form."""
    from fastinfer.ops._reference_attention import quantize_rows

    if kind == "scalar":
        scale = given = torch.tensor(0.031, device=t.device)
    elif kind == "head":
        device = str(t.device)
        scale = given = randn(t.shape[-2], seed=seed, device=device).abs() * 0.02 + 0.02
    else:
        codes, scale = quantize_rows(t, dtype, None)
        return codes, scale.contiguous()
    return quantize_rows(t, dtype, scale)[0], given


@pytest.mark.parametrize("kind", ["scalar", "head", "token"])
@pytest.mark.parametrize("code", [torch.float8_e4m3fn, torch.int8], ids=str)
def test_8bit(code, kind, isa):
    for dtype in FLOATS:
        q, k, v = make_dense(2, 13, 150, 6, 2, 40, dtype)
        (k, k_scale), (v, v_scale) = (quantized(t, code, kind) for t in (k, v))
        check_dense(q, k, v, causal=True, k_scale=k_scale, v_scale=v_scale)


@pytest.mark.skipif("cuda" not in DEVICES, reason="the CPU runs it per instruction-set level")
@pytest.mark.parametrize("kind", ["scalar", "head", "token"])
@pytest.mark.parametrize("code", [torch.float8_e4m3fn, torch.int8], ids=str)
def test_8bit_on_cuda(code, kind):
    for dtype in HALF:
        for dim in (40, 128, 256):
            q, k, v = make_dense(2, 73, 150, 6, 2, dim, dtype, 0, "cuda")
            (k, k_scale), (v, v_scale) = (quantized(t, code, kind) for t in (k, v))
            check_dense(q, k, v, causal=True, k_scale=k_scale, v_scale=v_scale)


@each_device
def test_8bit_varlen_token_scales(device):
    q, k, v, *rest = packed([5, 40], [90, 65], dtype=torch.bfloat16, device=device)
    (k, k_scale), (v, v_scale) = (quantized(t, torch.int8, "token") for t in (k, v))
    scales = {"k_scale": k_scale, "v_scale": v_scale}
    out, lse, _ = flash_attn_varlen_func(q, k, v, *rest, return_attn_probs=True, **scales)
    reference = flash_attn_varlen_func_reference(q, k, v, *rest[:2], **scales)
    baseline = flash_attn_varlen_func_reference(
        q, k, v, *rest[:2], compute_dtype=torch.bfloat16, **scales
    )
    check(out, lse, reference, baseline)


# ---- the torch side ----


def dense_kwargs(**changes):
    kwargs = {
        "softmax_scale": 0.2, "causal": True, "window_left": -1, "window_right": -1, "softcap": 0.0,
        "alibi_slopes": None, "sinks": None, "k_scale": None, "v_scale": None, "plan": None,
        "batch_invariant": False, "workspace": None,
    }  # fmt: skip
    return kwargs | changes


def test_opcheck():
    for dtype in (torch.float32, *HALF[:1]):
        q, k, v = make_dense(2, 5, 9, 4, 2, 16, dtype)
        opcheck(
            _lib.op("flash_attn_fwd"),
            (q, k, v, torch.zeros_like(q), torch.zeros(2, 4, 5)),
            dense_kwargs(alibi_slopes=torch.ones(4)),
        )
    q, k, v, cu_q, cu_k, max_q, max_k = packed([3, 4], [9, 20], dim=16)
    lengths = {"cu_seqlens_q": cu_q, "max_seqlen_q": max_q, "max_seqlen_k": max_k}
    op = _lib.op("flash_attn_varlen_fwd")
    opcheck(
        op,
        (q, k, v, torch.zeros_like(q), None),
        dense_kwargs(cu_seqlens_k=cu_k, seqused_k=None, block_table=None, **lengths),
    )
    k_cache, table = paged(k, cu_k, 4, seed=0)
    v_cache, _ = paged(v, cu_k, 4, seed=0)
    opcheck(
        op,
        (q, k_cache, v_cache, torch.zeros_like(q), torch.zeros(6, 7)),
        dense_kwargs(cu_seqlens_k=None, seqused_k=cu_k.diff().int(), block_table=table, **lengths),
    )


def test_compile():
    q, k, v = make_dense(2, 5, 9, 4, 2, 16)
    expected = flash_attn_func(q, k, v, causal=True, return_attn_probs=True)
    out = compiles(
        lambda q, k, v: flash_attn_func(q, k, v, causal=True, return_attn_probs=True), q, k, v
    )
    assert torch.equal(out[0], expected[0]) and torch.equal(out[1], expected[1])
    args = packed([3, 4], [9, 20], dim=16)
    out = compiles(lambda *a: flash_attn_varlen_func(*a, causal=True) * 2, *args)
    assert torch.equal(out, flash_attn_varlen_func(*args, causal=True) * 2)
