"""Decode attention over a paged cache, against torch's scaled_dot_product_attention on
contiguous keys.
"""

from __future__ import annotations

import torch
from common import OURS, Bench, Call, randn

import fastinfer

HQ, HKV, D, PAGE = 32, 8, 128, 16


def main() -> None:
    bench = Bench("paged_attention", __doc__)
    dtype, device = bench.dtype, bench.device
    for batch, context in ((1, 512), (1, 8192), (8, 2048)):
        pages = context // PAGE
        formats = {"bf16": dtype, "fp8": torch.float8_e4m3fn, "int8": torch.int8}
        for kv, kv_dtype in formats.items():

            def paged(
                batch: int = batch,
                context: int = context,
                pages: int = pages,
                kv_dtype: torch.dtype = kv_dtype,
            ) -> Call:
                q = randn(batch, 1, HQ, D, dtype=dtype, device=device)
                shape = (batch * pages, PAGE, HKV, D)
                caches = [(torch.randn(shape, device=device) * 40).to(kv_dtype) for _ in "kv"]
                scale = None if kv_dtype == dtype else torch.tensor(0.025, device=device)
                table = torch.randperm(batch * pages, device=device).int().view(batch, pages)
                lengths = torch.full((batch,), context, dtype=torch.int32, device=device)
                return lambda: fastinfer.flash_attn_with_kvcache(
                    q,
                    *caches,
                    cache_seqlens=lengths,
                    block_table=table,
                    causal=True,
                    k_scale=scale,
                    v_scale=scale,
                )

            def sdpa(batch: int = batch, context: int = context) -> Call:
                q = randn(batch, HQ, 1, D, dtype=dtype, device=device)
                k, v = (randn(batch, HKV, context, D, dtype=dtype, device=device) for _ in "kv")
                return lambda: torch.nn.functional.scaled_dot_product_attention(
                    q, k, v, enable_gqa=True
                )

            keys = {"op": "decode", "batch": batch, "context": context}
            keys |= {"hq": HQ, "hkv": HKV, "d": D, "page": PAGE, "kv": kv}
            bench.case(
                keys,
                {OURS: paged, "sdpa contiguous": sdpa} if kv == "bf16" else {OURS: paged},
                moved_bytes=2 * batch * context * HKV * D * kv_dtype.itemsize,
            )
    bench.finish()


if __name__ == "__main__":
    main()
