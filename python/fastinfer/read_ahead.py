"""Has the kernel read a checkpoint's files while the process still gets ready to use them.

Importing torch and making a CUDA context take seconds in which a disk would do nothing. Needs
neither torch nor any other package, so a command can call it first.
"""

from __future__ import annotations

import os
import threading
from pathlib import Path

_PIECE = 8 << 20  # bytes asked for at once
_MARGIN = 4 << 30  # bytes of memory left alone
# Where a container's limit stands, if there is one.
_LIMITS = ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes")
_started: set[str] = set()


def read_ahead(folder: str | os.PathLike[str]) -> threading.Thread | None:
    """Start reading the safetensors files of a folder into the page cache, in order of name, as far
    as free memory goes.

    Never fails: whoever opens the files says what is wrong with them.

    Returns:
        The thread that asks; None where there is nothing to do, or it has been done before.
    """
    name = os.path.abspath(os.fspath(folder))
    if name in _started or not hasattr(os, "posix_fadvise"):
        return None
    files = sorted(Path(name).glob("*.safetensors"))
    budget = _free_memory() - _MARGIN
    if not files or budget <= 0:
        return None
    _started.add(name)
    thread = threading.Thread(
        target=_ask, args=(files, budget), name="fastinfer-read-ahead", daemon=True
    )
    thread.start()
    return thread


def _ask(files: list[Path], budget: int) -> None:
    try:
        for file in files:
            descriptor = os.open(file, os.O_RDONLY)
            try:
                size = os.fstat(descriptor).st_size
                for begin in range(0, size, _PIECE):
                    if budget <= 0:
                        return
                    os.posix_fadvise(descriptor, begin, _PIECE, os.POSIX_FADV_WILLNEED)
                    budget -= _PIECE
            finally:
                os.close(descriptor)
    except OSError:
        return


def _free_memory() -> int:
    """Bytes the page cache may take; 0 where the system does not say."""
    free = 0
    for line in _lines("/proc/meminfo"):
        if line.startswith("MemAvailable:"):
            free = int(line.split()[1]) * 1024
    for path in _LIMITS:
        for line in _lines(path):
            if line.strip().isdecimal():  # not "max"
                free = min(free, int(line))
    return free


def _lines(path: str) -> list[str]:
    try:
        with open(path, encoding="ascii") as file:
            return file.readlines()
    except (OSError, ValueError):
        return []
