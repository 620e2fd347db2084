"""Cache writes, gathers, block copies and the GQA broadcast, against torch indexing.

swap_blocks is timed with events around many calls, which are queued behind a kernel that spins, so
that no time of the host is in it (a call takes 30 us, bench_host.py); everything else as
bench/common.py says. GB/s counts bytes read plus bytes written; for swap_blocks the bytes that
cross the link.
"""

from __future__ import annotations

import statistics

import torch
from common import OURS, Bench, Call, alone_and_overlapped, randn

import fastinfer

HKV, D, BLOCK = 8, 128, 16
FP8 = torch.float8_e4m3fn
SPIN_CYCLES = 8_000_000  # some 4 ms: longer than the host takes for 20 calls


def main() -> None:
    bench = Bench("kv_cache", __doc__)
    on_gpu = bench.device == "cuda"
    for t in (1, 8, 64, 256, 1024, 8192, 32768) if on_gpu else (1, 64, 2048):
        write_float(bench, t)
    for t in (1, 1024, 8192) if on_gpu else (2048,):
        write_fp8(bench, t, dynamic=False)
        write_fp8(bench, t, dynamic=True)
    for t in (64, 8192) if on_gpu else (2048,):
        gather(bench, t, bench.dtype)
        gather(bench, t, FP8)
    for pairs in (1, 8, 64, 1024) if on_gpu else (1, 64):
        copy(bench, pairs, 32 if on_gpu else 8)
    repeat(bench, 32768 if on_gpu else 4096)
    if on_gpu:
        for blocks in (16, 256, 2048):
            for into_host in (True, False):
                swap(bench, blocks, into_host)
                swap(bench, blocks, into_host, scattered=True)
        swap(bench, 256, True, pinned=False)
        swap(bench, 256, False, pinned=False)
    bench.finish()


def row_bytes(bench: Bench) -> int:
    return HKV * D * bench.dtype.itemsize


def tokens(bench: Bench, t: int) -> list[torch.Tensor]:
    return [randn(t, HKV, D, dtype=bench.dtype, device=bench.device) for _ in "kv"]


def caches(bench: Bench, blocks: int, dtype: torch.dtype | None = None) -> list[torch.Tensor]:
    return [
        randn(blocks, BLOCK, HKV, D, dtype=dtype or bench.dtype, device=bench.device) for _ in "kv"
    ]


def write_float(bench: Bench, t: int) -> None:
    blocks = max(64, 2 * t // BLOCK)

    def write() -> Call:
        new, pages = tokens(bench, t), caches(bench, blocks)
        slots = torch.randperm(blocks * BLOCK, device=bench.device)[:t]
        return lambda: fastinfer.reshape_and_cache(*new, *pages, slots)

    def index_copy() -> Call:
        k, v = tokens(bench, t)
        kc, vc = (c.view(-1, HKV, D) for c in caches(bench, blocks))
        slots = torch.randperm(blocks * BLOCK, device=bench.device)[:t]
        return lambda: (kc.index_copy_(0, slots, k), vc.index_copy_(0, slots, v))

    bench.case(
        {"op": "kvcopy", "case": f"reshape_and_cache T={t}"},
        alone_and_overlapped(bench.device, write) | {"torch index_copy_": index_copy},
        moved_bytes=4 * t * row_bytes(bench),
    )


def write_fp8(bench: Bench, t: int, dynamic: bool) -> None:
    blocks = max(64, 2 * t // BLOCK)

    def write() -> Call:
        new, pages = tokens(bench, t), caches(bench, blocks, FP8)
        slots = torch.randperm(blocks * BLOCK, device=bench.device)[:t]
        shape = (blocks, BLOCK, HKV) if dynamic else (HKV,)
        k_scale, v_scale = (torch.full(shape, 0.01, device=bench.device) for _ in "kv")
        return lambda: fastinfer.reshape_and_cache(
            *new, *pages, slots, k_scale=k_scale, v_scale=v_scale
        )

    bench.case(
        {"op": "kvcopy", "case": f"reshape_and_cache T={t} fp8{' dynamic' if dynamic else ''}"},
        alone_and_overlapped(bench.device, write),
        moved_bytes=2 * t * HKV * (D * (bench.dtype.itemsize + 1) + (4 if dynamic else 0)),
    )


def gather(bench: Bench, t: int, cache_dtype: torch.dtype) -> None:
    blocks = max(64, 2 * t // BLOCK)

    def call() -> Call:
        pages, out = caches(bench, blocks, cache_dtype), tokens(bench, t)
        table = torch.randperm(blocks, device=bench.device)[: t // BLOCK].view(-1, min(64, t) // 16)
        sizes = torch.full((len(table),), t // len(table), device=bench.device)
        cu = torch.cat((sizes.new_zeros(1), sizes.cumsum(0)))
        s = torch.full((HKV,), 0.01, device=bench.device) if cache_dtype == FP8 else None
        return lambda: fastinfer.gather_cache(
            *pages, table, cu, t, k_scale=s, v_scale=s, out=(out[0], out[1])
        )

    bench.case(
        {"op": "kvcopy", "case": f"gather_cache T={t}{' fp8' if cache_dtype == FP8 else ''}"},
        {OURS: call},
        moved_bytes=2 * t * HKV * D * (bench.dtype.itemsize + cache_dtype.itemsize),
    )


def copy(bench: Bench, pairs: int, layers: int) -> None:
    def call() -> Call:
        keys, values = zip(*(caches(bench, 2 * pairs) for _ in range(layers)), strict=True)
        mapping = torch.randperm(2 * pairs, device=bench.device).view(pairs, 2)
        return lambda: fastinfer.copy_blocks(list(keys), list(values), mapping)

    bench.case(
        {"op": "kvcopy", "case": f"copy_blocks {pairs} pairs x {layers} layers x K,V"},
        {OURS: call},
        moved_bytes=2 * 2 * pairs * layers * BLOCK * row_bytes(bench),
    )


def repeat(bench: Bench, t: int) -> None:
    def ours() -> Call:
        x = randn(1, t, HKV, D, dtype=bench.dtype, device=bench.device)
        out = torch.empty(1, t, 4 * HKV, D, dtype=bench.dtype, device=bench.device)
        return lambda: fastinfer.repeat_kv(x, 4, out=out)

    def interleave() -> Call:
        x = randn(1, t, HKV, D, dtype=bench.dtype, device=bench.device)
        return lambda: x.repeat_interleave(4, dim=2)

    mib = 4 * t * row_bytes(bench) >> 20
    bench.case(
        {"op": "kvcopy", "case": f"repeat_kv x4, output {mib} MB"},
        {OURS: ours, "torch repeat_interleave": interleave},
        moved_bytes=5 * t * row_bytes(bench),
    )


@torch.inference_mode()
def swap(
    bench: Bench, blocks: int, into_host: bool, *, scattered: bool = False, pinned: bool = True
) -> None:
    """Random blocks of the device; on the host a row of blocks, or random ones (`scattered`)."""
    case = f"swap {'D2H' if into_host else 'H2D'} {blocks} blocks x 32KiB, one layer K"
    case += (", host scattered" if scattered else "") + ("" if pinned else ", pageable")
    if not bench.wanted(f"case={case}"):
        return
    total = 2 * blocks + 64
    here = caches(bench, total)[0]
    host = torch.zeros(here.shape, dtype=here.dtype, pin_memory=pinned)
    src, dst = (here, host) if into_host else (host, here)
    mappings = []
    for i in range(4):
        on_host = torch.randperm(total)[:blocks] if scattered else torch.arange(blocks) + 16 * i
        ids = [torch.randperm(total)[:blocks], on_host]
        mappings.append(torch.stack(ids if into_host else ids[::-1], 1))
    peers = {OURS: lambda i: fastinfer.swap_blocks(src, dst, mappings[i])}
    if not scattered:
        row = slice(0, blocks)
        ids = [m[:, 0 if into_host else 1].to(bench.device) for m in mappings]
        peers["one cudaMemcpy"] = lambda i: dst[row].copy_(src[row], non_blocking=True)
        if into_host:
            peers["gather + 1 memcpy"] = lambda i: host[row].copy_(here[ids[i]], non_blocking=True)
        else:
            peers["1 memcpy + scatter"] = lambda i: here.index_copy_(
                0, ids[i], host[row].to(bench.device, non_blocking=True)
            )
    for peer, call in peers.items():
        samples = []
        calls = 20 if pinned else 4
        for _ in range(8):
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            if pinned:
                torch.cuda._sleep(SPIN_CYCLES)
            start.record()
            for i in range(calls):
                call(i % 4)
            end.record()
            end.synchronize()
            samples.append(start.elapsed_time(end) * 1e3 / calls)
        us, least = statistics.median(samples[1:]), min(samples[1:])
        gbs = blocks * BLOCK * row_bytes(bench) / us / 1e3
        keys = {"op": "kvcopy", "case": case, "peer": peer}
        bench.rows.append(
            keys | {"us": round(us, 2), "us_min": round(least, 2), "gbs": round(gbs, 1)}
        )
        print(f"case={case:<66} {peer:<19} {us:>8.1f} us {gbs:>6.1f} GB/s", flush=True)


if __name__ == "__main__":
    main()
