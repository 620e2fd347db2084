"""Runs `grid_rank.py` in several processes and keeps what they wrote."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

HERE = Path(__file__).resolve().parent
LAYOUTS = {2: [(2, 1), (1, 2)], 4: [(4, 1), (2, 2)]}  # processes -> (tp, pp)
# 4 ranks need 4 heads
CHANGES: dict[str, dict[str, Any]] = {"qwen2": {"num_attention_heads": 4}}


def run_grid(
    folder: Path,
    cases: Mapping[str, Path],
    layouts: Sequence[tuple[int, int]],
    device: str = "cpu",
    dtype: str = "float32",
) -> dict[tuple[str, int, int], Any]:
    """(case, tp, pp) -> logits of the two sequences, or an error's text. All layouts have one
    number of processes.
    """
    (size,) = {tp * pp for tp, pp in layouts}
    out = folder / f"out{size}"
    out.mkdir(parents=True)
    work = folder / f"work{size}.json"
    work.write_text(
        json.dumps(
            {
                "layouts": layouts,
                "cases": {name: str(path) for name, path in cases.items()},
                "out": str(out),
                "device": device,
                "dtype": dtype,
            }
        )
    )
    limit = timedelta(seconds=300)
    store = dist.TCPStore(
        "127.0.0.1", 0, size, is_master=True, wait_for_workers=False, timeout=limit
    )
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    paths = (HERE.parents[1] / "python", HERE.parent, HERE.parent / "models")
    environment["PYTHONPATH"] = os.pathsep.join(map(str, paths))
    ranks = [
        subprocess.Popen(
            [sys.executable, str(HERE / "grid_rank.py"), str(r), str(size), str(store.port), work],
            env=environment,
            stderr=subprocess.PIPE,
            text=True,
        )
        for r in range(size)
    ]
    errors = [rank.communicate(timeout=280)[1] for rank in ranks]
    assert [rank.returncode for rank in ranks] == [0] * size, "\n".join(errors)
    return {
        (name, tp, pp): torch.load(out / f"{name}-{tp}-{pp}.pt", weights_only=True)
        for name in cases
        for tp, pp in layouts
    }
