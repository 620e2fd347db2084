"""Prefill attention: dense, causal and full, against torch's scaled_dot_product_attention."""

from __future__ import annotations

import torch
from common import OURS, Bench, Call, randn

import fastinfer

HQ, HKV, D = 32, 8, 128


def main() -> None:
    bench = Bench("flash_attention", __doc__)
    dtype, device = bench.dtype, bench.device
    shapes = (
        ((1, 8192), (4, 4096), (1, 2048), (32, 512)) if device == "cuda" else ((1, 512), (1, 2048))
    )
    for batch, seqlen in shapes:
        for causal in (True, False):

            def inputs(batch: int = batch, seqlen: int = seqlen) -> list[torch.Tensor]:
                return [
                    randn(batch, seqlen, h, D, dtype=dtype, device=device) for h in (HQ, HKV, HKV)
                ]

            def ours(causal: bool = causal, inputs: Call = inputs) -> Call:
                q, k, v = inputs()
                return lambda: fastinfer.flash_attn_func(q, k, v, causal=causal)

            def sdpa(causal: bool = causal, inputs: Call = inputs) -> Call:
                q, k, v = (x.transpose(1, 2) for x in inputs())
                return lambda: torch.nn.functional.scaled_dot_product_attention(
                    q, k, v, is_causal=causal, enable_gqa=True
                )

            flops = 4 * batch * HQ * seqlen * seqlen * D // (2 if causal else 1)
            keys = {"op": "prefill", "kind": "dense", "batch": batch, "seqlen": seqlen}
            keys |= {"hq": HQ, "hkv": HKV, "d": D, "causal": causal}
            bench.case(keys, {OURS: ours, "sdpa": sdpa}, flops=flops)
    bench.finish()


if __name__ == "__main__":
    main()
