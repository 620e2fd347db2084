"""How many drafts are worth it, from given times and acceptance."""

from __future__ import annotations

import random
from itertools import pairwise
from types import SimpleNamespace

import pytest
from scheduler_harness import make_request, make_scheduler

from fastinfer.engine.pace import FIRST_WAIT, LONGEST_WAIT, Pace
from fastinfer.engine.request import Request
from fastinfer.engine.static_step import query_lengths, row_buckets


def requests(count: int) -> list[Request]:
    scheduler = make_scheduler()
    return [make_request(scheduler, 3) for _ in range(count)]


class World:
    """Steps that take what a formula says; drafts that are accepted with a given chance."""

    def __init__(self, pace: Pace, running: list[Request], accept: float, found: float = 1.0):
        self.pace, self.running, self.accept, self.found = pace, running, accept, found
        self.random = random.Random(0)
        self.tokens, self.seconds = 0, 0.0
        self.log: list[int] = []

    def step(self, cost) -> None:
        k = self.pace.drafts(self.running)
        self.log.append(k)
        longest = 1
        for request in self.running:
            accepted, proposed = 0, k if self.random.random() < self.found else 0
            while accepted < proposed and self.random.random() < self.accept:
                accepted += 1
            if k:
                self.pace.learn(request, proposed, accepted)
            longest = max(longest, 1 + proposed)
            self.tokens += 1 + accepted
        seconds = cost(longest) * self.random.uniform(0.95, 1.05)
        self.pace.observe(len(self.running), longest, k > 0, seconds)
        self.seconds += seconds

    def run(self, cost, steps: int = 600) -> float:
        """Tokens per second, relative to no drafts."""
        for _ in range(steps):
            self.step(cost)
        return self.tokens / self.seconds * cost(1) / len(self.running)


def memory_bound(q: int) -> float:
    return 1.0 + 0.02 * (q - 1)


def compute_bound(q: int) -> float:
    return 0.9 * q + 0.1


def test_drafts_while_checking_is_nearly_free() -> None:
    world = World(Pace(8), requests(1), accept=0.9)
    assert world.run(memory_bound) > 3.5
    assert world.log[:3] == [0, 0, 0] and sorted(world.log[-200:])[50] == 8


def test_no_drafts_where_checking_costs_as_much_as_decoding() -> None:
    world = World(Pace(4), requests(64), accept=0.5)
    world.run(compute_bound, 100)
    world.tokens = world.seconds = 0
    start = len(world.log)
    assert world.run(compute_bound, 3000) > 0.98
    tries = [i for i, k in enumerate(world.log[start:]) if k]
    assert 1 < len(tries) < 60  # tried again, ever more rarely
    assert max(b - a for a, b in pairwise(tries)) > FIRST_WAIT


def test_another_number_of_requests_does_not_begin_anew() -> None:
    """Batches that come and go: drafts that did not pay are not tried at every change."""
    pace = Pace(4)
    worlds = [World(pace, requests(n), accept=0.3) for n in (64, 20)]
    for turn in range(100):
        for _ in range(40):
            worlds[turn % 2].step(compute_bound)
    for world in worlds:
        assert sum(k > 0 for k in world.log[1000:]) < 20


def test_few_drafts_where_few_are_accepted() -> None:
    world = World(Pace(8), requests(1), accept=0.3)
    assert world.run(lambda q: 1 + 0.1 * (q - 1), 2000) > 1.05
    on = [k for k in world.log[-1000:] if k]
    assert len(on) > 300 and 1 <= sorted(on)[len(on) // 2] <= 4


def test_it_notices_when_the_text_changes() -> None:
    running = requests(2)
    world = World(Pace(4), running, accept=0.05)
    cost = lambda q: 1 + 0.1 * (q - 1)  # noqa: E731
    world.run(cost, 1500)
    assert sum(world.log[-200:]) < 100
    world.accept = 0.95
    world.run(cost, 2 * LONGEST_WAIT)
    assert sum(world.log[-200:]) > 400


def test_nothing_found_is_not_paid_for() -> None:
    """Drafts are wanted and never there; a step that waits for its tokens takes longer."""
    world = World(Pace(4), requests(1), accept=0.9, found=0.0)

    def cost(q: int) -> float:
        return 1.0

    for _ in range(2000):
        wants = world.pace.drafts(world.running) > 0
        world.log.append(int(wants))
        if wants:
            world.pace.learn(world.running[0], 0, 0)
        world.pace.observe(1, 1, wants, 1.3 if wants else 1.0)
    assert sum(world.log[-500:]) < 100


def test_a_number_slower_than_plain_is_not_kept_for_being_near_the_best() -> None:
    pace = Pace(4)
    pace._drafts, tokens = 4, {1: 1.61, 2: 1.98, 3: 2.2, 4: 2.39}
    pace._acceptance = lambda running: SimpleNamespace(found=1.0, tokens=tokens.__getitem__)
    pace._cost = lambda k, plain, measured: 1.97 if k <= 2 else 2.46
    assert pace._best([], 1.0, []) == 2  # 1.005 of plain; 4 drafts 0.972


@pytest.mark.parametrize("drafts", range(1, 17))
def test_lengths_and_rows(drafts: int) -> None:
    lengths = query_lengths(drafts)
    assert lengths == sorted(set(lengths)) and lengths[-1] == drafts + 1
    assert len(lengths) <= 4 and lengths[0] >= 2
    rows = row_buckets(drafts)
    assert rows[0] == 1 and rows[-1] == drafts and rows == sorted(set(rows))


def test_a_burst_costs_as_much_where_nothing_is_found() -> None:
    """The same steps, found one time in five: worth it only if those without guesses are plain."""
    longest, cost, plain, steps = 5, 1.6, 1.0, 8
    ends = {}
    for found in (0.2, 0.9):
        world = World(Pace(4), requests(1), accept=0.8, found=found)
        for _ in range(600):
            k = world.pace.drafts(world.running)
            world.log.append(k)
            if not k:
                world.pace.observe(1, 1, False, plain)
                continue
            for _ in range(steps):
                proposed = k if world.random.random() < found else 0
                accepted = 0
                while accepted < proposed and world.random.random() < 0.8:
                    accepted += 1
                world.pace.learn(world.running[0], proposed, accepted)
            world.pace.observe(1, longest, True, cost, steps)
        ends[found] = sum(k > 0 for k in world.log[-100:])
    assert ends[0.2] < 20 and ends[0.9] > 80


class PaperWorld(World):
    """Guesses that cost nothing are also made where nothing is drafted."""

    def step(self, cost) -> None:
        super().step(cost)
        if not self.log[-1] and len(self.log) % 4 == 0:
            request, accepted = self.random.choice(self.running), 0
            proposed = 4 * (self.random.random() < self.found)
            while accepted < proposed and self.random.random() < self.accept:
                accepted += 1
            self.pace.learn(request, proposed, accepted)


@pytest.mark.parametrize("count", [9, 64])
def test_many_requests_are_not_tried_where_paper_says_no(count: int) -> None:
    world = PaperWorld(Pace(4, on_paper=True), requests(count), accept=0.02, found=0.5)
    world.run(memory_bound, 3000)
    assert not any(world.log)
    world.accept = world.found = 0.9  # and once it says yes, they are
    world.run(memory_bound, 2000)
    assert sorted(world.log[-200:])[50] == 4


def test_paper_does_not_switch_on_what_was_measured_not_to_pay() -> None:
    world = PaperWorld(Pace(4, on_paper=True), requests(64), accept=0.6)
    assert world.run(compute_bound, 3000) > 0.97
    assert 0 < sum(k > 0 for k in world.log) < 60


def test_one_request_is_tried_at_once() -> None:
    world = PaperWorld(Pace(4, on_paper=True), requests(1), accept=0.8)
    assert world.run(memory_bound, 40) > 1.5
    assert world.log.index(4) < 8
    world.accept = 0.0
    world.run(memory_bound, 600)
    assert sum(world.log[-400:]) < 100
    world.accept = 0.9  # soon, and not after a wait that has doubled many times
    world.run(memory_bound, 300)
    assert sorted(world.log[-100:])[20] == 4
