"""Fixtures of the engine tests."""

from __future__ import annotations

from types import ModuleType

import pytest
from engine_helpers import HOSTS, load_host_module


@pytest.fixture(params=HOSTS)
def host(request: pytest.FixtureRequest) -> ModuleType:
    """The compiled host module and its twin in turn."""
    return load_host_module(request.param)
