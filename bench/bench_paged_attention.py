"""Decode attention over a paged cache. On CUDA: the anchor grid and beyond (several queries, skewed
lengths, block sizes, head dimensions, 8-bit caches, the price of batch invariance, of a plan, of a
missing workspace, shared prefixes), beside the best paged peer of each row on an H200
(decode_peers_h200.json) and what this GPU reads. On the CPU: three shapes. torch's
scaled_dot_product_attention runs on contiguous keys.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import json
import math
import statistics
from pathlib import Path
from typing import Any

import torch
from common import OURS, Bench, Call, randn

import fastinfer
from fastinfer import _lib
from fastinfer.ops.shared_prefix import flash_attn_with_shared_prefix

PEERS = Path(__file__).with_name("decode_peers_h200.json")
SMALL = 250e6  # bytes: what a bar calls small
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
        op = "cascade" if "prefix" in self.options else "decode"
        keys: dict[str, Any] = {"op": op, "batch": self.batch, "context": self.context}
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
        *grid((8192, (1, 32)), (2048, (8,)), options={"q_len": 4}),
        Row(32, 2048, options={"q_len": 8}),
        Row(32, 2048, hkv=1, options={"q_len": 4}),
        *grid((8192, (1,)), (2048, (32, 128)), d=64),
        *grid((8192, (1,)), (2048, (32, 128)), d=256),
        *grid((2048, (128,)), (8192, (1, 128)), kv="int8"),
        Row(128, 8192, kv="fp8", options={"scales": "token"}),
        *(Row(b, c, options=invariant) for b, c in ((1, 8192), (8, 2048), (32, 8192), (128, 2048))),
        Row(128, None, lengths=MIXED, options=invariant),
        Row(128, None, lengths=MIXED, options={"plan": True}),
        Row(1, 512, options={"plan": True}),
        Row(1, 512, options={"workspace": False}),
    ]


def overlapped_rows() -> list[Row]:
    """Anchor rows as the engine launches them: programmatically, while the one before ends."""
    return [
        dataclasses.replace(row, options={"overlapped": True})
        for row in anchor_rows()
        if row.moved_bytes(torch.bfloat16) < 300e6
    ]


def prefix_rows() -> list[Row]:
    """Batches whose sequences share all but the last 256 keys."""
    return [
        Row(b, prefix + 256, options={"prefix": prefix})
        for prefix in (512, 2048, 8192)
        for b in (2, 4, 8, 32)
    ]


@functools.cache
def shared_workspace(device: str) -> torch.Tensor:
    return torch.zeros(256 << 20, dtype=torch.uint8, device=device)


def make_call(row: Row, device: str, dtype: torch.dtype, cascade: bool = False) -> Call:
    lengths, page = row.all_lengths(), row.page
    prefix = row.options.get("prefix", 0)
    counts = torch.tensor([-(-n // page) for n in lengths])
    total = int(counts.sum()) - (row.batch - 1) * (prefix // page)
    kv_dtype = dtype if row.kv == "bf16" else FORMATS[row.kv]
    shape = (total, page, row.hkv, row.d)
    caches, scales = [], []
    for _ in "kv":
        cache = torch.empty(shape, dtype=dtype, device=device).normal_()
        if kv_dtype != dtype:
            cache = cache.mul_(40).to(kv_dtype)
        caches.append(cache)
        scale = None
        if kv_dtype != dtype:
            per_token = row.options.get("scales") == "token"
            scale = torch.full(shape[:3] if per_token else (), 0.025, device=device)
        scales.append(scale)
    order = torch.randperm(total).int()
    table = torch.full((row.batch, int(counts.max())), -1, dtype=torch.int32)
    common = prefix // page
    table[:, :common] = order[:common]
    own = torch.arange(table.shape[1]) < counts[:, None]
    own[:, :common] = False
    table[own] = order[common:]
    table = table.to(device)
    q_len = row.options.get("q_len", 1)
    q = randn(row.batch, q_len, row.hq, row.d, dtype=dtype, device=device)
    out = torch.empty_like(q)
    seqlens = torch.tensor(lengths, dtype=torch.int32, device=device)
    plan = workspace = None
    if row.options.get("plan"):
        plan = fastinfer.plan_decode(seqlens, row.hq, row.hkv, row.d, q_len=q_len)
    if row.options.get("workspace", True) and device == "cuda":
        workspace = shared_workspace(device)
    options: dict[str, Any] = {"k_scale": scales[0], "v_scale": scales[1], "out": out}
    options["workspace"] = workspace
    if cascade:
        return lambda: flash_attn_with_shared_prefix(q, *caches, prefix, seqlens, table, **options)
    options |= {"plan": plan, "batch_invariant": row.options.get("batch_invariant", False)}

    def call() -> torch.Tensor:
        return fastinfer.flash_attn_with_kvcache(
            q, *caches, cache_seqlens=seqlens, block_table=table, causal=True, **options
        )

    if not row.options.get("overlapped"):
        return call

    def overlapped() -> torch.Tensor:
        with _lib.programmatic_launch():
            return call()

    return overlapped


def sdpa_call(row: Row, device: str, dtype: torch.dtype) -> Call:
    context = row.context or 0
    q = randn(row.batch, row.hq, 1, row.d, dtype=dtype, device=device)
    k, v = (randn(row.batch, row.hkv, context, row.d, dtype=dtype, device=device) for _ in "kv")
    return lambda: torch.nn.functional.scaled_dot_product_attention(q, k, v, enable_gqa=True)


def read_rate() -> float:
    """GB/s of a sum over 2 GiB: what this GPU reads when it writes nothing."""
    x = torch.empty(1 << 29, device="cuda").normal_()
    best = 0.0
    for _ in range(10):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        x.sum()
        end.record()
        end.synchronize()
        best = max(best, x.nbytes / start.elapsed_time(end) / 1e6)
    return best


def compare(rows: list[dict[str, Any]], read: float) -> None:
    """Adds to each row the share of the read rate and, where there is one, the H200's best paged
    peer; prints the bars of issue-sized classes.
    """
    keys = ("batch", "context", "hq", "hkv", "d", "page", "kv")
    peers = {tuple(r[k] for k in keys): r for r in json.loads(PEERS.read_text())["rows"]}
    small: dict[bool, list[float]] = {False: [], True: []}  # by whether launches overlap
    for row in rows:
        if row["peer"] != OURS or row["op"] != "decode":
            continue
        row["of_read"] = round(row["gbs"] / read, 3)
        peer = peers.get(tuple(row[k] for k in keys))
        if peer and not set(row) & {
            "q_len",
            "batch_invariant",
            "plan",
            "workspace",
            "scales",
        }:
            row["h200_peer"], row["h200_peer_us"] = peer["peer"], peer["us"]
            row["of_h200_peer"] = round(peer["us"] / row["us"], 3)
            if row["gbs"] * row["us"] < SMALL / 1e3:
                small["overlapped" in row].append(row["of_h200_peer"])
    print(f"read {read:.0f} GB/s")
    shares = [r["of_h200_peer"] for r in rows if "of_h200_peer" in r and "overlapped" not in r]
    if shares:
        print(f"{len(shares)} rows against the H200's best paged peer: least {min(shares):.3f}")
    for overlapped, ratios in small.items():
        if ratios:
            mean = math.exp(statistics.fmean(map(math.log, ratios)))
            how = "overlapped" if overlapped else "alone"
            print(f"geometric mean of {len(ratios)} under 250 MB, launches {how}: {mean:.3f}")


ROW_SETS = ["all", "anchors", "further", "overlapped", "prefix", "small"]


def add_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--rows", default="all", choices=ROW_SETS)


def main() -> None:
    bench = Bench("paged_attention", __doc__, add_flags)
    device, dtype = bench.device, bench.dtype
    if device == "cpu":
        rows = [Row(b, c, kv=kv) for b, c in ((1, 512), (1, 8192), (8, 2048)) for kv in FORMATS]
    else:
        sets = {"anchors": anchor_rows(), "further": further_rows(), "prefix": prefix_rows()}
        sets["small"] = [r for r in sets["anchors"] if r.moved_bytes(dtype) < 600e6]
        sets["overlapped"] = overlapped_rows()
        sets["all"] = sets["anchors"] + sets["further"] + sets["prefix"] + sets["overlapped"]
        # Small ones first: what large ones leave behind in the allocator slows those after them.
        rows = sorted(sets[bench.args.rows], key=lambda row: row.moved_bytes(dtype))
    compared = [Row(1, 8192), Row(8, 2048), Row(32, 2048), Row(1, 8192, hkv=1)]
    for row in rows:

        def ours(row: Row = row) -> Call:
            return make_call(row, device, dtype)

        def shared(row: Row = row) -> Call:
            return make_call(row, device, dtype, cascade=True)

        def sdpa(row: Row = row) -> Call:
            return sdpa_call(row, device, dtype)

        peers = {OURS: ours}
        if "prefix" in row.options:
            peers["shared prefix"] = shared
        elif row.kv == "bf16" and (device == "cpu" or row in compared):
            peers["sdpa contiguous"] = sdpa
        bench.case(row.keys(), peers, moved_bytes=row.moved_bytes(dtype))
        if device == "cuda" and row.moved_bytes(dtype) > 1 << 30:
            torch.cuda.empty_cache()
    if device == "cuda":
        bench.read_gbs = read_rate()
        compare(bench.rows, bench.read_gbs)
    bench.finish()


if __name__ == "__main__":
    main()
