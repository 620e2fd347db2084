"""One request's state. No tensors, no text, no phase flag.

A request needs `num_pending` more tokens run through the model; when that is 1 it is decoding.
Whether it is "in prefill" is never stored, so preemption, prefix reuse, chunking and draft tokens
need no special case:

    tokens     p p p p p p o o o      prompt + output, one growing list
    computed   ^^^^^^^^^^^            K/V of the first num_computed tokens is in the pool
    pending                ^^^^^^^    what the next steps have to run

`num_computed` moves when a step is planned. A token that a running step is about to draw is counted
in `in_flight` until it arrives: the next step can be planned, and launched, without knowing it.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass, field
from typing import Any

from .config import SamplingParams
from .metrics import RequestMetrics


class RequestStatus(enum.Enum):
    """Where a request is; the arrows are all there are."""

    WAITING = "waiting"  # -> RUNNING, FINISHED
    RUNNING = "running"  # -> PREEMPTED, FINISHED
    PREEMPTED = "preempted"  # waiting again, its tokens kept -> RUNNING, FINISHED
    FINISHED = "finished"


_NEXT = {
    RequestStatus.WAITING: {RequestStatus.RUNNING, RequestStatus.FINISHED},
    RequestStatus.RUNNING: {RequestStatus.PREEMPTED, RequestStatus.FINISHED},
    RequestStatus.PREEMPTED: {RequestStatus.RUNNING, RequestStatus.FINISHED},
    RequestStatus.FINISHED: set(),
}


@dataclass(slots=True, eq=False)
class Request:
    """A prompt on its way to a completion.

    Args:
        request_id: Unique among the unfinished requests of an engine.
        tokens: The prompt's token ids; output is appended.
        sampling: Checked parameters, this request's own copy.
        seed: Seed of its random stream; the output position is the offset in the stream.
        max_total_tokens: The request ends at this many tokens, prompt included.
        stop_ids: Token ids that end it, each with what `stop_reason` says (None for the model's
            end-of-sequence tokens).
        metrics: Its timeline.
    """

    request_id: str
    tokens: list[int]
    sampling: SamplingParams
    seed: int
    max_total_tokens: int
    metrics: RequestMetrics
    stop_ids: dict[int, int | None] = field(default_factory=dict)
    num_prompt: int = 0
    num_computed: int = 0
    block_table: list[int] = field(default_factory=list)
    block_hashes: list[bytes] = field(default_factory=list)  # chain, one per full block
    num_registered: int = 0  # blocks of the table whose content the pool already knows
    draft_tokens: list[int] = field(default_factory=list)  # proposals to verify in the next step
    in_flight: int = 0  # tokens being drawn by steps whose results are not here yet
    row: int = -1  # its place among the running requests; kept while it runs
    blocks_sent: int = 0  # entries of the block table that the row's holder has seen
    fork_of: Request | None = None  # same prompt: share its blocks as soon as they are computed
    arrival_order: int = 0
    priority: int = 0  # lower is served first
    host_blocks: list[int] = field(default_factory=list)  # where its K/V waits, if it was swapped
    num_on_host: int = 0  # tokens whose K/V is there
    resume_after: int = 0  # plans that must be committed before it may run again
    status: RequestStatus = RequestStatus.WAITING
    finish_reason: str | None = None  # "stop", "length" or "abort"
    stop_reason: int | str | None = None

    acceptance: Any = None  # what the speculator has learnt about its drafts
    draft_state: Any = None  # of the drafter

    wants_only_tokens: bool = True  # no log-probabilities, no change to the logits
    followed: bool = True  # something (text, log-probabilities) is made of every single token

    def __post_init__(self) -> None:
        sampling = self.sampling
        self.wants_only_tokens = (
            sampling.logprobs is None and not sampling.has_penalties and not sampling.min_tokens
        )
        self.num_prompt = len(self.tokens)
        self.metrics.num_prompt_tokens = self.num_prompt

    @property
    def order(self) -> tuple[int, int]:
        """Requests are served by priority, then as they came."""
        return self.priority, self.arrival_order

    @property
    def num_tokens(self) -> int:
        """Prompt and output, tokens in flight included."""
        return len(self.tokens) + self.in_flight

    @property
    def num_pending(self) -> int:
        """Tokens, drafts included, that still have to be run."""
        known = len(self.tokens) + self.in_flight
        if known >= self.max_total_tokens:
            return 0  # its last token is in flight, and is never run
        return known + len(self.draft_tokens) - self.num_computed

    @property
    def sample_position(self) -> int:
        """Output tokens before the one that the step just planned draws."""
        return self.num_output + max(self.in_flight - 1, 0)

    @property
    def num_output(self) -> int:
        """Tokens generated so far and here."""
        return len(self.tokens) - self.num_prompt

    @property
    def output_token_ids(self) -> list[int]:
        """The generated tokens."""
        return self.tokens[self.num_prompt :]

    @property
    def finished(self) -> bool:
        """Whether nothing more will happen to it."""
        return self.status is RequestStatus.FINISHED

    def move_to(self, status: RequestStatus) -> None:
        """Change state.

        Raises:
            RuntimeError: The state machine has no such arrow.
        """
        if status not in _NEXT[self.status]:
            raise RuntimeError(
                f"Request: {self.request_id} must not go from {self.status.value} to {status.value}"
            )
        self.status = status

    def drop_last(self, count: int) -> None:
        """Take back tokens of the latest delivery."""
        if count:
            del self.tokens[-count:]
            self.metrics.token_counts[-1] -= count

    def append(self, token: int) -> bool:
        """Take one generated token; True when it ends the request (which the caller then does)."""
        self.tokens.append(token)
        if token in self.stop_ids and self.num_output >= self.sampling.min_tokens:
            self.finish_reason = "stop"
            self.stop_reason = self.stop_ids[token]
        elif len(self.tokens) >= self.max_total_tokens:
            self.finish_reason = "length"
        return self.finish_reason is not None
