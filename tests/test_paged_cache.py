"""PagedKVCache: attention equal to dense attention through any sequence of calls, blocks never lost
or shared by accident, tensors, errors, the example.
"""

from __future__ import annotations

import os
import random
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import fastinfer
from fastinfer import PagedKVCache, flash_attn_func
from helpers import devices, randn

LAYERS, HEADS, KV_HEADS, DIM = 2, 4, 2, 16
PATHS = [d for d in devices("flash_attn_varlen_fwd") if d in devices("reshape_and_cache")]


def make(num_blocks: int = 40, block_size: int = 4, device: str = "cpu", **options):
    dtype = torch.float32 if device == "cpu" else torch.float16
    options = {"dtype": dtype, "device": device} | options
    cache = PagedKVCache(LAYERS, KV_HEADS, DIM, num_blocks, block_size, **options)
    cache.k.fill_(float("nan"))
    cache.v.fill_(float("nan"))
    return cache


class Dense:
    """What the cache should hold: per sequence and layer, all keys and values."""

    def __init__(self, cache: PagedKVCache) -> None:
        self.cache, self.kv, self.seed = cache, {}, 0

    def new(self, *shape: int) -> torch.Tensor:
        self.seed += 1
        cache = self.cache.k
        return randn(*shape, seed=self.seed, dtype=cache.dtype, device=str(cache.device))

    def step(self, names: list[int], counts: list[int]) -> None:
        step = self.cache.append(names, counts)
        total = sum(counts)
        for layer in range(LAYERS):
            q, k, v = (self.new(total, h, DIM) for h in (HEADS, KV_HEADS, KV_HEADS))
            out = self.cache.attend(layer, q, k, v, step)
            parts = [t.split(counts) for t in (out, q, k, v)]
            for name, one, query, key, value in zip(names, *parts, strict=True):
                held = self.kv.setdefault((name, layer), [key[:0], value[:0]])
                held[0], held[1] = torch.cat([held[0], key]), torch.cat([held[1], value])
                want = flash_attn_func(query[None], held[0][None], held[1][None], causal=True)[0]
                torch.testing.assert_close(one, want, atol=2e-3 if one.is_cuda else 1e-6, rtol=1e-4)

    def fork(self, name: int) -> int:
        new = self.cache.fork(name)
        for layer in range(LAYERS):
            if (name, layer) in self.kv:
                self.kv[new, layer] = list(self.kv[name, layer])
        return new


@pytest.mark.parametrize("device", PATHS)
@pytest.mark.parametrize("block_size", [1, 4, 16])
@pytest.mark.parametrize("seed", range(6))
def test_any_sequence_of_calls(seed: int, block_size: int, device: str) -> None:
    rng = random.Random(seed)
    cache = make(num_blocks=240 // block_size, block_size=block_size, device=device)
    dense = Dense(cache)
    for _ in range(40):
        alive = cache.sequences
        action = rng.random()
        if not alive or action < 0.15:
            cache.allocate()
        elif action < 0.3:
            dense.fork(rng.choice(alive))
        elif action < 0.4 and len(alive) > 1:
            cache.free(rng.choice(alive))
        else:
            names = rng.sample(alive, rng.randint(1, len(alive)))
            try:
                dense.step(names, [rng.choice([1, 1, 2, 5, 9]) for _ in names])
            except RuntimeError as error:
                assert type(error).__name__ == "OutOfBlocks", error
                cache.free(alive[0])
        lengths = {name: cache.length(name) for name in cache.sequences}
        assert all(len(cache.blocks(s)) == -(-n // block_size) for s, n in lengths.items())
        held = {b for s in cache.sequences for b in cache.blocks(s)}
        assert cache.num_free_blocks == 240 // block_size - len(held)
    for name in cache.sequences:
        cache.free(name)
    assert cache.num_free_blocks == 240 // block_size


@pytest.mark.parametrize("host", ["native", "python"])
def test_forks_share_blocks_until_they_write(host: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FASTINFER_HOST", host)
    cache = make()
    dense = Dense(cache)
    one = cache.allocate()
    dense.step([one], [10])
    free = cache.num_free_blocks
    two, three = dense.fork(one), dense.fork(one)
    assert cache.num_free_blocks == free and cache.blocks(one) == cache.blocks(three)
    dense.step([one, two, three], [1, 1, 1])
    # Two copies of the half-full block; the last holder keeps it.
    assert cache.num_free_blocks == free - 2
    assert len({cache.blocks(s)[2] for s in (one, two, three)}) == 3
    assert len({cache.blocks(s)[1] for s in (one, two, three)}) == 1
    full = cache.allocate()
    dense.step([full], [8])
    other, free = dense.fork(full), cache.num_free_blocks
    dense.step([full, other], [1, 1])
    assert cache.num_free_blocks == free - 2  # a new block each, and no copy
    assert cache.blocks(full)[:2] == cache.blocks(other)[:2]


def test_tensors_of_a_step() -> None:
    cache = make()
    a, b = cache.allocate(), cache.allocate()
    cache.append([a], 5)
    step = cache.append([b, a], [3, 4])
    assert step.positions.tolist() == [0, 1, 2, 5, 6, 7, 8]
    assert step.seqlens.tolist() == [3, 9] and step.cu_seqlens.tolist() == [0, 3, 7]
    assert (step.max_new, step.max_len) == (4, 9)
    blocks = {s: cache.blocks(s) for s in (a, b)}
    assert step.block_table.tolist() == [blocks[b] + [0, 0], blocks[a]]
    want = [blocks[b][0] * 4 + j for j in range(3)]
    want += [blocks[a][j // 4] * 4 + j % 4 for j in range(5, 9)]
    assert step.slots.tolist() == want
    assert torch.equal(cache.block_table([b, a]), step.block_table)
    assert cache.seqlens([a, b]).tolist() == [9, 3]
    for t in (step.slots, step.block_table, step.seqlens, step.cu_seqlens, step.positions):
        assert t.dtype == torch.int32
    assert (
        cache.block_table([]).shape == (0, 0) and cache.block_table([cache.allocate()]).numel() == 0
    )


def test_decode_operator_takes_its_tensors() -> None:
    cache = make()
    dense = Dense(cache)
    names = [cache.allocate() for _ in range(2)]
    dense.step(names, [6, 3])
    before = cache.seqlens(names)
    step = cache.append(names)
    q, k, v = (randn(2, 1, h, DIM, seed=9) for h in (HEADS, KV_HEADS, KV_HEADS))
    fused = fastinfer.flash_attn_with_kvcache(
        q, cache.k[0], cache.v[0], k, v, cache_seqlens=before, block_table=step.block_table
    )
    plain = cache.attend(0, *(t[:, 0] for t in (q, k, v)), step)
    torch.testing.assert_close(fused[:, 0], plain, atol=1e-6, rtol=1e-5)


def test_errors_change_nothing() -> None:
    cache = make(num_blocks=3)
    a = cache.allocate()
    cache.append([a], 9)
    b = cache.fork(a)
    with pytest.raises(RuntimeError, match="1 blocks wanted, 0 of 3 are free"):
        cache.append([a])
    assert cache.length(a) == 9 and cache.blocks(a) == cache.blocks(b)
    for call, words in (
        (lambda: cache.append([a, a]), "named once"),
        (lambda: cache.append([a], 0), "at least 1"),
        (lambda: cache.append([a], [1, 2]), "one number per sequence"),
        (lambda: PagedKVCache(1, 1, 16, 0), "num_blocks must be at least 1"),
        (lambda: PagedKVCache(1, 1, 16, 4, dtype=torch.int8), "dtype"),
    ):
        with pytest.raises(ValueError, match=words):
            call()
    cache.free(b)
    for call in (cache.free, cache.fork, cache.length, cache.blocks):
        with pytest.raises(KeyError, match="allocate or fork returned"):
            call(b)
    assert cache.length(a) == 9 and cache.num_free_blocks == 0


def test_the_example() -> None:
    root = Path(__file__).parents[1]
    path = str(Path(fastinfer.__file__).parents[1])
    environment = {**os.environ, "PYTHONPATH": path}
    done = subprocess.run(
        [sys.executable, str(root / "examples/paged_cache.py")],
        capture_output=True,
        text=True,
        env=environment,
    )
    assert done.returncode == 0, done.stderr
    assert "lengths [43, 22, 43], blocks 58 free of 64" in done.stdout, done.stdout
