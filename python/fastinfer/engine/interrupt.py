"""Keeps Ctrl-C from tearing the engine's state apart in the middle of a step."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable
from types import FrameType, TracebackType


class InterruptsDeferred:
    """Ctrl-C inside the block takes effect at its end; a second one at once.

    Python raises KeyboardInterrupt between any two instructions of the main thread, also between
    taking a block and noting who has it. A step is short, so waiting for its end costs nothing.
    """

    __slots__ = ("_caught", "_handler")

    def __enter__(self) -> None:
        self._handler: Callable[[int, FrameType | None], object] | None = None
        if threading.get_ident() != threading.main_thread().ident:
            return
        handler = signal.getsignal(signal.SIGINT)
        if callable(handler):
            self._handler, self._caught = handler, list[tuple[int, FrameType | None]]()
            signal.signal(signal.SIGINT, self._note)

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self._caught and self._handler is not None:
            self._handler(number, frame)
        self._caught.append((number, frame))

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._handler is None:
            return
        signal.signal(signal.SIGINT, self._handler)
        if kind is None and self._caught:
            self._handler(*self._caught[0])
