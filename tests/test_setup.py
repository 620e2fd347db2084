"""What setup.py makes of the environment."""

from __future__ import annotations

import runpy
from pathlib import Path
from typing import Any

import pytest
import setuptools

ROOT = Path(__file__).resolve().parents[1]

pytestmark = pytest.mark.skipif(not (ROOT / "setup.py").is_file(), reason="needs the source tree")


@pytest.fixture
def setup_py(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    monkeypatch.setattr(setuptools, "setup", lambda **options: None)
    for name in ("FASTINFER_CUDA_ARCHS", "TORCH_CUDA_ARCH_LIST"):
        monkeypatch.delenv(name, raising=False)
    return runpy.run_path(str(ROOT / "setup.py"))


@pytest.mark.parametrize(
    "ours,torchs,archs",
    [
        (None, None, "8.0 9.0a"),
        (None, "8.0;8.6+PTX", "8.0 8.6+PTX"),
        (None, "8.0, 9.0+PTX", "8.0 9.0a+PTX"),
        (None, "7.5;8.9", "8.9"),
        (None, "10.0f 10.3a 12.0f+PTX", "10.0 10.3a 12.0+PTX"),
        (None, "Hopper", "8.0 9.0a"),
        (" ", "8.9", "8.9"),
        ("8.0;9.0a", "8.9", "8.0 9.0a"),
        (" 8.0, 9.0a ", None, "8.0 9.0a"),
    ],
)
def test_architectures(
    setup_py: dict[str, Any],
    monkeypatch: pytest.MonkeyPatch,
    ours: str | None,
    torchs: str | None,
    archs: str,
) -> None:
    for name, value in (("FASTINFER_CUDA_ARCHS", ours), ("TORCH_CUDA_ARCH_LIST", torchs)):
        if value is not None:
            monkeypatch.setenv(name, value)
    assert setup_py["cuda_archs"]() == archs


def test_old_torch_is_refused(setup_py: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "version.py").write_text("__version__ = '2.10.0+cu128'\n")
    with pytest.raises(SystemExit, match=r"torch 2\.10\.0\+cu128 is too old; torch >= 2\.11"):
        setup_py["torch_version"](tmp_path)
    (tmp_path / "version.py").write_text("__version__ = '2.11.0a0+git1234'\n")
    assert setup_py["torch_version"](tmp_path) == "2.11.0a0+git1234"


def test_missing_torch_is_refused(
    setup_py: dict[str, Any], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("FASTINFER_TORCH_DIR", str(tmp_path))
    with pytest.raises(SystemExit, match=r"no torch found; install torch >= 2\.11 first"):
        setup_py["find_torch"]()
