"""A deterministic toy model that reads its context back through the paged cache.

Its cache holds (position, token) per slot; the next token is a function of all tokens of the
sequence, gathered through the block table. A wrong slot, table, length or position, or a block
shared with the wrong request, gives other tokens or raises.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from types import SimpleNamespace
from typing import Any

import torch

from fastinfer import LLM, SamplingParams
from fastinfer.engine import EngineConfig
from fastinfer.engine.runner import ModelRunner

VOCAB = 50


def mix(tokens: list[int]) -> int:
    value = 7
    for token in tokens:
        value = (value * 1_000_003 + token + 1) % (2**61 - 1)
    return value


def toy_logits(tokens: list[int]) -> torch.Tensor:
    generator = torch.Generator().manual_seed(mix(tokens))
    return torch.randn(VOCAB, generator=generator)


def toy_greedy(prompt: list[int], count: int) -> list[int]:
    tokens = list(prompt)
    for _ in range(count):
        tokens.append(int(toy_logits(tokens).argmax()))
    return tokens[len(prompt) :]


class ToyModel:
    """Same interface as `CausalLM`. `before` runs at the start of every step; tests raise in it."""

    dtype = torch.float32
    device = torch.device("cpu")

    def __init__(self, max_model_len: int = 500, eos: tuple[int, ...] = ()) -> None:
        self.max_model_len = max_model_len
        self.config = SimpleNamespace(
            vocab_size=VOCAB, num_layers=2, num_kv_heads=1, head_dim=2, eos_token_ids=eos
        )
        self.before: Callable[[], None] = lambda: None
        self.batch_sizes: list[int] = []

    def __call__(self, input_ids: torch.Tensor, meta: Any, caches: list[Any]) -> torch.Tensor:
        self.before()
        assert len(caches) == 2 and input_ids.dtype == torch.int64
        assert meta.positions.dtype == meta.slot_mapping.dtype == torch.int64
        assert meta.cu_seqlens_q.dtype == meta.seq_lens.dtype == torch.int32
        assert meta.block_table.dtype == torch.int32
        entries = torch.stack([meta.positions, input_ids], 1).float()
        for cache in caches:
            for side in (cache.k, cache.v):
                size = side.shape[1]
                for slot, entry in zip(meta.slot_mapping.tolist(), entries, strict=True):
                    side[slot // size, slot % size, 0] = entry
        bounds = meta.cu_seqlens_q.tolist()
        lens = meta.seq_lens.tolist()
        self.batch_sizes.append(len(lens))
        assert meta.max_seqlen_q == max(b - a for a, b in pairwise(bounds))
        assert meta.max_seqlen_k == max(lens)
        rows = []
        for i, length in enumerate(lens):
            side = caches[i % 2].v if i % 3 else caches[i % 2].k
            table = meta.block_table[i, : -(-length // side.shape[1])].tolist()
            seen = torch.cat([side[block, :, 0] for block in table])[:length]
            assert seen[:, 0].tolist() == list(range(length))
            tokens = [int(token) for token in seen[:, 1].tolist()]
            count = bounds[i + 1] - bounds[i]
            rows += [mix(tokens[: length - count + j + 1]) for j in range(count)]
        return torch.tensor(rows, dtype=torch.int64)[:, None]

    def compute_logits(self, hidden: torch.Tensor) -> torch.Tensor:
        def logits(seed: int) -> torch.Tensor:
            return torch.randn(VOCAB, generator=torch.Generator().manual_seed(seed))

        return torch.stack([logits(seed) for seed in hidden[:, 0].tolist()])


def toy_llm(model: ToyModel | None = None, tokenizer: Any = None, **settings: Any) -> LLM:
    """An `LLM` around a toy model; small cache unless told otherwise."""
    config = EngineConfig(model="toy", **{"block_size": 4, "num_blocks": 100, **settings})
    runner = ModelRunner(config, torch.device("cpu"), model or ToyModel())
    return LLM.from_runner(config, runner, tokenizer)


PROMPTS = [[3, 1, 4], [1], [5, 9, 2, 6, 5, 3, 5, 8, 9, 7, 9, 3], [3, 1, 4, 1, 5, 9, 2], [7, 7]]


def greedy(max_tokens: int = 10, **more: object) -> SamplingParams:
    return SamplingParams(temperature=0, max_tokens=max_tokens, **more)


def tokens_of(outputs: list) -> list[list[int]]:
    return [list(output.outputs[0].token_ids) for output in outputs]


def assert_idle(llm: LLM) -> None:
    stats = llm.stats()
    assert (stats.running, stats.waiting, stats.kv_blocks_used) == (0, 0, 0)
    llm._core.scheduler.pool.check_invariants()
    assert not llm._core.scheduler.requests and not llm._core._completions
