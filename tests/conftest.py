"""Fixtures for every test: fixed seeds, two threads, and the switch over instruction-set levels."""

from __future__ import annotations

import os

import pytest
import torch

from helpers import available_isa_levels

torch.set_num_threads(min(2, os.cpu_count() or 1))


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(params=available_isa_levels())
def isa(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Runs the test once per instruction-set level of this machine."""
    monkeypatch.setenv("FASTINFER_CPU_ISA", request.param)
    return request.param


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """`full` tests run only when asked for by -m; `gpu` tests only where there is a CUDA device."""
    asked = "full" in (config.getoption("-m") or "")
    for item in items:
        if "full" in item.keywords and not asked:
            item.add_marker(pytest.mark.skip(reason="long: run with `make test-full`"))
        if "gpu" in item.keywords and not torch.cuda.is_available():
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))
