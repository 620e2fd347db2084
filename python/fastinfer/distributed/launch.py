"""Starts and ends the processes of a run, on one host or under torchrun.

On one host, the process that makes an `LLM` is rank 0 and starts `python -m
fastinfer.distributed.worker` for every other rank; they meet at a store on a free port of the
loopback interface. Under torchrun the processes are there already and meet where its environment
says; those that are not rank 0 serve from inside of `LLM(...)` and end there.

Two connections to rank 0 (`control.py`) tell everybody when somebody has gone. Whatever happens to
one rank ends all: rank 0 raises one `RankError`, the others exit.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from .control import CLOSE, SAY, START_S, Hub, RankError, Spoke
from .group import ParallelGroups, make_groups

_LOOPBACK = "127.0.0.1"
_CLOSING_S = 10.0  # for workers to end by themselves
_runs = 0  # started by this process under torchrun: each has a prefix of its own in the store


@dataclass(frozen=True, slots=True)
class Place:
    """Where a process meets the others."""

    rank: int
    size: int
    store: Any
    device: torch.device
    timeout: float


def under_torchrun() -> bool:
    """Whether torchrun (or something like it) started this process."""
    return all(name in os.environ for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"))


class Lead:
    """A run as rank 0 sees it.

    Args:
        tensor, pipeline: Ranks per stage, and stages.
        device: "cpu" or "cuda".
        timeout: Seconds.
        settings: For the other ranks, as JSON.

    Attributes:
        groups: Of this process.
        hub: Connections to the others.

    Raises:
        RankError: A process did not start.
        ValueError: There are not as many GPUs, or torchrun started another number of processes.
    """

    def __init__(
        self,
        *,
        tensor: int,
        pipeline: int,
        device: str,
        timeout: float,
        settings: Mapping[str, Any],
    ) -> None:
        size = tensor * pipeline
        self._processes: list[subprocess.Popen[bytes]] = []
        self._own_groups = False
        self._variables: dict[str, str] = {}  # of the environment, set by this run
        self._threads = 0  # of this process before there were others
        self.groups: ParallelGroups
        if under_torchrun():
            place = torchrun_place(size, device, timeout)
            host = os.environ["MASTER_ADDR"]
            here = int(os.environ.get("LOCAL_WORLD_SIZE", 0))  # 0: nobody says
            listener = listen_at(host, several_hosts=here < size)
        else:
            store = _start_store(size)
            place = Place(0, size, store, _device(device, 0, size), timeout)
            host, listener = _LOOPBACK, socket.create_server((_LOOPBACK, 0))
        self.hub = Hub(size, listener=listener, timeout=timeout, ended=self._ended)
        self.hub.on_failure = self._give_up
        try:
            message = {"tensor": tensor, "pipeline": pipeline, "settings": dict(settings)}
            place.store.set("run", json.dumps({**message, "hub": self.hub.address(host)}))
            if not under_torchrun():
                if device == "cpu" and "OMP_NUM_THREADS" not in os.environ:
                    self._threads = torch.get_num_threads()
                    torch.set_num_threads(min(self._threads, _threads_each(size)))
                for rank in range(1, size):
                    self._processes.append(_spawn(rank, size, store.port, device, timeout))
            self.hub.accept()
            join(place, self._variables)
            self._own_groups = True
            self.groups = make_groups(tensor, pipeline, place.device, timeout=timeout)
            self._store = place.store  # others may still ask it
        except BaseException as error:
            failed = self.hub.failure
            self.stop()
            if failed is not None and isinstance(error, Exception):
                raise RankError(failed) from error
            raise

    def least(self, what: str, value: int) -> int:
        """See `Team`."""
        others = self.hub.gather(f"waiting for every rank ({what})", START_S)
        result = min(value, *(int(answer[what]) for answer in others))
        self.hub.order(SAY, json.dumps(result).encode())
        return result

    def begin(self) -> None:
        """The model is loaded: from now on nobody may take longer than `timeout`."""
        limit_groups(self.hub.timeout)
        self.hub.loaded = True

    def _ended(self, rank: int) -> int | None:
        return self._processes[rank - 1].poll() if rank <= len(self._processes) else None

    def _give_up(self) -> None:
        """Called in a watching thread when the run has failed."""
        self.hub.hang_up()
        self._abort_kernels()
        threading.Thread(target=self._kill, args=(2.0,), daemon=True).start()
        if self._own_groups and torch.cuda.is_available():
            threading.Thread(target=_abort_groups, daemon=True).start()

    def _abort_kernels(self) -> None:
        """Let no kernel wait for another rank."""
        groups = getattr(self, "groups", None)  # there may be none yet
        if groups is not None:
            groups.abort()

    def _kill(self, patience: float) -> None:
        end = time.monotonic() + patience
        for process in self._processes:
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(max(end - time.monotonic(), 0.01))
                continue
            process.kill()
            process.wait()

    def close(self) -> None:
        """End all processes, which wait for an order. May be called twice."""
        if self.hub.failure is None and self._own_groups:
            self.hub.close()
            guard = threading.Timer(_CLOSING_S, self._give_up)  # for a rank that does not come
            guard.daemon = True
            guard.start()
            with contextlib.suppress(RuntimeError):
                self.groups.close()
                leave(failed=False)
                self._own_groups = False
            guard.cancel()
            self.hub.wait_closed(_CLOSING_S)
            self._kill(_CLOSING_S)
        self.stop()

    def stop(self) -> None:
        """End all processes, whatever they are doing. May be called twice."""
        self.hub.hang_up()
        self._kill(1.0)
        if self._own_groups:
            self._own_groups = False
            self._abort_kernels()
            leave(failed=True)
        if self._threads:
            torch.set_num_threads(self._threads)
            self._threads = 0
        restore_environment(self._variables)


class Member:
    """A run as every other rank sees it.

    Args:
        place: Of this process.

    Attributes:
        groups: Of this process.
        settings: From rank 0.
    """

    def __init__(self, place: Place) -> None:
        place.store.wait(["run"], timedelta(seconds=START_S))
        message = json.loads(place.store.get("run"))
        self.settings: dict[str, Any] = message["settings"]
        self.spoke = Spoke(message["hub"], place.rank)
        self._timeout = place.timeout
        try:
            join(place, {})
            self.groups = make_groups(
                message["tensor"], message["pipeline"], place.device, timeout=place.timeout
            )
            self.spoke.on_end = self.groups.abort
        except BaseException as error:
            self.spoke.fail(error)
            raise

    def least(self, what: str, value: int) -> int:
        """See `Team`."""
        self.spoke.say({what: value})
        kind, payload = self.spoke.receive()
        if kind == CLOSE:
            raise SystemExit(1)
        return int(json.loads(payload))

    def begin(self) -> None:
        """As `Lead.begin`."""
        limit_groups(self._timeout)

    def close(self) -> None:
        """Leave, when rank 0 says so."""
        self.spoke.done = True
        self.groups.close()
        leave(failed=False)
        self.spoke.close()


def torchrun_place(size: int, device: str, timeout: float) -> Place:
    """Of this process, from the environment.

    Raises:
        ValueError: There are other than `size` processes.
    """
    global _runs
    world, rank = int(os.environ["WORLD_SIZE"]), int(os.environ["RANK"])
    if world != size:
        raise ValueError(
            "LLM: tensor_parallel_size x pipeline_parallel_size must be the number of processes, "
            f"got {size} with WORLD_SIZE {world}; start as many with torchrun"
        )
    store, _, _ = next(dist.rendezvous("env://", timeout=timedelta(seconds=START_S)))
    _runs += 1
    local = int(os.environ.get("LOCAL_RANK", rank))
    here = int(os.environ.get("LOCAL_WORLD_SIZE", size))
    store = dist.PrefixStore(f"fastinfer-{_runs}", store)
    return Place(rank, size, store, _device(device, local, here), timeout)


def join(place: Place, variables: dict[str, str]) -> None:
    """Make the default group of torch.distributed.

    Args:
        place: Of this process.
        variables: Receives those of the environment that are set here.

    Raises:
        ValueError: There is one.
    """
    if dist.is_initialized():
        raise ValueError(
            "LLM: one model over several processes at a time, got torch.distributed initialised "
            "already; close the other LLM, or destroy the process group"
        )
    on_cuda = place.device.type == "cuda"
    if on_cuda:
        # a collective that fails must not end this process: rank 0 tells what happened
        _default(variables, "TORCH_NCCL_ASYNC_ERROR_HANDLING", "0")
        _default(variables, "TORCH_NCCL_ENABLE_MONITORING", "0")
        # sends of a stage are in order anyway
        _default(variables, "TORCH_NCCL_SHOW_EAGER_INIT_P2P_SERIALIZATION_WARNING", "0")
        torch.cuda.set_device(place.device)
    if not under_torchrun():
        for name in ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"):
            _default(variables, name, "lo")
    dist.init_process_group(
        "nccl" if on_cuda else "gloo",
        store=dist.PrefixStore("groups", place.store),
        rank=place.rank,
        world_size=place.size,
        timeout=timedelta(seconds=START_S),
        device_id=place.device if on_cuda else None,
    )


def _default(variables: dict[str, str], name: str, value: str) -> None:
    """Set a variable that has no value, until `restore_environment`."""
    if name not in os.environ:
        os.environ[name] = variables[name] = value


def restore_environment(variables: dict[str, str]) -> None:
    """Unset what a run set for torch and NCCL, whose later groups are none of its business; what
    has another value by now stays.
    """
    while variables:
        name, value = variables.popitem()
        if os.environ.get(name) == value:
            del os.environ[name]


def limit_groups(timeout: float) -> None:
    """How long a collective may take."""
    for group in list(dist.distributed_c10d._world.pg_map):
        dist.distributed_c10d._set_pg_timeout(timedelta(seconds=timeout), group)


def leave(failed: bool) -> None:
    """Take the groups apart."""
    if not dist.is_initialized():
        return
    if failed and torch.cuda.is_available():
        _abort_groups()
    with contextlib.suppress(Exception):  # after an abort there is little left of them
        dist.destroy_process_group()


def _abort_groups() -> None:
    """Make collectives that wait for a rank that has gone return."""
    with contextlib.suppress(Exception):
        dist.distributed_c10d._abort_process_group()


def _device(name: str, local: int, here: int) -> torch.device:
    if name != "cuda":
        return torch.device(name)
    count = torch.cuda.device_count()
    if count < here:
        raise ValueError(
            f"LLM: {here} processes on this machine need a GPU each, got {count}; lower "
            "tensor_parallel_size or pipeline_parallel_size, or start on several machines with "
            "torchrun"
        )
    return torch.device("cuda", local)


def listen_at(host: str, *, several_hosts: bool) -> socket.socket:
    """A socket on any free port of the interface that has the address of `host`, over IPv4 or,
    where it has no such address, IPv6.

    On all interfaces where that is not known: the name stands for a machine in front of this one,
    or the hosts file takes it for loopback, where no other host could connect.
    """
    literal = host in ("localhost", "ip6-localhost", "::1") or host.startswith("127.")
    with contextlib.suppress(OSError):  # of names that cannot be resolved
        found = socket.getaddrinfo(host, 0, type=socket.SOCK_STREAM)
        for family, _, _, _, place in sorted(found, key=lambda each: each[0] != socket.AF_INET):
            address = str(place[0])
            loopback = address == "::1" or address.startswith("127.")
            if loopback and several_hosts and not literal:
                continue
            with contextlib.suppress(OSError):
                return socket.create_server((address, 0, *place[2:]), family=family)
    if socket.has_dualstack_ipv6():
        return socket.create_server(("", 0), family=socket.AF_INET6, dualstack_ipv6=True)
    return socket.create_server(("", 0))


def _start_store(size: int) -> Any:
    # A store that opens its own socket listens on every interface, whatever its host name.
    listener = socket.create_server((_LOOPBACK, 0))
    return dist.TCPStore(
        _LOOPBACK,
        listener.getsockname()[1],
        size,
        is_master=True,
        wait_for_workers=False,
        timeout=timedelta(seconds=START_S),
        master_listen_fd=listener.detach(),
    )


def _threads_each(size: int) -> int:
    """Of each process on a CPU: threads that wait for a core are slower than none."""
    return max((os.cpu_count() or 1) // size, 1)


def _spawn(rank: int, size: int, port: int, device: str, timeout: float) -> subprocess.Popen[bytes]:
    environment = dict(os.environ)
    package = str(Path(__file__).resolve().parents[2])
    paths = [package, *filter(None, [environment.get("PYTHONPATH")])]
    environment["PYTHONPATH"] = os.pathsep.join(paths)
    if device == "cpu":
        environment.setdefault("OMP_NUM_THREADS", str(_threads_each(size)))
    arguments = [str(rank), str(size), str(port), device, str(timeout)]
    return subprocess.Popen(
        [sys.executable, "-m", "fastinfer.distributed.worker", *arguments],
        env=environment,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
    )
