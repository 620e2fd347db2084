"""flash_attn_with_kvcache, plan_decode and merge_attn_states against plain torch."""

from __future__ import annotations

import random

import pytest
import torch
from test_flash_attention import check, dense_kwargs, feature_sets, quantized

from fastinfer import _lib
from fastinfer.ops.flash_attention import flash_attn_func, flash_attn_varlen_func
from fastinfer.ops.kv_cache import reshape_and_cache
from fastinfer.ops.paged_attention import (
    flash_attn_with_kvcache,
    flash_attn_with_kvcache_reference,
    merge_attn_states,
    merge_attn_states_reference,
    plan_decode,
    plan_decode_reference,
)
from fastinfer.ops.rotary import apply_rotary
from helpers import FLOATS, assert_close_to_reference, compiles, opcheck, poisoned, randn

NAN = float("nan")


def rotary_tables(positions: int, rotary_dim: int, dtype=torch.float32):
    angle = torch.arange(positions)[:, None] / 100 ** torch.linspace(0, 1, rotary_dim // 2)
    return angle.cos().to(dtype), angle.sin().to(dtype)


class Case:
    """A decoding step over a dense or paged cache whose unused slots are poison."""

    def __init__(self, lengths, *, len_q=1, new=0, heads=6, heads_kv=2, dim=40, capacity=None,
                 block_size=None, dtype=torch.float32, cache_dtype=None, scales="none",
                 seed=0):  # fmt: skip
        batch = len(lengths)
        capacity = capacity or max(lengths) + new + 5
        self.lengths = torch.tensor(lengths, dtype=torch.int32)
        self.q = randn(batch, len_q, heads, dim, seed=seed, dtype=dtype)
        self.k = randn(batch, new, heads_kv, dim, seed=seed + 1, dtype=dtype) if new else None
        self.v = randn(batch, new, heads_kv, dim, seed=seed + 2, dtype=dtype) if new else None
        code = cache_dtype or dtype
        self.table = None
        if block_size:
            columns = -(-capacity // block_size)
            blocks = batch * columns + 2
            ids = random.Random(seed).sample(range(blocks), batch * columns)
            self.table = torch.tensor(ids, dtype=torch.int32).view(batch, columns)
            shape = (blocks, block_size, heads_kv, dim)
        else:
            shape = (batch, capacity, heads_kv, dim)
        self.caches, self.scales = [], []
        for i in range(2):
            cache = poisoned(*shape, dtype=code)
            if code == dtype:
                cache[..., ::3] = float("inf")
            scale = torch.full(shape[:3], NAN) if scales == "token" else None
            if scales == "head":
                scale = randn(heads_kv, seed=seed).abs() * 0.02 + 0.02
            elif scales == "scalar":
                scale = torch.tensor(0.03)
            for b, n in enumerate(lengths):
                rows = randn(n, heads_kv, dim, seed=seed + 10 * b + 3 + i, dtype=dtype)
                if code != dtype:
                    rows, used = quantized(rows, code, scales, seed)
                at = torch.arange(n)
                if block_size:
                    where = (self.table[b].long()[at // block_size], at % block_size)
                else:
                    where = (torch.full_like(at, b), at)
                if code != dtype:
                    cache.view(torch.uint8)[where] = rows.view(torch.uint8)
                    if scales == "token":
                        scale[where] = used
                else:
                    cache[where] = rows
            self.caches.append(cache)
            self.scales.append(scale)
        if block_size:  # entries that nobody needs
            for b, n in enumerate(lengths):
                self.table[b, -(-(n + new) // block_size) :] = -1 if b % 2 else 2**31 - 1

    def copy(self):
        caches = [c.clone() for c in self.caches]
        scales = [s if s is None else s.clone() for s in self.scales]
        args = (self.q, *caches, self.k, self.v)
        kwargs = {
            "cache_seqlens": self.lengths,
            "block_table": self.table,
            "k_scale": scales[0],
            "v_scale": scales[1],
        }
        return args, kwargs, caches, scales

    def verify(self, **features):
        args, kwargs, caches, scales = self.copy()
        out, lse = flash_attn_with_kvcache(*args, **kwargs, return_softmax_lse=True, **features)
        ref_args, ref_kwargs, ref_caches, ref_scales = self.copy()
        reference = flash_attn_with_kvcache_reference(*ref_args, **ref_kwargs, **features)
        base_args, base_kwargs, _, _ = self.copy()
        baseline = flash_attn_with_kvcache_reference(
            *base_args, **base_kwargs, compute_dtype=self.q.dtype, **features
        )
        check(out, lse, reference, baseline, **features)
        for ours, theirs, before in zip(caches, ref_caches, self.caches, strict=True):
            if features.get("rotary_cos") is None:
                assert torch.equal(ours.view(torch.uint8), theirs.view(torch.uint8))
            else:  # rotation may round the last bit the other way
                rtol = 0.15 if ours.element_size() == 1 else 1e-2
                atol = 1e-5 if ours.dtype.is_floating_point else 1
                torch.testing.assert_close(
                    ours.float(), theirs.float(), equal_nan=True, rtol=rtol, atol=atol
                )
            untouched = before.view(torch.uint8) == ours.view(torch.uint8)
            if self.k is None:
                assert untouched.all()
        for ours, theirs in zip(scales, ref_scales, strict=True):
            if ours is not None:
                torch.testing.assert_close(ours, theirs, equal_nan=True)
        return out


LENGTHS = [0, 1, 63, 64, 65, 700, 1030, 2100]


@pytest.mark.parametrize("block_size", [None, 1, 16, 100], ids=str)
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_decode(dtype, block_size):
    case = Case(LENGTHS, block_size=block_size, dtype=dtype)
    rng = random.Random(repr((dtype, block_size)))
    for features in rng.sample(feature_sets(6, len(LENGTHS), seed=4), 4):
        case.verify(**features)


@pytest.mark.parametrize("block_size", [None, 16], ids=str)
@pytest.mark.parametrize("len_q", [2, 5, 16])
def test_several_queries(len_q, block_size, isa):
    case = Case([3, 0, 90, 1100], len_q=len_q, block_size=block_size, dim=32)
    for features in ({"causal": True}, {"window_size": (20, 1)}, {"causal": True, "softcap": 3.0}):
        case.verify(**features)


@pytest.mark.parametrize("block_size", [None, 1, 16], ids=str)
@pytest.mark.parametrize("new,len_q", [(1, 1), (3, 3), (5, 2), (2, 4)])
def test_append(new, len_q, block_size):
    for dtype in FLOATS:
        case = Case([0, 5, 64, 130], new=new, len_q=len_q, block_size=block_size, dtype=dtype)
        case.verify(causal=True)
        case.verify()


@pytest.mark.parametrize("interleaved", [True, False])
@pytest.mark.parametrize("rotary_dim", [16, 32, 34, 64])
def test_rotary(rotary_dim, interleaved, isa):
    for dtype, block_size in ((torch.float32, None), (torch.bfloat16, 16)):
        case = Case([0, 5, 130], new=3, len_q=3, dim=64, dtype=dtype, block_size=block_size)
        cos, sin = rotary_tables(140, rotary_dim)
        for features in ({"causal": True}, {}, {"window_size": (30, -1)}):
            case.verify(rotary_cos=cos, rotary_sin=sin, rotary_interleaved=interleaved, **features)
        case.verify(rotary_cos=cos.to(dtype), rotary_sin=sin.to(dtype), causal=True)


@pytest.mark.parametrize("scales", ["scalar", "head", "token"])
@pytest.mark.parametrize("code", [torch.float8_e4m3fn, torch.int8], ids=str)
def test_8bit_cache(code, scales):
    for dtype, block_size in ((torch.float32, 16), (torch.bfloat16, None), (torch.float16, 4)):
        options = {"block_size": block_size, "dtype": dtype, "cache_dtype": code, "scales": scales}
        Case([0, 70, 200], **options).verify()
        Case([0, 70, 200], new=2, len_q=2, **options).verify(causal=True)
    cos, sin = rotary_tables(300, 32)
    Case(
        [3, 100], new=1, block_size=16, dtype=torch.bfloat16, cache_dtype=code, scales=scales
    ).verify(causal=True, rotary_cos=cos, rotary_sin=sin)


def test_batch_index_and_left_padding():
    case = Case([40, 90, 200, 8], new=2, len_q=2, capacity=220)
    rows = torch.tensor([2, 0, 3, 1], dtype=torch.int32)
    case.lengths = case.lengths[rows.long()]
    case.verify(cache_batch_idx=rows, causal=True)
    padding = torch.tensor([0, 7, 66, 8], dtype=torch.int32)
    case = Case([40, 90, 200, 8], new=2, len_q=2, capacity=220)
    for b, n in enumerate(padding.tolist()):
        for cache in case.caches:
            cache[b, :n] = NAN
    for features in ({"causal": True}, {}, {"window_size": (150, 0)}):
        case.verify(cache_leftpad=padding, **features)


def test_lengths_as_number_and_whole_cache():
    q = randn(2, 1, 4, 32, seed=0)
    k, v = randn(3, 70, 2, 32, seed=1), randn(3, 70, 2, 32, seed=2)
    whole = flash_attn_with_kvcache(q, k, v)
    assert torch.equal(whole, flash_attn_with_kvcache(q, k, v, cache_seqlens=70))
    assert torch.equal(whole, flash_attn_func(q, k[:2], v[:2]))
    part = flash_attn_with_kvcache(q, k, v, cache_seqlens=33)
    assert torch.equal(part, flash_attn_func(q, k[:2, :33], v[:2, :33]))


def test_same_bits_as_varlen(isa):
    for dtype in (torch.float32, torch.float16):
        case = Case([5, 700, 2100], len_q=4, block_size=16, dtype=dtype)
        args, kwargs, caches, _ = case.copy()
        out, lse = flash_attn_with_kvcache(*args, **kwargs, causal=True, return_softmax_lse=True)
        cu = torch.tensor([0, 4, 8, 12], dtype=torch.int32)
        peer, peer_lse, _ = flash_attn_varlen_func(
            case.q.flatten(0, 1), *caches, cu, None, 4, 2100, causal=True,
            block_table=case.table, seqused_k=case.lengths, return_attn_probs=True,
        )  # fmt: skip
        assert torch.equal(out.flatten(0, 1), peer)
        assert torch.equal(lse.transpose(0, 1).flatten(1), peer_lse)
        for b in range(3):
            alone = flash_attn_with_kvcache(
                case.q[b : b + 1], *caches, cache_seqlens=case.lengths[b : b + 1],
                block_table=case.table[b : b + 1], causal=True,
            )  # fmt: skip
            assert torch.equal(alone, out[b : b + 1])


@pytest.mark.parametrize("code", [None, torch.float8_e4m3fn, torch.int8], ids=str)
def test_append_has_the_bits_of_rotary_then_cache_write(code):
    """One call = apply_rotary, reshape_and_cache, attention."""
    lengths, new = torch.tensor([6, 2, 0], dtype=torch.int32), 3
    table = torch.tensor([[4, 1], [2, 3], [0, 5]], dtype=torch.int32)
    cos, sin = rotary_tables(20, 32)
    positions = (lengths.long()[:, None] + torch.arange(new)).flatten()
    slots = table.long().gather(1, positions.view(3, new) // 8) * 8 + positions.view(3, new) % 8
    for dtype in FLOATS:
        q = randn(3, new, 4, 64, seed=0, dtype=dtype)
        k, v = (randn(3, new, 2, 64, seed=s, dtype=dtype) for s in (1, 2))
        for scale in (torch.tensor(0.02), torch.tensor([0.02, 0.03]), torch.zeros(6, 8, 2)):
            ours = [torch.zeros(6, 8, 2, 64, dtype=code or dtype) for _ in range(2)]
            theirs = [t.clone() for t in ours]
            scales = [{n: scale.clone() for n in ("k_scale", "v_scale")} for _ in range(2)]
            if code is None:
                scales = [{}, {}]
            out = flash_attn_with_kvcache(
                q, *ours, k, v, cos, sin, lengths, block_table=table, causal=True,
                rotary_interleaved=False, **scales[0],
            )  # fmt: skip
            rotated = apply_rotary(q.flatten(0, 1), k.flatten(0, 1), cos, sin, positions)
            reshape_and_cache(rotated[1], v.flatten(0, 1), *theirs, slots.flatten(), **scales[1])
            peer = flash_attn_with_kvcache(
                rotated[0].view_as(q), *theirs, cache_seqlens=lengths + new, block_table=table,
                causal=True, **scales[1],
            )  # fmt: skip
            assert torch.equal(out, peer)
            for a, b in zip(ours, theirs, strict=True):
                assert torch.equal(a.view(torch.uint8), b.view(torch.uint8))
            for name, used in scales[0].items():
                assert torch.equal(used, scales[1][name])


def test_plan():
    lengths = torch.tensor([0, 1, 64, 65, 1000, 4096], dtype=torch.int32)
    for options in (
        {"num_slots": 7},
        {"num_slots": 264, "append": 1},
        {"num_slots": 3, "q_len": 4, "append": 4, "window_size": (100, 0)},
        {"num_slots": 3, "batch_invariant": True},
    ):
        plan = plan_decode(lengths, 32, 8, 128, **options)
        assert torch.equal(plan, plan_decode_reference(lengths, 8, **options))
    assert int(plan_decode(lengths, 32, 8, 128)[6]) == torch.get_num_threads()
    out = poisoned(15, dtype=torch.int32)
    assert plan_decode(lengths, 32, 8, 128, out=out) is out
    assert out[8:].tolist() == [0, 1, 2, 3, 5, 21, 85]
    assert int(plan_decode(lengths[:0], 4, 4, 64, num_slots=9)[7]) == 1
    case = Case([5, 70], new=1)
    plan = plan_decode(case.lengths, 6, 2, 40, append=1)
    args, kwargs, _, _ = case.copy()
    planned = flash_attn_with_kvcache(*args, **kwargs, plan=plan, batch_invariant=True)
    args, kwargs, _, _ = case.copy()
    assert torch.equal(planned, flash_attn_with_kvcache(*args, **kwargs))


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_merge_equals_attention_over_all_keys(dtype, isa):
    q = randn(3, 5, 6, 40, seed=0, dtype=dtype)
    k, v = (randn(3, 100, 2, 40, seed=s, dtype=dtype) for s in (1, 2))
    whole, whole_lse, _ = flash_attn_func(q, k, v, return_attn_probs=True)
    parts = []
    for rows in (slice(0, 37), slice(37, 100), slice(0, 0)):
        out, lse, _ = flash_attn_func(q, k[:, rows], v[:, rows], return_attn_probs=True)
        parts.append((out, lse))
    merged, lse = merge_attn_states(*parts[0], *parts[1], return_lse=True)
    reference, reference_lse = merge_attn_states_reference(*parts[0], *parts[1])
    assert_close_to_reference(merged, reference, reference.to(dtype))
    torch.testing.assert_close(lse.double(), reference_lse, atol=1e-5, rtol=1e-5)
    tolerance = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 2e-2}[dtype]
    torch.testing.assert_close(merged, whole, atol=tolerance, rtol=tolerance)
    torch.testing.assert_close(lse, whole_lse, atol=1e-4, rtol=1e-5)
    # A side without keys is not read.
    poison = poisoned(*q.shape, dtype=dtype)
    for empty in (float("-inf"), float("inf")):
        none = torch.full_like(whole_lse, empty)
        for sides in ((whole, whole_lse, poison, none), (poison, none, whole, whole_lse)):
            merged, lse = merge_attn_states(*sides, return_lse=True)
            assert torch.equal(merged, whole) and torch.equal(lse, whole_lse)
        merged, lse = merge_attn_states(poison, none, poison, none, return_lse=True)
        assert (merged == 0).all() and torch.isneginf(lse).all()
    # Packed layout, into the first input, strided.
    flat = [(o.flatten(0, 1), x.transpose(0, 1).flatten(1)) for o, x in parts[:2]]
    expected = merge_attn_states(*parts[0], *parts[1]).flatten(0, 1)
    target = flat[0][0].clone()
    assert merge_attn_states(target, flat[0][1], *flat[1], out=target) is target
    assert torch.equal(target, expected)
    assert merge_attn_states(
        *(t[:0] if t.dim() == 3 else t[:, :0] for s in flat for t in s)
    ).shape == (0, 6, 40)


def test_opcheck():
    case = Case([5, 9], new=2, len_q=2, dim=16, block_size=4)
    args, kwargs, _, _ = case.copy()
    cos, sin = rotary_tables(20, 16)
    extra = {
        "rotary_cos": cos, "rotary_sin": sin, "cache_batch_idx": None, "cache_leftpad": None,
        "rotary_interleaved": False, "num_splits": 0,
    }  # fmt: skip
    opcheck(
        _lib.op("flash_attn_kvcache"),
        (*args, torch.zeros_like(case.q), torch.zeros(2, 6, 2)),
        dense_kwargs(**kwargs) | extra,
    )
    opcheck(
        _lib.op("plan_decode"),
        (case.lengths, 6, 2, 16),
        {"q_len": 1, "append": 0, "window_left": -1, "window_right": -1, "num_slots": 4,
             "batch_invariant": False, "plan": torch.zeros(11, dtype=torch.int32)},
    )  # fmt: skip
    out, lse = randn(3, 4, 16, seed=0), randn(4, 3, seed=1)
    opcheck(
        _lib.op("merge_attn_states"),
        (out, lse, out + 1, lse + 1),
        {"out": torch.zeros_like(out), "out_lse": torch.zeros_like(lse)},
    )


def test_compile():
    case = Case([5, 9], new=2, len_q=2, dim=16, block_size=4)
    args, _, caches, _ = case.copy()

    def step(q, k_cache, v_cache, k, v, lengths, table):
        plan = plan_decode(lengths, 6, 2, 16, q_len=2, append=2)
        out, lse = flash_attn_with_kvcache(
            q, k_cache, v_cache, k, v, cache_seqlens=lengths, block_table=table, causal=True,
            return_softmax_lse=True, plan=plan,
        )  # fmt: skip
        return merge_attn_states(out, lse, out * 2, lse)

    eager_args, _, eager_caches, _ = case.copy()
    expected = step(*eager_args, case.lengths, case.table)
    assert torch.equal(compiles(step, *args, case.lengths, case.table), expected)
    for ours, theirs in zip(caches, eager_caches, strict=True):
        torch.testing.assert_close(ours, theirs, equal_nan=True, rtol=0, atol=0)
