"""Scheduler without tensors: a fake model whose next token is a function of all tokens before it.

The fake reads the tokens through the block tables from a fake cache that is written only by the
chunks that were scheduled, so a wrong table, a stale block or a prefix that was shared too early
gives other tokens than the sequence alone.
"""

from __future__ import annotations

import itertools

from fastinfer.engine.config import EngineConfig, SamplingParams
from fastinfer.engine.metrics import RequestMetrics
from fastinfer.engine.request import Request
from fastinfer.engine.scheduler import SchedulePlan, Scheduler


def next_token(tokens: list[int]) -> int:
    return hash(tuple(tokens)) % 7


class FakeModel:
    """Cache slots hold (position, token); what is not written, or belongs elsewhere, shows."""

    def __init__(self, scheduler: Scheduler) -> None:
        self.block_size = scheduler.config.block_size
        self.slots: dict[int, tuple[int, int]] = {}
        self.drawn: dict[str, list[int]] = {}
        self.host: dict[int, dict[int, tuple[int, int]]] = {}  # block of the host -> its slots

    def run(self, plan: SchedulePlan) -> list[list[int]]:
        size = self.block_size
        for source, target in plan.swap_out:
            self.host[target] = {
                i: self.slots[source * size + i]
                for i in range(size)
                if source * size + i in self.slots
            }
        for source, target in plan.swap_in:
            for i in range(size):
                self.slots.pop(target * size + i, None)
                if i in self.host[source]:
                    self.slots[target * size + i] = self.host[source][i]
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
    swap, stages = settings.pop("swap", None), settings.pop("stages", 1)
    config = EngineConfig(model="none", **{"block_size": 4, **settings})
    return Scheduler(
        config,
        num_blocks=num_blocks,
        max_model_len=max_model_len,
        clock=clock,
        swap=swap,
        stages=stages,
    )


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
    for queue in (scheduler.running, scheduler.waiting):
        orders = [r.order for r in queue]
        assert orders == sorted(orders)
    if scheduler.swap is not None:
        held = [block for r in scheduler.requests.values() for block in r.host_blocks]
        assert sorted([*held, *scheduler.swap._free]) == list(range(scheduler.swap.num_blocks))
        assert all(not r.host_blocks for r in scheduler.running)


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
