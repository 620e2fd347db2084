"""flash_attn_with_shared_prefix against one attention call over everything."""

from __future__ import annotations

import pytest
import torch

from fastinfer.ops.paged_attention import flash_attn_with_kvcache_reference
from fastinfer.ops.shared_prefix import flash_attn_with_shared_prefix, shared_prefix_saves
from helpers import HALF, assert_close_to_reference, devices, randn, refuses

BLOCK = 16


def step(device: str, dtype: torch.dtype, len_q: int, prefix: int):
    lengths = torch.tensor([prefix + len_q, prefix + 40, prefix + 700], dtype=torch.int32)
    blocks = prefix // BLOCK
    own = [-(-(int(n) - prefix) // BLOCK) for n in lengths]
    order = torch.randperm(blocks + sum(own), generator=torch.Generator().manual_seed(1)).int()
    table = torch.full((3, blocks + max(own)), -1, dtype=torch.int32)
    table[:, :blocks] = order[:blocks]
    at = blocks
    for b, n in enumerate(own):
        table[b, blocks : blocks + n] = order[at : at + n]
        at += n
    k, v = (randn(len(order), BLOCK, 2, 64, seed=s, dtype=dtype, device=device) for s in (2, 3))
    q = randn(3, len_q, 8, 64, seed=4, dtype=dtype, device=device)
    return q, k, v, lengths.to(device), table.to(device)


@pytest.mark.parametrize("device", devices("flash_attn_kvcache"))
@pytest.mark.parametrize("len_q", [1, 4])
@pytest.mark.parametrize("prefix", [0, 16, 1040])
def test_equals_attention_over_all_keys(prefix, len_q, device):
    for dtype in (torch.float32, *HALF) if device == "cpu" else HALF:
        q, k, v, lengths, table = step(device, dtype, len_q, prefix)
        for features in ({}, {"softcap": 3.0}, {"sinks": randn(8, seed=5, device=device)}):
            out, lse = flash_attn_with_shared_prefix(
                q, k, v, prefix, lengths, table, return_softmax_lse=True, **features
            )
            options = {"cache_seqlens": lengths, "block_table": table, "causal": True, **features}
            reference, expected = flash_attn_with_kvcache_reference(q, k, v, **options)
            baseline, _ = flash_attn_with_kvcache_reference(q, k, v, **options, compute_dtype=dtype)
            assert_close_to_reference(out, reference, baseline)
            torch.testing.assert_close(lse.double(), expected, atol=2e-4, rtol=1e-5)


def test_refused():
    q, k, v, lengths, table = step("cpu", torch.float32, 1, 16)
    refuses(lambda: flash_attn_with_shared_prefix(q, k, v, 8, lengths, table),
            "flash_attn_with_shared_prefix", "prefix_len", "16", "got 8")  # fmt: skip


def test_when_it_pays():
    key_bytes = 2 * 8 * 128 * 2
    assert not shared_prefix_saves(1, 1 << 20, key_bytes)
    assert not shared_prefix_saves(2, 512, key_bytes)
    assert shared_prefix_saves(64, 2048, key_bytes)
