"""Everything here runs with FASTINFER_STRICT=1: a call that the kernels do not serve fails the test
that did not expect it.
"""

from __future__ import annotations

import pytest


@pytest.fixture(autouse=True)
def _strict(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FASTINFER_STRICT", "1")


@pytest.fixture
def lenient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Falls back to torch with a warning, as without the variable."""
    monkeypatch.delenv("FASTINFER_STRICT")
    from fastinfer.integrations import _fallback

    monkeypatch.setattr(_fallback, "_said", set())
