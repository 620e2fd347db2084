"""Where a result is from: the command, the commit, the machine."""

from __future__ import annotations

import os
import platform
import re
import shlex
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

SECRETS = ("--api-key",)


def command_line() -> str:
    """`fastinfer ...` as it was given, without secrets and without the folders of this machine."""
    return shlex.join(["fastinfer", *told(sys.argv[1:])])


def told(words: Sequence[str], root: Path | None = None) -> list[str]:
    """Arguments as a result may name them: no secrets, no user names in addresses, and of absolute
    paths their place under `root`, elsewhere the last part alone.
    """
    out, secret = [], False
    for word in words:
        option, sign, value = word.partition("=") if word.startswith("--") else ("", "", word)
        if secret or (sign and option in SECRETS):
            value = "..."
        secret = not sign and word in SECRETS
        out.append(f"{option}{sign}{_told(value, root)}")
    return out


def _told(value: str, root: Path | None) -> str:
    path = Path(value)
    if path.is_absolute():
        return str(path.relative_to(root)) if root and path.is_relative_to(root) else path.name
    return without_user(value)


def without_user(url: str) -> str:
    """An address without the user name and password that it may hold."""
    return re.sub(r"(?<=://)[^/@]*@", "", url)


def commit() -> str:
    """Of the repository that this package lies in, if any; FASTINFER_BENCH_COMMIT overrules."""
    given = os.environ.get("FASTINFER_BENCH_COMMIT")
    if given:
        return given
    here = Path(__file__).resolve().parent
    command = ["git", "-C", str(here), "rev-parse", "--short", "HEAD"]
    try:
        return subprocess.run(command, capture_output=True, text=True).stdout.strip()
    except OSError:
        return ""


def device_name(device: torch.device) -> str:
    """Of the GPU, or of the processor."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    cpuinfo = Path("/proc/cpuinfo")
    for line in cpuinfo.read_text().splitlines() if cpuinfo.is_file() else []:
        if line.startswith("model name"):
            return line.split(":", 1)[1].strip()
    return platform.processor()
