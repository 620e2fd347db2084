"""peer_all_reduce, peer_all_reduce_add_rms_norm on one stream: rank 0 never waits (its limit is no
time), so that rank 1 finds what it sent. Two-shot and ranks that wait for each other are in
tests/ops/test_all_reduce.py.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from gpu_case import Case, Made

from fastinfer.distributed.all_reduce import PeerAllReduce
from fastinfer.ops.all_reduce import (
    peer_all_reduce,
    peer_all_reduce_add_rms_norm,
    peer_argmax,
)


def _case(
    world: int, shape: tuple[int, ...], dtype: torch.dtype, norm: bool
) -> Callable[[str, int], Made]:
    def make(device: str, seed: int) -> Made:
        g = torch.Generator(device=device).manual_seed(seed)
        ranks = PeerAllReduce.in_process([device] * world, 1 << 16, timeout_s=0)
        parts = [torch.randn(shape, generator=g, device=device).to(dtype) for _ in ranks]
        before, weight = parts[0] * 2, torch.randn(shape[-1], generator=g, device=device).to(dtype)
        work = [torch.full_like(part, float("nan")) for part in parts]
        residuals = [torch.full_like(part, float("nan")) for part in parts]

        def run() -> None:
            for rank, part, x, residual in zip(ranks, parts, work, residuals, strict=True):
                x.copy_(part)
                residual.copy_(before)
                # Past the wrapper, which raises for a rank that has given up.
                if norm:
                    peer_all_reduce_add_rms_norm(x, residual, weight, 1e-6, rank._id, "one_shot")
                else:
                    peer_all_reduce(x, rank._id, "one_shot")

        return run, [work[-1], residuals[-1]]

    return make


def _argmax(world: int, rows: int, columns: int, dtype: torch.dtype) -> Callable[[str, int], Made]:
    def make(device: str, seed: int) -> Made:
        g = torch.Generator(device=device).manual_seed(seed)
        ranks = PeerAllReduce.in_process([device] * world, 1 << 16, timeout_s=0)
        logits = torch.randn(world, rows, columns, generator=g, device=device).to(dtype)
        ids = logits.float().argmax(2)
        outs = torch.full((world, rows), -7, dtype=torch.int64, device=device)

        def run() -> None:
            for r, rank in enumerate(ranks):
                peer_argmax(logits[r], ids[r], r * columns, rank._id, outs[r])

        return run, [outs[-1]]

    return make


CASES: list[Case] = []
for _world, _rows in ((2, 1), (2, 300), (3, 129)):
    for _dtype in (torch.bfloat16, torch.float16, torch.float32):
        _make = _argmax(_world, _rows, 77, _dtype)
        CASES.append(Case(f"peer_argmax-{str(_dtype)[6:]}-{_world}x{_rows}", _make))
for _dtype in (torch.bfloat16, torch.float16, torch.float32):
    for _world in (2, 3):
        for _shape in ((2, 4096), (3, 33), (150, 64)):
            for _norm in (False, True):
                _name = "all_reduce_add_rms_norm" if _norm else "all_reduce"
                _tail = f"{str(_dtype)[6:]}-{_world}x{'x'.join(map(str, _shape))}"
                CASES.append(Case(f"{_name}-{_tail}", _case(_world, _shape, _dtype, _norm)))
