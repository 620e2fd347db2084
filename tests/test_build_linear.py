"""The kernels of the linears: few instances."""

from __future__ import annotations

import re

import pytest

from fastinfer import _lib
from machine_code import cuobjdump

pytestmark = pytest.mark.skipif(not _lib.LIBRARY.is_file(), reason="needs the built library")

# Parts of mangled names: the wgmma kernel; the skinny and the direct one; the FMA kernel and its
# sibling on the tensor cores.
KERNELS = ("wide_kernel", "SkinnyParams", "gemv_kernel", "gemv_mma_kernel")


def test_instances() -> None:
    names = set(re.findall(r"Function (\S+):", cuobjdump("-res-usage")))
    found = {part: sum(part in name for name in names) for part in KERNELS}
    if not any(found.values()):
        pytest.skip("this library was built without CUDA")
    assert all(found.values()) and sum(found.values()) <= 56, found
