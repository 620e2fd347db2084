"""Sampling from 128k-token logits, against the sort-based form in torch."""

from __future__ import annotations

import torch
from common import OURS, Bench, Call, randn

import fastinfer

VOCAB = 128256


def sort_based(logits: torch.Tensor, k: int, p: float) -> torch.Tensor:
    values, order = logits.float().sort(dim=-1, descending=True)
    values[:, k:] = -torch.inf
    probabilities = values.softmax(-1)
    probabilities[probabilities.cumsum(-1) - probabilities > p] = 0
    return order.gather(1, torch.multinomial(probabilities, 1))


def main() -> None:
    bench = Bench("sampling", __doc__)
    dtype, device = bench.dtype, bench.device
    for batch in (1, 8, 64):

        def ours(batch: int = batch, greedy: bool = False) -> Call:
            logits = randn(batch, VOCAB, dtype=dtype, device=device)
            if greedy:
                return lambda: fastinfer.sample(logits)
            ones = torch.ones(batch, device=device)
            parameters = {
                "temperature": ones,
                "top_k": (50 * ones).int(),
                "top_p": 0.9 * ones,
                "seeds": torch.arange(batch, device=device),
                "steps": torch.zeros(batch, dtype=torch.int64, device=device),
            }
            return lambda: fastinfer.sample(logits, **parameters)

        def theirs(batch: int = batch) -> Call:
            logits = randn(batch, VOCAB, dtype=dtype, device=device)
            return lambda: sort_based(logits, 50, 0.9)

        def argmax(batch: int = batch) -> Call:
            logits = randn(batch, VOCAB, dtype=dtype, device=device)
            return lambda: logits.argmax(-1)

        keys = {"op": "sampling", "batch": batch, "vocab": VOCAB}
        size = batch * VOCAB * dtype.itemsize
        bench.case(
            {**keys, "case": "top-k + top-p"}, {OURS: ours, "torch sort": theirs}, moved_bytes=size
        )
        bench.case(
            {**keys, "case": "greedy"},
            {OURS: lambda b=batch: ours(b, greedy=True), "torch": argmax},
            moved_bytes=size,
        )
    bench.finish()


if __name__ == "__main__":
    main()
