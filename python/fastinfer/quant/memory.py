"""Keeps the quantizers' temporary tensors small, and gives freed memory back."""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Iterator

import torch
from torch import Tensor

_CHUNK = 1 << 18  # elements of a weight that are worked on together


def row_chunks(weight: Tensor, least: int = 1) -> Iterator[tuple[int, int]]:
    """Row ranges [begin, end) of a matrix, of about 1 MB each; at least one range.

    Args:
        weight: [N, K].
        least: rows of a range: more of them for matrix products with something large.
    """
    return row_chunks_of(*weight.shape, least)


def row_chunks_of(rows: int, columns: int, least: int = 1) -> Iterator[tuple[int, int]]:
    """The same for a matrix of that shape."""
    step = max(least, _CHUNK // max(columns, 1))
    for begin in range(0, max(rows, 1), step):
        yield begin, min(begin + step, rows)


def all_finite(x: Tensor) -> bool:
    """Whether there is no NaN and no infinity, without a temporary tensor."""
    if not x.numel():
        return True
    low, high = torch.aminmax(x)
    return bool(torch.isfinite(low) & torch.isfinite(high))


def trim_heap() -> None:
    """Return freed memory to the system; glibc keeps blocks below 32 MB for itself."""
    if sys.platform == "linux":
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
        if trim is not None:
            trim(0)
