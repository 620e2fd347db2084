"""The loops of a decode step in C++: the same plans, tokens and arrays as without them."""

from __future__ import annotations

import random
from types import ModuleType

import numpy as np
import pytest
from engine_helpers import load_host_module
from scheduler_harness import FakeModel, make_request, make_scheduler

from fastinfer.engine.metrics import RequestMetrics
from fastinfer.engine.request import Request, RequestStatus
from fastinfer.engine.scheduler import ScheduledChunk, SchedulePlan


def history(host: str, seed: int, monkeypatch: pytest.MonkeyPatch) -> list[object]:
    """Everything a scheduler did with a stream of requests, planned one step ahead."""
    monkeypatch.setenv("FASTINFER_HOST", host)
    rng = random.Random(seed)
    scheduler = make_scheduler(
        block_size=rng.choice([1, 2, 4]),
        num_blocks=rng.randrange(10, 40),
        max_num_batched_tokens=rng.choice([4, 7, 64]),
        max_num_seqs=rng.choice([3, 8]),
    )
    model, packers = FakeModel(scheduler), [load_host_module(name) for name in ("python", host)]
    requests = [
        make_request(scheduler, rng.randrange(1, 9), rng.randrange(1, 12)) for _ in range(12)
    ]
    for request in requests:
        request.followed = rng.random() < 0.7
        if rng.random() < 0.3:
            request.stop_ids = {rng.randrange(7): None}
        scheduler.add(request)
    number = {request.request_id: i for i, request in enumerate(requests)}
    told: list[object] = []
    waiting: tuple[SchedulePlan, list[list[int]]] | None = None
    while scheduler.requests:
        plan = scheduler.schedule()
        told.append(
            [
                (number[c.request.request_id], c.start, c.count, c.num_drafts, c.samples)
                for c in plan.chunks
            ]
        )
        told.append([list(request.block_table) for request in requests])
        check_packers(packers, plan)
        drawn = model.run(plan)
        if waiting is not None:
            done, tokens = waiting
            plain = rng.random() < 0.5  # single tokens may come without a list around them
            single = [t[0] if plain and len(t) == 1 else t for t in tokens]
            updated = scheduler.commit(done, single)
            told.append([number[request.request_id] for request in updated])
        waiting = (plan, drawn)
    scheduler.pool.check_invariants()
    for request in requests:
        told.append((request.tokens, request.finish_reason, request.num_registered))
        told.append((request.block_hashes, request.in_flight, request.num_computed))
        told.append((request.metrics.token_times, request.metrics.token_counts))
    return told


def check_packers(hosts: list[ModuleType], plan: SchedulePlan) -> None:
    packers = [host.DecodePacker(Request, ScheduledChunk) for host in hosts]
    plain = [packer.plain(plan.chunks) for packer in packers]
    assert plain[0] == plain[1]
    results = []
    requests = [chunk.request for chunk in plan.chunks]
    before = [request.blocks_sent for request in requests]
    for packer in packers:
        for request, sent in zip(requests, before, strict=True):
            request.blocks_sent = sent
        arrays = [np.full(len(plan.chunks) + 1, -7) for _ in range(3)]
        tables = np.full((8, 64), -7, dtype=np.int32)
        news: list[Request] = []
        told = packer.pack(plan.chunks, *arrays, tables, news)
        sent_now = [request.blocks_sent for request in requests]
        new_ids = [request.request_id for request in news]
        results.append((told, [a.tolist() for a in (*arrays, tables)], new_ids, sent_now))
    assert results[0] == results[1]
    for request in news:
        request.blocks_sent = len(request.block_table)
    for request in requests:
        assert request.blocks_sent == len(request.block_table)


@pytest.mark.parametrize("seed", range(20))
def test_both_hosts_fill_the_same_columns(seed: int) -> None:
    rng = np.random.default_rng(seed)
    count, rows, block_size = int(rng.integers(0, 7)), 9, int(rng.integers(1, 5))
    tables = rng.integers(0, 2**31, (rows, 6), dtype=np.int32)
    temperatures = np.zeros(rows, dtype=np.float32)
    if seed % 2:
        temperatures[:] = rng.random(rows) * (rng.random(rows) < 0.3)
    arguments = (
        rng.permutation(rows)[:count],
        rng.integers(0, 6 * block_size, count),
        np.where(rng.random(count) < 0.5, -1, rng.integers(0, 99, count)),
        1000 + np.arange(rows),
    )
    results = []
    for name in ("python", "native"):
        kinds = dict.fromkeys(("input_ids", "source", "positions", "slots"), np.int64)
        kinds |= {"seq_lens": np.int32, "temperature": np.float32}
        columns = {key: np.full(rows, -7, dtype=kind) for key, kind in kinds.items()}
        drawn_at = np.arange(rows) + 100
        packer = load_host_module(name).DecodePacker(Request, ScheduledChunk)
        greedy = packer.fill(*arguments, drawn_at, tables, temperatures, block_size, columns)
        results.append((greedy, drawn_at.tolist(), {k: c.tolist() for k, c in columns.items()}))
    assert results[0] == results[1]
    assert results[0][0] == (not temperatures[arguments[0]].any())


@pytest.mark.parametrize("seed", range(8))
def test_both_hosts_gather_the_same_tables(seed: int) -> None:
    rng = np.random.default_rng(seed)
    tables = rng.integers(0, 2**31, (9, 7), dtype=np.int32)
    rows, width = rng.permutation(9)[: rng.integers(0, 9)], int(rng.integers(0, 8))
    for name in ("python", "native"):
        out = np.full(9 * 7, -7, dtype=np.int32)
        load_host_module(name).DecodePacker.gather(tables, rows, width, out)
        size = len(rows) * width
        assert out[:size].reshape(len(rows), width).tolist() == tables[rows, :width].tolist()
        assert (out[size:] == -7).all()


@pytest.mark.parametrize("seed", range(40))
def test_both_hosts_do_the_same(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    load_host_module("native")
    assert history("native", seed, monkeypatch) == history("python", seed, monkeypatch)


def test_misuse_is_an_error() -> None:
    host = load_host_module("native")
    pool = host.BlockPool(4)
    loop = host.DecodeLoop(
        Request, RequestMetrics, ScheduledChunk, RequestStatus.RUNNING, pool, block_size=4
    )
    packer = host.DecodePacker(Request, ScheduledChunk)
    request = make_request(make_scheduler(), 3)
    chunk = ScheduledChunk(request, 0, 1, 0, True)
    tables = np.zeros((1, 1), dtype=np.int32)
    with pytest.raises(TypeError, match="must hold objects of"):
        loop.plan([chunk], 0, 5, [])
    with pytest.raises(TypeError, match="must hold objects of"):
        loop.commit([request], [[1]], 0, 0.0, True, [])
    with pytest.raises(ValueError, match="tokens for every chunk"):
        loop.commit([chunk], [], 0, 0.0, True, [])
    with pytest.raises(ValueError, match="one number per chunk"):
        packer.pack([chunk], *(np.empty(0, dtype=np.int64) for _ in range(3)), tables, [])
    with pytest.raises(TypeError):  # the arrays are written to: no copies
        packer.pack([chunk], *(np.empty(1, dtype=np.int32) for _ in range(3)), tables, [])
    one = np.zeros(1, dtype=np.int64)
    names = ("input_ids", "source", "positions", "slots", "seq_lens", "temperature")
    columns = {name: np.zeros(1, dtype=np.int64) for name in names}
    floats = np.zeros(1, dtype=np.float32)
    with pytest.raises(TypeError, match="column seq_lens must be an array of its type"):
        packer.fill(one, one, one, one, one, tables, floats, 4, columns)
    columns |= {"seq_lens": np.zeros(1, dtype=np.int32), "temperature": floats}
    for row, start in ((1, 0), (-1, 0), (0, 4), (0, -1)):
        with pytest.raises(ValueError, match="not in the tables"):
            packer.fill(one + row, one + start, one, one, one, tables, floats, 4, columns)
    for rows, width, size in ((one, 2, 9), (one, -1, 9), (one, 1, 0), (one + 1, 1, 9)):
        with pytest.raises(ValueError, match="gather"):
            packer.gather(tables, rows, width, np.empty(size, dtype=np.int32))
    with pytest.raises(TypeError):
        packer.gather(tables, one, 1, np.empty(9, dtype=np.int64))
    columns["slots"] = one[:0]
    with pytest.raises(ValueError, match="column slots must hold one number per chunk"):
        packer.fill(one, one, one, one, one, tables, floats, 4, columns)
    with pytest.raises(TypeError, match="__slots__"):
        host.DecodePacker(RequestStatus, ScheduledChunk)
    request.block_table, request.blocks_sent = [1, 2], 1
    for row in (-1, 0, 1):  # no such row, too long, no such row
        request.row = row
        with pytest.raises(ValueError, match="not in the tables"):
            packer.pack([chunk], *(np.empty(1, dtype=np.int64) for _ in range(3)), tables, [])
    request.block_table = (1, 2)  # type: ignore[assignment]
    with pytest.raises(TypeError, match="block_table must be a list"):
        packer.pack([chunk], *(np.empty(1, dtype=np.int64) for _ in range(3)), tables, [])
    del request.block_table
    with pytest.raises(TypeError, match="block_table must be set"):
        packer.pack([chunk], *(np.empty(1, dtype=np.int64) for _ in range(3)), tables, [])


def test_chunks_are_used_again_when_nobody_holds_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FASTINFER_HOST", "native")
    load_host_module("native")
    scheduler = make_scheduler(num_blocks=40, max_num_batched_tokens=64, max_num_seqs=8)
    for request in [make_request(scheduler, 2, 30) for _ in range(3)]:
        scheduler.add(request)

    def step() -> SchedulePlan:
        plan = scheduler.schedule()
        scheduler.commit(plan, [[5] if chunk.samples else [] for chunk in plan.chunks])
        return plan

    step()  # the prompts
    held = [step() for _ in range(4)]
    assert len({id(chunk) for plan in held for chunk in plan.chunks}) == 12
    starts = [[chunk.start for chunk in plan.chunks] for plan in held]
    del held[1:]
    seen = {id(chunk) for _ in range(9) for chunk in step().chunks}
    assert len(seen) <= 9 and not seen & {id(chunk) for chunk in held[0].chunks}
    assert [chunk.start for chunk in held[0].chunks] == starts[0]  # a plan that is held stays
