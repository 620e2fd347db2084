"""A row or two of the benchmarks of kernels: graphs, warm-up and ceilings are of the GPU only."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]
pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


@pytest.mark.parametrize("name", ["kvcopy", "gemm"])
def test_rows(tmp_path: Path, name: str) -> None:
    """Without and with operations to be counted."""
    script = str(ROOT / "bench/run_all.py")
    options = ["--device", "cuda", "--short", "--only", name, "--out", str(tmp_path)]
    run = subprocess.run([sys.executable, script, *options], capture_output=True, text=True)
    assert run.returncode == 0, run.stdout + run.stderr
    document = json.loads((tmp_path / f"{name}.json").read_text())
    assert all(row["us"] > 0 for row in document["rows"])
    assert document["ceilings"]["gbs"] > 0
    assert ("tflops" in document["ceilings"]) == (name == "gemm")
