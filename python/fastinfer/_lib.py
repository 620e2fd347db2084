"""Loads `_ops.so`, once, and holds what every operator module shares: the operator namespace, fake
kernels, argument checks.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import inspect
import os
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

LIBRARY = Path(__file__).with_name("_ops.so")
LOAD_ERROR: str | None = None


def _load() -> str | None:
    if not LIBRARY.is_file():
        return (
            f"{LIBRARY.name} is missing beside {Path(__file__).name}: the package was not built; "
            "run `pip install .` (or `make dev` for an editable tree) in the source folder"
        )
    try:
        torch.ops.load_library(str(LIBRARY))
    except OSError:
        try:  # torch's message hides the loader's own text
            ctypes.CDLL(str(LIBRARY))
        except OSError as plain:
            error = plain
        return f"{LIBRARY.name} could not be loaded: {error}; `python -m fastinfer.env` says more"
    return None


class _MissingOps:
    """Stands in for the operators when the library is not there; any use says why and what to
    do.
    """

    def __getattr__(self, name: str) -> Any:
        raise ImportError(f"fastinfer: {LOAD_ERROR}")

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        raise ImportError(f"fastinfer: {LOAD_ERROR}")


def _check_isa() -> None:
    """Warn about a level in FASTINFER_CPU_ISA that does not exist: the kernels ignore it."""
    wanted, levels = os.environ.get("FASTINFER_CPU_ISA"), ("generic", "avx2", "avx512", "vnni")
    if wanted and wanted not in levels:
        warnings.warn(
            f"fastinfer: FASTINFER_CPU_ISA must be one of {', '.join(levels)}, got {wanted!r}, "
            "which is ignored",
            stacklevel=3,
        )


LOAD_ERROR = _load()
_check_isa()
ops: Any = _MissingOps() if LOAD_ERROR else torch.ops.fastinfer


def op(name: str) -> Any:
    """The default overload of operator `name` (cheaper to call than the packet), or a stand-in that
    explains why there is none.
    """
    return ops if LOAD_ERROR else getattr(ops, name).default


def entry(name: str) -> Any:
    """What op(name) calls, without the Python frame in between: for calls that are counted in
    tenths of a microsecond. Not while torch.compiler.is_compiling(), which knows op(name) only.
    """
    return ops if LOAD_ERROR else getattr(op(name), "_op", op(name))


def register_fake(
    name: str, *, any_device: tuple[str, ...] = ()
) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """`torch.library.register_fake` for fastinfer::name, with the device check; does nothing when
    the library is missing. Arguments in `any_device` may be on another device than the rest.
    """
    if LOAD_ERROR:
        return lambda fn: fn

    def register(fn: Callable[..., None]) -> Callable[..., None]:
        names = tuple(inspect.signature(fn).parameters)

        @functools.wraps(fn)
        def checked(*args: Any, **kwargs: Any) -> None:
            fn(*args, **kwargs)
            arguments = dict(zip(names, args, strict=False)) | kwargs
            _same_device(name, {k: v for k, v in arguments.items() if k not in any_device})

        torch.library.register_fake(f"fastinfer::{name}")(checked)
        return fn

    return register


def _same_device(name: str, arguments: dict[str, Any]) -> None:
    """torch picks a fake kernel when any argument is a meta tensor: without this, outputs on a real
    device would come back as they were allocated.
    """
    first: torch.Tensor | None = None
    for arg, value in arguments.items():
        for t in value if isinstance(value, (list, tuple)) else (value,):
            if not isinstance(t, torch.Tensor):
                continue
            first = t if first is None else first
            if t.device != first.device:
                raise RuntimeError(
                    f"{name}: {arg} must be on the same device as the first tensor "
                    f"({first.device}), got {describe(t)}; move it with .to(device)"
                )


def refuse_grad(name: str, *tensors: torch.Tensor | None) -> None:
    """Raise when autograd would record this call: the kernels are forward only and would drop the
    gradient silently.
    """
    if torch.is_grad_enabled():
        for t in tensors:
            if t is None:
                continue
            wants = getattr(t, "requires_grad", None)
            if wants is None:
                raise TypeError(
                    f"{name}: an argument must be a tensor, got {type(t).__name__} {t!r:.60}; make "
                    "it one with torch.tensor"
                )
            if wants:
                raise RuntimeError(
                    f"{name}: an input requires grad, but fastinfer is inference only; "
                    "call it under torch.no_grad() or torch.inference_mode(), or detach the input"
                )


def check(condition: bool, message: str | Callable[[], str]) -> None:
    """Raise RuntimeError, as the C++ checks do, for fake kernels and wrappers. A function for the
    message where every call passes: describing a tensor takes microseconds.
    """
    if not condition:
        raise RuntimeError(message if isinstance(message, str) else message())


def require_tensors(name: str, **tensors: Any) -> None:
    """Raise TypeError for a required argument that is not a tensor."""
    for arg, t in tensors.items():
        if not isinstance(t, Tensor):
            raise TypeError(f"{name}: {arg} must be a tensor, got {type(t).__name__}")


FLOATS = (torch.float32, torch.float16, torch.bfloat16)
EIGHT_BIT = (torch.float8_e4m3fn, torch.int8)


def describe(t: torch.Tensor) -> str:
    return f"{t.dtype} {list(t.shape)} on {t.device}"


def check_dtype(name: str, arg: str, t: torch.Tensor, allowed: tuple[torch.dtype, ...]) -> None:
    if t.dtype not in allowed:
        raise RuntimeError(
            f"{name}: {arg} must be {' or '.join(map(str, allowed))}, got {describe(t)}; "
            "convert it with .to(dtype)"
        )


def cpu_isa() -> str:
    """Instruction-set level the CPU kernels use now: generic, avx2, avx512 or vnni
    (FASTINFER_CPU_ISA can lower it).
    """
    _check_isa()
    return ops.cpu_isa()


def build_info() -> dict[str, str]:
    """What the library was built with: version, compiler, torch, and with CUDA the toolkit,
    architectures and driver found.
    """
    return dict(entry.split("=", 1) for entry in ops.build_info())


@contextlib.contextmanager
def programmatic_launch(on: bool = True) -> Iterator[None]:
    """Programmatic dependent launch for the CUDA kernels this thread launches in the scope (sm_90
    and newer): a kernel may start while the one before it on the stream still runs.

    Only for code that knows a whole step: a fastinfer kernel waits for the one before it, but reads
    weights, old KV, lengths, block tables and plans ahead of that wait. They must be written before
    the graph launch, or in front of a kernel of torch's (which waits for all before it); so pass
    lengths as tensors, not as an integer.
    """
    before = ops.set_programmatic_launch(on)
    try:
        yield
    finally:
        ops.set_programmatic_launch(before)


@register_fake("cuda_probe")
def _(out: torch.Tensor) -> None:
    check_dtype("cuda_probe", "out", out, (torch.int32,))
