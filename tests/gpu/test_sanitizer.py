"""compute-sanitizer over every case: no access out of bounds, no race in shared memory, no read of
memory that nothing wrote, no misuse of barriers.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

PROGRAM = Path(__file__).with_name("sanitize.py")
TOOL = shutil.which("compute-sanitizer") or "/usr/local/cuda/bin/compute-sanitizer"

# initcheck must see the writes of torch's kernels too; the others look at our kernels only.
OURS = ["--kernel-name", "kernel_substring=fastinfer"]


@pytest.mark.skipif(not Path(TOOL).is_file(), reason="compute-sanitizer is not installed")
@pytest.mark.parametrize("tool", ["memcheck", "racecheck", "initcheck", "synccheck"])
def test_sanitizer(tool: str) -> None:
    command = [TOOL, "--tool", tool, "--error-exitcode", "9"]
    command += [] if tool == "initcheck" else OURS
    done = subprocess.run([*command, sys.executable, str(PROGRAM)], capture_output=True, text=True)
    assert done.returncode == 0, (done.stdout + done.stderr)[-4000:]
    assert "cases ran" in done.stdout
    if tool == "racecheck":
        assert "RACECHECK SUMMARY: 0 hazards" in done.stdout
