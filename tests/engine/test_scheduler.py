"""Scheduler without tensors, on the fake model of scheduler_harness.py, one behaviour at a time."""

from __future__ import annotations

import random

import pytest
from engine_helpers import HOSTS
from scheduler_harness import (
    Clock,
    FakeModel,
    alone,
    check_pool,
    make_request,
    make_scheduler,
    run_all,
    step,
)

from fastinfer.engine.request import Request, RequestStatus


@pytest.fixture(params=HOSTS, autouse=True)
def _host(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if request.param == "native":
        pytest.importorskip("fastinfer._host", reason="_host was not built")
    monkeypatch.setenv("FASTINFER_HOST", request.param)


def test_one_request_runs_prompt_then_one_token_per_step() -> None:
    scheduler = make_scheduler()
    model = FakeModel(scheduler)
    request = make_request(scheduler, 6, max_tokens=3)
    scheduler.add(request)
    plans = run_all(scheduler, model)
    assert [[(c.start, c.count, c.samples) for c in p.chunks] for p in plans] == [
        [(0, 6, True)],
        [(6, 1, True)],
        [(7, 1, True)],
    ]
    assert request.output_token_ids == alone(request.tokens[:6], 3)
    assert (request.status, request.finish_reason) == (RequestStatus.FINISHED, "length")


def test_a_long_prompt_is_cut_and_does_not_hold_up_decoding() -> None:
    scheduler = make_scheduler(max_num_batched_tokens=8)
    model = FakeModel(scheduler)
    first, second = make_request(scheduler, 3, 20), make_request(scheduler, 30, 2)
    scheduler.add(first)
    step(scheduler, model)
    scheduler.add(second)
    for expected_start in (0, 7, 14, 21):
        plan = step(scheduler, model)
        assert [(c.request, c.count, c.samples) for c in plan.chunks] == [
            (first, 1, True),
            (second, 7, False),
        ]
        assert plan.chunks[1].start == expected_start
    plan = step(scheduler, model)
    assert [(c.request, c.count, c.samples) for c in plan.chunks] == [
        (first, 1, True),
        (second, 2, True),
    ]
    run_all(scheduler, model)
    assert second.output_token_ids == alone(list(range(100, 130)), 2)


def test_long_prefill_threshold_caps_a_chunk() -> None:
    scheduler = make_scheduler(max_num_batched_tokens=64, long_prefill_token_threshold=10)
    scheduler.add(make_request(scheduler, 25, 1))
    plans = run_all(scheduler, FakeModel(scheduler))
    assert [plan.num_tokens for plan in plans] == [10, 10, 5]


def test_first_come_first_served() -> None:
    scheduler = make_scheduler(max_num_seqs=2)
    model = FakeModel(scheduler)
    requests = [make_request(scheduler, 3 + i, 4) for i in range(6)]
    for request in requests:
        scheduler.add(request)
    started: list[Request] = []
    while scheduler.requests:
        for chunk in step(scheduler, model).chunks:
            if chunk.request not in started:
                started.append(chunk.request)
    assert started == requests


def test_single_token_prompts_and_single_token_outputs() -> None:
    scheduler = make_scheduler(max_num_batched_tokens=3)
    model = FakeModel(scheduler)
    requests = [make_request(scheduler, [i], 1) for i in range(10)]
    for request in requests:
        scheduler.add(request)
    run_all(scheduler, model)
    assert [r.output_token_ids for r in requests] == [alone([i], 1) for i in range(10)]
    assert all(r.metrics.tpot is None for r in requests)


def test_prompts_that_cannot_run_are_refused_at_once() -> None:
    scheduler = make_scheduler(num_blocks=4, max_model_len=1000)
    for prompt, message in [
        (0, "at least one token"),
        (17, r"fit into the KV cache of 16 tokens \(4 blocks of 4\), got 17"),
    ]:
        with pytest.raises(ValueError, match=message):
            scheduler.add(make_request(scheduler, prompt))
    assert not scheduler.requests and not scheduler.waiting
    short = make_scheduler(max_model_len=10)
    with pytest.raises(ValueError, match="shorter than max_model_len 10 to leave room"):
        short.add(make_request(short, 10))
    request = make_request(scheduler, 3)
    scheduler.add(request)
    with pytest.raises(ValueError, match="request_id must be unique"):
        scheduler.add(request)
    run_all(scheduler, FakeModel(scheduler))


def test_a_prompt_as_large_as_the_cache_gives_one_token() -> None:
    scheduler = make_scheduler(num_blocks=4)
    request = make_request(scheduler, 16, 100)
    scheduler.add(request)
    run_all(scheduler, FakeModel(scheduler))
    assert request.output_token_ids == alone(list(range(100, 116)), 1)
    assert request.finish_reason == "length"


def test_output_ends_where_the_cache_or_the_model_ends() -> None:
    scheduler = make_scheduler(num_blocks=4)
    request = make_request(scheduler, 5, 100)
    scheduler.add(request)
    run_all(scheduler, FakeModel(scheduler))
    assert len(request.tokens) == 17 and request.finish_reason == "length"
    scheduler = make_scheduler(max_model_len=9)
    request = make_request(scheduler, 5, 100)
    scheduler.add(request)
    run_all(scheduler, FakeModel(scheduler))
    assert len(request.tokens) == 9


@pytest.mark.parametrize("prefix_caching", [False, True])
def test_preemption_does_not_change_the_output(prefix_caching: bool) -> None:
    scheduler = make_scheduler(num_blocks=9, enable_prefix_caching=prefix_caching)
    model = FakeModel(scheduler)
    prompts = [[i, i + 1, 5, 6, 7] for i in range(5)]
    requests = [make_request(scheduler, prompt, 14) for prompt in prompts]
    for request in requests:
        scheduler.add(request)
    plans = run_all(scheduler, model)
    assert scheduler.num_preemptions > 0
    assert sum(len(plan.preempted) for plan in plans) == scheduler.num_preemptions
    assert requests[0].metrics.num_preemptions == 0  # the oldest never gives way
    for request, prompt in zip(requests, prompts, strict=True):
        assert request.output_token_ids == alone(prompt, 14)
        assert len(request.metrics.token_times) == 14


def test_nobody_is_admitted_in_a_step_that_preempts() -> None:
    scheduler = make_scheduler(num_blocks=6)
    model = FakeModel(scheduler)
    for _ in range(4):
        scheduler.add(make_request(scheduler, 4, 12))
    admitted: set[str] = set()
    while scheduler.requests:
        plan = step(scheduler, model)
        new = {c.request.request_id for c in plan.chunks} - admitted
        assert not (plan.preempted and new)
        admitted |= new
        admitted -= set(plan.preempted)


def test_admission_leaves_running_requests_room_to_grow() -> None:
    scheduler = make_scheduler(num_blocks=8)
    model = FakeModel(scheduler)
    long, late = make_request(scheduler, 16, 8), make_request(scheduler, list(range(15)), 2)
    scheduler.add(long)
    step(scheduler, model)
    scheduler.add(late)
    # 4 blocks free at first, 3 soon: the 4 blocks of the newcomer would leave none to grow into
    for _ in range(6):
        plan = step(scheduler, model)
        assert [c.request for c in plan.chunks] == [long]
    run_all(scheduler, model)
    assert scheduler.num_preemptions == 0


def test_stop_tokens_and_min_tokens() -> None:
    prompt = [1, 2, 3]
    expected = alone(prompt, 8)
    stop = expected[2]
    at = expected.index(stop)
    scheduler = make_scheduler()
    by_id = make_request(scheduler, prompt, 8, stop_ids={stop: stop})
    by_eos = make_request(scheduler, prompt, 8, stop_ids={stop: None})
    later = make_request(scheduler, prompt, 8, stop_ids={stop: None}, min_tokens=at + 2)
    for request in (by_id, by_eos, later):
        scheduler.add(request)
    run_all(scheduler, FakeModel(scheduler))
    assert by_id.output_token_ids == by_eos.output_token_ids == expected[: at + 1]
    assert (by_id.finish_reason, by_id.stop_reason) == ("stop", stop)
    assert (by_eos.finish_reason, by_eos.stop_reason) == ("stop", None)
    assert len(later.output_token_ids) >= at + 2


@pytest.mark.parametrize("when", ["waiting", "running", "preempted", "finished"])
def test_cancelling_in_any_state_frees_the_blocks(when: str) -> None:
    scheduler = make_scheduler(num_blocks=6)
    model = FakeModel(scheduler)
    first, second = make_request(scheduler, 7, 12), make_request(scheduler, 7, 12)
    scheduler.add(first)
    scheduler.add(second)
    if when != "waiting":
        step(scheduler, model)
    while when == "preempted" and second.status is not RequestStatus.PREEMPTED:
        step(scheduler, model)
    while when == "finished" and not second.finished:
        step(scheduler, model)
    reason = "length" if when == "finished" else "abort"
    for _ in range(2):  # the second time it has ended already
        scheduler.finish(second, "abort")
        assert second.finish_reason == reason and second.finished and not second.block_table
        check_pool(scheduler)
    run_all(scheduler, model)
    assert first.output_token_ids == alone(list(range(100, 107)), 12)


def test_a_request_that_ended_while_its_step_ran_is_left_alone() -> None:
    scheduler = make_scheduler()
    model = FakeModel(scheduler)
    stays, goes = make_request(scheduler, 5), make_request(scheduler, 5)
    scheduler.add(stays)
    scheduler.add(goes)
    plan = scheduler.schedule()
    tokens = model.run(plan)
    scheduler.finish(goes, "abort")
    assert scheduler.commit(plan, tokens) == [stays]
    assert goes.num_output == 0
    run_all(scheduler, model)


def test_prefix_reuse_runs_only_the_rest() -> None:
    scheduler = make_scheduler()
    model = FakeModel(scheduler)
    prefix = list(range(16))
    first = make_request(scheduler, [*prefix, 50, 51], 3)
    scheduler.add(first)
    run_all(scheduler, model)
    second = make_request(scheduler, [*prefix, 60], 3)
    third = make_request(scheduler, [*prefix[:9], 61], 3)
    scheduler.add(second)
    scheduler.add(third)
    plan = step(scheduler, model)
    assert [(c.start, c.count) for c in plan.chunks] == [(16, 1), (8, 2)]
    assert second.block_table[:2] == third.block_table[:2]
    run_all(scheduler, model)
    assert second.output_token_ids == alone([*prefix, 60], 3)
    assert third.output_token_ids == alone([*prefix[:9], 61], 3)
    assert second.metrics.num_cached_tokens == 16 and third.metrics.num_cached_tokens == 8
    assert scheduler.prefix_hit_tokens == 24


def test_a_fully_cached_prompt_still_runs_one_token() -> None:
    scheduler = make_scheduler()
    model = FakeModel(scheduler)
    for _ in range(2):
        request = make_request(scheduler, 16, 2)
        scheduler.add(request)
        plan = step(scheduler, model)
        run_all(scheduler, model)
    assert [(c.start, c.count, c.samples) for c in plan.chunks] == [(12, 4, True)]
    assert request.output_token_ids == alone(list(range(100, 116)), 2)


def test_a_block_is_not_shared_before_it_was_computed() -> None:
    scheduler = make_scheduler(max_num_batched_tokens=40)
    model = FakeModel(scheduler)
    twins = [make_request(scheduler, 16, 3) for _ in range(2)]
    for request in twins:
        scheduler.add(request)
    plan = step(scheduler, model)  # both in the same step: neither can have the other's blocks
    assert [(c.start, c.count) for c in plan.chunks] == [(0, 16), (0, 16)]
    assert not set(twins[0].block_table) & set(twins[1].block_table)
    run_all(scheduler, model)
    assert twins[0].output_token_ids == twins[1].output_token_ids


def test_without_prefix_caching_nothing_is_reused() -> None:
    scheduler = make_scheduler(enable_prefix_caching=False)
    for _ in range(2):
        scheduler.add(make_request(scheduler, 16, 2))
        plans = run_all(scheduler, FakeModel(scheduler))
        assert plans[0].num_tokens == 16
    assert scheduler.pool.num_cached == 0


def test_drafts_are_verified_and_rolled_back() -> None:
    """The seam for speculation: drafts are pending tokens like any others."""
    prompt = [3, 1, 4, 1, 5]
    truth = alone(prompt, 12)
    rng = random.Random(1)
    scheduler = make_scheduler()
    model = FakeModel(scheduler)
    request = make_request(scheduler, prompt, 12)
    scheduler.add(request)
    steps = 0
    while scheduler.requests:
        if request.num_output:
            right = truth[request.num_output : request.num_output + rng.randrange(4)]
            room = request.max_total_tokens - len(request.tokens) - 1
            request.draft_tokens = [*right, 99][: max(room, 0)]
        step(scheduler, model)
        steps += 1
    assert request.output_token_ids == truth
    assert steps < 12
    assert sum(request.metrics.token_counts) == 12


def test_state_machine_refuses_other_arrows() -> None:
    scheduler = make_scheduler()
    request = make_request(scheduler, 3)
    with pytest.raises(RuntimeError, match="must not go from waiting to preempted"):
        request.move_to(RequestStatus.PREEMPTED)
    request.move_to(RequestStatus.FINISHED)
    with pytest.raises(RuntimeError, match="must not go from finished to running"):
        request.move_to(RequestStatus.RUNNING)


def test_timestamps_follow_the_clock() -> None:
    clock = Clock()
    scheduler = make_scheduler(clock=clock)
    model = FakeModel(scheduler)
    request = make_request(scheduler, 3, 3)
    scheduler.add(request)
    clock.now = 1.0
    plan = scheduler.schedule()
    clock.now = 1.5
    scheduler.commit(plan, model.run(plan))
    clock.now = 2.0
    run_all(scheduler, model)
    metrics = request.metrics
    assert metrics.first_scheduled_time == 1.0 and metrics.token_times == [1.5, 2.0, 2.0]
    assert metrics.finished_time == 2.0 and metrics.ttft == 1.5


def test_completions_of_a_prompt_compute_it_once_and_copy_on_write() -> None:
    for prefix_caching in (False, True):
        scheduler = make_scheduler(enable_prefix_caching=prefix_caching)
        model = FakeModel(scheduler)
        first = make_request(scheduler, 14, 6)
        twins = [make_request(scheduler, 14, 6, fork_of=first) for _ in range(2)]
        for request in (first, *twins):
            scheduler.add(request)
        plan = step(scheduler, model)
        assert [(c.request, c.start, c.count) for c in plan.chunks] == [(first, 0, 14)]
        plan = step(scheduler, model)
        assert [(c.request, c.start, c.count) for c in plan.chunks] == [
            (first, 14, 1),
            (twins[0], 13, 1),
            (twins[1], 13, 1),
        ]
        # 13 tokens: three full blocks are shared, the fourth is copied to each
        assert twins[0].block_table[:3] == twins[1].block_table[:3] == first.block_table[:3]
        last = first.block_table[3]
        assert plan.copies == [(last, t.block_table[3]) for t in twins]
        assert len({last, *(t.block_table[3] for t in twins)}) == 3
        assert scheduler.pool.num_used == 3 + 3
        assert twins[0].metrics.num_cached_tokens == 13
        run_all(scheduler, model)
        for request in (first, *twins):
            assert request.output_token_ids == alone(list(range(100, 114)), 6)


def test_a_shared_prompt_that_ends_on_a_block_needs_no_copy() -> None:
    scheduler = make_scheduler()
    model = FakeModel(scheduler)
    first = make_request(scheduler, 13, 6)
    twin = make_request(scheduler, 13, 6, fork_of=first)
    scheduler.add(first)
    scheduler.add(twin)
    step(scheduler, model)
    plan = step(scheduler, model)
    assert not plan.copies and (plan.chunks[1].start, plan.chunks[1].count) == (12, 1)
    run_all(scheduler, model)
    assert twin.output_token_ids == alone(list(range(100, 113)), 6)


def test_nobody_waits_behind_a_completion_whose_prompt_is_being_computed() -> None:
    scheduler = make_scheduler(max_num_batched_tokens=8)
    model = FakeModel(scheduler)
    first = make_request(scheduler, 20, 3)
    twin, other = make_request(scheduler, 20, 3, fork_of=first), make_request(scheduler, [1], 3)
    for request in (first, twin, other):
        scheduler.add(request)
    plans = [step(scheduler, model) for _ in range(3)]
    assert [[c.request for c in plan.chunks] for plan in plans] == [
        [first],
        [first],
        [other, first],  # decodes come first
    ]
    scheduler.finish(first, "abort")  # the twin then computes the prompt, or finds it in the cache
    run_all(scheduler, model)
    assert twin.output_token_ids == alone(list(range(100, 120)), 3)


def test_drafts_are_dropped_before_anybody_is_preempted_for_them() -> None:
    scheduler = make_scheduler(num_blocks=4, block_size=4)
    model = FakeModel(scheduler)
    first, second = make_request(scheduler, 6, 8), make_request(scheduler, [5, 4, 3], 3)
    scheduler.add(first)
    scheduler.add(second)
    step(scheduler, model)
    assert scheduler.pool.num_free == 1
    first.draft_tokens = [1, 1, 1, 1, 1, 1]  # would need two more blocks
    plan = step(scheduler, model)
    assert not plan.preempted and [c.count for c in plan.chunks] == [1, 1]
    run_all(scheduler, model)
    assert first.output_token_ids == alone(list(range(100, 106)), 8)


def test_a_step_is_planned_before_the_tokens_of_the_last_one_are_known() -> None:
    scheduler = make_scheduler()
    model = FakeModel(scheduler)
    request = make_request(scheduler, 6, 3)
    scheduler.add(request)
    first = scheduler.schedule()
    tokens = model.run(first)
    second = scheduler.schedule()
    assert request.num_output == 0
    assert [(c.start, c.count, c.samples) for c in second.chunks] == [(6, 1, True)]
    more = model.run(second)
    assert scheduler.commit(first, tokens) == [request] and request.num_output == 1
    third = scheduler.schedule()
    last = model.run(third)
    assert not scheduler.schedule().chunks  # the third token is in flight and there is no fourth
    scheduler.commit(second, more)
    scheduler.commit(third, last)
    assert request.finish_reason == "length"
    assert request.output_token_ids == alone(list(range(100, 106)), 3)
    assert scheduler.pool.num_used == 0
