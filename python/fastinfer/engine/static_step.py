"""What steps over static buffers are made of: one buffer filled by one copy, and the capture.

A bucket's inputs are columns of one piece of memory, the same on the host (pinned) and on the
device; a step writes the host's and sends a prefix of it. Used by the steps of speculation, whose
results the host waits for before it prepares the next: one buffer on each side is enough.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .. import _lib

_ALIGN = 16  # bytes; every column starts at a multiple
# What the decode kernel needs for two CTAs per SM: 32 rows of up to 128 channels, one query of up
# to 32 heads per key head, or 64 for several queries.
_WORKSPACE_BYTES, _WORKSPACE_GROUP, _WORKSPACE_HEAD_DIM = 16 << 20, 32, 128


class StaticBuffer:
    """Columns of fixed length, on the host and on the device.

    Args:
        columns: name -> (numpy type, length, value of padding); the last one may be sent in part.
        device: Where the step runs.

    Attributes:
        host: name -> array to write.
        device: name -> tensor that the step reads.
    """

    def __init__(
        self, columns: Mapping[str, tuple[type, int, float]], device: torch.device
    ) -> None:
        self.host: dict[str, np.ndarray] = {}
        self.device: dict[str, Tensor] = {}
        begins, size = {}, 0
        for name, (kind, length, _) in columns.items():
            begins[name] = size
            size += -(-length * np.dtype(kind).itemsize // _ALIGN) * _ALIGN
        self._last = begins[name]
        self._here = torch.zeros(size, dtype=torch.uint8, pin_memory=device.type == "cuda")
        self._there = torch.zeros(size, dtype=torch.uint8, device=device)
        memory = self._here.numpy()
        for name, (kind, length, padding) in columns.items():
            end = begins[name] + length * np.dtype(kind).itemsize
            self.host[name] = memory[begins[name] : end].view(kind)
            self.host[name][:] = padding
            dtype = getattr(torch, np.dtype(kind).name)
            self.device[name] = self._there[begins[name] : end].view(dtype)
        self.send(size)

    def send(self, last: int) -> None:
        """Copy all columns, but of the last one only so many bytes."""
        end = self._last + last
        self._there[:end].copy_(self._here[:end], non_blocking=True)


class Capturer:
    """Turns functions into CUDA graphs that share their memory; on the CPU they stay functions."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        if device.type == "cuda":
            self._pool = torch.cuda.graph_pool_handle()
            self._side = torch.cuda.Stream(device)

    def capture(self, run: Callable[[], object], *, programmatic: bool) -> Callable[[], object]:
        """What repeats `run`. It must read and write the same memory every time."""
        if self.device.type != "cuda":
            return run
        current = torch.cuda.current_stream(self.device)
        self._side.wait_stream(current)
        with torch.cuda.device(self.device), torch.cuda.stream(self._side):
            run()  # libraries make their handles and workspaces now
            graph = torch.cuda.CUDAGraph()
            graph.capture_begin(self._pool, capture_error_mode="thread_local")
            try:
                with _lib.programmatic_launch(programmatic):
                    run()
            finally:
                graph.capture_end()
        current.wait_stream(self._side)
        return graph.replay


def make_workspace(config: Any, device: torch.device, *, several: bool = False) -> Tensor | None:
    """Scratch that every decode call of a stream shares; None where it is not used.

    Without one a call on CUDA allocates and clears its own, a launch more per layer.

    Args:
        config: Of the model.
        device: Where it runs.
        several: Calls have several tokens per sequence.
    """
    if device.type != "cuda" or config.head_dim > _WORKSPACE_HEAD_DIM:
        return None
    if several:
        return torch.zeros(2 * _WORKSPACE_BYTES, dtype=torch.uint8, device=device)
    if config.num_heads > _WORKSPACE_GROUP * config.num_kv_heads:
        return None
    return torch.zeros(_WORKSPACE_BYTES, dtype=torch.uint8, device=device)


def row_buckets(limit: int) -> list[int]:
    """Rows of the steps with drafts: powers of two, and the limit."""
    sizes = [1]
    while sizes[-1] < limit:
        sizes.append(min(2 * sizes[-1], limit))
    return sizes


def query_lengths(drafts: int) -> list[int]:
    """Tokens per row of the steps that check up to so many drafts: 3, 5, 9 ... and the longest."""
    lengths, length = [], 3
    while length < drafts + 1:
        lengths.append(length)
        length = 2 * length - 1
    return [*lengths, drafts + 1]
