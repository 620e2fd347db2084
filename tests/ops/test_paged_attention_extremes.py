"""Paged attention at its edges: strided tensors, rows without pages, long sequences, large logits,
how exact 8-bit caches are, and keys that come in TMA boxes.
"""

from __future__ import annotations

import pytest
import torch
from test_flash_attention import check
from test_paged_attention import Case

from fastinfer.ops.paged_attention import (
    flash_attn_with_kvcache,
    flash_attn_with_kvcache_reference,
)
from helpers import devices, randn

DEVICES = devices("flash_attn_kvcache")
FP8 = torch.float8_e4m3fn
on_gpu = pytest.mark.gpu


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("code", [None, FP8, torch.int8], ids=str)
@pytest.mark.parametrize("shift", [0, 8, 1])
def test_strided_tensors(shift, code, device):
    """q as a part of qkv, K and V as parts of one tensor, columns of wider tensors: the bits of
    contiguous tensors. `shift` elements of an odd multiple of the alignment in front of all.
    """
    heads, heads_kv, dim, block = 8, 2, 64, 16
    lengths = torch.tensor([0, 1, 70, 333], dtype=torch.int32)
    wide = torch.randperm(4 * 30, generator=torch.Generator().manual_seed(0)).int().view(4, 30)
    qkv = randn(4, 2, heads + 2 * heads_kv, dim + 16, seed=1).bfloat16().to(device)
    q = qkv[:, :, heads_kv : heads_kv + heads, shift : shift + dim]
    cache = randn(120, 2, block, heads_kv + 1, dim + 16, seed=2).bfloat16()
    if code:
        cache = (cache * 30).to(code)
    cache = cache.to(device)
    k, v = (cache[:, i, :, 1:, shift : shift + dim] for i in range(2))
    doubled = lengths.repeat_interleave(2).to(device)
    options = {"causal": True}
    if code:
        options |= dict.fromkeys(("k_scale", "v_scale"), torch.full((), 0.03, device=device))
    target = torch.zeros(4, 2, heads, dim + 16, dtype=q.dtype, device=device)
    out = target[..., shift : shift + dim]
    got = flash_attn_with_kvcache(
        q, k, v, cache_seqlens=doubled[::2], block_table=wide.to(device)[:, 3:27], out=out,
        **options,
    )  # fmt: skip
    assert got is out
    expected = flash_attn_with_kvcache(
        q.contiguous(), k.contiguous(), v.contiguous(), cache_seqlens=lengths.to(device),
        block_table=wide[:, 3:27].contiguous().to(device), **options,
    )  # fmt: skip
    assert expected[1:].float().abs().max() > 0
    assert torch.equal(out, expected)
    target[..., shift : shift + dim] = 0
    assert not target.any(), "written outside of out"


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("code", [None, FP8, torch.int8], ids=str)
def test_row_without_pages_has_length_0_or_changes_nothing(code, device):
    """Rows that fill up a batch: no page at all."""
    options = {"dtype": torch.bfloat16, "cache_dtype": code, "device": device, "dim": 128}
    options |= {"scales": "head" if code else "none", "block_size": 16, "heads": 8}
    case = Case([200, 0, 33, 0], **options)
    case.table[1], case.table[3] = -1, 2**31 - 1
    out = case.verify()
    assert not out[[1, 3]].any()
    if device == "cpu":  # which refuses a length without pages
        return
    case.lengths[1] = 50
    padded = case.run()[0]
    assert torch.equal(padded[[0, 2, 3]], out[[0, 2, 3]])
    assert not padded[1].any()


@on_gpu
@pytest.mark.parametrize("code", [None, FP8, torch.int8], ids=str)
@pytest.mark.parametrize("heads", [(4, 1), (32, 1), (2, 2)], ids=str)
def test_long_sequence(heads, code):
    """150,001 keys beside 3: more pieces than the lanes of a warp, and than a stage holds."""
    case = Case(
        [150001, 3], heads=heads[0], heads_kv=heads[1], dim=64, dtype=torch.bfloat16,
        cache_dtype=code, scales="head" if code else "none", block_size=16, device="cuda",
    )  # fmt: skip
    args, kwargs, _, _ = case.copy()
    there = [None if t is None else t.cuda() for t in args]
    kwargs = {n: None if t is None else t.cuda() for n, t in kwargs.items()}
    reference = flash_attn_with_kvcache_reference(*there, **kwargs)
    baseline = flash_attn_with_kvcache_reference(*there, **kwargs, compute_dtype=case.q.dtype)
    for invariant in (False, True):
        out, lse = flash_attn_with_kvcache(
            *there, **kwargs, return_softmax_lse=True, batch_invariant=invariant
        )
        check(out, lse, reference, baseline)


@on_gpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("code", [None, FP8, torch.int8], ids=str)
@pytest.mark.parametrize("scale", [250.0, 0.0])
def test_large_and_equal_logits(scale, code, dtype):
    """Scores of up to some 1e4, and all of them equal."""
    case = Case(
        [900, 33, 1], heads=8, dim=128, dtype=dtype, cache_dtype=code, block_size=16,
        scales="token" if code else "none", device="cuda",
    )  # fmt: skip
    case.verify(softmax_scale=scale)


@on_gpu
@pytest.mark.parametrize("scales", ["scalar", "head", "token"])
@pytest.mark.parametrize("code", [FP8, torch.int8], ids=str)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_8bit_cache_within_2e_3(dtype, code, scales):
    """Relative error against fp64 over the same codes: 16-bit queries are not quantised."""
    case = Case(
        [2048, 700, 1999, 64], heads=32, heads_kv=8, dim=128, dtype=dtype, cache_dtype=code,
        scales=scales, block_size=16, device="cuda",
    )  # fmt: skip
    out = case.run()[0].double()
    args, kwargs, _, _ = case.copy()
    expected = flash_attn_with_kvcache_reference(*args, **kwargs)[0]
    assert (out - expected).norm() <= 2e-3 * expected.norm()


@on_gpu
@pytest.mark.parametrize("code", [FP8, torch.int8], ids=str)
@pytest.mark.parametrize("scales", ["head", "token"])
@pytest.mark.parametrize("dim,block", [(128, 16), (96, 48), (80, None), (128, 64), (128, 1024)])
def test_boxes_have_the_bits_of_rows(dim, block, scales, code, monkeypatch):
    """Keys copied by TMA, 16 in a box, against copies row by row, without clusters: unused slots,
    which come along, hold NaN, and the lengths end at, before and behind a box.
    """
    case = Case(
        [0, 1, 15, 16, 17, 700, 63, 64, 1025, 2100], heads=6, heads_kv=3, dim=dim, block_size=block,
        dtype=torch.bfloat16, cache_dtype=code, scales=scales, device="cuda",
    )  # fmt: skip
    case.verify()
    boxes = case.run()
    monkeypatch.setenv("FASTINFER_FORCE_ARCH", "80")
    rows = case.run()
    assert torch.equal(boxes[0], rows[0]) and torch.equal(boxes[1], rows[1])
