"""What a step is to do: the scheduler's answer. No tensors."""

from __future__ import annotations

from dataclasses import dataclass, field

from .request import Request


@dataclass(slots=True)
class ScheduledChunk:
    """`count` tokens of a request from position `start` on; drafts are the last `num_drafts`."""

    request: Request
    start: int
    count: int
    num_drafts: int
    samples: bool  # reaches the end of the tokens, so the step yields tokens for it


@dataclass(slots=True)
class SchedulePlan:
    """One step: what to run, what was preempted for it, which blocks to copy before it.

    Blocks move in the order `swap_out`, `swap_in`, `copies`, each (source, destination); a plan
    without chunks may have some.
    """

    chunks: list[ScheduledChunk] = field(default_factory=list)  # those of one token first
    preempted: list[str] = field(default_factory=list)
    swap_out: list[tuple[int, int]] = field(default_factory=list)  # from the device to the host
    swap_in: list[tuple[int, int]] = field(default_factory=list)  # from the host to the device
    copies: list[tuple[int, int]] = field(default_factory=list)
    num_tokens: int = 0
    burst: tuple[int, int] | None = None  # (steps, drafts per step) of speculation, see bursts.py
