"""Helpers shared by the engine tests."""

from __future__ import annotations

import importlib
from types import ModuleType

import pytest

HOSTS = ["python", "native"]


def load_host_module(name: str) -> ModuleType:
    """One of the two host implementations; the test is skipped where it was not built."""
    if name == "python":
        return importlib.import_module("fastinfer._host_py")
    return pytest.importorskip(
        "fastinfer._host", reason="_host was not built (it needs the Python headers)"
    )
