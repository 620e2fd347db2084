"""sample: greedy, truncation, penalties, log-probabilities, odd values, layouts."""

from __future__ import annotations

import math
from functools import cache

import pytest
import torch
from torch import Tensor

import sampling_on_device
from fastinfer.ops._reference_sampling import distribution_reference, penalise_reference
from fastinfer.ops.sampling import sample, sample_reference
from helpers import FLOATS, compiles, devices, opcheck, randn

device, isa = sampling_on_device.device, sampling_on_device.isa
INF, NAN = float("inf"), float("nan")


def f32(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float32)


def i32(*values: int) -> Tensor:
    return torch.tensor(values, dtype=torch.int32)


def full(batch: int, **values: float) -> dict[str, Tensor]:
    """One parameter value for every row."""
    return {
        name: torch.full((batch,), value, dtype=torch.int32 if name == "top_k" else torch.float32)
        for name, value in values.items()
    }


def kept_tokens(logits: Tensor, **rules: float) -> Tensor:
    """The kept set of every row as the operator reports it, bool [B, V]."""
    b, v = logits.shape
    out = sample(logits, **full(b, **rules), num_top_logprobs=v)
    assert out.top_ids is not None and out.top_logprobs is not None
    return torch.zeros(b, v, dtype=torch.bool).scatter_(1, out.top_ids, out.top_logprobs > -INF)


def kept_ids(logits: Tensor, **rules: float) -> list[set[int]]:
    return [set(row.nonzero()[:, 0].tolist()) for row in kept_tokens(logits, **rules)]


@cache
def reference_of(vocab: int, seed: int, scale: float, n: int, rules: tuple[tuple[str, float], ...]):
    """(logits, parameters, sample_reference): made once for all instruction-set levels."""
    logits = randn(3, vocab, seed=seed) * scale
    parameters = {**full(3, **dict(rules)), "seeds": torch.arange(3)}
    return logits, parameters, sample_reference(logits, **parameters, num_top_logprobs=n)


def brute_force(
    x: list[float], temperature: float = 1, top_k: int = 0, top_p: float = 1, min_p: float = 0
) -> set[int]:
    """The kept set by the definition, one token at a time."""
    order = sorted(range(len(x)), key=lambda i: (-x[i], i))
    weight = {i: math.exp((x[i] - max(x)) / temperature) for i in order}
    kept = order
    if 0 < top_k < len(x):
        kept = [i for i in order if x[i] >= x[order[top_k - 1]]]
    if top_p < 1:
        total, mass, nucleus = math.fsum(weight[i] for i in kept), 0.0, []
        for i in kept:
            nucleus.append(i)
            mass += weight[i]
            if mass >= top_p * total:
                break
        kept = nucleus
    return {i for i in kept if weight[i] >= min_p}


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("vocab", [1, 2, 17, 64, 65, 1000, 128256])
def test_greedy_is_the_first_maximum(isa: str, vocab: int, dtype: torch.dtype) -> None:
    logits = randn(3, vocab, seed=vocab, dtype=dtype)
    logits[1, vocab // 3] = logits[1, vocab - 1] = 40.0  # a tie
    logits[2] = -0.0
    logits[2, vocab // 2] = 0.0  # equal to -0
    out = sample(logits, temperature=torch.zeros(3))
    assert out.token_ids.dtype == torch.int64
    assert logits[0, out.token_ids[0]] == logits[0].max()
    assert not (logits[0, : out.token_ids[0]] == logits[0].max()).any()
    assert out.token_ids[1:].tolist() == [vocab // 3, 0]
    assert out.logprobs is None and out.top_ids is None and out.top_logprobs is None


@pytest.mark.parametrize(
    "rules",
    [
        {"top_k": 1},
        {"top_k": 5},
        {"top_k": 16},
        {"top_k": 17},
        {"top_k": -1},
        {"top_k": 99},
        {"top_p": 0.0},
        {"top_p": 1e-6},
        {"top_p": 0.3},
        {"top_p": 0.9},
        {"top_p": 0.999},
        {"top_p": 1.0},
        {"min_p": 0.0},
        {"min_p": 0.05},
        {"min_p": 0.5},
        {"min_p": 1.0},
        {"top_k": 6, "top_p": 0.7},
        {"top_k": 3, "min_p": 0.3},
        {"top_p": 0.8, "min_p": 0.1, "temperature": 2.5},
        {"top_k": 9, "top_p": 0.95, "min_p": 0.02, "temperature": 0.6},
    ],
    ids=str,
)
def test_truncation_by_definition(isa: str, rules: dict[str, float]) -> None:
    smooth = randn(6, 17, seed=3) * 2
    coarse = (randn(6, 17, seed=4) * 1.5).round()  # many ties
    for logits in (smooth, coarse):
        kept = kept_ids(logits, **rules)
        assert kept == [brute_force(row, **rules) for row in logits.double().tolist()]


MANY = (
    {"top_k": 50},
    {"top_k": 17000},
    {"top_p": 0.9},
    {"top_p": 0.9999, "temperature": 3.0},
    {"top_p": 0.7, "temperature": 0.01},
    {"top_k": 40, "top_p": 0.6, "min_p": 0.03},
    {"min_p": 1e-3},
)


@cache
def kept_by_reference(vocab: int, offset: float) -> tuple[Tensor, list[Tensor]]:
    logits = randn(2, vocab, seed=vocab) * 3 + offset
    return logits, [distribution_reference(logits.double(), **full(2, **r))[1] for r in MANY]


@pytest.mark.parametrize(("vocab", "offset"), [(63, 0.0), (1000, 300.0), (20011, 0.0)])
def test_truncation_of_many_tokens(isa: str, vocab: int, offset: float) -> None:
    logits, want = kept_by_reference(vocab, offset)
    for rules, kept in zip(MANY, want, strict=True):
        assert torch.equal(kept_tokens(logits, **rules), kept), rules


def test_ties(device: str) -> None:
    logits = f32(1, 3, 2, 2, 2, 1)[None]
    assert kept_ids(logits, top_k=2) == [{1, 2, 3, 4}]  # every logit equal to the 2nd largest
    flat = torch.zeros(1, 10)
    assert kept_ids(flat, top_k=3) == [set(range(10))]
    assert kept_ids(flat, top_p=0.5) == [set(range(5))]  # the lowest ids of a tie
    assert kept_ids(flat, top_p=0.0) == [{0}]
    assert kept_ids(flat, min_p=1.0) == [set(range(10))]


def test_rows_have_their_own_parameters(device: str) -> None:
    logits = randn(1, 300, seed=5).expand(6, 300)
    rules = {
        "temperature": f32(0, 1, 0.5, 1, 2, 1),
        "top_k": i32(0, 4, -1, 0, 7, 300),
        "top_p": f32(1, 1, 0.5, 1, 0.9, 0.2),
        "min_p": f32(0, 0, 0, 0.2, 0.1, 0),
        "seeds": torch.arange(6),
    }
    together = sample(logits, **rules, return_logprobs=True)
    for r in range(6):
        mine = {k: v[r : r + 1] for k, v in rules.items()}
        alone = sample(logits[r : r + 1], **mine, return_logprobs=True)
        assert alone.token_ids[0] == together.token_ids[r]
        assert alone.logprobs[0] == together.logprobs[r]
    assert together.token_ids[0] == logits[0].argmax()
    as_int64 = sample(logits, **dict(rules, top_k=rules["top_k"].long()))
    assert torch.equal(as_int64.token_ids, together.token_ids)


def penalties(batch: int, vocab: int) -> dict[str, Tensor]:
    g = torch.Generator().manual_seed(vocab)
    return {
        "repetition_penalty": torch.rand(batch, generator=g) + 0.6,
        "presence_penalty": torch.randn(batch, generator=g),
        "frequency_penalty": torch.randn(batch, generator=g),
        "prompt_mask": torch.rand(batch, vocab, generator=g) < 0.3,
        "output_counts": torch.randint(-1, 4, (batch, vocab), generator=g, dtype=torch.int32),
    }


@pytest.mark.parametrize("vocab", [5, 257])
def test_penalties(isa: str, vocab: int) -> None:
    logits, every = randn(7, vocab, seed=12) * 2, penalties(7, vocab)
    for names in (
        ("repetition_penalty", "prompt_mask"),
        ("repetition_penalty", "output_counts"),
        ("presence_penalty", "output_counts"),
        ("frequency_penalty", "output_counts"),
        ("prompt_mask", "output_counts"),
        tuple(every),
    ):
        chosen = {name: every[name] for name in names}
        greedy = dict(chosen, temperature=torch.zeros(7))
        out = sample(logits, **greedy, return_logprobs=True, num_top_logprobs=vocab)
        ids, logprobs, top_ids, top = sample_reference(logits, **greedy, num_top_logprobs=vocab)
        assert torch.equal(out.token_ids, ids)
        assert torch.equal(out.top_ids, top_ids)
        torch.testing.assert_close(out.logprobs.double(), logprobs, rtol=0, atol=1e-5)
        torch.testing.assert_close(out.top_logprobs.double(), top, rtol=0, atol=1e-5)
        drawn = dict(chosen, seeds=torch.arange(7), **full(7, top_p=0.9))
        assert torch.equal(sample(logits, **drawn).token_ids, sample_reference(logits, **drawn)[0])


def test_penalties_by_hand(device: str) -> None:
    logits = f32(2, 2, -2, -2, 1)[None]
    rules = {
        "repetition_penalty": f32(2),
        "presence_penalty": f32(0.25),
        "frequency_penalty": f32(0.5),
        "prompt_mask": torch.tensor([[True, False, True, False, False]]),
        "output_counts": i32(0, 3, 0, 1, 0)[None],
    }
    want = f32(1, 1 - 1.5 - 0.25, -4, -4 - 0.5 - 0.25, 1)
    assert penalise_reference(logits, **rules).float().tolist() == [want.tolist()]
    out = sample(logits, **rules, num_top_logprobs=5)
    want = want.log_softmax(0)[out.top_ids]
    torch.testing.assert_close(out.top_logprobs, want, rtol=0, atol=1e-6)


@pytest.mark.parametrize("vocab", [1, 17, 1000, 128256])
@pytest.mark.parametrize(
    "rules", [{"temperature": 0.0}, {}, {"temperature": 0.5, "top_k": 10}], ids=str
)
def test_logprobs(isa: str, vocab: int, rules: dict[str, float]) -> None:
    n = min(vocab, 20)
    logits, parameters, want = reference_of(vocab, 13, 3.0, n, tuple(rules.items()))
    ids, logprobs, top_ids, top = want
    out = sample(logits, **parameters, return_logprobs=True, num_top_logprobs=n)
    assert torch.equal(out.token_ids, ids)
    assert torch.equal(out.top_ids, top_ids)
    assert out.logprobs.dtype == out.top_logprobs.dtype == torch.float32
    torch.testing.assert_close(out.logprobs.double(), logprobs, rtol=0, atol=1e-5)
    torch.testing.assert_close(out.top_logprobs.double(), top, rtol=0, atol=1e-5)


def test_top_logprobs_beyond_the_kept_set(device: str) -> None:
    out = sample(f32(1, 5, 4, 4, 3)[None], **full(1, top_k=1), num_top_logprobs=4)
    assert out.top_ids.tolist() == [[1, 2, 3, 4]]
    assert out.top_logprobs.tolist() == [[0.0, -INF, -INF, -INF]]
    assert out.logprobs is None


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_nan_and_infinite_logits(isa: str, temperature: float) -> None:
    rows = torch.tensor(
        [
            [NAN, 1.0, NAN, 2.0, -INF],
            [NAN] * 5,
            [-INF] * 5,
            [NAN, -INF, NAN, NAN, -INF],
            [1.0, INF, 3.0, NAN, INF],
            [-INF, -INF, -INF, 7.0, -INF],
            [3e38, -3e38, 0.0, 3e38, -INF],
        ]
    )
    kw = dict(full(7, temperature=temperature), return_logprobs=True, num_top_logprobs=5)
    for step in range(20):
        out = sample(rows, **kw, steps=torch.full((7,), step))
        ids = out.token_ids.tolist()
        assert ids[0] in (1, 3) and ids[1:4] == [0, 0, 0]
        assert ids[4] in (1, 4) and ids[5] == 3 and ids[6] in (0, 3)
        if temperature == 0.0:
            assert ids == [3, 0, 0, 0, 1, 3, 0]
        assert not out.top_logprobs.isnan().any()
        assert out.logprobs[1:4].tolist() == [-INF] * 3
        half = -math.log(2)
        torch.testing.assert_close(out.logprobs[4:], f32(half, 0, half), rtol=0, atol=1e-6)
        assert out.top_ids.tolist() == [
            [3, 1, 0, 2, 4],
            [0, 1, 2, 3, 4],
            [0, 1, 2, 3, 4],
            [0, 1, 2, 3, 4],
            [1, 4, 2, 0, 3],
            [3, 0, 1, 2, 4],
            [0, 3, 2, 1, 4],
        ]


def test_extreme_parameters(device: str) -> None:
    logits, n = randn(1, 100, seed=14).expand(64, 100), 64
    seeds = torch.arange(n)
    top = int(logits[0].argmax())
    for rules in (
        {"temperature": 1e-38},
        {"temperature": -1.0},
        {"temperature": NAN},
        {"top_p": 0.0},
        {"top_p": -1.0},
        {"min_p": 1.0},
        {"min_p": 9.0},
        {"top_k": 1},
        {"temperature": 1e-38, "top_p": 0.5},
    ):
        assert (sample(logits, **full(n, **rules), seeds=seeds).token_ids == top).all(), rules
    plain = sample(logits, seeds=seeds).token_ids
    assert len(set(plain.tolist())) > 20
    for rules in ({"top_p": NAN}, {"top_p": 1.5}, {"min_p": NAN}, {"min_p": -1.0}, {"top_k": -5}):
        assert torch.equal(sample(logits, **full(n, **rules), seeds=seeds).token_ids, plain), rules
    hot = sample(logits, **full(n, temperature=INF), seeds=seeds, return_logprobs=True)
    assert hot.logprobs.allclose(torch.tensor(-math.log(100.0)))
    assert kept_ids(logits[:1], temperature=INF, top_p=0.25)[0] == set(
        logits[0].topk(25).indices.tolist()
    )
    masked = torch.where(torch.arange(100) < 3, logits, -INF)
    for rules in ({"temperature": INF}, {"top_k": 50}, {"top_p": 0.999999}):
        assert (sample(masked, **full(n, **rules), seeds=seeds).token_ids < 3).all(), rules


@pytest.mark.parametrize("dtype", FLOATS)
def test_strided_rows(dtype: torch.dtype) -> None:
    storage = torch.full((6, 150), NAN).to(dtype)
    logits = storage[::2, 7:140]
    logits.copy_(randn(3, 133, seed=15))
    every = penalties(3, 200)
    masks = {
        "prompt_mask": every["prompt_mask"][:, :133],
        "output_counts": every["output_counts"][:, 67:],
    }
    kw = {"seeds": torch.arange(3), "repetition_penalty": f32(1.5, 0.5, 3), "return_logprobs": True}
    a = sample(logits, **kw, **masks)
    b = sample(logits.contiguous(), **kw, **{k: v.contiguous() for k, v in masks.items()})
    assert torch.equal(a.token_ids, b.token_ids) and torch.equal(a.logprobs, b.logprobs)


def test_empty_batch_and_out() -> None:
    out = sample(torch.empty(0, 9), return_logprobs=True, num_top_logprobs=2)
    assert [tuple(t.shape) for t in out] == [(0,), (0,), (0, 2), (0, 2)]
    ids = torch.full((2,), -9)
    assert sample(torch.eye(2, 9), temperature=torch.zeros(2), out=ids).token_ids is ids
    assert ids.tolist() == [0, 1]


def arguments(batch: int = 3, vocab: int = 37) -> dict[str, Tensor]:
    return dict(
        full(batch, temperature=0.8, top_k=9, top_p=0.9, min_p=0.01),
        seeds=torch.arange(batch),
        steps=torch.arange(batch),
        **penalties(batch, vocab),
    )


def test_opcheck() -> None:
    outputs = {
        "token_ids": torch.empty(3, dtype=torch.int64),
        "logprobs": torch.empty(3),
        "top_ids": torch.empty(3, 4, dtype=torch.int64),
        "top_logprobs": torch.empty(3, 4),
        "workspace": None,
    }
    op = torch.ops.fastinfer.sample.default
    opcheck(op, (randn(3, 37, seed=18),), {**arguments(), **outputs}, cuda=True)


@pytest.mark.parametrize("where", devices("sample"))
@pytest.mark.parametrize("batch", [1, 3])
def test_compiles(batch: int, where: str) -> None:
    logits = randn(batch, 37, seed=19, device=where)
    kw = {k: v.to(where) if isinstance(v, Tensor) else v for k, v in arguments(batch).items()}

    def step(x: Tensor) -> tuple[Tensor, ...]:
        return sample(x * 2, **kw, return_logprobs=True, num_top_logprobs=3)

    for got, want in zip(compiles(step, logits), step(logits), strict=True):
        assert torch.equal(got, want)
