"""What the machine code of the prefill kernels promises: few instances, no spilled register, wgmma
where sm_90a is used.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import sysconfig
from pathlib import Path

import pytest

from fastinfer import _lib

OPS = _lib.LIBRARY
PLACES = [
    *Path(sysconfig.get_paths()["purelib"]).glob("nvidia/*/bin"),
    Path("/usr/local/cuda/bin"),
]
NAMES = ("flash_sm90_kernel", "flash_portable_kernel")

pytestmark = pytest.mark.skipif(not OPS.is_file(), reason="needs the built library")


def cuobjdump(*options: str, file: Path = OPS, cwd: Path | None = None) -> str:
    found = shutil.which("cuobjdump") or next(
        (str(p / "cuobjdump") for p in PLACES if (p / "cuobjdump").is_file()), None
    )
    if not found:
        pytest.skip("cuobjdump (CUDA toolkit, or nvidia-cuda-cuobjdump) is not installed")
    command = [found, *options, str(file.resolve())]
    return subprocess.run(command, check=True, capture_output=True, text=True, cwd=cwd).stdout


def usage() -> list[tuple[str, str]]:
    """(mangled name, resources), one per kernel and architecture."""
    found = re.findall(r"Function (\S+):\n\s*(REG:.*)", cuobjdump("-res-usage"))
    kernels = [(name, line) for name, line in found if any(n in name for n in NAMES)]
    if not kernels:
        pytest.skip("this library was built without CUDA")
    return kernels


def test_instances_and_spills() -> None:
    kernels = usage()
    names = {name for name, _ in kernels}
    assert len(names) <= 32, sorted(names)
    assert all(any(n in name for name in names) for n in NAMES)
    for name, line in kernels:
        assert "STACK:0 " in line and "LOCAL:0 " in line, f"{name} spills registers: {line}"


def test_hopper_kernels_use_wgmma(tmp_path: Path) -> None:
    names = {name for name, _ in usage() if "flash_sm90_kernel" in name}
    assert len(names) == 18, sorted(names)
    cuobjdump("-xelf", "all", cwd=tmp_path)
    seen = set()
    for cubin in tmp_path.glob("*.cubin"):
        if b"flash_sm90_kernel" not in cubin.read_bytes():
            continue
        parts = re.split(r"Function : (\S+)", cuobjdump("-sass", file=cubin))[1:]
        for name, code in zip(parts[::2], parts[1::2], strict=True):
            seen.add(name)
            assert "HGMMA" in code, name
            assert not re.search(r"\bHMMA\b", code), name
    assert seen == names
