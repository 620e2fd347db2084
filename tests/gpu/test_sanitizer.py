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
# racecheck does not see that one lane's arrival at an mbarrier, behind a __syncwarp(), stands for
# the reads of its whole warp: it reports bytes of scales and zero points that a bulk copy
# (cp.async.bulk) writes over where the ring of stages goes round (docs/kernels/linear.md counts
# them). Leaving the kernel out ends the tool with an internal error, so its reports are read.
KNOWN = "wide_kernel"


def unknown_races(output: str) -> list[str]:
    """Accesses of the reports that are of other kernels."""
    return [line for line in output.splitlines() if " access at " in line and KNOWN not in line]


@pytest.mark.skipif(not Path(TOOL).is_file(), reason="compute-sanitizer is not installed")
@pytest.mark.parametrize("tool", ["memcheck", "racecheck", "initcheck", "synccheck"])
def test_sanitizer(tool: str) -> None:
    races = tool == "racecheck"
    command = [TOOL, "--tool", tool, "--error-exitcode", "0" if races else "9"]
    command += [] if tool == "initcheck" else OURS
    done = subprocess.run([*command, sys.executable, str(PROGRAM)], capture_output=True, text=True)
    assert done.returncode == 0, (done.stdout + done.stderr)[-4000:]
    assert "cases ran" in done.stdout
    if races:
        assert "RACECHECK SUMMARY" in done.stdout
        assert not unknown_races(done.stdout)
