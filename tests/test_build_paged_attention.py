"""What the machine code of the decode kernels promises: few instances, and registers that are
spilled only where a general kernel holds 256 columns of an 8-bit cache.
"""

from __future__ import annotations

import re

import pytest

from fastinfer import _lib
from machine_code import usage

pytestmark = pytest.mark.skipif(not _lib.LIBRARY.is_file(), reason="needs the built library")


def test_instances_and_spills() -> None:
    kernels = usage("cuda13decode_kernel")
    names = {name for name, _ in kernels}
    assert 40 <= len(names) <= 48, sorted(names)
    for name, line in kernels:
        wide = re.search(r"Format(I8|E4m3)ELi256E.*DecodeParams", name)
        stack = int(re.search(r"STACK:(\d+)", line)[1])
        assert "LOCAL:0 " in line, f"{name}: {line}"
        assert stack <= (96 if wide else 0), f"{name} spills registers: {line}"
