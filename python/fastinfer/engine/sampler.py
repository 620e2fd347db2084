"""Maps the sampling parameters of a batch to the tensors of the `sample` op.

A setting that no request of the batch uses is left out, so that the op skips that stage. A
request's random stream is (seed, output position): the draw does not depend on what else is in the
batch, on the row it sits in or on preemption.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .. import ops
from .request import Request


@dataclass(slots=True)
class SampleResult:
    """What one step yielded, on the host; lists run over the sampled requests."""

    token_ids: list[int]
    logprobs: list[float] | None = None  # of the chosen token; None when nobody asked
    top_ids: list[list[int]] | None = None  # most likely tokens, best first
    top_logprobs: list[list[float]] | None = None


def sampling_tensors(requests: Sequence[Request], vocab_size: int, device: torch.device) -> dict:
    """Keyword arguments of the `sample` op for these requests, one row each.

    Args:
        requests: The rows of the logits.
        vocab_size: V.
        device: Where the logits are.

    Returns:
        Only what at least one request needs. temperature, top_p, min_p and the penalties fp32
        [B]; top_k int32 [B]; seeds, steps int64 [B]; prompt_mask bool and output_counts int32
        [B, V]; return_logprobs, num_top_logprobs.
    """
    params = [request.sampling for request in requests]
    out: dict[str, Any] = {}

    def column(name: str, values: Sequence[float], off: float, dtype: torch.dtype) -> None:
        if any(value != off for value in values):
            out[name] = torch.tensor(values, dtype=dtype).to(device, non_blocking=True)

    column("temperature", [0.0 if p.greedy else p.temperature for p in params], 1.0, torch.float32)
    if not all(p.greedy for p in params):
        column("top_k", [min(max(p.top_k, 0), 2**31 - 1) for p in params], 0, torch.int32)
        column("top_p", [p.top_p for p in params], 1.0, torch.float32)
        column("min_p", [p.min_p for p in params], 0.0, torch.float32)
        seeds = torch.tensor([request.seed for request in requests], dtype=torch.int64)
        steps = torch.tensor([request.num_output for request in requests], dtype=torch.int64)
        out["seeds"] = seeds.to(device, non_blocking=True)
        out["steps"] = steps.to(device, non_blocking=True)
    if any(p.has_penalties for p in params):
        column("repetition_penalty", [p.repetition_penalty for p in params], 1.0, torch.float32)
        column("presence_penalty", [p.presence_penalty for p in params], 0.0, torch.float32)
        column("frequency_penalty", [p.frequency_penalty for p in params], 0.0, torch.float32)
        out["prompt_mask"], out["output_counts"] = _seen_tokens(requests, vocab_size, device)
    wanted = [p.logprobs for p in params if p.logprobs is not None]
    if wanted:
        out["return_logprobs"] = True
        out["num_top_logprobs"] = min(max(wanted), vocab_size)
    return out


def _seen_tokens(
    requests: Sequence[Request], vocab_size: int, device: torch.device
) -> tuple[Tensor, Tensor]:
    """Which tokens a prompt holds, and how often each was generated."""
    prompt = torch.zeros(len(requests), vocab_size, dtype=torch.bool)
    counts = torch.zeros(len(requests), vocab_size, dtype=torch.int32)
    for row, request in enumerate(requests):
        if request.sampling.has_penalties:
            prompt[row, request.tokens[: request.num_prompt]] = True
            output = torch.tensor(request.output_token_ids, dtype=torch.int64)
            counts[row] += torch.bincount(output, minlength=vocab_size).to(torch.int32)
    return prompt.to(device, non_blocking=True), counts.to(device, non_blocking=True)


def forbid_early_stops(logits: Tensor, requests: Sequence[Request]) -> None:
    """Set the stop tokens of requests below their `min_tokens` to -inf, in place."""
    rows, ids = [], []
    for row, request in enumerate(requests):
        if request.num_output < request.sampling.min_tokens:
            rows += [row] * len(request.stop_ids)
            ids += list(request.stop_ids)
    if rows:
        logits[
            torch.tensor(rows, device=logits.device), torch.tensor(ids, device=logits.device)
        ] = float("-inf")


def sample_tokens(logits: Tensor, requests: Sequence[Request]) -> SampleResult:
    """Draw the next token of each request.

    Args:
        logits: [B, V], one row per request; may be changed.
        requests: B of them.

    Returns:
        Tokens and, where asked for, log-probabilities. One copy to the host per tensor.
    """
    forbid_early_stops(logits, requests)
    options = sampling_tensors(requests, logits.shape[1], logits.device)
    out = ops.sample(logits, **options)
    result = SampleResult(token_ids=out.token_ids.tolist())
    if out.logprobs is not None:
        result.logprobs = out.logprobs.tolist()
    if out.top_ids is not None and out.top_logprobs is not None:
        result.top_ids = out.top_ids.tolist()
        result.top_logprobs = out.top_logprobs.tolist()
    return result
