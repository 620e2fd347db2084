"""The random side of sample: the recipe, what a draw depends on, the distribution of the draws."""

from __future__ import annotations

import math
from functools import cache
from typing import Any

import pytest
import torch

import sampling_on_device
from fastinfer.ops._reference_sampling import distribution_reference, philox_reference
from fastinfer.ops.sampling import sample, sample_reference
from helpers import FLOATS, available_isa_levels, chi_square_p, randn, threads

device, isa = sampling_on_device.device, sampling_on_device.isa
INF = float("inf")
DRAWS = 40000


def full(batch: int, **values: float) -> dict[str, torch.Tensor]:
    return {
        name: torch.full((batch,), value, dtype=torch.int32 if name == "top_k" else torch.float32)
        for name, value in values.items()
    }


def test_philox_known_answers() -> None:
    """The published test vectors of Philox4x32-10 (Random123)."""

    def words(key: tuple[int, int], counter: tuple[int, ...]) -> list[int]:
        k0, k1 = (torch.tensor([k]) for k in key)
        return [
            int(w) for w in philox_reference((k0, k1), tuple(torch.tensor([[c] for c in counter])))
        ]

    ones = 0xFFFFFFFF
    assert words((0, 0), (0, 0, 0, 0)) == [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]
    assert words((ones, ones), (ones,) * 4) == [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD]
    pi = (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344)
    assert words((0xA4093822, 0x299F31D0), pi) == [0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1]


SEEDS = torch.tensor([0, 1, -1, 2**31, 2**32 + 7, -(2**63), 2**63 - 1, 123456789])
STEPS = torch.tensor([0, 5, 1, 2**32, 2**40 + 1, 3, -2, 77])


RULES = ({}, {"top_k": 20}, {"temperature": 0.7, "top_p": 0.9, "min_p": 0.01})


@cache
def drawn_by_reference(vocab: int, dtype: torch.dtype) -> list[tuple[Any, ...]]:
    """(logits, parameters, tokens) for some rules, made once for all instruction-set levels."""
    n = 8 if vocab < 5000 else 1
    logits = (randn(n, vocab, seed=vocab) * 2).to(dtype)
    cases = []
    for rules in RULES if n > 1 else RULES[:1]:
        kw = {**full(n, **rules), "seeds": SEEDS[-n:], "steps": STEPS[-n:]}
        cases.append((logits, kw, sample_reference(logits, **kw)[0]))
    return cases


@pytest.mark.parametrize("vocab", [1, 2, 3, 17, 1001, 128256])
@pytest.mark.parametrize("dtype", FLOATS)
def test_tokens_are_those_of_the_recipe(isa: str, vocab: int, dtype: torch.dtype) -> None:
    for logits, kw, want in drawn_by_reference(vocab, dtype):
        assert torch.equal(sample(logits, **kw).token_ids, want)


def test_defaults_are_seed_0_step_0_temperature_1(device: str) -> None:
    logits = randn(5, 50, seed=8)
    zero = torch.zeros(5, dtype=torch.int64)
    explicit = sample(logits, temperature=torch.ones(5), seeds=zero, steps=zero)
    assert torch.equal(sample(logits).token_ids, explicit.token_ids)


def test_a_draw_depends_on_seed_and_step_only(device: str) -> None:
    logits = randn(16, 333, seed=9)
    rules = dict(full(16, top_p=0.95), seeds=torch.arange(16) * 7, steps=torch.arange(16) % 3)
    first = sample(logits, **rules).token_ids
    assert torch.equal(sample(logits, **rules).token_ids, first)
    order = torch.randperm(16)
    permuted = sample(logits[order], **{k: v[order] for k, v in rules.items()}).token_ids
    assert torch.equal(permuted, first[order])
    padded = torch.cat([logits, torch.full((16, 90), -INF)], 1)
    assert torch.equal(sample(padded, **rules).token_ids, first)
    for name in ("seeds", "steps"):
        other = dict(rules, **{name: rules[name] + 1})
        assert not torch.equal(sample(logits, **other).token_ids, first)


def test_same_bits_at_every_level_and_thread_count(monkeypatch: pytest.MonkeyPatch) -> None:
    logits = randn(24, 5003, seed=10) * 2
    rules = {
        "temperature": torch.linspace(0, 2, 24),
        "top_k": torch.arange(24, dtype=torch.int32) * 7,
        "top_p": torch.linspace(0.2, 1.2, 24),
        "min_p": torch.linspace(-0.01, 0.01, 24),
        "seeds": torch.arange(24),
        "return_logprobs": True,
        "num_top_logprobs": 30,
    }
    want = None
    for level in available_isa_levels():
        monkeypatch.setenv("FASTINFER_CPU_ISA", level)
        for n in (1, 2):
            with threads(n):
                out = sample(logits, **rules)
            want = want or out
            assert all(torch.equal(a, b) for a, b in zip(out, want, strict=True)), (level, n)


@pytest.mark.parametrize(
    "rules",
    [
        {},
        {"temperature": 0.7, "top_k": 5},
        {"temperature": 1.5, "top_p": 0.8},
        {"min_p": 0.1},
        {"top_k": 12, "top_p": 0.9, "min_p": 0.02},
    ],
    ids=str,
)
@pytest.mark.parametrize("vary", ["seeds", "steps"])
def test_distribution(device: str, rules: dict[str, float], vary: str) -> None:
    logits = randn(1, 17, seed=16) * 1.5
    want = distribution_reference(logits.double(), **full(1, **rules))[0].exp()[0]
    kw = dict(full(DRAWS, **rules), **{vary: torch.arange(DRAWS)})
    ids = sample(logits.expand(DRAWS, 17), **kw).token_ids
    assert chi_square_p(ids.bincount(minlength=17), want) > 1e-4


def test_distribution_over_a_wide_flat_vocabulary(device: str) -> None:
    """Many small probabilities: where a coarse uniform or ties between scores would show."""
    vocab, draws = 50000, 3000
    logits = torch.zeros(1, vocab)
    logits[0, ::2] = math.log(3.0)
    ids = sample(logits.expand(draws, vocab), seeds=torch.arange(draws)).token_ids
    cell = ids // 2500 * 2 + ids % 2
    want = torch.tensor([0.75, 0.25]).repeat(20) / 20
    assert chi_square_p(cell.bincount(minlength=40), want) > 1e-4


def test_rare_tokens_are_drawn_as_often_as_they_should(device: str) -> None:
    """20,000 tokens of 2^-20 of the top token's weight each, 2 % together."""
    vocab, draws = 20001, 10000
    logits = torch.full((1, vocab), -20 * math.log(2.0))
    logits[0, 0] = 0.0
    ids = sample(logits.expand(draws, vocab), seeds=torch.arange(draws)).token_ids
    rare = 20000 * 2.0**-20
    p = torch.tensor([1.0, rare]) / (1 + rare)
    assert chi_square_p((ids > 0).long().bincount(minlength=2), p) > 1e-4


def test_neighbouring_seeds_and_steps_are_independent(device: str) -> None:
    logits = (randn(1, 5, seed=17)).expand(DRAWS, 5)
    p = torch.softmax(logits[0].double(), -1)
    joint = torch.outer(p, p).flatten()
    n = torch.arange(DRAWS)
    first = sample(logits, seeds=n).token_ids
    others = (
        sample(logits, seeds=n + 1).token_ids,
        sample(logits, seeds=n, steps=torch.ones_like(n)).token_ids,
        sample(logits, seeds=n, steps=n + 1).token_ids,
    )
    for other in others:
        assert chi_square_p((first * 5 + other).bincount(minlength=25), joint) > 1e-4
