"""One launch of a CUDA operator, as the generic GPU tests need it: graphs, streams, devices,
poison, sanitizer. Each stem lists its own in cases_<stem>.py.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

Made = tuple[Callable[[], None], list[Tensor]]


@dataclass(frozen=True)
class Case:
    """`make(device, seed)` builds fresh random inputs and poisoned outputs and returns (run,
    outputs). `run()` fills the outputs: capturable in a CUDA graph, the same bits at every call (an
    in-place operator copies pristine inputs into its work buffers first).
    """

    name: str
    make: Callable[[str, int], Made]
