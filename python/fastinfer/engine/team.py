"""What a `ModelRunner` needs to know of the other processes that run its model."""

from __future__ import annotations

import time
from collections import deque
from typing import Any, Protocol

import torch
from torch import Tensor

from ..distributed.group import ParallelGroups


class Team(Protocol):
    """All processes of a run, from the place of one of them.

    Attributes:
        groups: Its collectives.
    """

    groups: ParallelGroups

    def least(self, what: str, value: int) -> int:
        """The smallest of all ranks' values, once all have come here."""
        ...


class Stage:
    """One part of a pipeline: hidden states come from the part before it and go to the next.

    Args:
        groups: Of this process.
        model: The part of the model.
    """

    def __init__(self, groups: ParallelGroups, model: Any) -> None:
        assert groups.pipeline is not None
        self._group, self._at = groups.pipeline, groups.stage
        self.is_first, self.is_last = groups.stage == 0, groups.stage == groups.stages - 1
        self._hidden = model.config.hidden_size
        self._dtype, self._device = model.dtype, groups.device
        self.clock = StageClock(groups.device)

    def buffer(self, rows: int) -> Tensor:
        """Memory for the hidden states of so many tokens."""
        return torch.zeros(rows, self._hidden, dtype=self._dtype, device=self._device)

    def receive(self, input_ids: Tensor) -> Tensor:
        """What the model takes: the tokens, or the hidden states of as many."""
        hidden = input_ids
        if not self.is_first:
            hidden = torch.empty(
                len(input_ids), self._hidden, dtype=self._dtype, device=self._device
            )
            self._group.receive(hidden, self._at - 1)
        self.clock.begin()
        return hidden

    def send(self, hidden: Tensor) -> None:
        """Pass on what the model returned, but from the last stage. Ends the stage's work."""
        self.clock.end()
        if not self.is_last:
            self._group.send(hidden, self._at + 1)

    def receive_into(self, hidden: Tensor) -> None:
        """Like `receive`, into a buffer."""
        if not self.is_first:
            self._group.receive(hidden, self._at - 1)
        self.clock.begin()


class StageClock:
    """How long a stage works, and how long it does not, between its first step and its latest."""

    def __init__(self, device: torch.device) -> None:
        self._on_cuda = device.type == "cuda"
        self._marks: deque[tuple[Any, Any]] = deque()  # of steps whose times are not known yet
        self._begun: Any = None
        self.reset()

    def reset(self) -> None:
        """Forget what was measured."""
        self._marks.clear()
        self._last: Any = None  # the end of the latest step that was counted
        self._working_s = self._idle_s = 0.0
        self._steps = 0

    def begin(self) -> None:
        """The input is there."""
        self._begun = self._now()

    def end(self) -> None:
        """The output is there."""
        self._marks.append((self._begun, self._now()))
        while len(self._marks) > 1 and self._is_done(self._marks[0][1]):
            self._count(*self._marks.popleft())

    def _now(self) -> Any:
        if not self._on_cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def _is_done(self, mark: Any) -> bool:
        return not self._on_cuda or mark.query()

    def _between(self, a: Any, b: Any) -> float:
        return a.elapsed_time(b) * 1e-3 if self._on_cuda else b - a

    def _count(self, begin: Any, end: Any) -> None:
        if self._last is not None:
            self._idle_s += self._between(self._last, begin)
        self._working_s += self._between(begin, end)
        self._last, self._steps = end, self._steps + 1

    def report(self) -> dict[str, float]:
        """Steps, milliseconds of work per step, and the share of the time that was idle. Waits for
        the steps that run.
        """
        if self._on_cuda:
            torch.cuda.current_stream().synchronize()
        while self._marks:
            self._count(*self._marks.popleft())
        whole = self._working_s + self._idle_s
        return {
            "steps": self._steps,
            "step_ms": self._working_s / max(self._steps, 1) * 1e3,
            "idle_share": self._idle_s / whole if whole else 0.0,
        }
