"""Perplexity: the model slides over a text in overlapping windows, each token scored once."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from ..models.decoder import CausalLM
from .calibration import empty_cache, move_metadata, pack_sequences

_LOGIT_ROWS = 1024


@torch.no_grad()
def perplexity(
    model: CausalLM,
    tokens: Tensor,
    *,
    window: int = 2048,
    stride: int | None = None,
    cache_dtype: torch.dtype | None = None,
    on_tokens: Callable[[int], None] | None = None,
) -> float:
    """exp of the mean negative log likelihood per token.

    Args:
        model: plain or quantised.
        tokens: int64 [T], T >= 2; the first is context only.
        window: tokens the model sees at once, at most its `max_model_len`.
        stride: new tokens per window; the rest of it is context that was scored before. None: half
            a window.
        cache_dtype: of the keys and values that attention reads; 8-bit ones get a scale per token
            and head. None: the model's.
        on_tokens: called with the number of tokens scored after each window.

    Returns:
        The perplexity; infinite or NaN when the model's logits are.

    Raises:
        ValueError: fewer than two tokens, or no room to slide.
    """
    if tokens.dim() != 1 or tokens.numel() < 2:
        raise ValueError(
            f"perplexity: tokens must be [T] with T >= 2, got {list(tokens.shape)}; give more text"
        )
    window = min(window, model.max_model_len)
    stride = max(window // 2, 1) if stride is None else stride
    if window < 2 or not 1 <= stride < window:
        raise ValueError(
            f"perplexity: stride must be in 1..window - 1 and window at least 2, got stride "
            f"{stride} and window {window}"
        )
    total, scored = 0.0, 1  # tokens[:scored] are done
    while scored < tokens.numel():
        end = min(tokens.numel(), window if scored == 1 else scored + stride)
        begin = max(0, end - window)
        loss = _losses(model, tokens[begin:end], end - scored, cache_dtype or model.dtype)
        total += float(loss.sum(dtype=torch.float64))
        if on_tokens is not None:
            on_tokens(end - scored)
        scored = end
    mean = total / (tokens.numel() - 1)
    return math.exp(mean) if mean < 700 else math.inf if mean == mean else math.nan


def _losses(model: CausalLM, tokens: Tensor, last: int, cache_dtype: torch.dtype) -> Tensor:
    """Negative log likelihoods of the last tokens of a sequence."""
    inputs, targets = tokens[:-1], tokens[1:].to(model.device)
    packed = pack_sequences([inputs])
    caches = [
        empty_cache(model.cache_config, packed.blocks, cache_dtype, model.device)
        for _ in range(len(model.layers))
    ]
    meta = move_metadata(packed.meta, model.device)
    hidden = model(inputs.to(model.device), meta, caches)[-last:]
    targets = targets[-last:]
    losses = [
        torch.nn.functional.cross_entropy(
            model.compute_logits(rows).float(), wanted, reduction="none"
        )
        for rows, wanted in zip(hidden.split(_LOGIT_ROWS), targets.split(_LOGIT_ROWS), strict=True)
    ]
    return torch.cat(losses)
