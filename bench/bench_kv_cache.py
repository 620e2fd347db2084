"""Cache writes, gathers, block copies and the GQA broadcast, against torch indexing."""

from __future__ import annotations

import torch
from common import OURS, Bench, Call, randn

import fastinfer

HKV, D, BLOCK = 8, 128, 16


def main() -> None:
    bench = Bench("kv_cache", __doc__)
    dtype, device = bench.dtype, bench.device
    row = HKV * D * dtype.itemsize

    def caches(blocks: int) -> list[torch.Tensor]:
        return [randn(blocks, BLOCK, HKV, D, dtype=dtype, device=device) for _ in "kv"]

    for t in (1, 64, 8192 if device == "cuda" else 2048):
        blocks = max(64, 2 * t // BLOCK)

        def write(t: int = t, blocks: int = blocks) -> Call:
            k, v = (randn(t, HKV, D, dtype=dtype, device=device) for _ in "kv")
            pages = caches(blocks)
            slots = torch.randperm(blocks * BLOCK, device=device)[:t]
            return lambda: fastinfer.reshape_and_cache(k, v, *pages, slots)

        def index_put(t: int = t, blocks: int = blocks) -> Call:
            k, v = (randn(t, HKV, D, dtype=dtype, device=device) for _ in "kv")
            kc, vc = (c.view(-1, HKV, D) for c in caches(blocks))
            slots = torch.randperm(blocks * BLOCK, device=device)[:t]
            return lambda: (kc.index_copy_(0, slots, k), vc.index_copy_(0, slots, v))

        bench.case(
            {"op": "kvcopy", "case": f"reshape_and_cache {t} tokens"},
            {OURS: write, "torch": index_put},
            moved_bytes=4 * t * row,
        )

    for pairs, layers in ((1, 32), (64, 32)) if device == "cuda" else ((1, 8), (64, 8)):

        def copy(pairs: int = pairs, layers: int = layers) -> Call:
            keys, values = zip(*(caches(2 * pairs) for _ in range(layers)), strict=True)
            mapping = torch.arange(2 * pairs, device=device).view(2, pairs).T.contiguous()
            return lambda: fastinfer.copy_blocks(list(keys), list(values), mapping)

        bench.case(
            {"op": "kvcopy", "case": f"copy_blocks {pairs} pairs x {layers} layers x K,V"},
            {OURS: copy},
            moved_bytes=2 * 2 * pairs * layers * BLOCK * row,
        )

    tokens = 16384 if device == "cuda" else 4096

    def repeat() -> Call:
        x = randn(1, tokens, HKV, D, dtype=dtype, device=device)
        return lambda: fastinfer.repeat_kv(x, 4)

    def repeat_interleave() -> Call:
        x = randn(1, tokens, HKV, D, dtype=dtype, device=device)
        return lambda: x.repeat_interleave(4, dim=2)

    bench.case(
        {"op": "kvcopy", "case": f"repeat_kv {tokens} tokens x4"},
        {OURS: repeat, "torch": repeat_interleave},
        moved_bytes=5 * tokens * row,
    )
    bench.finish()


if __name__ == "__main__":
    main()
