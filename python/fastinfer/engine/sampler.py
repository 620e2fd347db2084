"""Maps the sampling parameters of a batch to arguments of the `sample` op, and its results back.

A setting that no request of the batch uses is left out, so that the op skips that stage. A
request's random stream is (seed, output position): the draw does not depend on what else is in the
batch, on the row it sits in or on preemption.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
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
    first_rows: list[int] | None = None  # of each request, if some had drafts: one row more each
    # Of a burst, per chunk: the tokens that stand; per step how many drafts were checked and stand.
    runs: list[list[int]] | None = None
    checks: list[list[tuple[int, int]]] | None = None


@dataclass(slots=True)
class SampleOptions:
    """Per-row arguments of `sample`, on the device.

    `stops` int64 [n, 2] are (row, column of the logits) that must not be drawn, `ahead` the drafts
    of its request in front of each row (None: there are none).
    """

    columns: dict[str, Tensor] = field(default_factory=dict)
    stops: Tensor | None = None
    ahead: list[int] | None = None


class DrawnTokens:
    """Tokens on their way to the host: one copy (two more where log-probabilities were asked for).

    Args:
        out: What `sample` returned; None for a step that draws nothing, or not here.
        first_rows: See `SampleResult`.
    """

    def __init__(self, out: Any | None, first_rows: list[int] | None = None) -> None:
        self._parts: list[Any] = [None] * 4  # with a `tolist` each
        self._ready: torch.cuda.Event | None = None
        self.first_rows = first_rows
        if out is None:
            return
        self._parts = [out.token_ids, out.logprobs, out.top_ids, out.top_logprobs]
        if out.token_ids.is_cuda:
            self._parts = [None if part is None else _to_pinned(part) for part in self._parts]
            self._ready = torch.cuda.Event()
            self._ready.record(torch.cuda.current_stream(out.token_ids.device))

    @classmethod
    def in_buffer(
        cls, token_ids: np.ndarray | Tensor, ready: torch.cuda.Event | None
    ) -> DrawnTokens:
        """Tokens that are in this host memory once the event has happened."""
        tokens = cls(None)
        tokens._parts[0], tokens._ready = token_ids, ready
        return tokens

    @property
    def ready(self) -> torch.cuda.Event | None:
        """Happens when the step is done; None where it is."""
        return self._ready

    def wait(self) -> None:
        """Wait for the step."""
        if self._ready is not None:
            self._ready.synchronize()

    def result(self) -> SampleResult:
        """Wait for the step and read what it drew."""
        self.wait()
        ids, *others = (None if part is None else part.tolist() for part in self._parts)
        result = SampleResult(ids or [], *others)
        result.first_rows = self.first_rows
        return result


def _to_pinned(tensor: Tensor) -> Tensor:
    host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
    return host.copy_(tensor, non_blocking=True)


def sampling_columns(
    requests: Sequence[Request], ahead: Sequence[int] | None = None
) -> dict[str, np.ndarray]:
    """The columns of the `sample` op that at least one of these requests needs, one row each.

    `ahead` counts the drafts in front of a row: its position in the random stream is that of a
    token drawn after so many more tokens.
    temperature, top_p, min_p and the penalties fp32; top_k int32; seeds, steps int64.
    """
    params = [request.sampling for request in requests]
    out: dict[str, np.ndarray] = {}

    def column(name: str, values: Sequence[float], off: float, dtype: type = np.float32) -> None:
        if any(value != off for value in values):
            out[name] = np.array(values, dtype=dtype)

    column("temperature", [0.0 if p.greedy else p.temperature for p in params], 1.0)
    if not all(p.greedy for p in params):
        column("top_k", [min(max(p.top_k, 0), 2**31 - 1) for p in params], 0, np.int32)
        column("top_p", [p.top_p for p in params], 1.0)
        column("min_p", [p.min_p for p in params], 0.0)
        out["seeds"] = np.array([request.seed for request in requests], dtype=np.int64)
        out["steps"] = np.array([r.sample_position for r in requests], dtype=np.int64)
        if ahead is not None:
            out["steps"] += np.array(ahead, dtype=np.int64)
    if any(p.has_penalties for p in params):
        column("repetition_penalty", [p.repetition_penalty for p in params], 1.0)
        column("presence_penalty", [p.presence_penalty for p in params], 0.0)
        column("frequency_penalty", [p.frequency_penalty for p in params], 0.0)
    return out


def early_stops(
    requests: Sequence[Request], ahead: Sequence[int] | None = None
) -> list[tuple[int, int]]:
    """(row, stop token) for rows below the `min_tokens` of their request."""
    return [
        (row, token)
        for row, request in enumerate(requests)
        if request.sample_position + (ahead[row] if ahead else 0) < request.sampling.min_tokens
        for token in request.stop_ids
    ]


def _seen_tokens(
    requests: Sequence[Request],
    ahead: Sequence[int] | None,
    vocab_size: int,
    device: torch.device,
) -> tuple[Tensor, Tensor]:
    """Which tokens a prompt holds, and how often each was generated, drafts in front included."""
    prompt = torch.zeros(len(requests), vocab_size, dtype=torch.bool)
    counts = torch.zeros(len(requests), vocab_size, dtype=torch.int32)
    for row, request in enumerate(requests):
        if request.sampling.has_penalties:
            prompt[row, request.tokens[: request.num_prompt]] = True
            drafts = request.draft_tokens[: ahead[row]] if ahead else []
            output = torch.tensor(request.output_token_ids + drafts, dtype=torch.int64)
            counts[row] += torch.bincount(output, minlength=vocab_size).to(torch.int32)
    return prompt.to(device), counts.to(device)


def sample_tokens(
    logits: Tensor,
    requests: Sequence[Request],
    options: SampleOptions,
    *,
    vocab_size: int,
    sample: Callable[..., Any] | None = None,
) -> Any:
    """Draw the next token of each request.

    Args:
        logits: [B, V], one row per request, with drafts one more for each; may be changed.
        requests: B of them, that of each row. Those with penalties must have all their tokens on
            the host.
        options: Of these requests.
        vocab_size: Of the model, also where `logits` are a piece of the vocabulary.
        sample: What stands in for the operator where the vocabulary is divided.

    Returns:
        The op's `SampleOutput`, on the device.
    """
    if options.stops is not None:
        logits[options.stops[:, 0], options.stops[:, 1]] = float("-inf")
    more: dict[str, Any] = dict(options.columns)
    if any(request.sampling.has_penalties for request in requests):
        seen = _seen_tokens(requests, options.ahead, vocab_size, logits.device)
        more["prompt_mask"], more["output_counts"] = seen
    wanted = [r.sampling.logprobs for r in requests if r.sampling.logprobs is not None]
    if wanted:
        more["return_logprobs"] = True
        more["num_top_logprobs"] = min(max(wanted), vocab_size)
    return (sample or ops.sample)(logits, **more)
