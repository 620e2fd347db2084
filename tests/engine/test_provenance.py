"""What a result says about its command: no secrets, nothing of the machine."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from fastinfer.bench.provenance import command_line, told, without_user


def test_secrets_and_folders_stay_out(monkeypatch: pytest.MonkeyPatch) -> None:
    words = ["bench", "--api-key", "sk-1", "--api-key=sk-2", "--model=/home/u/m", "/data/x.json"]
    assert told(words) == ["bench", "--api-key", "...", "--api-key=...", "--model=m", "x.json"]
    assert told(["--json=/repo/bench/a.json"], Path("/repo")) == ["--json=bench/a.json"]
    monkeypatch.setattr(sys, "argv", ["fastinfer", "bench", "--url", "http://me:pw@host:1/v1"])
    assert command_line() == "fastinfer bench --url http://host:1/v1"


@pytest.mark.parametrize("url", ["http://host:8000", "host/a@b", "https://host/v1/x@y"])
def test_addresses_without_a_user_stay(url: str) -> None:
    assert without_user(url) == url
