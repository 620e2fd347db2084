"""Chooses the engine's host module: the compiled `_host`, or its twin in Python.

``FASTINFER_HOST=auto`` (the default) takes `_host` where it was built, ``native`` insists on it,
``python`` takes the twin.
"""

from __future__ import annotations

import os
from types import ModuleType


def load_host() -> ModuleType:
    """The module to use.

    Raises:
        ValueError: FASTINFER_HOST has a value that is not known.
        ImportError: FASTINFER_HOST=native and `_host` was not built.
    """
    choice = os.environ.get("FASTINFER_HOST", "auto") or "auto"
    if choice not in ("auto", "native", "python"):
        raise ValueError(
            f"fastinfer: FASTINFER_HOST must be auto, native or python, got {choice!r}"
        )
    if choice != "python":
        try:
            from . import _host  # type: ignore[attr-defined,unused-ignore]

            return _host
        except ImportError as error:
            if choice == "native":
                raise ImportError(
                    "fastinfer: FASTINFER_HOST=native, but the module _host is not there or does "
                    f"not load ({error}); build the package where the Python headers are installed"
                ) from None
    from . import _host_py

    return _host_py
