"""Fixtures of the sampling tests: the same test on every instruction-set level and on the GPU.

On the GPU the test's `sample` and `verify_draft` take CPU tensors, run on copies of them on the
device and return CPU tensors. Import both fixtures by name.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from torch import Tensor

from helpers import available_isa_levels, devices


def _moved(value: Any, device: str) -> Any:
    if not isinstance(value, Tensor):
        return value
    if value.dim() > 1 and value.shape[0] > 1 and value.stride(0) == 0:
        return value[:1].to(device).expand(value.shape)  # many rows that are one
    return value.to(device)


def on_cuda(op: Callable[..., Any]) -> Callable[..., Any]:
    def run(*args: Any, **kwargs: Any) -> Any:
        result = op(
            *(_moved(a, "cuda") for a in args), **{k: _moved(v, "cuda") for k, v in kwargs.items()}
        )
        return type(result)(*(_moved(t, "cpu") for t in result))

    return run


def _switch_to_cuda(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("sample", "verify_draft"):
        if hasattr(request.module, name):
            monkeypatch.setattr(request.module, name, on_cuda(getattr(request.module, name)))


@pytest.fixture(params=[*available_isa_levels(), *devices("sample")[1:]])
def isa(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    if request.param == "cuda":
        _switch_to_cuda(request, monkeypatch)
    else:
        monkeypatch.setenv("FASTINFER_CPU_ISA", request.param)
    return request.param


@pytest.fixture(params=devices("sample"))
def device(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    if request.param == "cuda":
        _switch_to_cuda(request, monkeypatch)
    return request.param
