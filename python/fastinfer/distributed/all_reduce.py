"""All-reduce between the GPUs of one host through memory that they write to each other.

    reduce = PeerAllReduce(group, device, max_bytes)
    if reduce.supports(x.nbytes):
        reduce.all_reduce_add_rms_norm_(x, residual, weight, eps)

Every rank has a buffer on its GPU which the others map through CUDA IPC handles (64 raw bytes each,
exchanged over the group). The kernels (csrc/cuda/all_reduce) keep what they need to know between
calls in those buffers, so calls can be captured in CUDA graphs and replayed.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import socket
import struct
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from .. import _lib
from ..ops.all_reduce import peer_all_reduce, peer_all_reduce_add_rms_norm, peer_argmax
from ..ops.norm import fused_add_rms_norm

MAX_RANKS = 8
HANDLE_BYTES = 64
_ABORTED = 2  # what the host writes to `failed`; the GPU writes 1 when it was late
_OFFER = struct.Struct(f"<?16sqq{HANDLE_BYTES}s")  # fine, host, max_bytes, limit, handle


class PeerAllReduce:
    """Sums over the ranks of a group, in place, the same bits on every rank and in every run.

    Every rank makes one at the same time, and calls the same methods in the same order with tensors
    of the same shape. Where GPUs cannot reach each other's memory, on the CPU, between hosts and
    beyond 8 ranks, `supports` says no and `reason` why.

    Args:
        group: of torch.distributed; None is the default group.
        device: this rank's.
        max_bytes: largest message; a rank keeps 2 * (ranks + 1) times as much on its GPU.
        timeout_s: longest wait for another rank inside a call. Then the results are void, `check`
            and every later call raise, and no call waits any more.

    Attributes:
        rank, size: place in the group, and how many there are.
        max_bytes: as given.
        reason: why nothing is supported; "" where it is.
    """

    def __init__(
        self,
        group: Any,
        device: torch.device | str | int,
        max_bytes: int = 8 << 20,
        *,
        timeout_s: float = 30.0,
    ) -> None:
        self._prepare(
            dist.get_rank(group), dist.get_world_size(group), device, max_bytes, timeout_s
        )
        if self.size == 1:
            return
        self._group, self._shared = group, True
        handle = self._allocate()
        offer = _OFFER.pack(not self.reason, _host(), self.max_bytes, self._limit_ns, handle)
        offers = [_OFFER.unpack(each) for each in self._gather(offer)]
        reason = self.reason or _refusal(offers, self.rank)
        if not reason:
            handles = b"".join(each[-1] for each in offers)
            reason = _error("map the other ranks' memory", _call("connect", self._id, handles))
            # All or nobody.
            if not all(each != b"\0" for each in self._gather(b"\0" if reason else b"\1")):
                reason = reason or "another rank could not map its peers' memory"
        if reason:
            self.close()
            self.reason = reason

    def _prepare(
        self,
        rank: int,
        size: int,
        device: torch.device | str | int,
        max_bytes: int,
        timeout_s: float,
    ) -> None:
        self.rank, self.size = rank, size
        self.device = (
            torch.device("cuda", device) if isinstance(device, int) else torch.device(device)
        )
        if self.device.type == "cuda" and self.device.index is None:
            self.device = torch.device("cuda", torch.cuda.current_device())
        for name, value in (("max_bytes", max_bytes), ("timeout_s", timeout_s)):
            if value < 0 or (name == "max_bytes" and value == 0):
                raise ValueError(f"PeerAllReduce: {name} must be positive, got {value}")
        self.max_bytes = max_bytes
        self.timeout_s = timeout_s
        self._limit_ns = int(timeout_s * 1e9)
        self._id = -1
        self._group: Any = None
        self._shared = False  # with other processes
        self._failed = ctypes.c_int(0)
        self._lock = threading.Lock()  # of `_failed`, whose memory goes when this is closed
        self.reason = ""
        if self.device.type != "cuda":
            self.reason = f"{self.device} is no CUDA device"
        elif size > MAX_RANKS:
            self.reason = f"{size} ranks are more than {MAX_RANKS}"
        elif "cuda_toolkit" not in _lib.build_info():
            self.reason = "this build of fastinfer has no CUDA kernels"

    def _allocate(self) -> bytes:
        """This rank's buffer; returns its handle, or sets `reason`."""
        handle = ctypes.create_string_buffer(HANDLE_BYTES)
        if self.reason:
            return handle.raw
        made = ctypes.c_int64(-1)
        slot_bytes = -(-self.max_bytes // 16) * 16
        self.reason = _error(
            "allocate memory for other ranks",
            _call(
                "create",
                self.device.index,
                self.rank,
                self.size,
                slot_bytes,
                self._limit_ns,
                ctypes.byref(made),
            ),
        )
        if not self.reason:
            self._id = made.value
            address = _library().fastinfer_peer_failed(self._id)
            self._failed = ctypes.c_int.from_address(address)
            self.reason = _error("share memory", _call("handle", self._id, handle))
        return handle.raw

    def _gather(self, data: bytes) -> list[bytes]:
        """Every rank's bytes, of one length."""
        on = self.device if dist.get_backend(self._group) == "nccl" else torch.device("cpu")
        mine = torch.frombuffer(bytearray(data), dtype=torch.uint8).to(on)
        every = [torch.empty_like(mine) for _ in range(self.size)]
        dist.all_gather(every, mine, group=self._group)
        return [bytes(each.cpu().numpy()) for each in every]

    @classmethod
    def in_process(
        cls,
        devices: Sequence[torch.device | str | int],
        max_bytes: int = 8 << 20,
        *,
        timeout_s: float = 30.0,
    ) -> list[PeerAllReduce]:
        """The ranks of a group inside this process, one per device; a device may repeat.

        Calls of different ranks belong on different streams. Code that CUDA loads at its first use
        may wait for the GPU, so launch once, before, what stands between two calls.

        Args:
            devices: of rank 0, 1, ...
            max_bytes: as above.
            timeout_s: as above.

        Raises:
            RuntimeError: A device is no GPU, or they cannot reach each other.
        """
        ranks = [cls.__new__(cls) for _ in devices]
        for rank, (each, device) in enumerate(zip(ranks, devices, strict=True)):
            each._prepare(rank, len(devices), device, max_bytes, timeout_s)
            if len(devices) > 1:
                each._allocate()
        reason = next((each.reason for each in ranks if each.reason), "")
        if not reason and len(devices) > 1:
            ids = (ctypes.c_int64 * len(ranks))(*(each._id for each in ranks))
            reason = _error("reach the other GPU", _call("connect_local", ids, len(ranks)))
        if reason:
            for each in ranks:
                each.close()
            raise RuntimeError(f"PeerAllReduce: {reason}")
        return ranks

    def supports(self, nbytes: int) -> bool:
        """Whether a contiguous message of so many bytes can be reduced here."""
        return not self.reason and 0 <= nbytes <= self.max_bytes

    def all_reduce_(self, x: Tensor, algorithm: str = "auto") -> Tensor:
        """x = the sum of every rank's x, in place; fp32 in the order of the ranks, rounded once.

        Args:
            x: fp32, fp16 or bf16, at most max_bytes, last dimension contiguous, one row stride.
            algorithm: "one_shot", "two_shot" or "auto" (by size).

        Returns:
            x.

        Raises:
            RuntimeError: Not supported, a rank did not answer in time, or x does not fit.
        """
        self.check()
        return x if self.size == 1 else peer_all_reduce(x, self._id, algorithm)

    def all_reduce_add_rms_norm_(
        self,
        x: Tensor,
        residual: Tensor,
        weight: Tensor,
        eps: float = 1e-6,
        algorithm: str = "auto",
    ) -> tuple[Tensor, Tensor]:
        """residual += the sum of every rank's x, x = rms_norm(residual) * weight, in place.

        The bits are those of `all_reduce_` and `fused_add_rms_norm`, one after the other.

        Args:
            x: [..., D], this rank's part of the sum.
            residual: like x, the same on every rank.
            weight: [D].
            eps: added to the mean square.
            algorithm: as in `all_reduce_`.

        Returns:
            (x, residual).

        Raises:
            RuntimeError: As in `all_reduce_`.
        """
        self.check()
        if self.size == 1:
            return fused_add_rms_norm(x, residual, weight, eps)
        return peer_all_reduce_add_rms_norm(x, residual, weight, eps, self._id, algorithm)

    def argmax(self, logits: Tensor, ids: Tensor, begin: int, out: Tensor) -> Tensor:
        """out = the token of the rank with the greatest logits[b, ids[b]]; see `peer_argmax`.

        Raises:
            RuntimeError: As in `all_reduce_`.
        """
        self.check()
        if self.size == 1:
            return out.copy_(ids + begin)
        return peer_argmax(logits, ids, begin, self._id, out)

    def check(self) -> None:
        """Raise when a rank has not answered in time, or nothing is supported. Waits for nothing:
        it tells of calls that the GPU has got through.

        Raises:
            RuntimeError: See above.
        """
        if self._failed.value == _ABORTED:
            raise RuntimeError(
                f"PeerAllReduce: rank {self.rank} was told to wait for no other rank of "
                f"{self.size} any more; results since then are void, restart the ranks"
            )
        if self._failed.value:
            raise RuntimeError(
                f"PeerAllReduce: rank {self.rank} waited {self.timeout_s:g} s for another rank of "
                f"{self.size} in vain; results since then are void, restart the ranks"
            )
        if self.reason:
            raise RuntimeError(f"PeerAllReduce: {self.reason}; use torch.distributed.all_reduce")

    def abort(self) -> None:
        """End the waits of calls that run, and let no later one wait: a rank has gone. From any
        thread, while the GPU works or `close` waits for it; `check` raises from now on.
        """
        with self._lock:
            if self._id >= 0 and not self._failed.value:
                self._failed.value = _ABORTED

    def close(self) -> None:
        """Give the memory back; every rank calls it, after the graphs that hold calls are gone. May
        be called again, also when it has raised.
        """
        self.reason = self.reason or "it is closed"
        if self._id >= 0:
            torch.cuda.synchronize(self.device)  # `abort` ends the waits of what runs
            _call("disconnect", self._id)
        if self._shared:  # the others let go of this memory before it is freed
            self._gather(b"\0")
        self._shared = False
        with self._lock:
            group, self._id = self._id, -1
            self._failed = ctypes.c_int(0)
        if group >= 0:
            _call("free", group)


@functools.cache
def _library() -> Any:
    library = ctypes.CDLL(str(_lib.LIBRARY))
    library.fastinfer_peer_failed.restype = ctypes.c_void_p
    library.fastinfer_peer_failed.argtypes = [ctypes.c_int64]
    library.fastinfer_cuda_error_text.restype = ctypes.c_char_p
    for name, types in {
        "create": [ctypes.c_int] * 3 + [ctypes.c_int64] * 2 + [ctypes.c_void_p],
        "handle": [ctypes.c_int64, ctypes.c_void_p],
        "connect": [ctypes.c_int64, ctypes.c_char_p],
        "connect_local": [ctypes.c_void_p, ctypes.c_int],
        "disconnect": [ctypes.c_int64],
        "free": [ctypes.c_int64],
    }.items():
        function = getattr(library, f"fastinfer_peer_{name}")
        function.restype, function.argtypes = ctypes.c_int, types
    return library


def _call(name: str, *args: Any) -> int:
    return getattr(_library(), f"fastinfer_peer_{name}")(*args)


def _error(what: str, code: int) -> str:
    """A sentence for a CUDA error, "" for none."""
    if code == 0:
        return ""
    text = _library().fastinfer_cuda_error_text(code).decode()
    return f"could not {what}: CUDA error {code} ({text})"


def _host() -> bytes:
    """What two processes on one host have in common."""
    boot = Path("/proc/sys/kernel/random/boot_id")
    text = boot.read_text() if boot.is_file() else ""
    return hashlib.sha256(f"{socket.gethostname()} {text}".encode()).digest()[:16]


def _refusal(offers: list[tuple[Any, ...]], rank: int) -> str:
    """Why these ranks cannot work together, or ""."""
    for other, (fine, host, max_bytes, limit, _) in enumerate(offers):
        if not fine:
            return f"rank {other} cannot take part"
        if host != offers[rank][1]:
            return f"rank {other} is on another host"
        if (max_bytes, limit) != offers[rank][2:4]:
            return f"rank {other} has another max_bytes or timeout_s"
    return ""
