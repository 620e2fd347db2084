"""All-reduce and transfers between GPUs: our kernels over peer memory, NCCL, torch's symmetric
memory.

    python bench/bench_parallel.py --json bench/results/h200/parallel.json     # a process per GPU
    torchrun --nproc-per-node 2 bench/bench_parallel.py

Rows: `op` all_reduce, of `kib` KiB a rank, and all_reduce_norm, with the residual addition and RMS
norm of rows of `hidden` elements behind it; send, half a round trip of two ranks. Every row is the
time of a call in a CUDA graph of a hundred. A rank that starts its replay first waits for the
others, so a sample is the shortest time among the ranks.

Rows of other `op`s in the JSON file are kept. On a CPU it is torch's gloo alone that is timed, in
two processes; with fewer GPUs than asked for, nothing.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from common import command_line, commit, replay_us

import fastinfer
from fastinfer import _lib
from fastinfer.distributed.all_reduce import PeerAllReduce

OPS = ("all_reduce", "all_reduce_norm", "send")
CALLS = 100  # per graph
BUFFERS = 4
KIB = (8, 16, 32, 64, 128, 256, 512, 1024, 4096, 8192)

Call = Callable[[int], Any]


class Rank:
    """One process's part of the measurement."""

    def __init__(self, args: argparse.Namespace, rank: int, world: int) -> None:
        self.args, self.rank, self.world = args, rank, world
        self.cuda = args.device == "cuda"
        self.device = torch.device("cuda", rank) if self.cuda else torch.device("cpu")
        self.gloo = dist.new_group(backend="gloo")
        self.peer = PeerAllReduce(None, self.device, max(KIB) << 10, timeout_s=5)
        if rank == 0 and self.peer.reason:
            print(f"no peer memory: {self.peer.reason}")
        self.rows: list[dict[str, Any]] = []

    def run(self) -> None:
        for kib in KIB if self.cuda else KIB[:4]:
            if str(kib) in self.args.kib.split(",") or not self.args.kib:
                self._size(kib)
        if self.world == 2 and self.cuda:
            for kib in (8, 64, 1024, 16384):
                x = torch.zeros(kib << 9, dtype=torch.bfloat16, device=self.device)
                row = {"op": "send", "kib": kib}
                self._time(row, "nccl", lambda i, x=x: self._round_trip(x), [x], calls=20, per=0.5)
        self.peer.close()

    def _size(self, kib: int) -> None:
        hidden = 4096
        shape = (kib * 512 // hidden, hidden)
        g = torch.Generator(device=self.device).manual_seed(self.rank)
        xs, residuals = (
            [
                torch.randn(shape, generator=g, device=self.device).to(torch.bfloat16)
                for _ in range(BUFFERS)
            ]
            for _ in "xr"
        )
        weight = torch.ones(hidden, dtype=torch.bfloat16, device=self.device)
        plain: dict[str, Call] = {
            "nccl" if self.cuda else "gloo": lambda i: dist.all_reduce(xs[i]),
            **self._symmetric_memory(shape),
        }
        fused: dict[str, Call] = {}
        if not self.peer.reason:
            for name in ("one_shot", "two_shot"):
                plain[f"fastinfer {name}"] = lambda i, name=name: self.peer.all_reduce_(xs[i], name)
                fused[f"fastinfer {name}"] = lambda i, name=name: (
                    self.peer.all_reduce_add_rms_norm_(xs[i], residuals[i], weight, 1e-6, name)
                )

        def nccl_norm(i: int) -> None:
            dist.all_reduce(xs[i])
            fastinfer.fused_add_rms_norm(xs[i], residuals[i], weight)

        fused[f"{next(iter(plain))}, fused_add_rms_norm"] = nccl_norm
        for op, calls in (("all_reduce", plain), ("all_reduce_norm", fused)):
            row = {"op": op, "kib": kib} | ({"hidden": hidden} if op != "all_reduce" else {})
            for peer, call in calls.items():
                self._time(row, peer, call, [*xs, *residuals])

    def _symmetric_memory(self, shape: tuple[int, int]) -> dict[str, Call]:
        """torch's kernels for the same, without NVLink multicast."""
        if not self.cuda or self.args.no_torch_peers or shape[0] * shape[1] > 1 << 19:
            return {}
        try:
            import torch.distributed._symmetric_memory as symm_mem

            name = dist.group.WORLD.group_name
            x = symm_mem.empty(shape, dtype=torch.bfloat16, device=self.device).fill_(1)
            symm_mem.rendezvous(x, name)
        except Exception as error:
            if self.rank == 0:
                print(f"no symmetric memory: {error}")
            return {}
        ops = torch.ops.symm_mem
        return {
            "torch one_shot": lambda i: ops.one_shot_all_reduce(x, "sum", name),
            "torch two_shot": lambda i: ops.two_shot_all_reduce_(x, "sum", name),
        }

    def _round_trip(self, x: torch.Tensor) -> None:
        first, second = (dist.send, dist.recv) if self.rank == 0 else (dist.recv, dist.send)
        first(x, 1 - self.rank)
        second(x, 1 - self.rank)

    def _time(
        self,
        row: dict[str, Any],
        peer: str,
        call: Call,
        tensors: list[torch.Tensor],
        calls: int = CALLS,
        per: float = 1.0,
    ) -> None:
        """Append the row; `per` calls count as one."""
        before = [t.clone() for t in tensors]
        for i in range(BUFFERS):
            call(i)
        sample = self._graph(call, calls) if self.cuda else self._plain(call, calls)
        times: list[float] = []
        count = 2
        while len(times) < count:
            for t, old in zip(tensors, before, strict=True):
                t.copy_(old)
            dist.barrier(self.gloo)
            times.append(sample())
            if len(times) == 2:  # as many on every rank
                most = torch.tensor([min(max(self.args.seconds / times[1] * 1e6, 4), 100)])
                dist.broadcast(most, 0, group=self.gloo)
                count = int(most)
        mine = torch.tensor(times[1:]) / calls * per
        every = [torch.empty_like(mine) for _ in range(self.world)]
        dist.all_gather(every, mine, group=self.gloo)
        best = torch.stack(every).amin(0).tolist()
        self.rows.append(
            {
                **row,
                "gpus": self.world,
                "link": self.args.link,
                "dtype": "bf16",
                "peer": peer,
                "us": round(statistics.median(best), 2),
                "us_min": round(min(best), 2),
            }
        )
        if self.rank == 0:
            print_row(self.rows[-1])

    def _graph(self, call: Call, calls: int) -> Callable[[], float]:
        """Microseconds of a graph of so many calls, when called."""
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with (
            torch.cuda.graph(graph, capture_error_mode="thread_local"),  # NCCL has a thread
            _lib.programmatic_launch(),
        ):
            for i in range(calls):
                call(i % BUFFERS)

        return partial(replay_us, graph)

    def _plain(self, call: Call, calls: int) -> Callable[[], float]:
        def sample() -> float:
            start = time.perf_counter()
            for i in range(calls):
                call(i % BUFFERS)
            return (time.perf_counter() - start) * 1e6

        return sample


def print_row(row: dict[str, Any]) -> None:
    gbs = row["kib"] * 1.024 / row["us"]
    print(
        f"{row['op']:<16} {row['kib']:>6} KiB  {row['peer']:<26} {row['us']:>8.2f} us "
        f"(min {row['us_min']:.2f}) {gbs:>7.1f} GB/s",
        flush=True,
    )


def save(args: argparse.Namespace, rows: list[dict[str, Any]]) -> None:
    document: dict[str, Any] = {"rows": []}
    if args.json.is_file():
        read = json.loads(args.json.read_text())
        document = read if isinstance(read, dict) else {"rows": read}
    when = {"date": datetime.date.today().isoformat(), "commit": commit()}
    kept = [row for row in document["rows"] if row["op"] not in OPS]
    document |= {
        "device": torch.cuda.get_device_name(0) if args.device == "cuda" else "CPU",
        "torch": torch.__version__,
        **when,
        "command": command_line(sys.argv),
        "rows": kept + [row | when for row in rows],
    }
    args.json.parent.mkdir(parents=True, exist_ok=True)
    args.json.write_text(json.dumps(document, indent=1) + "\n")
    print(f"wrote {args.json}")


def worker(rank: int, world: int, args: argparse.Namespace, store: str) -> None:
    backend = "nccl" if args.device == "cuda" else "gloo"
    if backend == "nccl":
        torch.cuda.set_device(rank)
    torch.set_num_threads(1)
    if store:
        dist.init_process_group(
            backend, store=dist.FileStore(store, world), rank=rank, world_size=world
        )
    else:
        dist.init_process_group(backend)
    with torch.inference_mode():
        mine = Rank(args, rank, world)
        mine.run()
    if rank == 0 and args.json:
        save(args, mine.rows)
    dist.destroy_process_group()


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--device", default="cuda", choices=["cpu", "cuda"])
    parser.add_argument("--json", type=Path, help="write or update this file")
    parser.add_argument("--gpus", type=int, default=2, help="processes to start (default: 2)")
    parser.add_argument("--seconds", type=float, default=0.02, help="time spent per row")
    parser.add_argument("--kib", default="", help="only these sizes: 8,64")
    parser.add_argument("--link", default="nvlink", help="what connects the GPUs, for the rows")
    parser.add_argument("--no-torch-peers", action="store_true", help="leave symmetric memory out")
    args = parser.parse_args()
    os.environ.setdefault("TORCH_SYMM_MEM_DISABLE_MULTICAST", "1")
    os.environ.setdefault("NCCL_NVLS_ENABLE", "0")
    start = time.perf_counter()
    if "RANK" in os.environ:
        worker(int(os.environ.get("LOCAL_RANK", "0")), int(os.environ["WORLD_SIZE"]), args, "")
    elif args.device == "cuda" and torch.cuda.device_count() < args.gpus:
        print(f"{args.gpus} GPUs are needed, {torch.cuda.device_count()} are here: nothing to time")
    else:
        with tempfile.TemporaryDirectory() as folder:
            mp.spawn(worker, (args.gpus, args, f"{folder}/store"), nprocs=args.gpus)
    print(f"{time.perf_counter() - start:.1f} s")


if __name__ == "__main__":
    main()
