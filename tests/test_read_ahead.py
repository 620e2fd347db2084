"""Reading ahead: everything asked for, within free memory, without torch, and never an error."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from fastinfer import read_ahead as module
from fastinfer.cli import main as cli
from fastinfer.read_ahead import read_ahead

SIZES = (3 * module._PIECE // 2, 100, module._PIECE)

pytestmark = pytest.mark.skipif(not hasattr(os, "posix_fadvise"), reason="needs posix_fadvise")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for i, size in enumerate(SIZES):
        with open(tmp_path / f"{i}.safetensors", "wb") as file:
            file.truncate(size)
    (tmp_path / "config.json").write_text("{}")
    return tmp_path


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int]]:
    """(inode's size, begin) of every request."""
    calls: list[tuple[int, int]] = []

    def fadvise(descriptor: int, begin: int, length: int, advice: int) -> None:
        assert advice == os.POSIX_FADV_WILLNEED and length == module._PIECE
        calls.append((os.fstat(descriptor).st_size, begin))

    monkeypatch.setattr(os, "posix_fadvise", fadvise)
    return calls


def test_all_files_in_order_once(folder: Path, asked: list[tuple[int, int]]) -> None:
    thread = read_ahead(folder)
    assert thread is not None and read_ahead(str(folder)) is None
    thread.join()
    assert asked == [(SIZES[0], 0), (SIZES[0], module._PIECE), (SIZES[1], 0), (SIZES[2], 0)]


def test_no_more_than_fits(
    folder: Path, asked: list[tuple[int, int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    free = module._MARGIN + 2 * module._PIECE
    monkeypatch.setattr(module, "_free_memory", lambda: free)
    thread = read_ahead(folder)
    assert thread is not None
    thread.join()
    assert len(asked) == 2
    monkeypatch.setattr(module, "_started", set())
    monkeypatch.setattr(module, "_free_memory", lambda: module._MARGIN)
    assert read_ahead(folder) is None


def test_nothing_to_read_is_no_error(tmp_path: Path) -> None:
    assert read_ahead(tmp_path) is None
    assert read_ahead(tmp_path / "absent") is None
    (tmp_path / "a.safetensors").mkdir()  # cannot be opened for reading as a file
    thread = read_ahead(tmp_path)
    assert thread is not None
    thread.join()


def test_free_memory_heeds_the_limit_of_a_container(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    limit = tmp_path / "memory.max"
    monkeypatch.setattr(module, "_LIMITS", (str(limit), str(tmp_path / "absent")))
    free = module._free_memory()
    assert 0 < free < 1 << 50
    limit.write_text("max\n")
    assert module._free_memory() > free // 2
    limit.write_text("12345\n")
    assert module._free_memory() == 12345


def test_importing_it_is_cheap() -> None:
    code = "import sys; import fastinfer.cli.main; print('torch' in sys.modules)"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "False"


def test_commands_ask_before_anything_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[str] = []
    monkeypatch.setattr(cli, "read_ahead", seen.append)
    absent = str(tmp_path / "absent")
    prompt = ("--token-ids", "1", "--device", "cpu")
    assert cli.main(["generate", "--model", absent, *prompt]) == cli.USAGE_ERROR
    assert seen == [absent]
    assert cli.main(["generate", "--model", absent, "--load-format", "dummy", *prompt]) == 2
    assert cli.main(["plan", "--model", absent]) == 2
    assert seen == [absent]
