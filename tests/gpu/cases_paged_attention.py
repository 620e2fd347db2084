"""Cases of the paged attention stem: every kernel instance (cache type x head dimension), dense and
paged, one and several queries, append with rotary, plans, invariant mode, merges.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from gpu_case import Case, Made
from torch import Tensor

import fastinfer

E4M3, INT8 = torch.float8_e4m3fn, torch.int8
NAN = float("nan")


def decode(
    lengths: list[int],
    *,
    dtype: torch.dtype = torch.bfloat16,
    cache: torch.dtype | None = None,
    heads: tuple[int, int] = (8, 2),
    dim: int = 128,
    block: int | None = 16,
    q_len: int = 1,
    new: int = 0,
    scales: str = "head",
    rotary: bool = False,
    plan: bool = False,
    workspace: bool = True,
    room: int = 0,  # columns of the table behind the last: more than few keys, so no large clusters
    **features: object,
) -> Callable[[str, int], Made]:
    def make(device: str, seed: int) -> Made:
        generator = torch.Generator(device=device).manual_seed(seed)

        def randn(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator, device=device)

        batch, code = len(lengths), cache or dtype
        hq, hkv = heads
        capacity = max(lengths) + new + 3
        size = block or capacity
        columns = -(-capacity // size)
        order = torch.randperm(batch * columns + 1, generator=generator, device=device).int()
        table = order[: batch * columns].view(batch, columns).contiguous()
        table = torch.nn.functional.pad(table, (0, room), value=-1)
        if not block:
            table = torch.arange(batch, device=device, dtype=torch.int32)[:, None]
        caches, scale = [], []
        for _ in "kv":
            shape = (batch * columns + (1 if block else 0), size, hkv, dim)
            values = randn(*shape)
            if code == dtype:
                t = values.to(dtype)
                poison = torch.full_like(t, NAN)
            else:
                t = (values * 30).to(code)
                poison = torch.full(shape, 0x7F, dtype=torch.uint8, device=device).view(code)
            used = torch.zeros(shape[:2], dtype=torch.bool, device=device)
            for b, n in enumerate(lengths):
                at = torch.arange(n, device=device)
                used[table[b].long()[at // size], at % size] = True
            raw, bad = t.view(torch.uint8), poison.view(torch.uint8)
            raw[~used] = bad[~used]
            caches.append(t)
            if code == dtype:
                scale.append(None)
            elif scales == "token":
                scale.append(torch.where(used[..., None], randn(*shape[:3]).abs() * 0.03, NAN))
            else:
                scale.append(randn(hkv if scales == "head" else 1).abs() * 0.03)
        work = [t.clone() for t in (*caches, *scale) if t is not None]
        pristine = [t for t in (*caches, *scale) if t is not None]
        tensors = list(work)
        k_cache, v_cache = tensors[:2]
        k_scale, v_scale = tensors[2:] if code != dtype else (None, None)
        q = randn(batch, q_len, hq, dim).to(dtype)
        k, v = (randn(batch, new, hkv, dim).to(dtype) if new else None for _ in "kv")
        extra = dict(features)
        if rotary:
            angles = randn(capacity + 40, dim // 4)
            extra |= {"rotary_cos": angles.cos(), "rotary_sin": angles.sin()}
        if "sinks" in extra:
            extra["sinks"] = randn(hq)
        if "alibi_slopes" in extra:
            extra["alibi_slopes"] = randn(hq).abs()
        seqlens = torch.tensor(lengths, dtype=torch.int32, device=device)
        invariant = bool(extra.get("batch_invariant", False))
        made = None
        if plan:
            made = fastinfer.plan_decode(
                seqlens, hq, hkv, dim, q_len=q_len, append=new, batch_invariant=invariant
            )
        scratch = torch.zeros(32 << 20, dtype=torch.uint8, device=device) if workspace else None
        out = torch.full_like(q, NAN)

        def run() -> None:
            if new:
                for to, source in zip(work, pristine, strict=True):
                    to.view(torch.uint8).copy_(source.view(torch.uint8))
            fastinfer.flash_attn_with_kvcache(
                q, k_cache, v_cache, k, v, cache_seqlens=seqlens,
                block_table=table if block else None, k_scale=k_scale, v_scale=v_scale,
                plan=made, workspace=scratch, out=out, **extra,
            )  # fmt: skip

        outputs = [out]
        if new:
            outputs += [t.view(torch.uint8) for t in work]
        return run, outputs

    return make


def plan(device: str, seed: int) -> Made:
    generator = torch.Generator(device=device).manual_seed(seed)
    lengths = torch.randint(0, 5000, (1500,), generator=generator, device=device).int()
    out = torch.full((8 + 1501,), -77, dtype=torch.int32, device=device)

    def run() -> None:
        fastinfer.plan_decode(lengths, 32, 8, 128, out=out)

    return run, [out]


def merge(device: str, seed: int) -> Made:
    generator = torch.Generator(device=device).manual_seed(seed)
    a, b = (
        torch.randn(3, 5, 4, 72, generator=generator, device=device).bfloat16() for _ in range(2)
    )
    x, y = (torch.randn(3, 4, 5, generator=generator, device=device) for _ in range(2))
    x[0], a[0] = float("-inf"), NAN
    out, lse = torch.full_like(a, NAN), torch.full_like(x, NAN)

    def run() -> None:
        fastinfer.merge_attn_states(a, x, b, y, out=out, out_lse=lse)

    return run, [out, lse]


F16 = torch.float16
LENGTHS = [0, 1, 70, 333, 64]
PAIRS = [3500, 70, 0, 64, 1, 333, 17, 900, 5, 1200]

CASES = [
    *(
        Case(f"decode_{name}_d{dim}", decode(LENGTHS, dtype=dtype, cache=cache, dim=dim))
        for name, dtype, cache in (
            ("bf16", torch.bfloat16, None),
            ("f16", F16, None),
            ("e4m3", torch.bfloat16, E4M3),
            ("int8", F16, INT8),
        )
        for dim in (64, 128, 256)
    ),
    *(  # without clusters, shares of the CTAs wherever they end
        Case(
            f"decode_{name}_d{dim}_shares",
            decode(LENGTHS, dtype=dtype, cache=cache, dim=dim, room=600),
        )
        for name, dtype, cache in (("bf16", torch.bfloat16, None), ("e4m3", torch.bfloat16, E4M3))
        for dim in (64, 128)
    ),
    # Clusters of two: all of it, where the lengths are short, with several for an item.
    Case("decode_clusters_of_two", decode([200, 64, 0, 33] * 4, heads=(8, 2), room=600)),
    Case("decode_two_clusters_e4m3", decode([2500, 70], cache=E4M3, scales="token", dim=112)),
    Case("decode_eight_clusters", decode([3000, 0, 70])),
    Case("decode_split", decode([3000, 5], heads=(4, 1), plan=True, room=600)),
    # A CTA that ends one split item and begins the next.
    Case("decode_two_splits", decode([2500, 2400, 700], room=600)),
    Case(
        "decode_two_splits_e4m3_token", decode([2500, 2400], cache=E4M3, scales="token", room=600)
    ),
    Case("decode_split_no_workspace", decode([1500], heads=(8, 2), workspace=False, room=600)),
    Case("decode_mqa_32_rows", decode([900, 17], heads=(32, 1), block=1)),
    # Pieces that several CTAs merge: dealt to threads, in the order of the keys, rows of 16 lanes.
    Case("decode_shared_merge", decode([5000], heads=(32, 1), room=600)),
    Case("decode_shared_merge_invariant", decode([20000], heads=(32, 1), batch_invariant=True)),
    Case("decode_shared_merge_d64", decode([5000, 70], dtype=F16, heads=(16, 1), dim=64, room=600)),
    Case("decode_shared_merge_e4m3", decode([5000], cache=E4M3, heads=(16, 1), room=600)),
    *(  # pairs of warps for 32 rows
        Case(f"decode_pairs_d{dim}", decode(PAIRS, dtype=dtype, heads=(32, 1), dim=dim))
        for dtype, dim in ((torch.bfloat16, 128), (F16, 64), (F16, 256))
    ),
    Case("decode_large_ctas", decode(PAIRS * 4, heads=(32, 1))),
    # Keys of 8-bit caches in boxes of 16; pages of 8 keys: row by row.
    Case("decode_boxes_int8_token", decode(PAIRS, cache=INT8, scales="token", dim=112, block=32)),
    Case("decode_boxes_dense", decode(LENGTHS, cache=E4M3, scales="scalar", dim=96, block=None)),
    Case("decode_boxes_two_splits", decode([2500, 2400], cache=INT8, scales="scalar", room=600)),
    Case("decode_rows_e4m3", decode(PAIRS, cache=E4M3, block=8)),
    Case("decode_rows_int8_token", decode(LENGTHS, cache=INT8, scales="token", block=8, room=1100)),
    Case("decode_64_rows", decode([700, 0], heads=(16, 1), q_len=4, causal=True)),
    Case("decode_many_rows", decode([300, 40], heads=(12, 2), q_len=21, causal=True, block=None)),
    Case("decode_d72_window", decode([500, 90], dim=72, window_size=(100, 0), sinks=True)),
    Case("decode_dense_alibi", decode([200, 65], block=None, alibi_slopes=True, softcap=5.0)),
    Case("decode_invariant", decode([2500, 1024], batch_invariant=True, plan=True)),
    Case("decode_append", decode([0, 40, 64], new=2, q_len=2, causal=True, rotary=True)),
    Case("decode_append_e4m3", decode([9, 40], cache=E4M3, new=1, scales="token", rotary=True)),
    Case("decode_append_int8", decode([9, 40], cache=INT8, new=3, scales="scalar", block=4)),
    Case("plan_decode", plan),
    Case("merge_attn_states", merge),
]
