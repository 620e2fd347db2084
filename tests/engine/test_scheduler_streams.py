"""Scheduler under random streams of requests, cancellations, preemptions, drafts and forks."""

from __future__ import annotations

import random
from collections import deque

import pytest
from engine_helpers import HOSTS
from hypothesis import given, settings
from hypothesis import strategies as st
from scheduler_harness import FakeModel, alone, check_pool, make_request, make_scheduler

from fastinfer.engine.request import Request
from fastinfer.engine.scheduler import SchedulePlan, Scheduler
from fastinfer.engine.swap import SwapSpace


@pytest.fixture(params=HOSTS, autouse=True)
def _host(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if request.param == "native":
        pytest.importorskip("fastinfer._host", reason="_host was not built")
    monkeypatch.setenv("FASTINFER_HOST", request.param)


def random_stream(seed: int) -> None:
    """Requests come, are cancelled, fight for a tiny pool; nothing is lost, leaked or changed.

    Some are further completions of a prompt, some carry drafts (mostly wrong ones), and in half of
    the streams every step is planned and run before the results of the one before are handed in.
    """
    rng = random.Random(seed)
    swap = SwapSpace(rng.choice([1, 3, 30]), 1, 1.0) if rng.random() < 0.5 else None
    priorities = rng.choice([[0], [0, 0, 1], [-1, 0, 5]])
    scheduler = make_scheduler(
        swap=swap,
        block_size=rng.choice([1, 2, 3, 4, 16]),
        num_blocks=rng.randrange(2, 24),
        max_num_batched_tokens=rng.choice([1, 2, 5, 16, 64]),
        max_num_seqs=rng.choice([1, 2, 8]),
        long_prefill_token_threshold=rng.choice([0, 0, 3]),
        enable_prefix_caching=rng.random() < 0.7,
    )
    model = FakeModel(scheduler)
    overlap = rng.random() < 0.5
    drafts = not overlap and rng.random() < 0.4
    room = min(scheduler.max_total_tokens - 1, 40)
    requests: list[Request] = []
    cancelled: set[str] = set()
    pending: tuple[SchedulePlan, list[list[int]]] | None = None
    steps = 0
    todo = rng.randrange(1, 12)
    while todo or scheduler.requests:
        while todo and (not scheduler.requests or rng.random() < 0.4):
            length = rng.randrange(1, room + 1)
            base = rng.choice([0, 0, 1])  # few beginnings, so that prefixes are shared
            prompt = [(base + i) % 3 for i in range(length)]
            first, priority = None, rng.choice(priorities)
            for _ in range(rng.choice([1, 1, 1, 2, 4])):
                request = make_request(
                    scheduler, prompt, rng.randrange(1, 20), fork_of=first, priority=priority
                )
                first = first or request
                if rng.random() < 0.3:
                    request.stop_ids = {rng.randrange(7): None}
                scheduler.add(request)
                requests.append(request)
            todo -= 1
        if scheduler.requests and rng.random() < 0.05:
            victim = rng.choice(list(scheduler.requests.values()))
            scheduler.finish(victim, "abort")
            cancelled.add(victim.request_id)
        for request in scheduler.running if drafts else ():
            space = request.max_total_tokens - len(request.tokens) - 1
            if request.num_output and rng.random() < 0.5:
                right = alone(request.tokens, rng.randrange(3))
                if rng.random() < 0.3 and request.num_computed == len(request.tokens) - 1:
                    space = min(space, scheduler.look_ahead(request, space)) if space > 0 else 0
                request.draft_tokens = [*right, rng.randrange(7)][: max(space, 0)]
        if swap is not None and rng.random() < 0.1:
            swap.prefill_rate = rng.choice([None, 1e-9, 1e9])
        pending = overlapped_step(scheduler, model, pending, keep=overlap)
        steps += 1
        assert steps < 20_000, "the engine hangs"
    if pending is not None:
        scheduler.commit(*pending)
    assert swap is None or swap.num_free == swap.num_blocks
    assert scheduler.pool.num_used == 0 and not scheduler.running and not scheduler.waiting
    for request in requests:
        prompt = request.tokens[: request.num_prompt]
        expected = alone(prompt, request.num_output)
        assert request.output_token_ids == expected
        if request.request_id not in cancelled:
            assert request.in_flight == 0 and request.draft_tokens == []
            if request.finish_reason == "stop":
                assert expected[-1] in request.stop_ids
            else:
                assert request.finish_reason == "length"
                assert len(request.tokens) == request.max_total_tokens
            assert not set(expected[:-1]) & set(request.stop_ids)


def overlapped_step(
    scheduler: Scheduler,
    model: FakeModel,
    pending: tuple[SchedulePlan, list[list[int]]] | None,
    *,
    keep: bool,
) -> tuple[SchedulePlan, list[list[int]]] | None:
    """Plan and run a step, hand in the results of the one before, and with `keep` not its own."""
    plan = scheduler.schedule()
    assert plan.num_tokens == sum(chunk.count for chunk in plan.chunks)
    assert plan.num_tokens <= scheduler.config.max_num_batched_tokens
    assert len(scheduler.running) <= scheduler.config.max_num_seqs
    assert plan.chunks or pending or plan.preempted or not scheduler.requests
    check_pool(scheduler)
    results = model.run(plan)
    if pending is not None:
        scheduler.commit(*pending)
        check_pool(scheduler)
    if keep:
        return (plan, results) if plan.chunks else None
    scheduler.commit(plan, results)
    check_pool(scheduler)
    return None


def pipelined_stream(seed: int) -> None:
    """As many steps in flight as there are stages, and no token is run before it has come back."""
    rng = random.Random(seed)
    scheduler = make_scheduler(
        stages=rng.choice([2, 3, 4]),
        swap=SwapSpace(rng.choice([1, 3, 30]), 1, 1.0) if rng.random() < 0.3 else None,
        block_size=rng.choice([1, 2, 3, 4, 16]),
        num_blocks=rng.randrange(2, 24),
        max_num_batched_tokens=rng.choice([1, 2, 5, 16, 64]),
        max_num_seqs=rng.choice([1, 2, 8]),
        enable_prefix_caching=rng.random() < 0.7,
    )
    model = FakeModel(scheduler)
    longest = min(scheduler.max_total_tokens - 1, 40)
    priorities = rng.choice([[0], [-1, 0, 5]])
    drafts = rng.random() < 0.5
    launched: deque[tuple[SchedulePlan, list[list[int]]]] = deque()
    requests: list[Request] = []
    todo = rng.randrange(1, 14)
    while todo or scheduler.requests:
        while todo and (not scheduler.requests or rng.random() < 0.4):
            prompt = [(rng.choice([0, 0, 1]) + i) % 3 for i in range(rng.randrange(1, longest + 1))]
            priority, first = rng.choice(priorities), None
            for _ in range(rng.choice([1, 1, 1, 3])):
                count = rng.randrange(1, 20)
                request = make_request(scheduler, prompt, count, fork_of=first, priority=priority)
                first = first or request
                scheduler.add(request)
                requests.append(request)
            todo -= 1
        for request in scheduler.running if drafts else ():
            space = request.max_total_tokens - len(request.tokens) - 1
            decodes = request.num_computed == len(request.tokens) - 1 and not request.in_flight
            if decodes and space > 0 and rng.random() < 0.6:
                right = alone(request.tokens, rng.randrange(3))
                request.draft_tokens = [*right, rng.randrange(7)][:space]
        plan = scheduler.schedule()
        check_pool(scheduler)
        for chunk in plan.chunks:
            known = len(chunk.request.tokens) + chunk.num_drafts
            assert chunk.start + chunk.count <= known
            assert chunk.request.in_flight == chunk.samples
        results = model.run(plan)
        if plan.chunks:
            launched.append((plan, results))
        elif launched:
            scheduler.commit(*launched.popleft())
        else:
            assert plan.preempted or not scheduler.requests
        while len(launched) > scheduler.stages - 1:
            scheduler.commit(*launched.popleft())
        check_pool(scheduler)
    while launched:
        scheduler.commit(*launched.popleft())
    assert scheduler.pool.num_used == 0
    for request in requests:
        expected = alone(request.tokens[: request.num_prompt], request.num_output)
        assert request.output_token_ids == expected and request.finish_reason == "length"


@settings(max_examples=80, deadline=None)
@given(seed=st.integers(0, 2**32))
def test_random_streams(seed: int) -> None:
    random_stream(seed)


@pytest.mark.parametrize("part", range(4))
def test_random_streams_of_pipelines(part: int) -> None:
    for seed in range(part, 600, 4):
        pipelined_stream(seed)


@pytest.mark.full
def test_ten_thousand_random_streams() -> None:
    for seed in range(10_000):
        random_stream(seed)
        pipelined_stream(seed)
