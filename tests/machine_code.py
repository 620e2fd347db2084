"""The machine code of the built library, as cuobjdump shows it."""

from __future__ import annotations

import re
import shutil
import subprocess
import sysconfig
from pathlib import Path

import pytest

from fastinfer import _lib

PLACES = [
    *Path(sysconfig.get_paths()["purelib"]).glob("nvidia/*/bin"),
    Path("/usr/local/cuda/bin"),
]


def cuobjdump(*options: str, file: Path = _lib.LIBRARY, cwd: Path | None = None) -> str:
    found = shutil.which("cuobjdump") or next(
        (str(p / "cuobjdump") for p in PLACES if (p / "cuobjdump").is_file()), None
    )
    if not found:
        pytest.skip("cuobjdump (CUDA toolkit, or nvidia-cuda-cuobjdump) is not installed")
    command = [found, *options, str(file.resolve())]
    return subprocess.run(command, check=True, capture_output=True, text=True, cwd=cwd).stdout


def usage(*names: str) -> list[tuple[str, str]]:
    """(mangled name, resources), one per architecture, of kernels whose name contains one of
    `names`.
    """
    found = re.findall(r"Function (\S+):\n\s*(REG:.*)", cuobjdump("-res-usage"))
    kernels = [(name, line) for name, line in found if any(n in name for n in names)]
    if not kernels:
        pytest.skip("this library was built without CUDA")
    return kernels
