"""Operators that run once per step, per check of drafts or per checkpoint, beside plain torch.

`plan_decode`, `merge_attn_states` and `verify_draft` are small parts of a step; `quantize_weight`,
`pack_weight` and `dequantize_weight` run when weights are loaded. The torch forms are those that
one would write; none is given where there is no short one.
"""

from __future__ import annotations

import torch
from common import OURS, Bench, Call, randn

import fastinfer

VOCAB = 128256
LAYERS = ((4096, 4096), (28672, 4096))
GROUP = 128


def plans(bench: Bench) -> None:
    for batch, context in ((1, 8192), (64, 1024), (256, 4096)):

        def ours(batch: int = batch, context: int = context) -> Call:
            lengths = torch.randint(1, context, (batch,), dtype=torch.int32, device=bench.device)
            out = fastinfer.plan_decode(lengths, 32, 8, 128)
            return lambda: fastinfer.plan_decode(lengths, 32, 8, 128, out=out)

        keys = {"op": "preparation", "case": "plan_decode", "batch": batch, "context": context}
        bench.case(keys, {OURS: ours}, moved_bytes=batch * 8)


def merged(a: torch.Tensor, lse_a: torch.Tensor, b: torch.Tensor, lse_b: torch.Tensor) -> Call:
    def call() -> torch.Tensor:
        share = torch.sigmoid(lse_a - lse_b).t().unsqueeze(-1)
        return (share * a + (1 - share) * b).to(a.dtype)

    return call


def merges(bench: Bench) -> None:
    for tokens in (64, 2048):

        def states(tokens: int = tokens) -> tuple[torch.Tensor, ...]:
            shape = (tokens, 32, 128)
            a, b = (randn(*shape, dtype=bench.dtype, device=bench.device) for _ in range(2))
            lse_a, lse_b = (torch.randn(32, tokens, device=bench.device) for _ in range(2))
            return a, lse_a, b, lse_b

        def ours(make=states) -> Call:
            a, lse_a, b, lse_b = make()
            out = torch.empty_like(a)
            return lambda: fastinfer.merge_attn_states(a, lse_a, b, lse_b, out=out)

        keys = {"op": "preparation", "case": "merge_attn_states", "tokens": tokens}
        keys |= {"hq": 32, "d": 128, "dtype": bench.args.dtype}
        moved = tokens * 32 * (3 * 128 * bench.dtype.itemsize + 8)
        peers = {OURS: ours, "torch": lambda make=states: merged(*make())}
        bench.case(keys, peers, moved_bytes=moved)


def verifications(bench: Bench) -> None:
    for batch, drafts in ((1, 4), (64, 4)):
        for case, temperature in (("greedy", 0.0), ("temperature", 0.8)):

            def inputs(batch: int = batch, drafts: int = drafts) -> tuple[torch.Tensor, ...]:
                shape = (batch, drafts + 1, VOCAB)
                logits = randn(*shape, dtype=bench.dtype, device=bench.device)
                return logits, logits[:, :-1].argmax(-1)

            def ours(batch: int = batch, t: float = temperature, make=inputs) -> Call:
                logits, ids = make()
                kw = {"temperature": torch.full((batch,), t, device=bench.device)}
                kw["seeds"] = torch.arange(batch, device=bench.device)
                kw["steps"] = torch.zeros_like(kw["seeds"])
                return lambda: fastinfer.verify_draft(logits, ids, **kw)

            def theirs(make=inputs) -> Call:
                logits, ids = make()
                return lambda: (logits.argmax(-1)[:, :-1] == ids).long().cumprod(1).sum(1)

            keys = {"op": "preparation", "case": f"verify_draft {case}", "batch": batch}
            keys |= {"q_len": drafts + 1, "vocab": VOCAB, "dtype": bench.args.dtype}
            peers = {OURS: ours} | ({"torch argmax": theirs} if case == "greedy" else {})
            moved = batch * (drafts + 1) * VOCAB * bench.dtype.itemsize
            bench.case(keys, peers, moved_bytes=moved)


def weights(bench: Bench) -> None:
    device, dtype = bench.device, bench.dtype
    for n, k in LAYERS[: 2 if device == "cuda" else 1]:
        for bits in (4, 8):
            size, packed_size = n * k, n * k * bits // 8

            def plain(n: int = n, k: int = k) -> torch.Tensor:
                return randn(n, k, dtype=dtype, device=device)

            def quantize(bits: int = bits, make=plain) -> Call:
                weight = make()
                return lambda: fastinfer.quantize_weight(weight, bits, GROUP)

            def pack(bits: int = bits, make=plain) -> Call:
                codes, scales, _ = fastinfer.quantize_weight(make(), bits, GROUP)
                options = {"bits": bits, "group_size": GROUP}
                return lambda: fastinfer.pack_weight(codes, scales, **options)

            def dequantize(bits: int = bits, n: int = n, k: int = k, make=plain) -> Call:
                codes, scales, _ = fastinfer.quantize_weight(make(), bits, GROUP)
                options = {"bits": bits, "group_size": GROUP}
                words, scales, _ = fastinfer.pack_weight(codes, scales, **options)
                options |= {"out_features": n, "in_features": k, "dtype": dtype}
                return lambda: fastinfer.dequantize_weight(words, scales, **options)

            for case, make, moved in (
                ("quantize_weight", quantize, size * (dtype.itemsize + 1)),
                ("pack_weight", pack, size + packed_size),
                ("dequantize_weight", dequantize, packed_size + size * dtype.itemsize),
            ):
                keys = {"op": "preparation", "case": case, "n": n, "k": k, "bits": bits}
                bench.case(keys, {OURS: make}, moved_bytes=moved)


def main() -> None:
    bench = Bench("preparation", __doc__)
    plans(bench)
    merges(bench)
    verifications(bench)
    weights(bench)
    bench.finish()


if __name__ == "__main__":
    main()
