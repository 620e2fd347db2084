"""Tensors of a round of speculation, for the tests of its kernel and of its twin."""

from __future__ import annotations

import random

import torch

from fastinfer.engine import rounds


def make_tensors(
    k: int, rows: list[list[int]], capacity: list[int], *, block_size: int, history: bool = True
) -> dict[str, torch.Tensor]:
    n, width = len(rows), 180
    rng = random.Random(k)
    tables = [rng.sample(range(500), width) for _ in rows]
    whole = torch.zeros(n, 170, dtype=torch.int32)
    for i, row in enumerate(rows):
        whole[n - 1 - i, : len(row)] = torch.tensor(row, dtype=torch.int32)
    out = {name: torch.zeros(1, dtype=dtype) for name, dtype in rounds._TENSORS.items()}
    shapes = {
        **dict.fromkeys(("input_ids", "positions", "slots", "steps", "drawn"), n * (k + 1)),
        **dict.fromkeys(("draft_positions", "draft_slots"), n * (k + 1)),
        **dict.fromkeys(("draft_steps", "draft_seq_lens", "draft_drawn"), n * k),
        **dict.fromkeys(("count", "seq_lens", "round"), n),
        "out": 4 * n * (k + 3),
    }
    for name, size in shapes.items():
        out[name] = torch.zeros(size, dtype=out[name].dtype)
    given = {
        "length": [len(row) for row in rows],
        "capacity": capacity,
        "num_prompt": [max(len(row) // 2, 1) for row in rows],
        "tail": [t for row in rows for t in (row[-2:] if len(row) > 1 else [0, row[-1]])],
        "tables": [b for table in tables for b in table],
        "history_row": [n - 1 - i for i in range(n)],
    }
    for name, values in given.items():
        out[name] = torch.tensor(values, dtype=out[name].dtype)
    out["history"] = whole.contiguous()
    dropped = [n for n in out if n.startswith("draft_")] if history else ["history"]
    return {name: tensor for name, tensor in out.items() if name not in dropped}


def numbers(tensors: dict[str, torch.Tensor], k: int, block_size: int) -> dict[str, int]:
    return {
        "rows": len(tensors["length"]),
        "drafts": k,
        "block_size": block_size,
        "vocab_size": 50,
        "min_n": 2,
        "max_n": 4,
        "table_width": 180,
        "history_width": tensors["history"].shape[1] if "history" in tensors else 0,
        "max_rounds": 4,
    }
