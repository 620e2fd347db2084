"""A step's plan as int64 numbers, so that other ranks can run the same step.

    head     chunks, tokens, swap_out, swap_in, copies                         5 numbers
    chunks   row, start, count, drafts, samples, in_flight, news, blocks       8 each
    moves    (source, destination) of swap_out, swap_in, copies                2 each
    then for each chunk in turn:
             a request that is new in its row (blocks < 0): what `_describe` says of it
             new tokens, new block ids, drafts

The other side keeps a `Request` per row and runs the ordinary `ModelRunner` over the plan it gets;
it never schedules. Both sides must see every plan, in the same order.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from .config import SamplingParams
from .metrics import RequestMetrics
from .request import Request
from .step_plan import ScheduledChunk, SchedulePlan

_HEAD, _CHUNK = 5, 8
_FLOATS = (
    "temperature",
    "top_p",
    "min_p",
    "repetition_penalty",
    "presence_penalty",
    "frequency_penalty",
)


class PlanWriter:
    """Rank 0's side. `write` must be called before the step is run here.

    Args:
        max_rows: Most running requests.
    """

    def __init__(self, max_rows: int) -> None:
        self._sent = [0] * max_rows  # tokens of the request of a row that the others have

    def write(self, plan: SchedulePlan) -> bytes:
        """The plan, with what the others do not know of its requests."""
        chunks: list[int] = []
        news: list[int] = []
        for chunk in plan.chunks:
            request, row = chunk.request, chunk.request.row
            blocks, known = len(request.block_table), request.blocks_sent
            drafts = request.draft_tokens[: chunk.num_drafts] if chunk.num_drafts else ()
            have = len(request.tokens)
            if known:
                fresh = blocks - known
                more = request.tokens[self._sent[row] :]
            else:
                fresh, more = -blocks, request.tokens
                news += _describe(request)
            self._sent[row] = have
            chunks += (
                row,
                chunk.start,
                chunk.count,
                chunk.num_drafts,
                chunk.samples,
                request.in_flight,
                len(more),
                fresh,
            )
            news += more
            if blocks != known:
                news += request.block_table[known:]
            news += drafts
        moves = [*plan.swap_out, *plan.swap_in, *plan.copies]
        head = (
            len(plan.chunks),
            plan.num_tokens,
            len(plan.swap_out),
            len(plan.swap_in),
            len(plan.copies),
        )
        flat = [side for pair in moves for side in pair]
        return np.array([*head, *chunks, *flat, *news], dtype=np.int64).tobytes()


class PlanReader:
    """The side of every other rank.

    Args:
        max_rows: Most running requests.
    """

    def __init__(self, max_rows: int) -> None:
        self._requests: list[Request | None] = [None] * max_rows

    def read(self, data: bytes) -> SchedulePlan:
        """The plan, over this side's requests."""
        numbers: list[int] = np.frombuffer(data, dtype=np.int64).tolist()
        count, tokens, out, back, copies = numbers[:_HEAD]
        at = _HEAD + _CHUNK * count
        pairs = [(numbers[at + 2 * i], numbers[at + 2 * i + 1]) for i in range(out + back + copies)]
        plan = SchedulePlan(
            swap_out=pairs[:out],
            swap_in=pairs[out : out + back],
            copies=pairs[out + back :],
            num_tokens=tokens,
        )
        news = iter(numbers[at + 2 * len(pairs) :])
        for i in range(_HEAD, _HEAD + _CHUNK * count, _CHUNK):
            row, start, length, drafts, samples, in_flight, more, fresh = numbers[i : i + _CHUNK]
            if fresh < 0:
                request = self._requests[row] = _restore(row, news, more)
            else:
                known = self._requests[row]
                assert known is not None
                request = known
                if more:
                    request.tokens += _take(news, more)
            if fresh:
                request.block_table += _take(news, abs(fresh))
            request.draft_tokens = _take(news, drafts) if drafts else []
            request.in_flight = in_flight
            request.num_computed = start + length
            plan.chunks.append(ScheduledChunk(request, start, length, drafts, bool(samples)))
        return plan


def _take(numbers: Iterator[int], count: int) -> list[int]:
    return [next(numbers) for _ in range(count)]


def _describe(request: Request) -> list[int]:
    """Prompt length, seed, top_k, log-probabilities + 1, min_tokens, floats, stop ids."""
    params = request.sampling
    floats = np.array([getattr(params, name) for name in _FLOATS], dtype=np.float64)
    logprobs = 0 if params.logprobs is None else 1 + params.logprobs
    stops = list(request.stop_ids)
    return [
        request.num_prompt,
        request.seed,
        params.top_k,
        logprobs,
        params.min_tokens,
        *floats.view(np.int64).tolist(),
        len(stops),
        *stops,
    ]


def _restore(row: int, numbers: Iterator[int], count: int) -> Request:
    num_prompt, seed, top_k, logprobs, min_tokens = _take(numbers, 5)
    floats = np.array(_take(numbers, len(_FLOATS)), dtype=np.int64).view(np.float64).tolist()
    stops = _take(numbers, next(numbers))
    params = SamplingParams(
        top_k=top_k,
        logprobs=logprobs - 1 if logprobs else None,
        min_tokens=min_tokens,
        max_tokens=None,
        **dict(zip(_FLOATS, floats, strict=True)),
    )
    request = Request(
        request_id=str(row),
        tokens=_take(numbers, count),
        sampling=params,
        seed=seed,
        max_total_tokens=2**62,
        metrics=RequestMetrics(arrival_time=0.0),
        stop_ids=dict.fromkeys(stops),
        row=row,
    )
    request.num_prompt = num_prompt
    return request
