"""`python faulty_rank.py FAULT RANK ARGUMENTS`: the fastinfer command, with a fault on one rank."""

from __future__ import annotations

import os
import sys
import time
from typing import Any

import torch

from fastinfer.cli.main import main
from fastinfer.engine import runner


def plant(fault: str) -> None:
    """Make this process run out of memory, or wait, at some point."""
    errors: dict[str, BaseException] = {
        "cuda": torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."),
        "host": MemoryError(),
    }
    where, _, kind = fault.partition("-")

    def fail(*args: Any, **kwargs: Any) -> Any:
        if kind == "wait":
            print("waiting", flush=True)
            for _ in range(3000):  # a signal just before a sleep does not end it
                time.sleep(0.1)
        raise errors[kind]

    if where == "load":
        runner.start_loading = fail
        return
    step, left = runner.ModelRunner.step, [3]

    def fails_later(self: Any, plan: Any) -> Any:
        left[0] -= 1
        return step(self, plan) if left[0] else fail()

    runner.ModelRunner.step = fails_later


if __name__ == "__main__":
    if os.environ.get("RANK", "0") == sys.argv[2]:
        plant(sys.argv[1])
    sys.exit(main(sys.argv[3:]))
