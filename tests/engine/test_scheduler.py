"""Scheduler without tensors: a fake model whose next token is a function of all tokens before it.

The fake reads the tokens through the block tables from a fake cache that is written only by the
chunks that were scheduled, so a wrong table, a stale block or a prefix that was shared too early
gives other tokens than the sequence alone.
"""

from __future__ import annotations

import itertools
import random

import pytest
from engine_helpers import HOSTS
from hypothesis import given, settings
from hypothesis import strategies as st

from fastinfer.engine.config import EngineConfig, SamplingParams
from fastinfer.engine.metrics import RequestMetrics
from fastinfer.engine.request import Request, RequestStatus
from fastinfer.engine.scheduler import SchedulePlan, Scheduler


def next_token(tokens: list[int]) -> int:
    return hash(tuple(tokens)) % 7


class FakeModel:
    """Cache slots hold (position, token); what is not written, or belongs elsewhere, shows."""

    def __init__(self, scheduler: Scheduler) -> None:
        self.block_size = scheduler.config.block_size
        self.slots: dict[int, tuple[int, int]] = {}
        self.drawn: dict[str, list[int]] = {}

    def run(self, plan: SchedulePlan) -> list[list[int]]:
        size = self.block_size
        for source, target in plan.copies:
            assert source != target
            for i in range(size):
                self.slots.pop(target * size + i, None)
                if source * size + i in self.slots:
                    self.slots[target * size + i] = self.slots[source * size + i]
        for chunk in plan.chunks:
            tokens = self.tokens_of(chunk.request)
            for position in range(chunk.start, chunk.start + chunk.count):
                self.slots[self.slot(chunk.request, position)] = (position, tokens[position])
        sampled = []
        for chunk in plan.chunks:
            end = chunk.start + chunk.count
            seen = [self.slots[self.slot(chunk.request, i)] for i in range(end)]
            assert [position for position, _ in seen] == list(range(end))
            known = [token for _, token in seen]
            assert known == self.tokens_of(chunk.request)[:end]
            if not chunk.samples:
                sampled.append([])
                continue
            # accept drafts while they are what would have been generated, then one more token
            out = [next_token(known[: end - chunk.num_drafts])]
            while (
                len(out) <= chunk.num_drafts
                and known[end - chunk.num_drafts :][len(out) - 1] == out[-1]
            ):
                out.append(next_token(known[: end - chunk.num_drafts + len(out)]))
            self.drawn[chunk.request.request_id] = known[: end - chunk.num_drafts] + out
            sampled.append(out)
        return sampled

    def tokens_of(self, request: Request) -> list[int]:
        """What the device knows: a drawn token may not have reached the request yet."""
        drawn = self.drawn.get(request.request_id, [])
        return max(request.tokens, drawn, key=len) + request.draft_tokens

    def slot(self, request: Request, position: int) -> int:
        block = request.block_table[position // self.block_size]
        return block * self.block_size + position % self.block_size


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def make_scheduler(**settings: object) -> Scheduler:
    num_blocks = settings.pop("num_blocks", 64)
    max_model_len = settings.pop("max_model_len", 1000)
    clock = settings.pop("clock", Clock())
    config = EngineConfig(model="none", **{"block_size": 4, **settings})
    return Scheduler(config, num_blocks=num_blocks, max_model_len=max_model_len, clock=clock)


IDS = itertools.count()


def make_request(
    scheduler: Scheduler, prompt: list[int] | int, max_tokens: int = 5, **more: object
) -> Request:
    tokens = list(range(100, 100 + prompt)) if isinstance(prompt, int) else list(prompt)
    return Request(
        request_id=str(next(IDS)),
        tokens=tokens,
        sampling=SamplingParams(max_tokens=max_tokens, min_tokens=more.pop("min_tokens", 0)),
        seed=0,
        max_total_tokens=min(len(tokens) + max_tokens, scheduler.max_total_tokens),
        metrics=RequestMetrics(arrival_time=scheduler.clock()),
        **more,
    )


def alone(prompt: list[int], count: int) -> list[int]:
    tokens = list(prompt)
    for _ in range(count):
        tokens.append(next_token(tokens))
    return tokens[len(prompt) :]


def check_pool(scheduler: Scheduler) -> None:
    """No block is in two live tables unless its content is shared; counts add up."""
    scheduler.pool.check_invariants()
    holders: dict[int, list[tuple[int, Request]]] = {}
    size = scheduler.config.block_size
    for request in scheduler.requests.values():
        assert len(set(request.block_table)) == len(request.block_table)
        for i, block in enumerate(request.block_table):
            holders.setdefault(block, []).append((i, request))
    for block in range(scheduler.pool.num_blocks):
        found = holders.get(block, [])
        assert scheduler.pool.ref_count(block) == len(found)
        if len(found) > 1:  # all mean the same tokens by it, and all of them are there
            content = {(i, tuple(request.tokens[: (i + 1) * size])) for i, request in found}
            assert len(content) == 1
            assert all(len(request.tokens) >= (i + 1) * size for i, request in found)
    queued = {id(r) for r in [*scheduler.waiting, *scheduler.running]}
    assert queued == {id(r) for r in scheduler.requests.values()}
    orders = [r.arrival_order for r in scheduler.running]
    assert orders == sorted(orders)
    orders = [r.arrival_order for r in scheduler.waiting]
    assert orders == sorted(orders)


def step(scheduler: Scheduler, model: FakeModel) -> SchedulePlan:
    plan = scheduler.schedule()
    assert plan.num_tokens == sum(chunk.count for chunk in plan.chunks)
    assert plan.num_tokens <= scheduler.config.max_num_batched_tokens
    assert len(scheduler.running) <= scheduler.config.max_num_seqs
    assert all(chunk.count > 0 for chunk in plan.chunks)
    assert len({chunk.request.request_id for chunk in plan.chunks}) == len(plan.chunks)
    assert plan.chunks or not scheduler.requests
    check_pool(scheduler)
    scheduler.commit(plan, model.run(plan))
    check_pool(scheduler)
    return plan


def run_all(scheduler: Scheduler, model: FakeModel, limit: int = 5000) -> list[SchedulePlan]:
    plans = []
    while scheduler.requests:
        plans.append(step(scheduler, model))
        assert len(plans) < limit, "the engine hangs"
    assert scheduler.pool.num_used == 0
    return plans


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
        [first, other],
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


def random_stream(seed: int) -> None:
    """Requests come, are cancelled, fight for a tiny pool; nothing is lost, leaked or changed.

    Some are further completions of a prompt, some carry drafts (mostly wrong ones), and in half of
    the streams every step is planned and run before the results of the one before are handed in.
    """
    rng = random.Random(seed)
    scheduler = make_scheduler(
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
            first = None
            for _ in range(rng.choice([1, 1, 1, 2, 4])):
                request = make_request(scheduler, prompt, rng.randrange(1, 20), fork_of=first)
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
                request.draft_tokens = [*right, rng.randrange(7)][: max(space, 0)]
        pending = overlapped_step(scheduler, model, pending, keep=overlap)
        steps += 1
        assert steps < 20_000, "the engine hangs"
    if pending is not None:
        scheduler.commit(*pending)
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


@settings(max_examples=80, deadline=None)
@given(seed=st.integers(0, 2**32))
def test_random_streams(seed: int) -> None:
    random_stream(seed)


@pytest.mark.full
def test_ten_thousand_random_streams() -> None:
    for seed in range(10_000):
        random_stream(seed)
