"""flash_attn_func and flash_attn_varlen_func: every kernel instance, dense, packed and paged."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from gpu_case import Case, Made

from fastinfer.ops.flash_attention import flash_attn_func, flash_attn_varlen_func
from helpers import generator, poisoned

BF16, FP16, FP8 = torch.bfloat16, torch.float16, torch.float8_e4m3fn


def random(*shape: int, dtype: torch.dtype, device: str, seed: int) -> torch.Tensor:
    """Drawn on the CPU: the same on every device."""
    x = torch.randn(*shape, generator=generator(seed))
    return (x * 20 if dtype == torch.int8 else x).to(dtype).to(device)


def options(names: str, heads: int, device: str, seed: int) -> dict[str, Any]:
    made: dict[str, Any] = {}
    for name in names.split():
        if name == "causal":
            made["causal"] = True
        elif name == "window":
            made["window_size"] = (70, 3)
        elif name == "softcap":
            made["softcap"] = 5.0
        elif name == "alibi":
            made["alibi_slopes"] = random(heads, dtype=torch.float32, device=device, seed=seed)
        elif name == "sinks":
            made["sinks"] = random(heads, dtype=torch.float32, device=device, seed=seed)
    return made


def dense(
    features: str, dtype: torch.dtype, dim: int, kv: torch.dtype | None, shift: int,
    device: str, seed: int, len_k: int = 300,
) -> Made:  # fmt: skip
    """`shift` elements off 16-byte alignment."""
    batch, len_q, heads, heads_kv = 2, 130, 4, 2
    q, k, v = (
        random(batch, n, h, dim + shift, dtype=t, device=device, seed=seed + i)[..., shift:]
        for i, (n, h, t) in enumerate(
            [(len_q, heads, dtype), (len_k, heads_kv, kv or dtype), (len_k, heads_kv, kv or dtype)]
        )
    )
    extra = options(features, heads, device, seed)
    if kv is not None:
        extra["k_scale"] = torch.full((heads_kv,), 0.05, device=device)
        extra["v_scale"] = torch.rand(k.shape[:-1], generator=generator(seed)).to(device)
    out = poisoned(batch, len_q, heads, dim, dtype=dtype, device=device)
    lse = poisoned(batch, heads, len_q, device=device)

    def run() -> None:
        lse.copy_(flash_attn_func(q, k, v, out=out, return_attn_probs=True, **extra)[1])

    return run, [out, lse]


def packed(features: str, dtype: torch.dtype, dim: int, page: int, device: str, seed: int) -> Made:
    heads, heads_kv = 4, 2
    cu_q = torch.tensor([0, 5, 5, 145, 146], dtype=torch.int32)
    lengths = torch.tensor([40, 7, 290, 129], dtype=torch.int32)
    cu_k = torch.cat([torch.zeros(1, dtype=torch.int32), lengths.cumsum(0).int()])
    q = random(int(cu_q[-1]), heads, dim, dtype=dtype, device=device, seed=seed)
    extra = options(features, heads, device, seed)
    if page:
        blocks = -(-300 // page)
        table = torch.randperm(4 * blocks, generator=generator(seed)).int().view(4, blocks)
        for b, n in enumerate(lengths.tolist()):
            table[b, -(-n // page) :] = -1
        shape = (4 * blocks, page, heads_kv, dim)
        extra["block_table"], extra["seqused_k"] = table.to(device), lengths.to(device)
    else:
        shape = (int(cu_k[-1]), heads_kv, dim)
    k, v = (random(*shape, dtype=dtype, device=device, seed=seed + i) for i in (1, 2))
    cu_q, cu_k = cu_q.to(device), None if page else cu_k.to(device)
    out = poisoned(*q.shape, dtype=dtype, device=device)
    lse = poisoned(heads, q.shape[0], device=device)

    def run() -> None:
        result = flash_attn_varlen_func(
            q, k, v, cu_q, cu_k, 140, 290, out=out, return_attn_probs=True, **extra
        )
        lse.copy_(result[1])

    return run, [out, lse]


FEATURES = ["causal", "softcap causal"]  # the two sm_90a instances of a type and dimension
CASES = [
    *(
        Case(f"flash dense d{dim} {dtype} {f}", partial(dense, f, dtype, dim, None, 0))
        for dim in (64, 128, 192, 256)
        for dtype in (FP16, BF16)
        for f in FEATURES
    ),
    *(
        Case(f"flash codes d{dim} {dtype}", partial(dense, "window sinks", dtype, dim, kv, 0))
        for dim in (64, 128, 256)
        for dtype, kv in ((FP16, torch.int8), (BF16, FP8))
    ),
    *(  # too many keys for the tiles of short sequences
        Case(f"flash long d{dim} {dtype}", partial(dense, "causal", dtype, dim, None, 0, len_k=600))
        for dim in (64, 128)
        for dtype in (FP16, BF16)
    ),
    Case("flash unaligned d80", partial(dense, "alibi", FP16, 80, None, 3)),
    Case("flash packed d128", partial(packed, "causal sinks", BF16, 128, 0)),
    *(
        Case(f"flash paged {page} d{dim}", partial(packed, "causal window", BF16, dim, page))
        for page, dim in ((16, 128), (8, 256), (64, 64), (256, 128), (5, 72))
    ),
]
