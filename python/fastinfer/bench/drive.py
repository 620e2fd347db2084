"""Sends a workload to an engine at the given times and collects the timelines."""

from __future__ import annotations

import sys
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TextIO

from ..engine.config import SamplingParams
from ..engine.core import EngineCore
from ..engine.generation import Generation
from ..engine.metrics import EngineStats, RequestMetrics
from .workloads import Conversation

_NAP = 0.05  # seconds: longest sleep while nothing is due


@dataclass(slots=True)
class LoadResult:
    """One timeline per request and, where it is known, what the engine did meanwhile."""

    records: list[RequestMetrics]
    duration: float  # seconds, from the start to the last token
    engine: EngineWork | None = None


@dataclass(slots=True)
class EngineWork:
    """Counts over one load test, or added up over several."""

    num_steps: int
    num_preemptions: int
    prefix_hit_tokens: int
    prefix_query_tokens: int
    kv_blocks_peak: int
    kv_blocks_total: int

    @classmethod
    def between(cls, before: EngineStats, after: EngineStats) -> EngineWork:
        """What was done between two looks at an engine."""
        return cls(
            num_steps=after.num_steps - before.num_steps,
            num_preemptions=after.num_preemptions - before.num_preemptions,
            prefix_hit_tokens=after.prefix_hit_tokens - before.prefix_hit_tokens,
            prefix_query_tokens=after.prefix_query_tokens - before.prefix_query_tokens,
            kv_blocks_peak=after.kv_blocks_peak,
            kv_blocks_total=after.kv_blocks_total,
        )

    def __add__(self, other: EngineWork) -> EngineWork:
        return EngineWork(
            num_steps=self.num_steps + other.num_steps,
            num_preemptions=self.num_preemptions + other.num_preemptions,
            prefix_hit_tokens=self.prefix_hit_tokens + other.prefix_hit_tokens,
            prefix_query_tokens=self.prefix_query_tokens + other.prefix_query_tokens,
            kv_blocks_peak=max(self.kv_blocks_peak, other.kv_blocks_peak),
            kv_blocks_total=self.kv_blocks_total,
        )


class Progress:
    """A line on the terminal that says how far the test is; silent anywhere else.

    Args:
        total: Requests.
        label: In front.
        stream: Where to; None is stderr.
    """

    def __init__(self, total: int, label: str = "", stream: TextIO | None = None) -> None:
        self._stream = stream or sys.stderr
        self._on = self._stream.isatty()
        self._total, self._label = total, label
        self._last = 0.0

    def show(self, done: int, tokens: int, seconds: float, stats: EngineStats) -> None:
        """Draw the line, at most five times a second."""
        if not self._on or seconds - self._last < 0.2:
            return
        self._last = seconds
        rate = tokens / seconds if seconds > 0 else 0.0
        self._stream.write(
            f"\r{self._label}{done}/{self._total} done, {stats.running} running, "
            f"{stats.waiting} waiting, {rate:,.0f} tok/s, cache {stats.kv_cache_usage:.0%}, "
            f"{seconds:.0f} s\x1b[K"
        )
        self._stream.flush()

    def show_sent(self, sent: int, tokens: int, seconds: float) -> None:
        """Draw the line of a client, which sees the requests it has sent and their tokens."""
        if self._on:
            self._stream.write(
                f"\r{self._label}{sent}/{self._total} sent, "
                f"{tokens / max(seconds, 1e-9):,.0f} tok/s, {seconds:.0f} s\x1b[K"
            )
            self._stream.flush()

    def clear(self) -> None:
        """Remove the line."""
        if self._on:
            self._stream.write("\r\x1b[K")
            self._stream.flush()


@dataclass(slots=True, eq=False)
class _Active:
    conversation: Conversation
    turn: int
    generation: Generation


def run_load(
    core: EngineCore,
    conversations: Sequence[Conversation],
    arrivals: Sequence[float],
    *,
    max_concurrency: int | None = None,
    sampling: SamplingParams | None = None,
    progress: Progress | None = None,
) -> LoadResult:
    """Run a workload to its end.

    A request's clock starts when it is due, also when the engine is in the middle of a step then.
    With `max_concurrency` it starts when a place is free: a client that waits does not ask.

    Args:
        core: The engine, idle. Its prefix cache is emptied first.
        conversations: What to ask.
        arrivals: When, in seconds from the start, one per conversation; a conversation's own
            `arrival` wins.
        max_concurrency: Most conversations at once (closed loop); None is no limit.
        sampling: Of every request; max_tokens comes from the workload. None is greedy.
        progress: Where to say how far it is.

    Raises:
        ValueError: A request could never run.
        RuntimeError: A step failed; all requests have ended.
    """
    sampling = sampling or SamplingParams(temperature=0.0)
    pairs = zip(conversations, arrivals, strict=True)
    due = [(c.arrival if c.arrival is not None else t, i, c) for i, (c, t) in enumerate(pairs)]
    todo = deque(sorted(due))
    total = sum(len(conversation.turns) for conversation in conversations)
    before = core.stats()
    core.scheduler.pool.clear_cache()  # or the same work would be less the second time
    core.scheduler.peak_blocks = 0
    records: list[RequestMetrics] = []
    active: list[_Active] = []
    tokens, ended = 0, core.num_ended
    start = core.clock()
    try:
        while todo or active:
            now = core.clock() - start
            while todo and todo[0][0] <= now:
                if max_concurrency is not None and len(active) >= max_concurrency:
                    break
                when, _, conversation = todo.popleft()
                asked = start + when if max_concurrency is None else core.clock()
                active.append(_ask(core, conversation, 0, [], sampling, asked))
            if not core.has_work:
                time.sleep(min(max(todo[0][0] - now, 0.0), _NAP))
                continue
            core.step()
            if core.num_ended == ended:
                continue
            ended = core.num_ended
            still: list[_Active] = []
            for each in active:
                if not each.generation.finished:
                    still.append(each)
                    continue
                metrics = each.generation.completions[0].request.metrics
                records.append(metrics)
                tokens += metrics.num_output_tokens
                following = _next_turn(core, each, sampling)
                if following is not None:
                    still.append(following)
            active = still
            if progress is not None:
                progress.show(len(records), tokens, core.clock() - start, core.stats())
    finally:
        core.abort([each.generation for each in active])
        if progress is not None:
            progress.clear()
    assert len(records) == total
    return LoadResult(
        records=records,
        duration=max((r.last_token_time or start for r in records), default=start) - start,
        engine=EngineWork.between(before, core.stats()),
    )


def _ask(
    core: EngineCore,
    conversation: Conversation,
    turn: int,
    past: list[int],
    sampling: SamplingParams,
    asked: float,
) -> _Active:
    wanted = conversation.turns[turn]
    params = sampling.copy()
    params.max_tokens = wanted.max_tokens
    params.ignore_eos = True
    prompt = past + wanted.tokens
    (generation,) = core.add([(None, prompt, params)], arrival_time=asked)
    return _Active(conversation, turn, generation)


def _next_turn(core: EngineCore, done: _Active, sampling: SamplingParams) -> _Active | None:
    request = done.generation.completions[0].request
    if done.turn + 1 == len(done.conversation.turns):
        return None
    asked = request.metrics.last_token_time
    assert asked is not None
    return _ask(core, done.conversation, done.turn + 1, request.tokens, sampling, asked)
