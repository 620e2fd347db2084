"""Calibration text, and perplexity over sliding windows."""

from __future__ import annotations

import pytest
import torch
from quantizing import MODEL, calibration_text

from fastinfer.models import load_model
from fastinfer.quant.calibration import calibration_tokens, encode_text
from fastinfer.quant.perplexity import perplexity
from fastinfer.text import load_tokenizer


def test_documents_are_split_at_the_beginning_token() -> None:
    tokenizer = load_tokenizer(MODEL)
    ids = encode_text(tokenizer, "<|begin|>One.<|end|>\n<|begin|>Two.<|end|>\n")
    one, two = (tokenizer.encode(t + "<|end|>") for t in ("One.", "Two."))
    assert ids.tolist() == one + two
    assert encode_text(tokenizer, "One.<|end|>").tolist() == one


def test_calibration_pieces_are_spread_over_the_text(caplog: pytest.LogCaptureFixture) -> None:
    tokenizer = load_tokenizer(MODEL)
    text = calibration_text(20_000)
    ids = encode_text(tokenizer, text)
    pieces = calibration_tokens(tokenizer, text, samples=5, seqlen=100)
    starts = [int((ids.unfold(0, 100, 1) == p).all(1).nonzero()[0, 0]) for p in pieces]
    whole = ids.numel() // 100
    assert starts == [i * whole // 5 * 100 for i in range(5)]
    few = calibration_tokens(tokenizer, text, samples=10_000, seqlen=100)
    assert len(few) == whole
    assert "10000 were asked for" in caplog.text
    with pytest.raises(ValueError, match="at least 2 tokens"):
        calibration_tokens(tokenizer, "", samples=1, seqlen=10)


def test_perplexity_slides_and_scores_each_token_once() -> None:
    model = load_model(MODEL, dtype="float32", progress=False)
    ids = encode_text(load_tokenizer(MODEL), calibration_text(600))[:90]

    def losses(tokens: torch.Tensor) -> torch.Tensor:
        from fastinfer.quant.perplexity import _losses

        return _losses(model, tokens, tokens.numel() - 1, model.dtype)

    whole = losses(ids)
    assert perplexity(model, ids, window=90) == pytest.approx(float(whole.mean().exp()), rel=1e-5)
    scored: list[int] = []
    value = perplexity(model, ids, window=40, stride=15, on_tokens=scored.append)
    assert scored == [39, 15, 15, 15, 5]
    parts = [losses(ids[:40])]
    parts += [losses(ids[e - 40 : e])[-15:] for e in (55, 70, 85)]
    parts.append(losses(ids[50:])[-5:])
    assert value == pytest.approx(float(torch.cat(parts).mean().exp()), rel=1e-5)
    for wrong in ({"window": 1}, {"stride": 0}, {"window": 10, "stride": 10}):
        with pytest.raises(ValueError, match="stride"):
            perplexity(model, ids, **wrong)
    with pytest.raises(ValueError, match="T >= 2"):
        perplexity(model, ids[:1])
