"""Decode attention over a paged cache. On CUDA: the anchor grid and beyond (several queries, skewed
lengths, block sizes, head dimensions, 8-bit caches, the price of batch invariance, of a plan, of a
missing workspace). On the CPU: three shapes, against torch's scaled_dot_product_attention on
contiguous keys.
"""

from __future__ import annotations

import argparse
import dataclasses
from typing import Any

import torch
from common import OURS, Bench, Call, randn

import fastinfer

FORMATS = {"bf16": torch.bfloat16, "fp8": torch.float8_e4m3fn, "int8": torch.int8}
# 128 lognormal lengths, 774198 keys in all.
MIXED = [
    607, 630, 5582, 159, 2104, 166, 9369, 3189, 12728, 1365, 4031, 1774, 1030, 2976, 553, 1633,
    5767, 2678, 1527, 32768, 2680, 1236, 3027, 1334, 1574, 1642, 28405, 2568, 3086, 5614, 28121,
    1911, 1182, 32768, 433, 1609, 5565, 32768, 799, 135, 5530, 1336, 1570, 4348, 3269, 3544, 1490,
    11745, 15214, 2597, 1453, 6027, 4435, 717, 1439, 8804, 2227, 1684, 3225, 2401, 2492, 246, 20398,
    3175, 873, 8098, 3621, 2553, 8792, 32768, 4857, 16750, 32768, 734, 1334, 6346, 321, 1814, 11795,
    8741, 5011, 257, 32768, 4841, 6276, 4527, 318, 446, 580, 24978, 922, 1869, 1841, 4959, 4558,
    3447, 550, 100, 3052, 3448, 10947, 2209, 1200, 4090, 387, 716, 747, 3531, 30742, 6248, 9841,
    3326, 3494, 1457, 1784, 135, 590, 533, 6825, 5540, 9840, 16176, 1733, 8871, 26128, 2474, 9212,
    2050,
]  # fmt: skip


@dataclasses.dataclass(slots=True)
class Row:
    """One case. `lengths` replaces batch x context."""

    batch: int
    context: int | None
    hq: int = 32
    hkv: int = 8
    d: int = 128
    page: int = 16
    kv: str = "bf16"
    lengths: list[int] | None = None
    options: dict[str, Any] = dataclasses.field(default_factory=dict)

    def all_lengths(self) -> list[int]:
        return self.lengths or [self.context or 0] * self.batch

    def moved_bytes(self, dtype: torch.dtype) -> int:
        size = dtype.itemsize if self.kv == "bf16" else 1
        return 2 * sum(self.all_lengths()) * self.hkv * self.d * size

    def keys(self) -> dict[str, Any]:
        keys: dict[str, Any] = {"op": "decode", "batch": self.batch, "context": self.context}
        if self.lengths:
            keys["total_context"] = sum(self.lengths)
        keys |= {"hq": self.hq, "hkv": self.hkv, "d": self.d, "page": self.page, "kv": self.kv}
        return keys | self.options


def grid(*contexts: tuple[int, tuple[int, ...]], **changes: Any) -> list[Row]:
    return [Row(b, context, **changes) for context, batches in contexts for b in batches]


def anchor_rows() -> list[Row]:
    """The rows that other kernels were measured on."""
    few = ((8192, (1,)), (2048, (32, 128)), (8192, (32, 128)))
    return [
        Row(128, None, lengths=MIXED),
        *grid(
            (8192, (1, 8, 32, 64, 128, 256)),
            (2048, (1, 8, 32, 128, 256)),
            (512, (1, 8, 32, 64, 128, 256)),
            (32768, (1, 8, 32, 64, 128, 256)),
            (131072, (1, 8, 32)),
        ),
        *grid(*few, (131072, (1,)), page=64),
        *grid(*few, (512, (256,)), hq=64),
        *grid((8192, (1, 8, 32, 128)), (2048, (32,)), (131072, (1,)), (512, (256,)), hkv=32),
        *grid((8192, (1, 8, 32)), (2048, (32, 128)), (131072, (1,)), (512, (256,)), hkv=1),
        *grid((8192, (1, 128)), (2048, (32, 128)), (131072, (1,)), kv="fp8"),
    ]


def further_rows() -> list[Row]:
    skewed = [65536] + [512] * 31
    invariant = {"batch_invariant": True}
    return [
        Row(32, None, lengths=skewed),
        *(Row(32, 8192, page=page) for page in (8, 32, 128, 256)),
        Row(32, 8192, options={"q_len": 4}),
        Row(32, 2048, options={"q_len": 8}),
        *grid((2048, (32, 128)), d=64),
        *grid((2048, (32, 128)), d=256),
        *grid((2048, (128,)), (8192, (1, 128)), kv="int8"),
        Row(128, 8192, kv="fp8", options={"scales": "token"}),
        *(Row(b, c, options=invariant) for b, c in ((1, 8192), (8, 2048), (32, 8192), (128, 2048))),
        Row(128, None, lengths=MIXED, options=invariant),
        Row(128, None, lengths=MIXED, options={"plan": True}),
        Row(1, 512, options={"plan": True}),
        Row(1, 512, options={"workspace": False}),
    ]


def make_call(row: Row, device: str, dtype: torch.dtype) -> Call:
    lengths, page = row.all_lengths(), row.page
    counts = [-(-n // page) for n in lengths]
    kv_dtype = dtype if row.kv == "bf16" else FORMATS[row.kv]
    shape = (sum(counts), page, row.hkv, row.d)
    caches, scales = [], []
    for _ in "kv":
        cache = torch.empty(shape, dtype=dtype, device=device).normal_()
        if kv_dtype != dtype:
            cache = (cache * 40).to(kv_dtype)
        caches.append(cache)
        scale = None
        if kv_dtype != dtype:
            per_token = row.options.get("scales") == "token"
            scale = torch.full(shape[:3] if per_token else (), 0.025, device=device)
        scales.append(scale)
    order = torch.randperm(sum(counts), device=device).int()
    table = torch.full((row.batch, max(counts)), -1, dtype=torch.int32, device=device)
    at = 0
    for b, n in enumerate(counts):
        table[b, :n] = order[at : at + n]
        at += n
    q_len = row.options.get("q_len", 1)
    q = randn(row.batch, q_len, row.hq, row.d, dtype=dtype, device=device)
    out = torch.empty_like(q)
    seqlens = torch.tensor(lengths, dtype=torch.int32, device=device)
    invariant = row.options.get("batch_invariant", False)
    plan = workspace = None
    if row.options.get("plan"):
        plan = fastinfer.plan_decode(seqlens, row.hq, row.hkv, row.d, q_len=q_len)
    if row.options.get("workspace", True) and device == "cuda":
        workspace = torch.zeros(
            256 << 20 if invariant else 64 << 20, dtype=torch.uint8, device=device
        )
    return lambda: fastinfer.flash_attn_with_kvcache(
        q, *caches, cache_seqlens=seqlens, block_table=table, causal=True, k_scale=scales[0],
        v_scale=scales[1], plan=plan, batch_invariant=invariant, out=out, workspace=workspace,
    )  # fmt: skip


def sdpa_call(row: Row, device: str, dtype: torch.dtype) -> Call:
    context = row.context or 0
    q = randn(row.batch, row.hq, 1, row.d, dtype=dtype, device=device)
    k, v = (randn(row.batch, row.hkv, context, row.d, dtype=dtype, device=device) for _ in "kv")
    return lambda: torch.nn.functional.scaled_dot_product_attention(q, k, v, enable_gqa=True)


def add_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--rows", default="all", choices=["all", "anchors", "further"])


def main() -> None:
    bench = Bench("paged_attention", __doc__, add_flags)
    device, dtype = bench.device, bench.dtype
    if device == "cpu":
        rows = [Row(b, c, kv=kv) for b, c in ((1, 512), (1, 8192), (8, 2048)) for kv in FORMATS]
    else:
        rows = anchor_rows() if bench.args.rows != "further" else []
        rows += further_rows() if bench.args.rows != "anchors" else []
    for row in rows:

        def ours(row: Row = row) -> Call:
            return make_call(row, device, dtype)

        def sdpa(row: Row = row) -> Call:
            return sdpa_call(row, device, dtype)

        peers = {OURS: ours}
        if device == "cpu" and row.kv == "bf16":
            peers["sdpa contiguous"] = sdpa
        bench.case(row.keys(), peers, moved_bytes=row.moved_bytes(dtype))
    bench.finish()


if __name__ == "__main__":
    main()
