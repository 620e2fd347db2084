"""Prefill attention: dense, packed (varlen) and chunks over a paged cache, against torch's
scaled_dot_product_attention (FlashAttention-2 and cuDNN on a GPU)."""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable

import torch
import torch.nn.functional as F
from common import OURS, Bench, Call, randn
from torch.nn.attention import SDPBackend, sdpa_kernel

import fastinfer

# (query heads, key heads, head dim): (batch, length) pairs
GRID = {
    (32, 8, 128): [
        (1, 8192), (4, 4096), (1, 2048), (1, 512), (1, 32768), (32, 512), (1, 131072),
    ],
    (64, 8, 128): [(1, 8192), (4, 4096), (1, 2048), (1, 32768), (32, 512), (1, 131072)],
    (32, 32, 128): [(1, 8192), (1, 2048), (1, 512), (1, 32768), (32, 512)],
    (32, 8, 64): [(1, 8192), (4, 4096), (1, 2048), (1, 512), (1, 32768), (32, 512)],
    (32, 8, 192): [(1, 8192), (1, 2048)],
    (16, 8, 256): [(1, 8192)],
    (32, 8, 256): [(1, 8192)],
}  # fmt: skip
VARLEN = [1301, 4131, 466, 3193, 913, 911, 7919, 1385, 1134, 2455, 3652, 1147, 2131, 447, 820, 763]
CHUNKS = [(512, 8192), (2048, 8192), (2048, 32768), (512, 131072), (2048, 131072)]
LONG = 32768
MAX_PORTABLE_FLOPS = 10**13  # longer ones say nothing new
INVARIANT = "fastinfer_batch_invariant"  # what that mode costs
BACKENDS = {"sdpa_cudnn": SDPBackend.CUDNN_ATTENTION, "sdpa_flash": SDPBackend.FLASH_ATTENTION}


def portable(call: Call) -> Call:
    """The same call on the kernels of sm_80."""

    def run() -> object:
        os.environ["FASTINFER_FORCE_ARCH"] = "80"
        try:
            return call()
        finally:
            del os.environ["FASTINFER_FORCE_ARCH"]

    return run


class Cases:
    def __init__(self, bench: Bench) -> None:
        self.bench, self.dtype, self.device = bench, bench.dtype, bench.device

    def random(self, *shape: int) -> torch.Tensor:
        return randn(*shape, dtype=self.dtype, device=self.device)

    def report(
        self, keys: dict, make: Callable[[], Call], peers: dict, flops: int, moved: int
    ) -> None:
        rows = {OURS: make}
        if self.device == "cuda" and self.bench.args.portable and flops < MAX_PORTABLE_FLOPS:
            rows["fastinfer_portable"] = lambda: portable(make())
        if self.device == "cuda":
            wanted = self.bench.args.peers.split(",")
            peers = {name: make for name, make in peers.items() if name in wanted}
        # moved_bytes only sets how many buffer sets are rotated through.
        self.bench.case(keys, rows | peers, flops=flops, moved_bytes=moved)

    def dense(self, batch: int, length: int, hq: int, hkv: int, d: int, causal: bool) -> None:
        def inputs() -> list[torch.Tensor]:
            return [self.random(batch, length, h, d) for h in (hq, hkv, hkv)]

        def ours(**options: bool) -> Call:
            q, k, v = inputs()
            out = torch.empty_like(q)
            return lambda: fastinfer.flash_attn_func(q, k, v, causal=causal, out=out, **options)

        def sdpa(backend: SDPBackend | None) -> Call:
            q, k, v = (x.transpose(1, 2) for x in inputs())

            def run() -> torch.Tensor:
                return F.scaled_dot_product_attention(q, k, v, is_causal=causal, enable_gqa=True)

            def chosen() -> torch.Tensor:
                with sdpa_kernel(backend):
                    return run()

            return run if backend is None else chosen

        peers: dict[str, Callable[[], Call]] = {}
        if self.device == "cpu":
            peers["sdpa"] = lambda: sdpa(None)
        else:
            for name, backend in BACKENDS.items():
                peers[name] = lambda backend=backend: sdpa(backend)
            if length <= 8192:
                peers[INVARIANT] = lambda: ours(batch_invariant=True)
        flops = 4 * batch * hq * length * length * d // (2 if causal else 1)
        keys = {"op": "prefill", "kind": "dense", "batch": batch, "seqlen": length}
        keys |= {"hq": hq, "hkv": hkv, "d": d, "causal": causal}
        self.report(keys, ours, peers, flops, 4 * batch * length * d * (hq + hkv))

    def varlen(self, hq: int, hkv: int, d: int) -> None:
        total, longest = sum(VARLEN), max(VARLEN)

        def ours() -> Call:
            q, k, v = (self.random(total, h, d) for h in (hq, hkv, hkv))
            cu = torch.tensor([0, *VARLEN], device=self.device).cumsum(0).int()
            out = torch.empty_like(q)
            return lambda: fastinfer.flash_attn_varlen_func(
                q, k, v, cu, cu, longest, longest, causal=True, out=out
            )

        keys = {"op": "prefill", "kind": "varlen", "batch": len(VARLEN), "tokens": total}
        keys |= {"max_len": longest, "hq": hq, "hkv": hkv, "d": d, "causal": True}
        flops = 2 * hq * d * sum(n * n for n in VARLEN)
        self.report(keys, ours, {}, flops, 4 * total * d * (hq + hkv))

    def chunk(self, q_len: int, context: int, page: int, hq: int, hkv: int, d: int) -> None:
        """q_len new tokens behind a context of `context`; all keys lie in shuffled pages."""
        length = context + q_len

        def ours() -> Call:
            blocks = length // page
            q = self.random(q_len, hq, d)
            k, v = (self.random(blocks, page, hkv, d) for _ in range(2))
            table = torch.randperm(blocks, device=self.device).int()[None]
            cu, used = (
                torch.tensor(x, dtype=torch.int32, device=self.device)
                for x in ([0, q_len], [length])
            )
            out = torch.empty_like(q)
            return lambda: fastinfer.flash_attn_varlen_func(
                q, k, v, cu, None, q_len, length, causal=True, block_table=table, seqused_k=used,
                out=out,
            )  # fmt: skip

        keys = {"op": "prefill", "kind": "chunk", "batch": 1, "q": q_len, "context": context}
        keys |= {"page": page, "hq": hq, "hkv": hkv, "d": d, "causal": True}
        pairs = q_len * context + q_len * q_len // 2
        self.report(keys, ours, {}, 4 * hq * d * pairs, 4 * d * (q_len * hq + length * hkv))


def main() -> None:
    def flags(parser: argparse.ArgumentParser) -> None:
        parser.add_argument("--portable", action="store_true", help="also time the sm_80 kernels")
        parser.add_argument("--peers", default=",".join([*BACKENDS, INVARIANT]), help="on a GPU")

    bench = Bench("flash_attention", __doc__, flags)
    cases = Cases(bench)
    if bench.device == "cpu":
        for length in (512, 2048):
            for causal in (True, False):
                cases.dense(1, length, 32, 8, 128, causal)
        bench.finish()
        return
    rows = [(*shape, *heads) for heads, shapes in GRID.items() for shape in shapes]
    for length_at_most in (LONG, float("inf")):  # the long ones last: they heat the GPU up
        for batch, length, *heads in rows:
            if (length <= LONG) == (length_at_most == LONG):
                cases.dense(batch, length, *heads, True)
                if length <= LONG or heads[0] == 32:  # the rest would take a second a call
                    cases.dense(batch, length, *heads, False)
        for q_len, context in CHUNKS:
            if (context <= LONG) == (length_at_most == LONG):
                for page in (16, 64):
                    cases.chunk(q_len, context, page, 32, 8, 128)
        if length_at_most == LONG:
            cases.varlen(32, 8, 128)
    bench.finish()


if __name__ == "__main__":
    main()
