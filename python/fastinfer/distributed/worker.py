"""A process that `launch.py` started: `python -m fastinfer.distributed.worker rank size port device
timeout`. It ends with rank 0, whatever happens.
"""

from __future__ import annotations

import os
import signal
import sys
from datetime import timedelta

import torch.distributed as dist

from .control import START_S
from .launch import _LOOPBACK, Member, Place, _device


def main(arguments: list[str]) -> int:
    """Serve one run."""
    rank, size, port = map(int, arguments[:3])
    timeout = float(arguments[4])
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # rank 0 decides what an interrupt means
    store = dist.TCPStore(
        _LOOPBACK, port, size, is_master=False, timeout=timedelta(seconds=START_S)
    )
    place = Place(rank, size, store, _device(arguments[3], rank, size), timeout)
    from ..engine.parallel import serve

    return serve(Member(place))


if __name__ == "__main__":
    code = main(sys.argv[1:])
    sys.stderr.flush()
    os._exit(code)  # taking the interpreter and torch down takes seconds, and nothing needs it
