"""Who runs in the next step, and with how many tokens. No tensors, no models.

One rule, no phases. Every step has a token budget. Running requests come first, in order of
priority and then of arrival, each with all its pending tokens (one when it decodes, a chunk of the
prompt otherwise, the drafts on top when it speculates); what is left of the budget admits waiting
ones. Decodes are thus never held up by more than one budget's worth of somebody's prompt.

When blocks run out, the last running request in that order is preempted: its blocks are freed, or
moved to the host where that is faster than computing them again (swap.py), its tokens kept, and it
waits again in its place; drafts are dropped before anybody is preempted for them. One that waits
for want of blocks or of a place makes the last running one give way if that has a lower priority. A
request is admitted only when everything it has to run fits beside what the running ones still need,
so that admission does not cause preemption at once. The first request is never preempted and a
request that could not run alone is refused on arrival, therefore somebody always advances.

The n completions of a prompt compute it once: the others wait for the first, then share its full
blocks and get a copy of the block their own tokens would go into (copy on write).

A plan may be made before the results of the one before are known (`Request.in_flight`). Blocks that
a step in flight still writes may be handed out again: steps run in order.
"""

from __future__ import annotations

import time
from bisect import insort
from collections import deque
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from .._host_loader import load_host
from .config import EngineConfig
from .metrics import RequestMetrics
from .request import Request, RequestStatus
from .step_plan import ScheduledChunk, SchedulePlan

if TYPE_CHECKING:
    from .._host_py import BlockPool, DecodeLoop
    from .swap import SwapSpace


class Scheduler:
    """Queues of requests over one block pool.

    Args:
        config: Reads block_size, max_num_seqs, max_num_batched_tokens,
            long_prefill_token_threshold, enable_prefix_caching, enable_chunked_prefill, batching,
            use_kv_cache.
        num_blocks: Size of the pool.
        max_model_len: Longest prompt + output in tokens.
        clock: Monotonic time in seconds.
        swap: Blocks of the host; None recomputes what was preempted.
        stages: Of a pipeline: with more than one a request with a token on its way is not planned,
            and a step takes its share of the running requests, so that there are some for the next.
    """

    def __init__(
        self,
        config: EngineConfig,
        *,
        num_blocks: int,
        max_model_len: int,
        clock: Callable[[], float] = time.perf_counter,
        swap: SwapSpace | None = None,
        stages: int = 1,
    ) -> None:
        self.stages = stages
        host = load_host()
        self._extend_hashes = host.extend_block_hashes
        self.pool: BlockPool = host.BlockPool(num_blocks)
        self.decodes: DecodeLoop = host.DecodeLoop(
            Request,
            RequestMetrics,
            ScheduledChunk,
            RequestStatus.RUNNING,
            self.pool,
            config.block_size,
        )
        self.config = config
        self.max_model_len = max_model_len
        longest = self.max_total_tokens - 1
        if not config.enable_chunked_prefill and longest > config.max_num_batched_tokens:
            raise ValueError(
                "LLM: enable_chunked_prefill=False must go with max_num_batched_tokens of at least "
                f"{longest}, the longest prompt, got {config.max_num_batched_tokens}"
            )
        self.clock = clock
        self.swap = swap
        self.waiting: deque[Request] = deque()
        self.running: list[Request] = []  # in order, as those that wait
        self.requests: dict[str, Request] = {}  # all that are not finished
        self.num_preemptions = 0
        self.num_swapped = 0  # preemptions that moved blocks to the host
        self.prefix_hit_tokens = 0
        self.prefix_query_tokens = 0
        self.peak_blocks = 0
        self._arrivals = 0
        self._held_up = False  # the first that waits found no place in the last step
        self._rows = list(range(config.max_num_seqs))  # not taken by a running request
        self._planned = self._committed = 0  # steps

    @property
    def max_total_tokens(self) -> int:
        """Most tokens, prompt and output, that one request can have."""
        # the last token is never run, so it needs no slot in the cache
        return min(self.max_model_len, self.pool.num_blocks * self.config.block_size + 1)

    def check_prompt_length(self, length: int) -> None:
        """Refuse a prompt that could never run.

        Raises:
            ValueError: It is empty, or leaves no room for an output token.
        """
        if length < 1:
            raise ValueError("LLM: prompt must hold at least one token, got an empty prompt")
        slots = self.pool.num_blocks * self.config.block_size
        if length > slots:
            raise ValueError(
                f"LLM: prompt must fit into the KV cache of {slots} tokens "
                f"({self.pool.num_blocks} blocks of {self.config.block_size}), got {length}; "
                "raise num_blocks or kv_cache_memory, or shorten the prompt"
            )
        if length >= self.max_model_len:
            raise ValueError(
                f"LLM: prompt must be shorter than max_model_len {self.max_model_len} to leave "
                f"room for output, got {length} tokens; raise max_model_len or shorten the prompt"
            )

    def add(self, request: Request) -> None:
        """Queue a request.

        Raises:
            ValueError: Its prompt could never run, or its id is taken.
        """
        self.check_prompt_length(len(request.tokens))
        if request.request_id in self.requests:
            raise ValueError(
                f"LLM: request_id must be unique among unfinished requests, got "
                f"{request.request_id!r} twice"
            )
        request.arrival_order = self._arrivals
        self._arrivals += 1
        self.requests[request.request_id] = request
        self._queue(request)

    def finish(self, request: Request, reason: str, stop_reason: int | str | None = None) -> None:
        """End a request in whatever state it is and free its blocks; no-op when it has ended."""
        if request.finished:
            return
        was = request.status
        request.move_to(RequestStatus.FINISHED)
        request.finish_reason = reason
        request.stop_reason = stop_reason
        request.in_flight, request.draft_tokens, request.fork_of = 0, [], None
        request.metrics.finished_time = self.clock()
        request.metrics.failed = reason == "abort"
        del self.requests[request.request_id]
        if was is RequestStatus.RUNNING:
            self.running.remove(request)
        else:
            self.waiting.remove(request)
        self._release(request)
        if self.swap is not None:
            self.swap.forget(request)

    def _queue(self, request: Request) -> None:
        at = len(self.waiting)
        while at and self.waiting[at - 1].order > request.order:
            at -= 1
        self.waiting.insert(at, request)

    def schedule(self) -> SchedulePlan:
        """Plan the next step and take the blocks it needs. An empty plan means nothing waits."""
        plan = SchedulePlan()
        last = self.running[-1] if self._held_up and self.waiting and self.running else None
        if last is not None and last.priority > self.waiting[0].priority:
            self._preempt(last, plan)
        self._held_up = False
        budget = self.config.max_num_batched_tokens
        limit = self.config.long_prefill_token_threshold or budget
        running = list(self.running) if self.stages == 1 else self._turn()
        at = 0
        while at < len(running) and budget > 0:
            if self.config.use_kv_cache:
                at, decodes = self.decodes.plan(running, at, budget, plan.chunks)
                plan.num_tokens += decodes
                budget -= decodes
            if at < len(running) and budget > 0:
                budget -= self._plan_running(running[at], min(budget, limit), plan)
                at += 1
        if not plan.preempted:
            self._admit(plan, budget)
        if plan.num_tokens > len(plan.chunks):
            plan.chunks.sort(key=lambda chunk: chunk.count > 1)  # decodes first
        self._planned += bool(plan.chunks)
        self.peak_blocks = max(self.peak_blocks, self.pool.num_used)
        return plan

    def _turn(self) -> list[Request]:
        """The running requests of the next step of a pipeline."""
        ready = [request for request in self.running if not request.in_flight]
        return ready[: -(-len(self.running) // self.stages)]

    def commit(self, plan: SchedulePlan, sampled: list[int] | list[list[int]]) -> list[Request]:
        """Take the results of a step.

        Args:
            plan: What was run.
            sampled: For each chunk the tokens it yielded: none when it did not reach the end,
                one (which may be a plain number), or with drafts the accepted ones and one more.

        Returns:
            Of the requests that got tokens those that somebody follows or that just ended.
        """
        self._committed += 1
        now = self.clock()
        caching = self.config.enable_prefix_caching
        updated: list[Request] = []
        at, chunks = 0, plan.chunks
        while at < len(chunks):
            at = self.decodes.commit(chunks, sampled, at, now, caching, updated)
            if at < len(chunks):
                drawn = sampled[at]
                tokens = [drawn] if isinstance(drawn, int) else drawn
                self._commit_chunk(chunks[at], tokens, now, updated)
                at += 1
        return updated

    def _commit_chunk(
        self, chunk: ScheduledChunk, tokens: Sequence[int], now: float, updated: list[Request]
    ) -> None:
        request = chunk.request
        if request.status is RequestStatus.FINISHED:
            return  # while the step ran
        request.in_flight -= chunk.samples
        taken = 0
        for token in tokens:
            taken += 1
            if request.append(token):
                break
        if request.status is RequestStatus.RUNNING:  # if preempted, its K/V is gone already
            computed = chunk.start + chunk.count
            if request.draft_tokens:
                # K/V of rejected drafts, and of what follows a stop among the accepted ones
                computed -= chunk.num_drafts - max(len(tokens) - 1, 0)
                computed = min(computed, len(request.tokens))
                request.num_computed = computed
            full = (request.num_registered + 1) * self.config.block_size
            if self.config.enable_prefix_caching and computed >= full:
                self._register(request, computed)
        if request.draft_tokens:
            request.draft_tokens = []
        if taken:
            request.metrics.record_tokens(taken, now)
            if request.followed or request.finish_reason is not None:
                updated.append(request)
        if request.finish_reason is not None:
            self.finish(request, request.finish_reason, request.stop_reason)

    def look_ahead(self, request: Request, count: int) -> int:
        """Take the blocks of the pending token and its drafts, if nobody else needs them: how many
        of the drafts there is room for."""
        size = self.config.block_size
        missing = self._blocks_for(request.num_computed + 1 + count) - len(request.block_table)
        missing = min(missing, self.pool.num_free - len(self.running))
        if missing > 0:
            request.block_table += self.pool.allocate(missing)
        return min(count, len(request.block_table) * size - request.num_computed - 1)

    def make_room(self, request: Request, num_tokens: int) -> bool:
        """Take the blocks of so many tokens, if nobody else needs them."""
        missing = self._blocks_for(num_tokens) - len(request.block_table)
        if missing <= 0:
            return True
        if missing > self.pool.num_free - len(self.running):
            return False
        request.block_table += self.pool.allocate(missing)
        self.peak_blocks = max(self.peak_blocks, self.pool.num_used)
        return True

    def plan_afterwards(self, plan: SchedulePlan, runs: list[list[int]]) -> None:
        """Give the chunks of a burst behind another one, now that its tokens are known, what
        `schedule` would have: nobody knew where it would start."""
        for chunk, run in zip(plan.chunks, runs, strict=True):
            request = chunk.request
            chunk.start = len(request.tokens) - 1
            if request.status is not RequestStatus.RUNNING:
                continue
            chunk.count, chunk.num_drafts = len(run), len(run) - 1
            plan.num_tokens += chunk.count
            request.num_computed = chunk.start + chunk.count
            request.draft_tokens = [0] * chunk.num_drafts
            request.in_flight += 1

    def _blocks_for(self, num_tokens: int) -> int:
        return -(-num_tokens // self.config.block_size)

    def _plan_running(self, request: Request, limit: int, plan: SchedulePlan) -> int:
        """Plan at most `limit` tokens of a running request; returns how many."""
        if request.status is not RequestStatus.RUNNING:
            return 0  # preempted for an older one
        count = min(request.num_pending, limit)
        if request.num_computed + count > len(request.block_table) * self.config.block_size:
            count = self._grow(request, count, plan)
        if count:
            self._plan_chunk(plan, request, count)
        return count

    def _plan_chunk(self, plan: SchedulePlan, request: Request, count: int) -> None:
        if request.metrics.first_scheduled_time is None:
            request.metrics.first_scheduled_time = self.clock()
        start = request.num_computed
        drafts = start + count - len(request.tokens) - request.in_flight
        samples = drafts >= 0
        plan.chunks.append(ScheduledChunk(request, start, count, max(drafts, 0), samples))
        plan.num_tokens += count
        request.num_computed = start + count if self.config.use_kv_cache or not samples else 0
        request.in_flight += samples

    def _grow(self, request: Request, count: int, plan: SchedulePlan) -> int:
        """Get the blocks for `count` more tokens.

        Returns:
            `count`, less by the drafts there is no room for, or 0 when the request gave way.
        """
        have = len(request.block_table)
        missing = self._blocks_for(request.num_computed + count) - have
        if missing > self.pool.num_free:
            count = min(count, request.num_tokens - request.num_computed)
            missing = self._blocks_for(request.num_computed + count) - have
        while missing > self.pool.num_free:
            victim = self.running[-1]
            self._preempt(victim, plan)
            if victim is request:
                return 0
        if missing > 0:
            request.block_table += self.pool.allocate(missing)
        return count

    def _preempt(self, request: Request, plan: SchedulePlan) -> None:
        self.running.remove(request)
        request.move_to(RequestStatus.PREEMPTED)
        if request.in_flight and request.draft_tokens:  # nobody knows yet which of them stand
            request.num_computed = min(request.num_computed, len(request.tokens))
        if self.swap is not None:
            self.num_swapped += self.swap.take_out(request, plan, self._blocks_for)
        self._release(request)
        request.num_computed = 0
        request.draft_tokens = []
        request.resume_after = self._planned
        request.metrics.num_preemptions += 1
        self.num_preemptions += 1
        self._queue(request)
        plan.preempted.append(request.request_id)

    def _admit(self, plan: SchedulePlan, budget: int) -> None:
        if not self.waiting or (self.running and self.config.batching == "static"):
            return
        whole = not self.config.enable_chunked_prefill
        self._held_up = budget > 0 and len(self.running) >= self.config.max_num_seqs
        reserved = sum(
            # what a running request still has to get for the tokens it has, and one block to grow
            max(self._blocks_for(r.num_tokens) - len(r.block_table), 0) + 1
            for r in self.running
        )
        held: list[Request] = []  # for a prompt that is being computed for them
        while self.waiting and budget > 0 and len(self.running) < self.config.max_num_seqs:
            request = self.waiting[0]
            if self.stages > 1 and request.resume_after > self._committed:
                break  # steps from before it was preempted are on their way, and their tokens
            if self._waits_for_fork(request, plan):
                held.append(self.waiting.popleft())
                continue
            parent, request.fork_of = request.fork_of, None
            shared = self._match_prefix(request) if parent is None else self._fork(parent)
            total = self._blocks_for(request.num_tokens)
            # blocks found in the cache that nobody holds leave the free list as well
            needed = total - len(shared) + self.pool.count_free(shared)
            lacks = needed + (reserved if self.running else 0) > self.pool.num_free
            if whole and parent is None:
                lacks |= request.num_tokens - len(shared) * self.config.block_size > budget
            if lacks:
                request.fork_of = parent
                self._held_up = True
                break
            self.waiting.popleft()
            request.move_to(RequestStatus.RUNNING)
            insort(self.running, request, key=lambda r: r.order)
            self._adopt_prefix(request, shared, parent)
            if self.swap is not None:
                self.swap.bring_back(request, plan, self.pool)
            request.row = self._rows.pop()
            limit = self.config.long_prefill_token_threshold
            count = min(request.num_pending, budget, limit or budget)
            fresh = self._blocks_for(request.num_computed + count) - len(request.block_table)
            request.block_table += self.pool.allocate(fresh)
            if parent is not None and request.num_computed % self.config.block_size:
                at = len(shared)
                plan.copies.append((parent.block_table[at], request.block_table[at]))
            reserved += total - len(request.block_table) + 1
            self._plan_chunk(plan, request, count)
            budget -= count
        self.waiting.extendleft(reversed(held))

    def _waits_for_fork(self, request: Request, plan: SchedulePlan) -> bool:
        """Whether another request's prompt, the same one, is still to be computed."""
        parent = request.fork_of
        if parent is None or parent.finished:
            request.fork_of = None
            return False
        # what this very step computes cannot be copied before it
        planned = (chunk.start for chunk in plan.chunks if chunk.request is parent)
        return next(planned, parent.num_computed) < request.num_prompt - 1

    def _fork(self, parent: Request) -> list[int]:
        """The blocks in front of the last prompt token; that one is run again, for its logits."""
        return parent.block_table[: (parent.num_prompt - 1) // self.config.block_size]

    def _match_prefix(self, request: Request) -> list[int]:
        if not self.config.enable_prefix_caching:
            return []
        self._extend_hashes(request.tokens, self.config.block_size, request.block_hashes)
        # One token at least has to be run: without it there are no logits to sample from.
        limit = (len(request.tokens) - 1) // self.config.block_size
        return self.pool.match(request.block_hashes, limit)

    def _adopt_prefix(self, request: Request, shared: list[int], parent: Request | None) -> None:
        self.pool.acquire(shared)
        request.block_table = list(shared)
        request.num_registered = len(shared)
        request.num_computed = len(shared) * self.config.block_size
        if parent is not None:
            request.num_computed = request.num_prompt - 1
        if request.metrics.num_preemptions == 0:
            request.metrics.num_cached_tokens = request.num_computed
            self.prefix_hit_tokens += request.num_computed
            self.prefix_query_tokens += len(request.tokens)

    def _register(self, request: Request, computed: int) -> None:
        # Only now: a block becomes findable when its last token has been computed, not before.
        full = computed // self.config.block_size
        self._extend_hashes(request.tokens, self.config.block_size, request.block_hashes)
        for i in range(request.num_registered, full):
            self.pool.register_hash(request.block_table[i], request.block_hashes[i])
        request.num_registered = full

    def _release(self, request: Request) -> None:
        self.pool.release(request.block_table[::-1])
        request.block_table = []
        request.blocks_sent = 0
        request.draft_state = None
        if request.row >= 0:
            self._rows.append(request.row)
            request.row = -1
        request.num_registered = 0
