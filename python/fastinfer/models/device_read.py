"""Checkpoint tensors straight to a device: threads read pieces of the files into page-locked memory
and send them off.

A mapped file is read by page faults of one thread and copied once more on its way to a GPU; this
keeps the disk and the bus busy at the same time. `BackgroundRead` fills memory that is there
already and lets the caller go on; `read_to_device` hands out tensors, several of them read ahead.
"""

from __future__ import annotations

import json
import os
import struct
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

_THREADS = 6
_PIECE = 16 << 20  # bytes that are read and sent together
_AHEAD = 512 << 20  # bytes of tensors that may wait to be taken
_DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


@dataclass(slots=True)
class _Stored:
    """Where a tensor lies in its file."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    begin: int
    size: int

    def rows(self, begin: int, end: int) -> _Stored:
        """Some of its rows."""
        each = self.size // self.shape[0]
        shape = (end - begin, *self.shape[1:])
        at = self.begin + begin * each
        return _Stored(self.name, self.dtype, shape, at, (end - begin) * each)


def can_send(dtype: str, target: torch.dtype | None = None) -> bool:
    """Whether `read_to_device` takes tensors of this dtype, as safetensors spells it; with a
    target, whether `BackgroundRead` can fill memory of that dtype with them.
    """
    return dtype in _DTYPES and target in (None, _DTYPES[dtype])


class BackgroundRead:
    """Threads that fill memory on a device from files while the caller does something else.

    What is filled holds anything until `wait` has returned. The threads end with `wait` or `close`.

    Args:
        files: safetensors files whose headers are sound.
        places: tensor name -> contiguous memory of the tensor's dtype and size.
        device: where the places are. Work queued on its current stream is waited for.
        rows: of these tensors only the rows [begin, end) are read, and the place is for them.
    """

    def __init__(
        self,
        files: Sequence[Path],
        places: Mapping[str, Tensor],
        device: torch.device,
        rows: Mapping[str, tuple[int, int]] | None = None,
    ) -> None:
        self._pool = ThreadPoolExecutor(_THREADS, thread_name_prefix="fastinfer-read")
        self._descriptors: list[int] = []
        self._reads: list[list[Future[Any]]] = []  # of each tensor
        self._slots: _Slots | None = None
        try:
            self._slots = slots = _Slots(device)
            ready = slots.event()
            for file in files:
                descriptor = os.open(file, os.O_RDONLY)
                self._descriptors.append(descriptor)
                for stored in _layout(file, set(places)):
                    target = places[stored.name]
                    if rows is not None and stored.name in rows:
                        stored = stored.rows(*rows[stored.name])
                    job = (target, stored, file, descriptor, ready)
                    self._reads.append(_submit(*job, self._pool, slots))
        except BaseException:
            self.close()
            raise

    def wait(self, each: Callable[[], object] = lambda: None) -> None:
        """Return when everything is in its place, for every stream.

        Args:
            each: called once per tensor.

        Raises:
            ValueError: a file has become shorter.
        """
        try:
            for futures in self._reads:
                for future in futures:
                    future.result()
                each()
        finally:
            self.close()

    def close(self) -> None:
        """Stop reading; nothing touches the places any more. May be called twice."""
        self._pool.shutdown(cancel_futures=True)
        if self._slots is not None:
            self._slots.synchronize()
        self._slots = None
        while self._descriptors:
            os.close(self._descriptors.pop())


def read_to_device(
    files: Sequence[Path], names: set[str], device: torch.device
) -> Iterator[tuple[str, Tensor]]:
    """The named tensors, in the order in which they lie in the files, on the device.

    Args:
        files: safetensors files whose headers are sound.
        names: of fp32, fp16 or bf16 tensors.
        device: where they go.

    Raises:
        ValueError: a file has become shorter.
    """
    pool = ThreadPoolExecutor(_THREADS, thread_name_prefix="fastinfer-read")
    slots = _Slots(device)
    try:
        for file in files:
            descriptor = os.open(file, os.O_RDONLY)
            try:
                yield from _read_file(file, descriptor, names, device, pool, slots)
            finally:
                slots.drain()
                os.close(descriptor)
    finally:
        pool.shutdown(cancel_futures=True)


class _Slots:
    """A piece of page-locked memory per thread, the stream it is sent on, and what is under way."""

    def __init__(self, device: torch.device) -> None:
        self.device, self.on_cuda = device, device.type == "cuda"
        self.pending: deque[Future[Any]] = deque()
        self._free: deque[tuple[Tensor, Any, Any]] = deque()
        memory = torch.empty((_THREADS, _PIECE), dtype=torch.uint8, pin_memory=self.on_cuda)
        for piece in memory:
            stream = torch.cuda.Stream(device) if self.on_cuda else None
            self._free.append((piece, stream, torch.cuda.Event() if self.on_cuda else None))

    def event(self) -> Any:
        """What has been queued on the current stream so far; None on a CPU."""
        if not self.on_cuda:
            return None
        event = torch.cuda.Event()
        event.record(torch.cuda.current_stream(self.device))
        return event

    def synchronize(self) -> None:
        """Wait until everything that was read has been sent."""
        for _, _, sent in self._free:
            if sent is not None:
                sent.synchronize()

    @torch.inference_mode()  # whatever mode the loading thread is in
    def fetch(self, descriptor: int, begin: int, target: Tensor, ready: Any, file: Path) -> Any:
        """Fill `target` (uint8) from a file; runs in a thread of the pool.

        Returns:
            What to wait for on the device before the target is used.
        """
        memory, stream, sent = slot = self._free.popleft()  # as many as there are threads
        try:
            if sent is not None:
                sent.synchronize()
            piece = memory[: target.numel()]
            view, done = memoryview(piece.numpy()), 0
            while done < len(view):
                got = os.preadv(descriptor, [view[done:]], begin + done)
                if got == 0:
                    raise ValueError(f"load_model: {file} ended early; download the file again")
                done += got
            if stream is None:
                target.copy_(piece)
                return None
            with torch.cuda.stream(stream):
                stream.wait_event(ready)
                target.copy_(piece, non_blocking=True)
                sent.record(stream)
                arrived = torch.cuda.Event()
                arrived.record(stream)
            return arrived
        finally:
            self._free.append(slot)

    def drain(self) -> None:
        """Wait until no thread reads any more."""
        for future in self.pending:
            future.cancel()
        while self.pending:
            future = self.pending.popleft()
            if not future.cancelled():
                future.exception()


def _read_file(
    file: Path,
    descriptor: int,
    names: set[str],
    device: torch.device,
    pool: ThreadPoolExecutor,
    slots: _Slots,
) -> Iterator[tuple[str, Tensor]]:
    wanted = deque(_layout(file, names))
    started: deque[tuple[_Stored, Tensor, list[Future[Any]]]] = deque()
    ahead = 0
    while wanted or started:
        while wanted and (not started or ahead + wanted[0].size <= _AHEAD):
            stored = wanted.popleft()
            ahead += stored.size
            started.append((stored, *_start(stored, file, descriptor, device, pool, slots)))
        stored, tensor, futures = started.popleft()
        for future in futures:
            arrived = future.result()
            slots.pending.popleft()
            if arrived is not None:
                torch.cuda.current_stream(device).wait_event(arrived)
        ahead -= stored.size
        yield stored.name, tensor


def _start(
    stored: _Stored,
    file: Path,
    descriptor: int,
    device: torch.device,
    pool: ThreadPoolExecutor,
    slots: _Slots,
) -> tuple[Tensor, list[Future[Any]]]:
    tensor = torch.empty(stored.shape, dtype=stored.dtype, device=device)
    ready = slots.event()  # its memory may still be read as the tensor that had it before
    futures = _submit(tensor, stored, file, descriptor, ready, pool, slots)
    slots.pending.extend(futures)
    return tensor, futures


def _submit(
    tensor: Tensor,
    stored: _Stored,
    file: Path,
    descriptor: int,
    ready: Any,
    pool: ThreadPoolExecutor,
    slots: _Slots,
) -> list[Future[Any]]:
    """Have the pool fill `tensor` in pieces."""
    raw = tensor.view(-1).view(torch.uint8)
    futures = []
    for begin in range(0, stored.size, _PIECE):
        target = raw[begin : begin + _PIECE]
        at = stored.begin + begin
        futures.append(pool.submit(slots.fetch, descriptor, at, target, ready, file))
    return futures


def _layout(file: Path, names: set[str]) -> list[_Stored]:
    """The wanted tensors of a file in the order of their bytes."""
    with open(file, "rb") as stream:
        (length,) = struct.unpack("<Q", stream.read(8))
        header = json.loads(stream.read(length))
    found = []
    for name in names & header.keys():
        begin, end = header[name]["data_offsets"]
        dtype, shape = _DTYPES[header[name]["dtype"]], tuple(header[name]["shape"])
        found.append(_Stored(name, dtype, shape, 8 + length + begin, end - begin))
    return sorted(found, key=lambda stored: stored.begin)
