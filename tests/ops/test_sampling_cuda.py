"""sample and verify_draft on the GPU give the tokens of the CPU: not nearly, but all of them.

Log-probabilities end in a double-precision log that the two libraries may round differently, so
those are compared to one fp32 rounding.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from fastinfer.ops.sampling import sample, verify_draft
from helpers import FLOATS, devices, randn
from sampling_on_device import on_cuda

pytestmark = pytest.mark.skipif("cuda" not in devices("sample"), reason="needs a CUDA device")
INF, NAN = float("inf"), float("nan")
VOCABS = (1, 7, 1000, 4095, 32000, 50257, 128256, 151936)


def rules(batch: int, vocab: int, seed: int) -> dict[str, Tensor]:
    """A different mix of parameters in every row, each of them off in some rows."""
    g = torch.Generator().manual_seed(seed)

    def pick(*values: float) -> Tensor:
        return torch.tensor(values)[torch.randint(len(values), (batch,), generator=g)]

    return {
        "temperature": pick(0.0, 0.3, 0.8, 1.0, 1.0, 1.7, 5.0),
        "top_k": pick(0, 0, 1, 3, 50, 50, 700, vocab // 2, vocab - 1).long(),
        "top_p": pick(1.0, 1.0, 0.0, 0.3, 0.9, 0.95, 0.999),
        "min_p": pick(0.0, 0.0, 0.0, 0.01, 0.2),
        "seeds": torch.randint(-(2**62), 2**62, (batch,), generator=g),
        "steps": torch.randint(0, 2**40, (batch,), generator=g),
    }


def penalties(batch: int, vocab: int, seed: int) -> dict[str, Tensor]:
    g = torch.Generator().manual_seed(seed)
    on = torch.arange(batch) % 3 > 0
    return {
        "repetition_penalty": torch.where(on, torch.rand(batch, generator=g) + 0.6, 1.0),
        "presence_penalty": torch.where(on, torch.randn(batch, generator=g), 0.0),
        "frequency_penalty": torch.where(on, torch.randn(batch, generator=g), 0.0),
        "prompt_mask": torch.rand(batch, vocab, generator=g) < 0.1,
        "output_counts": torch.randint(-1, 3, (batch, vocab), generator=g, dtype=torch.int32),
    }


def same(logits: Tensor, **kw: Any) -> None:
    want, got = sample(logits, **kw), on_cuda(sample)(logits, **kw)
    wrong = (want.token_ids != got.token_ids).nonzero()[:, 0].tolist()
    assert not wrong, (logits.shape, logits.dtype, wrong[:9])
    for a, b in ((want.logprobs, got.logprobs), (want.top_logprobs, got.top_logprobs)):
        if a is not None:
            torch.testing.assert_close(b, a, rtol=2.0**-22, atol=0, equal_nan=True)
    if want.top_ids is not None:
        assert torch.equal(want.top_ids, got.top_ids)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("vocab", VOCABS)
@pytest.mark.parametrize("batch", [1, 3, 40, 150])
def test_tokens_and_logprobs(batch: int, vocab: int, dtype: torch.dtype) -> None:
    if batch * vocab > 7_000_000:
        batch = 7_000_000 // vocab
    logits = (randn(batch, vocab, seed=batch + vocab) * 3).to(dtype)
    logits[::5] *= 4
    same(logits, **rules(batch, vocab, seed=vocab))
    kw = {**rules(batch, vocab, seed=vocab + 1), "return_logprobs": True}
    same(logits, **kw, **penalties(batch, vocab, seed=vocab), num_top_logprobs=min(20, vocab))


def test_thousands_of_draws() -> None:
    logits = randn(4, 32000, seed=1).repeat(512, 1) * 2
    for seed in range(4):
        same(logits, **rules(2048, 32000, seed=seed))


@pytest.mark.parametrize("dtype", FLOATS)
def test_ties_and_flat_rows(dtype: torch.dtype) -> None:
    vocab = 50000
    flat = torch.zeros(24, vocab)
    flat[8:16] = torch.arange(vocab) % 2
    flat[16:] = (randn(8, vocab, seed=2) * 2).round()
    for seed in range(3):
        kw = rules(24, vocab, seed=seed)
        same(flat.to(dtype), **kw, return_logprobs=True, num_top_logprobs=3000)
    same(flat, temperature=torch.zeros(24))


@pytest.mark.parametrize("n", [1, 128, 1024, 1025, 9000, 20011])
def test_many_top_logprobs(n: int) -> None:
    for batch in (1, 20):
        logits = randn(batch, 20011, seed=n)
        same(logits, **rules(batch, 20011, n), return_logprobs=True, num_top_logprobs=n)


def test_odd_rows() -> None:
    vocab = 70001
    logits = randn(12, vocab, seed=3) * 5
    logits[0] = NAN
    logits[1] = -INF
    logits[2, 1::2] = NAN
    logits[3, [5, 60000]] = INF
    logits[4] = -INF
    logits[4, 69999] = -3e38
    logits[5, :-3] = -INF
    logits[6] *= 1e30
    logits[7] *= 1e-40
    logits[8] = -logits[8].abs() * 1e37
    logits[9, ::3] = -0.0
    for temperature in (0.0, 1e-38, 1e-40, 1.0, 3e38, INF):
        for extra in ({}, {"top_p": 0.9}, {"top_k": 40}, {"top_k": 30000, "top_p": 0.5}):
            kw = {
                k: torch.full((12,), v, dtype=torch.int64 if k == "top_k" else torch.float32)
                for k, v in {"temperature": temperature, **extra}.items()
            }
            seeds = torch.arange(12)
            same(logits, **kw, seeds=seeds, return_logprobs=True, num_top_logprobs=9)


def test_the_largest_vocabulary() -> None:
    vocab = 2**23 - 1
    logits = randn(1, vocab, seed=4).half() * 2
    for extra in ({}, {"top_k": 50, "top_p": 0.9}, {"top_p": 0.9}, {"temperature": 0.0}):
        kw = {
            k: torch.full((1,), v, dtype=torch.int64 if k == "top_k" else torch.float32)
            for k, v in extra.items()
        }
        same(logits, **kw, return_logprobs=True, num_top_logprobs=5)


@pytest.mark.parametrize("dtype", FLOATS)
def test_strides_and_alignment(dtype: torch.dtype) -> None:
    vocab = 40010
    storage = torch.full((7, 40100), NAN, dtype=dtype, device="cuda")
    source = (randn(7, vocab, seed=5) * 3).to(dtype)
    wide = penalties(7, vocab + 40, seed=5)
    for offset in (0, 1, 7, 8):
        view = storage[:, offset : offset + vocab]
        view.copy_(source)
        masks = {k: wide[k][:, offset : offset + vocab] for k in ("prompt_mask", "output_counts")}
        kw = {**rules(7, vocab, seed=offset), "repetition_penalty": wide["repetition_penalty"]}
        want = sample(source, **kw, **masks).token_ids
        on_gpu = {k: v.cuda() for k, v in kw.items()}
        strided = {
            k: wide[k].cuda()[:, offset : offset + vocab] for k in ("prompt_mask", "output_counts")
        }
        assert torch.equal(sample(view, **on_gpu, **strided).token_ids.cpu(), want)


@pytest.mark.parametrize("vocab", [17, 5000, 128256])
def test_the_batch_changes_nothing(vocab: int) -> None:
    """One row alone (8 CTAs at most), among 30 (4), among 300 (1)."""
    logits, kw = randn(300, vocab, seed=6).cuda() * 3, rules(300, vocab, seed=6)
    kw = {k: v.cuda() for k, v in kw.items()}
    together = sample(logits, **kw, return_logprobs=True, num_top_logprobs=5)
    for n in (1, 30):
        for first in (0, 100, 270):
            part = {k: v[first : first + n] for k, v in kw.items()}
            some = sample(
                logits[first : first + n], **part, return_logprobs=True, num_top_logprobs=5
            )
            for a, b in zip(some, together, strict=True):
                assert torch.equal(a, b[first : first + n])


def test_portable_path(monkeypatch: pytest.MonkeyPatch) -> None:
    logits, kw = randn(5, 128256, seed=7).cuda() * 3, rules(5, 128256, seed=7)
    kw = {k: v.cuda() for k, v in kw.items()}
    want = sample(logits, **kw, return_logprobs=True, num_top_logprobs=50)
    monkeypatch.setenv("FASTINFER_FORCE_ARCH", "80")
    got = sample(logits, **kw, return_logprobs=True, num_top_logprobs=50)
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


@pytest.mark.parametrize(("vocab", "k"), [(7, 3), (1000, 0), (50257, 4), (128256, 2)])
@pytest.mark.parametrize("dtype", FLOATS)
def test_verified_tokens(vocab: int, k: int, dtype: torch.dtype) -> None:
    batch = min(300, 3_000_000 // vocab // (k + 1))
    target = (randn(batch, k + 1, vocab, seed=vocab + k) * 2).to(dtype)
    ids = target[:, :k].float().argmax(-1)
    ids[::2] = torch.randint(vocab, ids[::2].shape)
    q = torch.softmax(target[:, :k].float() + randn(batch, k, vocab, seed=k), -1)
    num = torch.arange(batch) % (k + 2) - 1
    for seed, arguments in enumerate(((ids, q), (ids,), (ids.int(), q, num))):
        kw = rules(batch, vocab, seed=seed)
        want, got = (
            verify_draft(target, *arguments, **kw),
            on_cuda(verify_draft)(target, *arguments, **kw),
        )
        assert torch.equal(want.token_ids, got.token_ids)
        assert torch.equal(want.num_accepted, got.num_accepted)


def test_out_and_untouched_inputs() -> None:
    logits = randn(3, 1000, seed=8).cuda()
    before, out = logits.clone(), torch.full((3,), -9, device="cuda")
    result = sample(logits, out=out, temperature=torch.zeros(3, device="cuda"))
    assert result.token_ids is out and torch.equal(out, logits.argmax(-1))
    assert torch.equal(logits, before)
    empty = sample(logits[:0], return_logprobs=True, num_top_logprobs=2)
    assert [tuple(t.shape) for t in empty] == [(0,), (0,), (0, 2), (0, 2)]
