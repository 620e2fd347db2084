"""Block pool, block hashes and n-gram search: the same tests on `_host` and on its Python twin."""

from __future__ import annotations

import hashlib
import random
import struct
import subprocess
import sys
from types import ModuleType

import pytest
from engine_helpers import HOSTS, load_host_module
from hypothesis import given, settings
from hypothesis import strategies as st

H = [hashlib.sha256(bytes([i])).digest() for i in range(64)]


def snapshot(pool) -> tuple:
    """Everything that can be seen of a pool."""
    blocks = range(pool.num_blocks)
    return (
        pool.num_free,
        pool.num_cached,
        [pool.ref_count(b) for b in blocks],
        [pool.hash_of(b) for b in blocks],
    )


def test_allocate_takes_blocks_once_and_all_or_nothing(host: ModuleType) -> None:
    pool = host.BlockPool(5)
    assert pool.allocate(0) == []
    first = pool.allocate(3)
    assert first == [0, 1, 2] and pool.num_free == 2 and pool.num_used == 3
    before = snapshot(pool)
    with pytest.raises(host.OutOfBlocks, match=r"3 blocks wanted, 2 of 5 are free"):
        pool.allocate(3)
    assert snapshot(pool) == before
    assert issubclass(host.OutOfBlocks, RuntimeError)
    assert set(pool.allocate(2)).isdisjoint(first)
    pool.check_invariants()


@pytest.mark.parametrize("n", [0, -1])
def test_a_pool_needs_a_block(host: ModuleType, n: int) -> None:
    with pytest.raises(ValueError, match="num_blocks must be at least 1"):
        host.BlockPool(n)


def test_misuse_raises_and_changes_nothing(host: ModuleType) -> None:
    pool = host.BlockPool(4)
    a, b = pool.allocate(2)
    pool.register_hash(a, H[0])
    before = snapshot(pool)
    misuse = [
        (lambda: pool.allocate(-1), "must not be negative"),
        (lambda: pool.release([a, 99]), r"must be in \[0, 4\), got 99"),
        (lambda: pool.release([b, -1]), r"must be in \[0, 4\), got -1"),
        (lambda: pool.release([a, b, a]), "freed twice"),
        (lambda: pool.release([b, 3]), "block 3 has no reference left"),
        (lambda: pool.acquire([a, 4]), r"must be in \[0, 4\)"),
        (lambda: pool.acquire([a, 2]), "block 2 is free and holds no cached content"),
        (lambda: pool.register_hash(2, H[1]), "block 2 is not in use"),
        (lambda: pool.register_hash(a, H[1]), "already holds other content"),
        (lambda: pool.register_hash(b, b"short"), "bytes of length 32"),
        (lambda: pool.register_hash(7, H[1]), r"must be in \[0, 4\)"),
        (lambda: pool.match([b"short"]), "bytes of length 32"),
        (lambda: pool.ref_count(4), r"must be in \[0, 4\)"),
        (lambda: pool.hash_of(-1), r"must be in \[0, 4\)"),
        (lambda: pool.count_free([a, 4]), r"must be in \[0, 4\)"),
    ]
    for call, message in misuse:
        with pytest.raises(ValueError, match=message):
            call()
        assert snapshot(pool) == before
        pool.check_invariants()
    pool.release([b, a])
    with pytest.raises(ValueError, match="freed twice"):
        pool.release([a])


def test_shared_block_is_free_only_after_its_last_holder(host: ModuleType) -> None:
    pool = host.BlockPool(2)
    (block,) = pool.allocate(1)
    pool.acquire([block])
    assert pool.ref_count(block) == 2
    pool.release([block])
    assert pool.num_free == 1
    pool.release([block])
    assert pool.num_free == 2


def test_freed_blocks_keep_their_content_until_it_is_the_oldest(host: ModuleType) -> None:
    pool = host.BlockPool(4)
    blocks = pool.allocate(4)
    for block, content in zip(blocks, H, strict=False):
        assert pool.register_hash(block, content)
    pool.release([blocks[2]])
    pool.release([blocks[0]])
    pool.release([blocks[3], blocks[1]])
    assert pool.match(H[:4]) == blocks
    assert pool.count_free(blocks) == 4
    pool.acquire([blocks[0]])  # out of the middle of the list: content is used again
    assert pool.count_free(blocks) == 3
    pool.release([blocks[0]])  # and now the most recent one
    assert pool.allocate(3) == [blocks[2], blocks[3], blocks[1]]
    assert pool.match(H[:4]) == [blocks[0]]
    pool.check_invariants()


def test_blocks_without_content_are_reused_before_cached_ones(host: ModuleType) -> None:
    pool = host.BlockPool(3)
    a, b, c = pool.allocate(3)
    pool.register_hash(a, H[0])
    pool.release([a])
    pool.release([b, c])
    assert pool.allocate(2) == [c, b]
    assert pool.match([H[0]]) == [a]


def test_first_block_keeps_a_content_and_the_chain_stops_at_a_gap(host: ModuleType) -> None:
    pool = host.BlockPool(4)
    a, b, c = pool.allocate(3)
    assert pool.register_hash(a, H[0])
    assert pool.register_hash(a, H[0])
    assert not pool.register_hash(b, H[0])
    assert pool.hash_of(b) is None
    assert pool.register_hash(c, H[2])
    assert pool.match([H[0], H[1], H[2]]) == [a]
    assert pool.register_hash(b, H[1])
    assert pool.match([H[0], H[1], H[2]]) == [a, b, c]
    assert pool.match([H[0], H[1], H[2]], 2) == [a, b]
    assert pool.match([H[0]], max_blocks=0) == []
    pool.clear_cache()
    assert pool.num_cached == 0 and pool.match([H[0]]) == [] and pool.num_used == 3
    pool.check_invariants()


class Model:
    """A few requests that take, share, register and free blocks, tracked independently."""

    def __init__(self, pool) -> None:
        self.pool = pool
        self.held: list[list[int]] = []

    def step(self, kind: int, value: int) -> object:
        pool, held = self.pool, self.held
        if kind == 0:
            wanted = value % 5
            if wanted > pool.num_free:
                return "full"
            held.append(pool.allocate(wanted))
            return held[-1]
        if kind == 1:
            found = pool.match([H[value % 8]])
            pool.acquire(found)
            held.append(found)
            return found
        if not held:
            return None
        mine = held[value % len(held)]
        if kind == 2:
            held.remove(mine)
            pool.release(mine[::-1])
            return mine
        block = mine[value % len(mine)] if mine else None
        if block is None or pool.hash_of(block) is not None:
            return None
        return pool.register_hash(block, H[value % 8])

    def check(self) -> None:
        self.pool.check_invariants()
        counts = [0] * self.pool.num_blocks
        for blocks in self.held:
            for block in blocks:
                counts[block] += 1
        assert counts == [self.pool.ref_count(b) for b in range(self.pool.num_blocks)]
        assert self.pool.num_free == counts.count(0)
        assert self.pool.num_free + self.pool.num_used == self.pool.num_blocks


STEPS = st.lists(st.tuples(st.integers(0, 3), st.integers(0, 1000)), max_size=60)


@pytest.mark.parametrize("name", HOSTS)
@settings(max_examples=60, deadline=None)
@given(num_blocks=st.integers(1, 12), steps=STEPS)
def test_any_sequence_keeps_the_invariants(
    name: str, num_blocks: int, steps: list[tuple[int, int]]
) -> None:
    model = Model(load_host_module(name).BlockPool(num_blocks))
    for kind, value in steps:
        model.step(kind, value)
        model.check()


@settings(max_examples=60, deadline=None)
@given(num_blocks=st.integers(1, 12), steps=STEPS)
def test_both_implementations_do_the_same(num_blocks: int, steps: list[tuple[int, int]]) -> None:
    models = [Model(load_host_module(name).BlockPool(num_blocks)) for name in HOSTS]
    for kind, value in steps:
        results = [model.step(kind, value) for model in models]
        assert results[0] == results[1]
        assert snapshot(models[0].pool) == snapshot(models[1].pool)


def test_block_hashes_are_the_documented_chain(host: ModuleType) -> None:
    tokens = [5, 0, 2**31 - 1, 7, 8, 9, 10]
    hashes: list[bytes] = []
    host.extend_block_hashes(tokens, 3, hashes)
    root = hashlib.sha256(b"").digest()
    first = hashlib.sha256(root + struct.pack("<3i", *tokens[:3])).digest()
    second = hashlib.sha256(first + struct.pack("<3i", *tokens[3:6])).digest()
    assert hashes == [first, second]


@pytest.mark.parametrize("block_size", [1, 5, 6, 7, 8, 16, 33])
def test_block_hashes_grow_with_the_sequence(host: ModuleType, block_size: int) -> None:
    twin = load_host_module("python")
    tokens = [random.Random(7).randrange(50_000) for _ in range(100)]
    whole: list[bytes] = []
    twin.extend_block_hashes(tokens, block_size, whole, b"salt")
    grown: list[bytes] = []
    for end in range(len(tokens) + 1):
        host.extend_block_hashes(tokens[:end], block_size, grown, b"salt")
        assert grown == whole[: end // block_size]
    changed: list[bytes] = []
    host.extend_block_hashes([tokens[0] + 1, *tokens[1:]], block_size, changed, b"salt")
    assert not set(changed) & set(whole)


def test_bad_hash_input_leaves_the_chain_alone(host: ModuleType) -> None:
    hashes: list[bytes] = []
    for bad in (-1, 2**31, "x", 1.5):
        with pytest.raises(ValueError, match=r"integers in \[0, 2\^31\)"):
            host.extend_block_hashes([1, 2, 3, bad], 2, hashes)
        assert hashes == []
    with pytest.raises(ValueError, match="block_size must be at least 1"):
        host.extend_block_hashes([1], 0, hashes)
    with pytest.raises(ValueError, match="bytes of length 32"):
        host.extend_block_hashes([1, 2], 1, [b"no"])


def ngram_by_definition(tokens: list[int], max_n: int, min_n: int, k: int) -> list[int]:
    for n in range(max_n, min_n - 1, -1):
        for start in range(len(tokens) - n - 1, -1, -1):
            if tokens[start : start + n] == tokens[-n:]:
                return tokens[start + n : start + n + k]
    return []


@pytest.mark.parametrize("name", HOSTS)
@settings(max_examples=150, deadline=None)
@given(
    tokens=st.lists(st.integers(0, 2), max_size=24),
    min_n=st.integers(1, 4),
    extra=st.integers(0, 3),
    k=st.integers(0, 5),
)
def test_ngram_finds_what_the_definition_says(
    name: str, tokens: list[int], min_n: int, extra: int, k: int
) -> None:
    propose = load_host_module(name).propose_ngram
    want = ngram_by_definition(tokens, min_n + extra, min_n, k)
    assert propose(tokens, min_n + extra, min_n, k) == want


def test_ngram_examples_and_bad_arguments(host: ModuleType) -> None:
    text = [1, 2, 3, 9, 1, 2, 3, 8, 7, 1, 2, 3]
    assert host.propose_ngram(text, 3, 2, 2) == [8, 7]  # the most recent of two
    assert host.propose_ngram(text, 4, 2, 10) == [8, 7, 1, 2, 3]
    assert host.propose_ngram([1, 2, 3], 3, 1, 4) == []
    assert host.propose_ngram([4, 4, 4], 2, 1, 4) == [4]
    assert host.propose_ngram([], 2, 1, 4) == []
    for bad in ((1, 2, 3), (2, 0, 3), (2, 1, -1)):
        with pytest.raises(ValueError, match="expected 1 <= min_n <= max_n and k >= 0"):
            host.propose_ngram(text, *bad)


def test_choice_of_the_implementation() -> None:
    code = "from fastinfer._host_loader import load_host; print(load_host().__name__)"

    def run(value: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-c", code],
            env={"PYTHONPATH": ":".join(sys.path), "FASTINFER_HOST": value},
            capture_output=True,
            text=True,
        )

    assert run("python").stdout.strip() == "fastinfer._host_py"
    assert run("auto").stdout.strip() in ("fastinfer._host", "fastinfer._host_py")
    assert "must be auto, native or python, got 'rust'" in run("rust").stderr
