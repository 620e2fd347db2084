"""The shipped tiny checkpoint, text for it, and its perplexity: what the quantizer tests share."""

from __future__ import annotations

import functools
import importlib
import sys
from pathlib import Path
from typing import Any

import torch

from fastinfer.models import load_model
from fastinfer.quant import QuantizeOptions, quantize_checkpoint
from fastinfer.quant.calibration import encode_text
from fastinfer.quant.perplexity import perplexity
from fastinfer.text import load_tokenizer

TINY = Path(__file__).resolve().parents[2] / "examples" / "tiny"
MODEL = TINY / "model"
HELDOUT_TOKENS = 8_000


def calibration_text(size: int = 100_000) -> str:
    """Documents of the grammar that neither training nor heldout.txt has seen."""
    if str(TINY) not in sys.path:
        sys.path.insert(0, str(TINY))
    corpus = importlib.import_module("corpus")
    records: list[str] = []
    for document in corpus.documents(4242):
        records.append(document + "\n")
        if sum(map(len, records)) > size:
            return "".join(records)
    raise AssertionError("documents never ends")


@functools.cache
def heldout() -> torch.Tensor:
    text = (TINY / "heldout.txt").read_text(encoding="utf-8")
    return encode_text(load_tokenizer(MODEL), text)


def quality(folder: Path, tokens: int | None = HELDOUT_TOKENS) -> float:
    """Perplexity in fp32, so that only the weights differ; None: over all held-out text."""
    model = load_model(folder, dtype="float32", progress=False)
    return perplexity(model, heldout()[:tokens], window=512)


def quantized(out: Path, calib: Path | None = None, **options: Any) -> dict[str, Any]:
    """Quantise the tiny checkpoint; small groups, few samples."""
    defaults: dict[str, Any] = {"samples": 24, "seqlen": 256}
    if options.get("method") != "smoothquant":
        defaults["group_size"] = 64
    chosen = QuantizeOptions(**(defaults | options))
    return quantize_checkpoint(MODEL, out, chosen, calib=calib, progress=False)
