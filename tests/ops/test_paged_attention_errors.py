"""flash_attn_with_kvcache, plan_decode and merge_attn_states refuse bad input with one sentence
each, and leave the cache as it was."""

from __future__ import annotations

import pytest
import torch

from fastinfer.ops.flash_attention import flash_attn_func
from fastinfer.ops.paged_attention import flash_attn_with_kvcache, merge_attn_states, plan_decode
from helpers import randn, refuses

NAME = "flash_attn_with_kvcache"


def ints(*values: int) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int32)


def dense(**changes):
    """Two sequences over a dense cache of three rows of 8 slots, two tokens appended to each."""
    args = {
        "q": randn(2, 2, 4, 16, seed=0),
        "k_cache": randn(3, 8, 2, 16, seed=1),
        "v_cache": randn(3, 8, 2, 16, seed=2),
        "k": randn(2, 2, 2, 16, seed=3),
        "v": randn(2, 2, 2, 16, seed=4),
        "cache_seqlens": ints(3, 6),
    }
    args |= changes
    caches = [args[n] for n in ("k_cache", "v_cache") if isinstance(args[n], torch.Tensor)]
    before = [t.clone() for t in caches]
    try:
        return flash_attn_with_kvcache(**args)
    except Exception:
        for t, old in zip(caches, before, strict=True):
            assert torch.equal(t.view(torch.uint8), old.view(torch.uint8)), "the cache changed"
        raise


TABLE = torch.zeros(9, 4)


@pytest.mark.parametrize(
    "changes,words",
    [
        ({"q": torch.zeros(2, 4, 16)}, ("q", "4 dimensions")),
        ({"k_cache": torch.zeros(8, 2, 16)}, ("k_cache", "4 dimensions")),
        ({"v_cache": torch.zeros(3, 9, 2, 16)}, ("v_cache", "shape of k_cache")),
        ({"k_cache": torch.zeros(3, 8, 2, 16).half()}, ("k_cache", "dtype of q")),
        ({"k_cache": torch.zeros(1, 8, 2, 16), "v_cache": torch.zeros(1, 8, 2, 16)},
         ("k_cache", "batch of q (2)")),
        ({"k": None}, ("k and v must be given together", "only v")),
        ({"v": None}, ("k and v must be given together", "only k")),
        ({"k": torch.zeros(2, 2, 3, 16)}, ("k must have shape [2, *, 2, 16]",)),
        ({"v": torch.zeros(2, 3, 2, 16)}, ("v must have shape [2, 2, 2, 16]",)),
        ({"k": torch.zeros(2, 2, 2, 16).half()}, ("k", "dtype of q")),
        ({"k": torch.zeros(2, 2, 16, 2).transpose(2, 3)}, ("k", "contiguous")),
        ({"cache_seqlens": None}, ("cache_seqlens", "k and v")),
        ({"cache_seqlens": ints(3)}, ("cache_seqlens", "[2]", "[1]")),
        ({"cache_seqlens": torch.tensor([3, 6])}, ("cache_seqlens", "int32", "int64")),
        ({"cache_seqlens": ints(3, 7)}, ("cache_seqlens[1]", "0 to 6", "got 7")),
        ({"cache_seqlens": ints(-1, 6)}, ("cache_seqlens[0]", "got -1")),
        ({"cache_seqlens": 7}, ("cache_seqlens[0]", "got 7")),
        ({"cache_batch_idx": ints(0, 3)}, ("cache_batch_idx[1]", "0 to 2", "got 3")),
        ({"cache_batch_idx": ints(-1, 0)}, ("cache_batch_idx[0]", "got -1")),
        ({"cache_batch_idx": ints(2, 2)}, ("cache_batch_idx", "2 twice")),
        ({"cache_batch_idx": ints(2)}, ("cache_batch_idx", "[2]", "[1]")),
        ({"cache_leftpad": ints(0, 9)}, ("cache_leftpad[1]", "(8)", "got 9")),
        ({"cache_leftpad": ints(-1, 0)}, ("cache_leftpad[0]", "got -1")),
        ({"cache_leftpad": torch.zeros(2).long()}, ("cache_leftpad", "int32")),
        ({"num_splits": -1}, ("num_splits", "-1")),
        ({"rotary_cos": TABLE}, ("rotary_cos and rotary_sin", "together")),
        ({"rotary_sin": TABLE}, ("rotary_cos and rotary_sin", "together")),
        ({"rotary_cos": TABLE, "rotary_sin": TABLE, "k": None, "v": None},
         ("need the new k and v", "apply_rotary")),
        ({"rotary_cos": TABLE, "rotary_sin": TABLE[:8]}, ("rotary_sin", "[9, 4]", "[8, 4]")),
        ({"rotary_cos": TABLE, "rotary_sin": TABLE.half()}, ("rotary_sin", "dtype")),
        ({"rotary_cos": TABLE.half(), "rotary_sin": TABLE.half()}, ("rotary_cos", "float32")),
        ({"rotary_cos": torch.zeros(9, 9), "rotary_sin": torch.zeros(9, 9)},
         ("rotary_cos", "rotary_dim <= head_dim (16)")),
        ({"rotary_cos": TABLE[:7], "rotary_sin": TABLE[:7]},
         ("rotary_cos", "8 rows for sequence 1", "[7, 4]")),
        ({"rotary_cos": TABLE.T.contiguous().T, "rotary_sin": TABLE}, ("rotary_cos", "contiguous")),
        ({"window_size": (-3, 0)}, ("window_size", "-3")),
        ({"sinks": torch.ones(3)}, ("sinks", "[4]")),
        ({"k_scale": torch.ones(2)}, ("k_scale", "k_cache", "leave it out")),
        ({"plan": torch.zeros(11).int()}, ("plan", "q_len 2", "append 2")),
        ({"plan": torch.zeros(12).int()}, ("plan", "[11]")),
        ({"out": torch.zeros(2, 2, 4, 24)}, ("out",)),
    ],
    ids=str,
)  # fmt: skip
def test_refuses(changes, words):
    assert dense().shape == (2, 2, 4, 16)
    refuses(lambda: dense(**changes), NAME, *words)


def paged(table, **changes):
    """Blocks of 2 tokens; lengths 3 and 6, two tokens appended to each."""
    caches = {"k_cache": randn(9, 2, 2, 16, seed=1), "v_cache": randn(9, 2, 2, 16, seed=2)}
    return dense(**caches, block_table=torch.tensor(table, dtype=torch.int32), **changes)


GOOD = [[0, 1, 2, -1], [3, 4, 5, 6]]


def test_paged_refuses():
    assert paged(GOOD).shape == (2, 2, 4, 16)
    refuses(lambda: paged(GOOD, cache_batch_idx=ints(0, 1)), NAME, "cache_batch_idx", "block_table")
    refuses(lambda: paged([[0, 9, 2, 7], GOOD[1]]), NAME, "block_table[0, 1]", "below 9", "got 9")
    # The block that only receives the appended tokens.
    refuses(lambda: paged([[0, 1, -5, 7], GOOD[1]]), NAME, "block_table[0, 2]", "got -5")
    refuses(lambda: paged([r[:3] for r in GOOD]), NAME, "cache_seqlens[1]", "0 to 4", "got 6")
    refuses(lambda: paged(GOOD[:1]), NAME, "block_table", "[2, *]", "[1, 4]")


def test_shared_memory_is_refused():
    q, k, v = (randn(2, 2, h, 16, seed=h) for h in (4, 2, 2))
    cache = randn(3, 8, 2, 16, seed=1)
    refuses(lambda: dense(k_cache=cache, v_cache=cache), NAME, "v_cache must not be k_cache")
    shifted = torch.empty(q.numel() + 16).as_strided(q.shape, q.stride(), 16)
    base = shifted.as_strided(q.shape, q.stride(), 0).copy_(q)
    refuses(lambda: dense(q=base, out=shifted), NAME, "out must not share memory with q")
    refuses(lambda: flash_attn_func(base, k, v, out=shifted), "flash_attn_func", "memory with q")
    # Written exactly over q, an output is fine.
    expected = dense(q=q)
    assert torch.equal(dense(q=base, out=base), expected)
    assert flash_attn_with_kvcache(q, cache, cache).shape == q.shape  # only read
    # Slices of one buffer that are apart.
    buffer = randn(2, 2, 12, 16, seed=7)
    parts = buffer[:, :, :4], buffer[:, :, 4:6], buffer[:, :, 6:8]
    out = flash_attn_func(*parts, out=buffer[:, :, 8:])
    assert torch.equal(out, flash_attn_func(*(t.clone() for t in parts)))
    refuses(lambda: flash_attn_func(*parts, out=buffer[:, :, 7:11]), "flash_attn_func",
            "share memory with v")  # fmt: skip
    pages = randn(3, 2, 8, 2, 16, seed=1)  # keys and values of a block side by side
    interleaved = dense(k_cache=pages[:, 0], v_cache=pages[:, 1])
    assert interleaved.isfinite().all()


def test_two_writers_of_one_slot(monkeypatch):
    shared = [[0, 1, 2, -1], [3, 1, 2, 6]]
    lengths = {"cache_seqlens": ints(3, 3)}
    assert paged(shared, **lengths).shape == (2, 2, 4, 16)
    monkeypatch.setenv("FASTINFER_VALIDATE", "1")
    refuses(lambda: paged(shared, **lengths), NAME, "same cache slot 3", "block 1")
    assert paged(GOOD, **lengths).shape == (2, 2, 4, 16)


def test_gradients_are_refused():
    for arg in ("q", "k", "v", "k_cache", "v_cache"):
        t = randn(*(3, 8, 2, 16) if "cache" in arg else (2, 2, 4 if arg == "q" else 2, 16), seed=7)
        refuses(lambda arg=arg, t=t: dense(**{arg: t.requires_grad_()}), NAME, "requires grad")
    out, lse = randn(3, 4, 16, seed=0).requires_grad_(), torch.zeros(4, 3)
    refuses(lambda: merge_attn_states(out, lse, out, lse), "merge_attn_states", "requires grad")


@pytest.mark.parametrize(
    "args,options,words",
    [
        ((torch.zeros(2).long(), 4, 2, 16), {}, ("cache_seqlens", "int32")),
        ((torch.zeros(2, 1).int(), 4, 2, 16), {}, ("cache_seqlens", "1 dimensions")),
        ((ints(5, -2), 4, 2, 16), {}, ("cache_seqlens[1]", "-2")),
        ((ints(5), 4, 3, 16), {}, ("num_heads_q", "4 and 3")),
        ((ints(5), 4, 0, 16), {}, ("num_heads_q", "4 and 0")),
        ((ints(5), 4, 2, 12), {}, ("head_dim", "12")),
        ((ints(5), 4, 2, 16), {"q_len": 0}, ("q_len", "got 0")),
        ((ints(5), 4, 2, 16), {"append": -1}, ("append", "-1")),
        ((ints(5), 4, 2, 16), {"num_slots": 0}, ("num_slots", "and 0")),
        ((ints(5), 4, 2, 16), {"window_size": (-2, 0)}, ("window_size", "-2")),
        ((ints(5), 4, 2, 16), {"out": torch.zeros(9).int()}, ("out", "[10]", "[9]")),
        ((ints(5), 4, 2, 16), {"out": torch.zeros(10)}, ("out", "int32")),
        ((ints(*[2**31 - 1] * 9), 64, 64, 16), {}, ("32 bits",)),
    ],
    ids=str,
)
def test_plan_refuses(args, options, words):
    refuses(lambda: plan_decode(*args, **options), "plan_decode", *words)


def test_merge_refuses():
    out, lse = randn(3, 4, 16, seed=0), torch.zeros(4, 3)
    cases = [
        ((out[0], lse, out[0], lse), {}, ("prefix_output", "[T, H, D]")),
        ((out.double(), lse, out.double(), lse), {}, ("prefix_output", "float64")),
        ((out, lse, out.half(), lse), {}, ("suffix_output", "dtype of prefix_output")),
        ((out, lse, out[:2], lse), {}, ("suffix_output", "shape of prefix_output")),
        ((out, lse.T, out, lse), {}, ("prefix_lse", "[4, 3]", "[3, 4]")),
        ((out, lse, out, lse.half()), {}, ("suffix_lse", "float32")),
        ((out, lse, out, lse), {"out": torch.zeros(3, 4, 8)}, ("out",)),
        ((out, lse, out, lse), {"out_lse": torch.zeros(3, 4)}, ("out_lse", "[4, 3]")),
        ((out, lse, out.transpose(1, 2).contiguous().transpose(1, 2), lse), {}, ("contiguous",)),
        ((out, lse, out, lse.to("meta")), {}, ("suffix_lse", "device")),
    ]
    for args, options, words in cases:
        refuses(
            lambda args=args, options=options: merge_attn_states(*args, **options),
            "merge_attn_states",
            *words,
        )
