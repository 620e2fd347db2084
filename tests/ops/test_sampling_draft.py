"""verify_draft: the accept rule against the reference and against the exact distribution."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor

import sampling_on_device
from fastinfer.ops._reference_sampling import distribution_reference
from fastinfer.ops.sampling import sample, verify_draft, verify_draft_reference
from helpers import FLOATS, available_isa_levels, chi_square_p, compiles, devices, opcheck, randn

device, isa = sampling_on_device.device, sampling_on_device.isa
INF, NAN = float("inf"), float("nan")
DRAWS = 40000


def rules(batch: int, **extra: Tensor) -> dict[str, Tensor]:
    """Mixed parameters, every fourth row greedy."""
    n = torch.arange(batch)
    return {
        "temperature": torch.where(n % 4 == 3, 0.0, 0.6 + 0.1 * (n % 5)),
        "top_k": (n % 3 * 5).int(),
        "top_p": 1.1 - 0.1 * (n % 4),
        "min_p": 0.01 * (n % 2),
        "seeds": n * 1000003,
        "steps": n * 17,
        **extra,
    }


def drafts(batch: int, k: int, vocab: int, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """Target logits, draft probabilities close to the target's, drafts drawn from them."""
    target = randn(batch, k + 1, vocab, seed=seed) * 2
    draft_logits = target[:, :k] + randn(batch, k, vocab, seed=seed + 1)
    q = torch.softmax(draft_logits, -1)
    ids = (
        torch.multinomial(q.flatten(0, 1), 1).view(batch, k) if k else torch.empty(batch, 0).long()
    )
    return target, ids, q


@cache
def verified_by_reference(k: int, vocab: int) -> list[tuple[Any, ...]]:
    """(arguments, parameters, result) for several kinds of drafts, made once for all levels."""
    batch = 24
    target, ids, q = drafts(batch, k, vocab, seed=k * 100 + vocab)
    ids[::2] = target[::2, :k].argmax(-1)  # rows that are accepted far
    num = (torch.arange(batch) % (k + 1)).int()
    kw = rules(batch)
    cases = []
    for arguments in ((target, ids, q), (target, ids), (target, ids, q, num)):
        cases.append((arguments, kw, verify_draft_reference(*arguments, **kw)))
    return cases


@pytest.mark.parametrize(
    ("k", "vocab"), [(0, 17), (1, 1), (1, 17), (2, 2), (3, 1001), (5, 17), (16, 9)]
)
def test_matches_the_reference(isa: str, k: int, vocab: int) -> None:
    for arguments, kw, want in verified_by_reference(k, vocab):
        got = verify_draft(*arguments, **kw)
        assert got.token_ids.dtype == torch.int64 and got.num_accepted.dtype == torch.int32
        assert torch.equal(got.token_ids, want[0])
        assert torch.equal(got.num_accepted, want[1])


def test_no_drafts_is_sample(isa: str) -> None:
    target, ids, q = drafts(32, 3, 333, seed=5)
    kw = rules(32)
    none = torch.zeros(32, dtype=torch.int32)
    got = verify_draft(target, ids, q, none, **kw)
    assert torch.equal(got.token_ids[:, 0], sample(target[:, 0], **kw).token_ids)
    assert (got.token_ids[:, 1:] == -1).all() and (got.num_accepted == 0).all()
    k0 = verify_draft(target[:, :1], ids[:, :0], **kw)
    assert torch.equal(k0.token_ids, got.token_ids[:, :1])


def test_the_bonus_token_is_sample_at_its_step(device: str) -> None:
    target, ids, q = drafts(32, 2, 50, seed=6)
    target[:, :2] = torch.where(torch.nn.functional.one_hot(ids, 50).bool(), 0.0, -INF)
    kw = rules(32)
    got = verify_draft(target, ids, q.new_zeros(32, 2, 50).scatter_(2, ids[:, :, None], 1.0), **kw)
    assert (got.num_accepted == 2).all()
    assert torch.equal(got.token_ids[:, :2], ids)
    kw["steps"] = kw["steps"] + 2
    assert torch.equal(got.token_ids[:, 2], sample(target[:, 2], **kw).token_ids)


def test_greedy_accepts_while_the_draft_is_the_argmax(isa: str) -> None:
    target = randn(5, 4, 40, seed=7)
    best = target.argmax(-1)
    ids = best[:, :3].clone()
    for row in range(1, 4):
        ids[row, row - 1] = (ids[row, row - 1] + 1) % 40
    target[4, 1, 3] = target[4, 1, 30] = 50.0  # a tie: the lower id is the argmax
    ids[4, 1] = 30
    got = verify_draft(target, ids, temperature=torch.zeros(5))
    assert got.num_accepted.tolist() == [3, 0, 1, 2, 1]
    assert got.token_ids[0].tolist() == best[0].tolist()
    assert got.token_ids[1].tolist() == [int(best[1, 0]), -1, -1, -1]
    assert got.token_ids[3].tolist() == [*best[3, :3].tolist(), -1]
    assert got.token_ids[4].tolist() == [int(best[4, 0]), 3, -1, -1]


def speculate(
    logits: Tensor, q: Tensor | None, ids: Tensor, **parameters: Tensor
) -> tuple[Tensor, Tensor]:
    """Many runs on the same logits [k + 1, V] and q [k, V], each with its own seed and drafts."""
    n = len(ids)
    return verify_draft(
        logits.expand(n, *logits.shape),
        ids,
        None if q is None else q.expand(n, *q.shape),
        seeds=torch.arange(n),
        **parameters,
    )


@pytest.mark.parametrize(
    ("name", "value"),
    [("temperature", 1.0), ("temperature", 0.6), ("top_k", 4), ("top_p", 0.8), ("min_p", 0.1)],
)
def test_output_is_distributed_as_the_target(device: str, name: str, value: float) -> None:
    vocab, k = 9, 2
    logits = randn(k + 1, vocab, seed=21) * 1.5
    q = torch.softmax(logits[:k] + randn(k, vocab, seed=22), -1)
    ids = torch.stack([torch.multinomial(q[i], DRAWS, replacement=True) for i in range(k)], 1)
    dtype = torch.int32 if name == "top_k" else torch.float32
    tokens, accepted = speculate(logits, q, ids, **{name: torch.full((DRAWS,), value, dtype=dtype)})
    rule = {name: torch.full((k + 1,), value, dtype=dtype)}
    p = distribution_reference(logits.double(), **rule)[0].exp()
    rate = torch.minimum(p[:k], q.double()).sum(-1)
    reached = torch.ones(DRAWS, dtype=torch.bool)
    for i in range(k + 1):
        assert chi_square_p(tokens[reached, i].bincount(minlength=vocab), p[i]) > 1e-4
        if i < k:
            passed = (accepted > i)[reached].long().bincount(minlength=2)
            assert chi_square_p(passed, torch.stack([1 - rate[i], rate[i]])) > 1e-4
        reached &= accepted > i


def test_one_hot_drafts_are_distributed_as_the_target(device: str) -> None:
    vocab, k = 9, 2
    logits = randn(k + 1, vocab, seed=23) * 1.5
    p = torch.softmax(logits.double(), -1)
    for draft in (int(logits[0].argmax()), 2):
        ids = torch.full((DRAWS, k), draft)
        tokens, accepted = speculate(logits, None, ids)
        reached = torch.ones(DRAWS, dtype=torch.bool)
        for i in range(k + 1):
            assert chi_square_p(tokens[reached, i].bincount(minlength=vocab), p[i]) > 1e-4
            if i < k:
                passed = (accepted > i)[reached].long().bincount(minlength=2)
                assert chi_square_p(passed, torch.stack([1 - p[i, draft], p[i, draft]])) > 1e-4
            reached &= accepted > i


def test_acceptance_and_replacement_are_independent_of_other_draws(device: str) -> None:
    """The replacement depends on the residual only, not on which draft was rejected."""
    logits = torch.log(torch.tensor([[0.1, 0.2, 0.3, 0.4]])).repeat(2, 1)
    q = torch.tensor([[0.5, 0.5, 0.0, 0.0]])
    ids = torch.multinomial(q[0], DRAWS, replacement=True)[:, None]
    tokens, accepted = speculate(logits, q, ids)
    for draft in (0, 1):
        rejected = (ids[:, 0] == draft) & (accepted == 0)
        counts = tokens[rejected, 0].bincount(minlength=4)
        assert chi_square_p(counts, torch.tensor([0.0, 0.0, 3 / 7, 4 / 7])) > 1e-4


def test_drafts_may_be_drawn_by_sample_with_the_same_seeds_and_steps(device: str) -> None:
    """Exact only if the accept test and the replacement use random numbers of their own."""
    vocab, seeds = 9, torch.arange(DRAWS)
    logits = randn(2, vocab, seed=30) * 1.5
    draft_logits = logits[:1] + randn(1, vocab, seed=31)
    ids = sample(draft_logits.expand(DRAWS, vocab), seeds=seeds).token_ids[:, None]
    tokens, accepted = speculate(logits, torch.softmax(draft_logits, -1), ids)
    p = torch.softmax(logits.double(), -1)
    assert chi_square_p(tokens[:, 0].bincount(minlength=vocab), p[0]) > 1e-4
    joint = torch.outer(*p).flatten()
    # The token after a rejection comes from the next call, at the next step.
    next_call = sample(logits[1].expand(DRAWS, vocab), seeds=seeds, steps=torch.ones_like(seeds))
    second = torch.where(accepted == 1, tokens[:, 1], next_call.token_ids)
    assert chi_square_p((tokens[:, 0] * vocab + second).bincount(minlength=81), joint) > 1e-4


def test_a_draft_from_the_target_itself_is_always_accepted(device: str) -> None:
    logits = randn(4, 30, seed=24)
    q = torch.softmax(logits[:3], -1)
    ids = torch.stack([torch.multinomial(q[i], 2000, replacement=True) for i in range(3)], 1)
    tokens, accepted = speculate(logits, q, ids)
    assert (accepted == 3).float().mean() > 0.999  # q and p round differently
    assert torch.equal(tokens[accepted == 3, :3], ids[accepted == 3])


def test_odd_drafts(isa: str) -> None:
    target, ids, q = drafts(8, 3, 20, seed=25)
    ids[0, 0], ids[1, 0], ids[2, 1] = -1, 20, 2**40
    q[3, 0] = NAN
    target[4, 0] = NAN  # dead position: token 0
    ids[4, 0] = 0
    target[5, 0] = -INF
    ids[5, 0] = 3
    target[6, 0, 1:] = -INF
    ids[6, 0] = 5  # a draft the target rules out
    q[7, 0] = 0.0
    for probs in (q, None):
        tokens, accepted = verify_draft(target, ids, probs)
        assert ((tokens >= -1) & (tokens < 20)).all()
        assert (tokens >= 0).sum(1).tolist() == (accepted + 1).tolist()
        assert accepted[[0, 1, 5, 6]].tolist() == [0, 0, 0, 0]
        assert accepted[2] <= 1 and accepted[4] >= 1
        assert tokens[[4, 5, 6], 0].tolist() == [0, 0, 0]
    # num_draft_tokens is clamped; drafts beyond it are never looked at
    clamped = verify_draft(target, ids, q, torch.full((8,), 99, dtype=torch.int32))
    assert torch.equal(clamped.token_ids, verify_draft(target, ids, q).token_ids)
    negative = verify_draft(target, ids, q, torch.full((8,), -3))
    assert (negative.num_accepted == 0).all()
    garbage = torch.full((8, 3), -(2**60))
    zero = torch.zeros(8, dtype=torch.int32)
    same = verify_draft(target, garbage, q * NAN, zero)
    assert torch.equal(same.token_ids, negative.token_ids)


def test_batch_position_level_and_threads_do_not_matter(monkeypatch: pytest.MonkeyPatch) -> None:
    target, ids, q = drafts(12, 4, 2003, seed=26)
    kw = rules(12)
    want = verify_draft(target, ids, q, **kw)
    order = torch.randperm(12)
    permuted = verify_draft(
        target[order], ids[order], q[order], **{k: v[order] for k, v in kw.items()}
    )
    assert torch.equal(permuted.token_ids, want.token_ids[order])
    for level in available_isa_levels():
        monkeypatch.setenv("FASTINFER_CPU_ISA", level)
        got = verify_draft(target, ids, q, **kw)
        assert torch.equal(got.token_ids, want.token_ids)
        assert torch.equal(got.num_accepted, want.num_accepted)


@pytest.mark.parametrize("dtype", FLOATS)
def test_strides_and_dtypes(dtype: torch.dtype) -> None:
    target, ids, q = drafts(5, 3, 77, seed=27)
    target = target.to(dtype)
    wide = torch.full((5, 8, 90), NAN).to(dtype)
    view = wide[:, ::2, 4:81]
    view.copy_(target)
    q_view = torch.full((3, 5, 80), NAN)[:, :, :77].transpose(0, 1)
    q_view.copy_(q)
    ids_view = torch.zeros(5, 9, dtype=torch.int32)[:, 3:6]
    ids_view.copy_(ids)
    want = verify_draft(target, ids, q, **rules(5))
    got = verify_draft(view, ids_view, q_view, **rules(5))
    assert torch.equal(got.token_ids, want.token_ids)
    assert torch.equal(want.token_ids, verify_draft_reference(target, ids, q, **rules(5))[0])


def test_empty_batch(device: str) -> None:
    out = verify_draft(torch.empty(0, 4, 9), torch.empty(0, 3, dtype=torch.int64))
    assert out.token_ids.shape == (0, 4) and out.num_accepted.shape == (0,)


@pytest.mark.parametrize("where", devices("verify_draft"))
def test_opcheck_and_compile(where: str) -> None:
    target, ids, q = drafts(3, 2, 37, seed=28)
    num = torch.tensor([2, 0, 1], dtype=torch.int32)
    outputs = {
        "token_ids": torch.empty(3, 3, dtype=torch.int64),
        "num_accepted": torch.empty(3, dtype=torch.int32),
        "workspace": None,
    }
    kw = rules(3)
    op = torch.ops.fastinfer.verify_draft.default
    opcheck(op, (target, ids, q, num), {**kw, **outputs}, cuda=where == "cuda")
    target, ids, q, num = (x.to(where) for x in (target, ids, q, num))
    kw = {name: x.to(where) for name, x in kw.items()}

    def step(x: Tensor, q: Tensor) -> tuple[Tensor, ...]:
        return verify_draft(x * 2, ids, q, num, **kw)

    for got, want in zip(compiles(step, target, q), step(target, q), strict=True):
        assert torch.equal(got, want)
