"""What every benchmark script shares: flags, timing, ceilings of this machine, table and JSON.

Timing: random data, cold caches (the same call rotates over buffer sets that together exceed twice
the second-level cache of a GPU, 128 MiB on a CPU), median of many. On a GPU the rotation is
captured in one CUDA graph and timed with events, every row and peer in the same state of the GPU
(settle_launches); on a CPU it is perf_counter around each call, the peers of a case taking short
turns.

Rows carry the keys of the case, `peer` (who ran it), `us` (and `us_min`, the fastest sample, which
other load on the machine disturbs least), `gbs` or `tflops`, the fraction of this machine's
measured ceiling, and `time_ratio`: `us` over that of `ratio_to`, the case's first peer.
"""

from __future__ import annotations

import argparse
import datetime
import functools
import json
import math
import shlex
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "python"))

import fastinfer
from fastinfer import _lib
from fastinfer.bench.provenance import commit, device_name, told

ROOT = Path(__file__).resolve().parents[1]
Call = Callable[[], Any]
OURS, OURS_PDL = "fastinfer", "fastinfer pdl"
TURN_SECONDS = 0.02
LEAST_GRAPH_US = 2000  # of a graph replay, whose own start costs some 4 us
WARM_SECONDS = 0.2  # in front of the first row: an idle GPU takes a while to raise its clocks


def randn(*shape: int, dtype: torch.dtype, device: str) -> torch.Tensor:
    return torch.randn(*shape, device=device).to(dtype)


def alone_and_overlapped(device: str, make: Callable[[], Call]) -> dict[str, Callable[[], Call]]:
    """Ours alone, and on a GPU also launched programmatically behind one another."""
    return {OURS: make} | ({OURS_PDL: programmatic(make)} if device == "cuda" else {})


def programmatic(make: Callable[[], Call]) -> Callable[[], Call]:
    """The same call as the engine launches it: a launch may begin while the one before it ends."""

    def made() -> Call:
        call = make()

        def run() -> None:
            with _lib.programmatic_launch():
                call()

        return run

    return made


def settle_launches() -> None:
    """Takes back what the rows in front have left behind: one programmatic launch.

    A process that has made more than a few graphs gets into a state, by any ordinary launch, in
    which each kernel of every graph takes 0.2 to 0.35 us longer; a programmatic launch ends it, and
    replays keep what they find (docs/kernels/kv_cache.md). Without this a row would depend on how
    many were measured before it. On a GPU before sm_90 the launch is an ordinary one.
    """
    with _lib.programmatic_launch():
        fastinfer.silu_and_mul(*_small_work(torch.cuda.current_device()))


@functools.cache
def _small_work(device: int) -> tuple[torch.Tensor]:
    return (torch.zeros(1, 16, dtype=torch.bfloat16, device=f"cuda:{device}"),)


def replay_us(graph: torch.cuda.CUDAGraph) -> float:
    """Microseconds of one replay (settled first)."""
    settle_launches()
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    graph.replay()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) * 1e3


def command_line(arguments: list[str]) -> str:
    """As it was given, from the root of the repository, without other folders of this machine."""
    return shlex.join(["python", *told(arguments, ROOT)])


class Bench:
    """One script's run: parses the flags, times cases, prints the table, writes the JSON."""

    def __init__(
        self,
        name: str,
        description: str,
        add_flags: Callable[[argparse.ArgumentParser], None] | None = None,
    ) -> None:
        parser = argparse.ArgumentParser(description=description)
        parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
        parser.add_argument("--dtype", default="bf16", choices=["fp32", "fp16", "bf16"])
        parser.add_argument(
            "--filter",
            default="",
            help="only cases whose description contains this, or one of these (a,b,c)",
        )
        parser.add_argument("--seconds", type=float, default=0.5, help="time spent per row")
        parser.add_argument(
            "--rest", type=float, default=0.0, help="seconds of rest in front of a row, on a GPU"
        )
        parser.add_argument("--threads", type=int, default=torch.get_num_threads())
        parser.add_argument("--json", type=Path, help="also write the rows to this file")
        if add_flags:
            add_flags(parser)
        self.args = parser.parse_args()
        self.name = name
        self.device = self.args.device
        self.dtype = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}[
            self.args.dtype
        ]
        torch.set_num_threads(self.args.threads)
        torch.manual_seed(0)
        self.rows: list[dict[str, Any]] = []
        self._warm_until = 0.0
        self.gb_s, self.tflops = self._copy_ceiling(), 0.0  # the other: see _matmul_ceiling
        self.read_gbs = 0.0  # of a script that measures it

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

        moved_bytes and flops are what the case has to move and compute, whoever does it. Times are
        compared with that of the first peer, which is ours.
        """
        label = " ".join(f"{k}={v}" for k, v in keys.items() if k != "op")
        if not self.wanted(label):
            return
        if flops and not self.tflops:
            self.tflops = self._matmul_ceiling()
        first, first_us = next(iter(peers)), 0.0
        for peer, (us, fastest) in self._times(peers, moved_bytes):
            first_us = first_us or us
            row = {**keys, "peer": peer, "us": round(us, 2), "us_min": round(fastest, 2)}
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
            ratio = ""
            if peer != first:
                row["time_ratio"], row["ratio_to"] = round(us / first_us, 3), first
                ratio = f"{us / first_us:6.2f} x the time of {first}"
            print(
                f"{label:<56} {peer:<21} {us:>10.1f} us (min {fastest:.1f}) {rate} "
                f"{share:>5.0%} {ratio}",
                flush=True,
            )
        self.save()

    def wanted(self, label: str) -> bool:
        return any(part in f"{label} " for part in self.args.filter.split(","))  # "m=1 ": not 16

    def save(self) -> None:
        """After every case: a run that is cut short leaves what it has."""
        if self.args.json:
            self._write()

    def finish(self) -> None:
        self.save()
        if self.args.json:
            print(f"wrote {self.args.json}")

    def _write(self) -> None:
        document = {
            "device": device_name(torch.device(self.device)),
            "torch": torch.__version__,
            "threads": torch.get_num_threads(),
            "date": datetime.date.today().isoformat(),
            "commit": commit(),
            "command": command_line(sys.argv),
            "ceilings": {"gbs": round(self.gb_s, 1)}
            | ({"tflops": round(self.tflops, 3)} if self.tflops else {})
            | ({"read_gbs": round(self.read_gbs, 1)} if self.read_gbs else {}),
            "rows": self.rows,
        }
        self.args.json.parent.mkdir(parents=True, exist_ok=True)
        self.args.json.write_text(json.dumps(document, indent=1) + "\n")

    # ---- timing ----------------------------------------------------------------------------------
    def _times(
        self, peers: dict[str, Callable[[], Call]], moved_bytes: int
    ) -> Iterator[tuple[str, tuple[float, float]]]:
        """Microseconds of one call, median and fastest, per peer."""
        sets = max(1, min(64, -(-2 * self._cache_bytes() // max(moved_bytes, 1))))
        if self.device == "cuda":
            for peer, make in peers.items():
                calls = [make() for _ in range(sets)]
                torch.cuda.synchronize()
                time.sleep(self.args.rest)  # a hot GPU is a slower one
                # At least four launches per graph replay: its own start costs microseconds.
                yield peer, self._time_graph(calls * -(-4 // sets))
            return
        calls_of = {peer: [make() for _ in range(sets)] for peer, make in peers.items()}
        for peer in peers:
            for call in calls_of[peer][:2]:
                call()
        # The peers take short turns: load from elsewhere then falls on all alike.
        samples: dict[str, list[float]] = {peer: [] for peer in peers}
        stop = time.perf_counter() + self.args.seconds * len(peers)
        turns = 0
        while turns < 5 or time.perf_counter() < stop:
            turns += 1
            for peer, times in samples.items():
                turn_end = time.perf_counter() + TURN_SECONDS
                while True:
                    call = calls_of[peer][len(times) % sets]
                    start = time.perf_counter()
                    call()
                    end = time.perf_counter()
                    times.append(end - start)
                    if end > turn_end:
                        break
        for peer, times in samples.items():
            yield peer, (statistics.median(times) * 1e6, min(times) * 1e6)

    def _time_graph(self, calls: list[Call]) -> tuple[float, float]:
        calls[0]()
        torch.cuda.synchronize()
        once = time.perf_counter()
        calls[-1]()
        torch.cuda.synchronize()
        once = time.perf_counter() - once
        long = once > self.args.seconds
        if long:  # one launch and a sample or two say enough
            calls = calls[:1]
        rounds = 1
        while True:
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                for _ in range(rounds):
                    for call in calls:
                        call()
            if long:
                break
            replay_us(graph)
            us = min(replay_us(graph) for _ in range(2))
            if rounds > 1 or us > LEAST_GRAPH_US / 2:
                break
            rounds = math.ceil(LEAST_GRAPH_US / us)  # the same buffers in turn, again
        samples: list[float] = []
        self._warm_until = self._warm_until or time.perf_counter() + WARM_SECONDS
        while not long and time.perf_counter() < self._warm_until:
            replay_us(graph)
        stop = time.perf_counter() + self.args.seconds
        least = 1 if once > 0.2 else 2 if long else 5
        while len(samples) < least or time.perf_counter() < stop:
            samples.append(replay_us(graph) / (rounds * len(calls)))
        return statistics.median(samples), min(samples)

    # ---- this machine ----------------------------------------------------------------------------
    def _cache_bytes(self) -> int:
        if self.device == "cuda":
            return torch.cuda.get_device_properties(0).L2_cache_size
        return 64 << 20

    def _copy_ceiling(self) -> float:
        """GB/s of a large copy by torch, read + write."""
        n = 256 << 20 if self.device == "cuda" else 32 << 20
        source = torch.randn(n // 4, device=self.device)
        target = torch.empty_like(source)
        us = next(self._times({"": lambda: lambda: target.copy_(source)}, 1 << 40))[1][0]
        print(
            f"{self.name} on {device_name(torch.device(self.device))}, "
            f"{self.args.threads} threads, torch {torch.__version__}, {self.args.dtype}: "
            f"copy {2 * n / us / 1e3:.1f} GB/s"
        )
        return 2 * n / us / 1e3

    def _matmul_ceiling(self) -> float:
        """TFLOP/s of a large matmul by torch, on random data. In front of the first row that counts
        operations and not before: at its power limit a GPU lowers its clock, an H200 from 1.98 to
        1.1 GHz, and takes a fifth of a second to raise it again.
        """
        size = 8192 if self.device == "cuda" else 1024
        a = randn(size, size, dtype=self.dtype, device=self.device)
        us = next(self._times({"": lambda: lambda: torch.matmul(a, a)}, 1 << 40))[1][0]
        print(f"matmul {2 * size**3 / us / 1e6:.2f} TFLOP/s")
        return 2 * size**3 / us / 1e6
