"""The CPU attention kernels touch nothing outside their tensors: run against pages that may not be
accessed, in a process of its own."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap

PROGRAM = """
    import ctypes, os
    import torch
    from fastinfer import _lib
    from fastinfer.ops.flash_attention import flash_attn_func
    from fastinfer.ops.paged_attention import flash_attn_with_kvcache
    from helpers import available_isa_levels

    libc = ctypes.CDLL(None)
    libc.mmap.restype = ctypes.c_void_p
    libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 3, ctypes.c_long]
    libc.mprotect.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    PAGE, READ_WRITE, PRIVATE_ANONYMOUS = os.sysconf("SC_PAGESIZE"), 3, 0x22


    def fence(t, at_start):
        # t copied so that it ends (or starts) where a forbidden page starts (or ends)
        size = t.numel() * t.element_size()
        pages = -(-size // PAGE) + 2
        base = libc.mmap(None, pages * PAGE, READ_WRITE, PRIVATE_ANONYMOUS, -1, 0)
        last = base + (pages - 1) * PAGE
        assert libc.mprotect(base, PAGE, 0) == 0 and libc.mprotect(last, PAGE, 0) == 0
        raw = (ctypes.c_char * size).from_address(base + PAGE if at_start else last - size)
        copy = torch.frombuffer(raw, dtype=torch.uint8).view(t.dtype).view(t.shape)
        return copy.copy_(t)


    for level in available_isa_levels():
        os.environ["FASTINFER_CPU_ISA"] = level
        for i, dim in enumerate((16, 24, 40, 64, 72, 256)):
            at_start = i % 2 == 0
            for dtype in (torch.float32, torch.bfloat16):
                for code in (dtype, torch.int8):
                    for rows, keys in ((1, 65), (2, 64), (7, 130)):
                        q = torch.randn(1, rows, 2, dim).to(dtype)
                        k = torch.randn(1, keys, 1, dim).mul(20).to(code)
                        new = q[:, :1, :1]
                        scales = {}
                        if code != dtype:
                            scale = fence(torch.rand(1, keys, 1), at_start)
                            scales = {"k_scale": scale, "v_scale": scale.clone()}
                        expected = flash_attn_func(q, k, k, causal=True, **scales)
                        q, k, new, out = (fence(t, at_start) for t in (q, k, new, q))
                        flash_attn_func(q, k, k, causal=True, out=out, **scales)
                        assert torch.equal(out, expected)
                        table = fence(torch.rand(keys, 4), at_start)
                        flash_attn_with_kvcache(
                            q, k, k.clone(), new, new, table, table, cache_seqlens=keys - 1,
                            **scales,
                        )
    print("untouched")
"""


def test_nothing_outside_the_tensors_is_touched():
    run = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(PROGRAM)],
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
        check=False,
    )
    assert run.returncode == 0 and "untouched" in run.stdout, run.stderr[-2000:]
