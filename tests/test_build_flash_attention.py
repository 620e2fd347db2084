"""What the machine code of the prefill kernels promises: few instances, no spilled register, wgmma
where sm_90a is used.
"""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from fastinfer import _lib
from machine_code import cuobjdump, usage

NAMES = ("flash_sm90_kernel", "flash_portable_kernel")

pytestmark = pytest.mark.skipif(not _lib.LIBRARY.is_file(), reason="needs the built library")


def test_instances_and_spills() -> None:
    kernels = usage(*NAMES)
    names = {name for name, _ in kernels}
    assert len(names) <= 32, sorted(names)
    assert all(any(n in name for name in names) for n in NAMES)
    for name, line in kernels:
        assert "STACK:0 " in line and "LOCAL:0 " in line, f"{name} spills registers: {line}"


def test_hopper_kernels_use_wgmma(tmp_path: Path) -> None:
    names = {name for name, _ in usage("flash_sm90_kernel")}
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
