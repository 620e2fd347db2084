"""flash_attn_func and flash_attn_varlen_func refuse bad input with one sentence each."""

from __future__ import annotations

import pytest
import torch

from fastinfer.ops.flash_attention import flash_attn_func, flash_attn_varlen_func
from fastinfer.ops.paged_attention import plan_decode
from helpers import compiles, poisoned, randn, refuses

NAME = "flash_attn_func"
VARLEN = "flash_attn_varlen_func"


def tensors(batch=2, len_q=3, len_k=5, heads=4, heads_kv=2, dim=16, dtype=torch.float32):
    return [
        randn(batch, n, h, dim, seed=i, dtype=dtype)
        for i, (n, h) in enumerate([(len_q, heads), (len_k, heads_kv), (len_k, heads_kv)])
    ]


def ints(*values: int) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int32)


@pytest.mark.parametrize(
    "arg,value,words",
    [
        ("dropout_p", 0.1, ("dropout_p", "0.1")),
        ("deterministic", True, ("deterministic",)),
        ("window_size", (-2, 0), ("window_size", "-2")),
        ("window_size", (3, -7), ("window_size", "-7")),
        ("softcap", -1.0, ("softcap", "-1")),
        ("alibi_slopes", torch.ones(3), ("alibi_slopes", "[4]", "[3]")),
        ("alibi_slopes", torch.ones(3, 4), ("alibi_slopes", "[2, 4]", "[3, 4]")),
        ("alibi_slopes", torch.ones(4).half(), ("alibi_slopes", "float32", "float16")),
        ("sinks", torch.ones(2), ("sinks", "[4]", "[2]")),
        ("sinks", torch.ones(4).double(), ("sinks", "float64")),
        ("k_scale", torch.ones(2), ("k_scale", "8", "leave it out")),
        ("v_scale", torch.tensor(1.0), ("v_scale", "leave it out")),
        ("out", torch.zeros(2, 3, 4, 24), ("out", "[2, 3, 4, 16]", "[2, 3, 4, 24]")),
        ("out", torch.zeros(2, 3, 4, 16).half(), ("out", "dtype", "float16")),
        ("out", torch.zeros(2, 3, 16, 4).transpose(2, 3), ("out", "contiguous")),
        ("plan", torch.zeros(11).int(), ("plan", "plan_decode")),
        ("plan", torch.zeros(9).int(), ("plan", "[11]", "[9]")),
        ("plan", torch.zeros(11).long(), ("plan", "int32", "int64")),
        ("sinks", torch.ones(4, device="meta"), ("sinks", "device")),
    ],
    ids=str,
)
def test_refused_option(arg, value, words):
    refuses(lambda: flash_attn_func(*tensors(), **{arg: value}), NAME, *words)


def test_refused_tensors():
    q, k, v = tensors()
    cases = [
        ((q[0], k, v), ("q", "4 dimensions")),
        ((q, k[0], v), ("k", "4 dimensions")),
        ((q, k, v[:, :4]), ("v", "shape of k", "[2, 4, 2, 16]")),
        ((q, k[:1], v[:1]), ("k", "batch size of q (2)")),
        ((q.double(), k, v), ("q", "float64", ".to(dtype)")),
        ((q, k.half(), v.half()), ("k", "dtype of q", "float16")),
        ((q, k, v.half()), ("v", "dtype of k", "float16")),
        ((q, k.to(torch.int8), v.to(torch.float8_e4m3fn)), ("v", "dtype of k", "float8")),
        ((q, k.to(torch.float8_e5m2), v.to(torch.float8_e5m2)), ("k", "float8_e5m2")),
        ((q[:, :, :3], k, v), ("multiple", "3 and 2")),
        ((q, k[:, :, :0], v[:, :, :0]), ("multiple", "4 and 0")),
        ((q, *(t[..., :8] for t in (k, v))), ("k", "head_dim of q (16)")),
        (tuple(t[..., :8] for t in (q, k, v)), ("head_dim", "16 to 256")),
        (tensors(dim=20), ("head_dim", "multiple of 8")),
        (tensors(dim=264), ("head_dim", "264")),
        ((q, k.transpose(1, 3).contiguous().transpose(1, 3), v), ("k", "contiguous")),
        ((q.transpose(1, 3).contiguous().transpose(1, 3), k, v), ("q", "contiguous")),
    ]
    for args, words in cases:
        refuses(lambda args=args: flash_attn_func(*args), NAME, *words)
    codes, one = k.to(torch.int8), torch.tensor(1.0)
    refuses(lambda: flash_attn_func(q, codes, codes, k_scale=one), NAME, "v_scale must be given")
    for scale, words in (
        (None, ("k_scale must be given", "torch.int8")),
        (torch.ones(3), ("k_scale", "[2]", "[3]")),
        (torch.ones(2, 4, 2), ("k_scale", "[2, 4, 2]")),
        (torch.ones(2).half(), ("k_scale", "float32")),
    ):
        refuses(
            lambda scale=scale: flash_attn_func(q, codes, codes, k_scale=scale, v_scale=one),
            NAME,
            *words,
        )


def test_gradients_are_refused():
    q, k, v = tensors()
    for t in (q, k, v):
        t.requires_grad_(True)
        refuses(lambda: flash_attn_func(q, k, v), NAME, "requires grad", "no_grad")
        with torch.no_grad():
            assert not flash_attn_func(q, k, v).requires_grad
        t.requires_grad_(False)


def test_plan_of_another_batch_or_query_length():
    args = tensors()
    lengths = ints(5, 5)
    flash_attn_func(*args, plan=plan_decode(lengths, 4, 2, 16, q_len=3))
    for plan in (
        plan_decode(lengths, 4, 2, 16, q_len=2),
        plan_decode(lengths, 4, 4, 16, q_len=3),
        plan_decode(lengths, 4, 2, 16, q_len=3, append=1),
    ):
        refuses(lambda plan=plan: flash_attn_func(*args, plan=plan), NAME, "plan", "q_len 3")


def test_a_compiled_call_is_refused_alike():
    q, k, v = tensors()
    with pytest.raises(RuntimeError, match="v must be like k"):
        compiles(flash_attn_func, q, k, v.half())


# ---- packed and paged ----


def varlen(**changes):
    """Two sequences of 2 and 3 queries, 4 and 6 keys."""
    args = {
        "q": randn(5, 4, 16, seed=0),
        "k": randn(10, 2, 16, seed=1),
        "v": randn(10, 2, 16, seed=2),
        "cu_seqlens_q": ints(0, 2, 5),
        "cu_seqlens_k": ints(0, 4, 10),
        "max_seqlen_q": 3,
        "max_seqlen_k": 6,
    }
    return flash_attn_varlen_func(**(args | changes))


@pytest.mark.parametrize(
    "changes,words",
    [
        ({"q": torch.zeros(1, 5, 4, 16)}, ("q", "3 dimensions")),
        ({"k": torch.zeros(1, 10, 2, 16)}, ("k", "3 dimensions")),
        ({"cu_seqlens_q": torch.tensor([0, 2, 5])}, ("cu_seqlens_q", "int32", "int64")),
        ({"cu_seqlens_q": torch.zeros(0).int()}, ("cu_seqlens_q", "batch + 1")),
        ({"cu_seqlens_k": ints(0, 10)}, ("cu_seqlens_k", "[3]", "[2]")),
        ({"cu_seqlens_q": ints(0, 3, 2)}, ("cu_seqlens_q", "not decrease", "3 then 2")),
        ({"cu_seqlens_q": ints(-1, 2, 5)}, ("cu_seqlens_q", "-1")),
        ({"cu_seqlens_q": ints(0, 2, 6)}, ("cu_seqlens_q", "tokens of q (5)", "6")),
        ({"cu_seqlens_k": ints(0, 11, 10)}, ("cu_seqlens_k", "not decrease")),
        ({"cu_seqlens_k": ints(0, 4, 11)}, ("cu_seqlens_k", "tokens of k (10)", "11")),
        ({"cu_seqlens_k": None}, ("cu_seqlens_k", "block_table and seqused_k")),
        ({"max_seqlen_q": 2}, ("max_seqlen_q", "(3)", "2")),
        ({"max_seqlen_k": 5}, ("max_seqlen_k", "(6)", "5")),
        ({"max_seqlen_q": -1}, ("max_seqlen_q", "-1")),
        ({"seqused_k": ints(5, 6)}, ("seqused_k[0]", "0 to 4", "5")),
        ({"seqused_k": ints(4, -1)}, ("seqused_k[1]", "-1")),
        ({"seqused_k": ints(4)}, ("seqused_k", "[2]", "[1]")),
        ({"alibi_slopes": torch.ones(5, 4)}, ("alibi_slopes", "[2, 4]")),
        ({"dropout_p": 0.5}, ("dropout_p",)),
        ({"plan": torch.zeros(11).int()}, ("plan", "q_len 3")),
        ({"out": torch.zeros(6, 4, 16)}, ("out", "[5, 4, 16]")),
        ({"k_scale": torch.ones(())}, ("k_scale", "leave it out")),
    ],
    ids=str,
)
def test_varlen_refuses(changes, words):
    assert varlen().shape == (5, 4, 16)
    refuses(lambda: varlen(**changes), VARLEN, *words)


def paged(**changes):
    """The same two sequences over blocks of 2 tokens."""
    cache = randn(6, 2, 2, 16, seed=3)
    return varlen(
        **(
            {
                "k": cache,
                "v": cache,
                "cu_seqlens_k": None,
                "seqused_k": ints(4, 6),
                "block_table": torch.tensor([[0, 1, -1], [2, 3, 4]], dtype=torch.int32),
            }
            | changes
        )
    )


@pytest.mark.parametrize(
    "changes,words",
    [
        ({"k": torch.zeros(12, 2, 16)}, ("k", "4 dimensions")),
        ({"seqused_k": None}, ("cu_seqlens_k",)),
        ({"seqused_k": ints(4, 7), "max_seqlen_k": 9}, ("seqused_k[1]", "0 to 6", "7")),
        ({"cu_seqlens_k": ints(0, 1, 8), "seqused_k": None, "max_seqlen_k": 9}, ("7 keys", "6")),
        ({"block_table": torch.zeros(2, 3).long()}, ("block_table", "int32")),
        ({"block_table": torch.zeros(3, 3).int()}, ("block_table", "[2, *]", "[3, 3]")),
        ({"block_table": ints(0, 0, 0)}, ("block_table", "[2, *]")),
        ({"block_table": torch.zeros(3, 2).int().T}, ("block_table", "contiguous")),
        (
            {"block_table": torch.tensor([[0, -1, 0], [2, 3, 4]]).int()},
            ("block_table[0, 1]", "below 6", "-1"),
        ),
        (
            {"block_table": torch.tensor([[0, 1, 0], [2, 3, 6]]).int()},
            ("block_table[1, 2]", "below 6", "6"),
        ),
    ],
    ids=str,
)
def test_paged_refuses(changes, words):
    assert paged().shape == (5, 4, 16)
    refuses(lambda: paged(**changes), VARLEN, *words)


def test_blocks_outside_the_window_are_not_needed():
    table = torch.tensor([[-1, 1, -1], [-1, 99, 4]], dtype=torch.int32)
    cache = poisoned(6, 2, 2, 16)
    cache[1], cache[4] = 1.0, 2.0
    out = paged(
        k=cache, v=cache, block_table=table, cu_seqlens_q=ints(0, 1, 2), causal=True,
        window_size=(1, 0), q=torch.ones(2, 4, 16),
    )  # fmt: skip
    assert torch.equal(out, torch.tensor([1.0, 2.0])[:, None, None].expand(2, 4, 16))


def test_a_refused_call_writes_nothing():
    out = poisoned(5, 4, 16)
    refuses(lambda: varlen(out=out, max_seqlen_k=5), VARLEN)
    assert out.isnan().all()


def test_what_cannot_even_be_allocated_for() -> None:
    q, k, v = tensors()
    refuses(lambda: flash_attn_func(q, None, v), "flash_attn_func: k must be a tensor", "NoneType")
    refuses(lambda: flash_attn_func(torch.tensor(1.0), k, v), "q must have dimensions", "[]")
    refuses(lambda: flash_attn_func(q, k, v, window_size=(1,)), "window_size must be two", "(1,)")


def test_window_as_wide_as_an_integer() -> None:
    q, k, v = tensors()
    wide = flash_attn_func(q, k, v, window_size=(2**63 - 1, 2**63 - 1))
    assert torch.equal(wide, flash_attn_func(q, k, v))
