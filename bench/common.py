"""What every benchmark script shares: flags, timing, ceilings of this machine, table and JSON.

Timing: random data, cold caches (the same call rotates over buffer sets that together exceed twice
    the last-level cache), median of many. On
a GPU the rotation is captured in one CUDA graph and timed with events; on a CPU it is perf_counter
around each call. Rows carry the
keys of the case, `peer` (who ran it), `us`, `gbs` or `tflops`, and the fraction of this machine's
measured ceiling.
"""

from __future__ import annotations

import argparse
import datetime
import json
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "python"))

Call = Callable[[], Any]
OURS = "fastinfer"


def randn(*shape: int, dtype: torch.dtype, device: str) -> torch.Tensor:
    return torch.randn(*shape, device=device).to(dtype)


class Bench:
    """One script's run: parses the flags, times cases, prints the table, writes the JSON."""

    def __init__(self, name: str, description: str) -> None:
        parser = argparse.ArgumentParser(description=description)
        parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
        parser.add_argument("--dtype", default="bf16", choices=["fp32", "fp16", "bf16"])
        parser.add_argument(
            "--filter", default="", help="only cases whose description contains this"
        )
        parser.add_argument("--seconds", type=float, default=0.5, help="time spent per row")
        parser.add_argument("--threads", type=int, default=torch.get_num_threads())
        parser.add_argument("--json", type=Path, help="also write the rows to this file")
        self.args = parser.parse_args()
        self.name = name
        self.device = self.args.device
        self.dtype = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}[
            self.args.dtype
        ]
        torch.set_num_threads(self.args.threads)
        torch.manual_seed(0)
        self.rows: list[dict[str, Any]] = []
        self.gb_s, self.tflops = self._ceilings()

    @torch.inference_mode()
    def case(
        self,
        keys: dict[str, Any],
        peers: dict[str, Callable[[], Call]],
        *,
        moved_bytes: int = 0,
        flops: int = 0,
    ) -> None:
        """Time one case for every peer. `peers[name]()` makes fresh buffers and returns the call on
        them.

        moved_bytes and flops are what the case has to move and compute, whoever does it.
        """
        label = " ".join(f"{k}={v}" for k, v in keys.items() if k != "op")
        if self.args.filter not in label:
            return
        ours_us = 0.0
        for peer, make in peers.items():
            us = self._time(make, moved_bytes)
            first_of_ours = peer.startswith(OURS) and not ours_us
            ours_us = us if first_of_ours else ours_us
            row = {**keys, "peer": peer, "us": round(us, 2)}
            if moved_bytes:
                row["gbs"] = round(moved_bytes / us / 1e3, 1)
                row["of_bandwidth"] = round(row["gbs"] / self.gb_s, 3)
            if flops:
                row["tflops"] = round(flops / us / 1e6, 3)
                row["of_matmul"] = round(row["tflops"] / self.tflops, 3)
            self.rows.append(row)
            rate = "  ".join(
                f"{row[key]:>9} {unit}"
                for key, unit in (("gbs", "GB/s"), ("tflops", "TFLOP/s"))
                if key in row
            )
            share = max(row.get("of_bandwidth", 0), row.get("of_matmul", 0))
            ratio = f"{us / ours_us:5.2f}x of ours" if ours_us and not first_of_ours else ""
            print(f"{label:<56} {peer:<20} {us:>10.1f} us {rate} {share:>5.0%} {ratio}", flush=True)

    def finish(self) -> None:
        if not self.args.json:
            return
        document = {
            "device": self._device_name(),
            "torch": torch.__version__,
            "threads": torch.get_num_threads(),
            "date": datetime.date.today().isoformat(),
            "commit": subprocess.run(
                ["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True
            ).stdout.strip(),
            "command": " ".join(["python", *sys.argv]),
            "ceilings": {"gbs": round(self.gb_s, 1), "tflops": round(self.tflops, 3)},
            "rows": self.rows,
        }
        self.args.json.parent.mkdir(parents=True, exist_ok=True)
        self.args.json.write_text(json.dumps(document, indent=1) + "\n")
        print(f"wrote {self.args.json}")

    # ---- timing ----------------------------------------------------------------------------------
    def _time(self, make: Callable[[], Call], moved_bytes: int) -> float:
        """Median microseconds of one call."""
        cold = 2 * self._cache_bytes()
        sets = max(1, min(32, -(-cold // max(moved_bytes, 1))))
        calls = [make() for _ in range(sets)]
        for call in calls[:2]:
            call()
        if self.device == "cuda":
            return self._time_graph(calls)
        samples: list[float] = []
        stop = time.perf_counter() + self.args.seconds
        while len(samples) < 5 or (time.perf_counter() < stop and len(samples) < 2000):
            call = calls[len(samples) % sets]
            start = time.perf_counter()
            call()
            samples.append(time.perf_counter() - start)
        return statistics.median(samples) * 1e6

    def _time_graph(self, calls: list[Call]) -> float:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            for call in calls:
                call()
        samples: list[float] = []
        stop = time.perf_counter() + self.args.seconds
        while len(samples) < 5 or time.perf_counter() < stop:
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            graph.replay()
            end.record()
            end.synchronize()
            samples.append(start.elapsed_time(end) * 1e3 / len(calls))
        return statistics.median(samples)

    # ---- this machine ----------------------------------------------------------------------------
    def _cache_bytes(self) -> int:
        if self.device == "cuda":
            return torch.cuda.get_device_properties(0).L2_cache_size
        return 64 << 20

    def _device_name(self) -> str:
        if self.device == "cuda":
            return torch.cuda.get_device_name(0)
        cpuinfo = Path("/proc/cpuinfo")
        for line in cpuinfo.read_text().splitlines() if cpuinfo.is_file() else []:
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
        return platform.processor()

    def _ceilings(self) -> tuple[float, float]:
        """(GB/s of a large copy, read + write; TFLOP/s of a large matmul at the dtype), by
        torch itself, on random data.
        """
        n = 256 << 20 if self.device == "cuda" else 32 << 20
        source = torch.randn(n // 4, device=self.device)
        target = torch.empty_like(source)
        size = 8192 if self.device == "cuda" else 1024
        a = randn(size, size, dtype=self.dtype, device=self.device)
        copy_us = self._time(lambda: lambda: target.copy_(source), 1 << 40)
        matmul_us = self._time(lambda: lambda: torch.matmul(a, a), 1 << 40)
        gb_s, tflops = 2 * n / copy_us / 1e3, 2 * size**3 / matmul_us / 1e6
        print(
            f"{self.name} on {self._device_name()}, {self.args.threads} threads, "
            f"torch {torch.__version__}, {self.args.dtype}: copy {gb_s:.1f} GB/s, "
            f"matmul {tflops:.2f} TFLOP/s"
        )
        return gb_s, tflops
