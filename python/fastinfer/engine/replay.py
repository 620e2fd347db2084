"""Runs a captured decode step with everything around it: inputs to the device, the graph, tokens
back. One call into the library (csrc/cuda/common/step.cu) instead of five into torch.
"""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Callable

import torch
from torch import Tensor

from .. import _lib


class _Step(ctypes.Structure):
    """`FastinferStep` of step.cu."""

    _fields_ = [
        ("columns", ctypes.c_void_p),
        ("host_columns", ctypes.c_void_p),
        ("column_bytes", ctypes.c_int64),
        ("tables", ctypes.c_void_p),
        ("table_pitch", ctypes.c_int64),
        ("host_tables", ctypes.c_void_p),
        ("drawn", ctypes.c_void_p),
        ("tokens", ctypes.c_void_p),
        ("done", ctypes.c_void_p),
    ]


@functools.cache
def _library_function() -> Callable[..., int]:
    function = ctypes.CDLL(str(_lib.LIBRARY)).fastinfer_step
    function.restype = ctypes.c_int
    function.argtypes = [ctypes.c_void_p] * 3 + [ctypes.c_int64] * 2
    return function


class StepReplay:
    """Where one set of step inputs lies on both sides.

    Args:
        columns: On the device; the host's are sent to it whole.
        host_columns: Page-locked, of the same size.
        tables: int32 [rows, most blocks], on the device.
        host_tables: Page-locked; the rows that are sent, one after the other.
        drawn: int64, on the device; the tokens of the step.
        tokens: int64, page-locked.
        done: Recorded behind each step.
    """

    def __init__(
        self,
        *,
        columns: Tensor,
        host_columns: Tensor,
        tables: Tensor,
        host_tables: Tensor,
        drawn: Tensor,
        tokens: Tensor,
        done: torch.cuda.Event,
    ) -> None:
        assert columns.nbytes == host_columns.nbytes and tables.stride(1) == 1
        device = tables.device
        self._device = torch.cuda.current_device() if device.index is None else device.index
        with torch.cuda.device(self._device):
            done.record()  # which makes it
        self._kept = (columns, host_columns, tables, host_tables, drawn, tokens, done)
        self._step = _Step(
            columns=columns.data_ptr(),
            host_columns=host_columns.data_ptr(),
            column_bytes=columns.nbytes,
            tables=tables.data_ptr(),
            table_pitch=tables.stride(0) * tables.element_size(),
            host_tables=host_tables.data_ptr(),
            drawn=drawn.data_ptr(),
            tokens=tokens.data_ptr(),
            done=done.cuda_event,
        )
        self._address = ctypes.addressof(self._step)
        self._function = _library_function()

    def __call__(self, graph: int, count: int, width: int) -> None:
        """Launch the step on the current stream.

        Args:
            graph: A cudaGraphExec_t.
            count: Requests.
            width: Block ids per request to send; 0 sends none.

        Raises:
            RuntimeError: CUDA reports an error, of this step or of one before it.
        """
        if torch._C._cuda_getDevice() != self._device:
            with torch.cuda.device(self._device):
                return self(graph, count, width)
        stream = torch._C._cuda_getCurrentRawStream(self._device)
        error = self._function(self._address, graph, stream, count, width)
        if error:
            torch.cuda.check_error(error)
        return None
