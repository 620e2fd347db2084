"""The engine's loop: schedule, build, execute, commit, deliver.

    plan = scheduler.schedule()      who runs            (no tensors)
    drawn = runner.step(plan)        arrays -> device, one copy; model and sampling
    drawn.result()                   tokens -> host, one copy
    scheduler.commit(plan, tokens)   states, blocks
    deliver                          text, stop strings, log-probabilities

With `async_scheduling` the last three of a step follow the first two of the next one, so that a
GPU has its next step before it has finished this one. A request that ends is noticed one step late;
what that step did for it is dropped. Over a pipeline of several stages as many steps are launched
as there are stages, of different requests: one that has a token on its way waits for it.

A step either happens or ends its requests: whatever goes wrong in it, their blocks are free
afterwards and the next step starts from a clean state.
"""

from __future__ import annotations

import random
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from .config import EngineConfig, SamplingParams
from .drafting import Speculator, tokens_that_stand
from .generation import Completion, Generation
from .interrupt import InterruptsDeferred
from .metrics import EngineStats, RequestMetrics
from .request import Request
from .runner import ModelRunner
from .sampler import DrawnTokens, SampleResult
from .scheduler import Scheduler
from .step_plan import ScheduledChunk, SchedulePlan

KEPT_RECORDS = 10_000  # timelines kept for `metrics`, the latest ones


@dataclass(slots=True)
class _Launched:
    """A step that runs, or has run, and whose results nobody has looked at."""

    plan: SchedulePlan
    sampling: list[Request]  # whose row it is, of each row of the logits
    drawn: DrawnTokens

    @property
    def needed_now(self) -> bool:
        """Whether the next step cannot be built before this one's tokens are known."""
        drafted = self.drawn.first_rows is not None
        return drafted or any(request.sampling.has_penalties for request in self.sampling)


class EngineCore:
    """One model, one cache, many prompts at once.

    Args:
        config: Settings.
        runner: Owner of the model and the cache.
        eos_token_ids: Tokens that end a request.
        tokenizer: For text; None restricts the engine to token ids.
        clock: Monotonic time in seconds.
    """

    def __init__(
        self,
        config: EngineConfig,
        runner: ModelRunner,
        *,
        eos_token_ids: Sequence[int] = (),
        tokenizer: Any = None,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self.runner = runner
        self.stages: int = getattr(runner, "stages", 1)
        self.overlap = config.async_scheduling
        if self.overlap is None:
            self.overlap = runner.device.type == "cuda"
        # steps that stay launched when `step` returns
        self.depth = self.stages - 1 if self.stages > 1 else int(self.overlap)
        self.tokenizer = tokenizer
        self.eos_token_ids = tuple(eos_token_ids)
        self.clock = clock
        self.scheduler = Scheduler(
            config,
            num_blocks=runner.num_blocks,
            max_model_len=runner.max_model_len,
            clock=clock,
            swap=runner.swap,
            stages=self.stages,
        )
        self.lock = threading.RLock()
        self.records: deque[RequestMetrics] = deque(maxlen=KEPT_RECORDS)
        self.num_steps = 0
        self.speculator: Speculator | None = None
        if runner.drafter is not None:
            rows = config.max_num_seqs if runner.max_draft_rows is None else runner.max_draft_rows
            self.speculator = Speculator(config, runner.drafter, runner.vocab_size, rows)
            self.speculator.bursts = runner.bursts
        self._finished_at = 0.0  # of the step before; 0: nothing ran just before
        self.num_ended = 0  # completions, for whatever reason
        # is shown every plan before it is launched, and those of bursts behind others when it is
        # known where they began; for measurements
        self.on_plan: Callable[[SchedulePlan], None] | None = None
        self._completions: dict[str, tuple[Generation, Completion]] = {}
        self._abandoned: deque[Generation] = deque()
        self._launched: deque[_Launched] = deque()  # the oldest first
        self._random = random.Random(config.seed)
        self._next_id = 0

    def check(self, token_ids: Sequence[int], params: SamplingParams) -> None:
        """Refuse what could never run, before anything is queued.

        Raises:
            ValueError: The prompt is empty, too long, or holds ids outside the vocabulary; or the
                parameters ask for text without a tokenizer.
        """
        self.scheduler.check_prompt_length(len(token_ids))
        vocab_size = self.runner.vocab_size
        for token in (min(token_ids), max(token_ids)):
            if not 0 <= token < vocab_size:
                raise ValueError(
                    f"LLM: prompt token ids must be in [0, {vocab_size}), the vocabulary of the "
                    f"model, got {token}"
                )
        for token in params.stop_token_ids or ():
            if token >= vocab_size:
                raise ValueError(
                    f"SamplingParams: stop_token_ids must be in [0, {vocab_size}), got {token}"
                )
        if params.stop and self.tokenizer is None:
            raise ValueError(
                "SamplingParams: stop needs a tokenizer and this model folder has none; "
                "use stop_token_ids"
            )

    def add(
        self,
        prompts: Sequence[tuple[str | None, list[int], SamplingParams]],
        *,
        arrival_time: float | None = None,
        priority: int | Sequence[int] = 0,
    ) -> list[Generation]:
        """Queue prompts (text if known, token ids, parameters): all of them, or none.

        Args:
            prompts: As `parse_prompts` returns them.
            arrival_time: When they arrived, on the engine's clock; None is now.
            priority: One for all or one per prompt; lower is served first, equal ones as they came.

        Raises:
            ValueError: One of them could never run, or the numbers of prompts and priorities
                differ.
        """
        with self.lock, InterruptsDeferred():
            for _, token_ids, params in prompts:
                self.check(token_ids, params)
            now = self.clock() if arrival_time is None else arrival_time
            each = [priority] * len(prompts) if isinstance(priority, int) else list(priority)
            if len(each) != len(prompts):
                raise ValueError(
                    f"LLM: priority must be one number or one per prompt ({len(prompts)}), got "
                    f"{len(each)}"
                )
            return [
                self._add(*prompt, now, first) for prompt, first in zip(prompts, each, strict=True)
            ]

    def _add(
        self,
        text: str | None,
        token_ids: list[int],
        params: SamplingParams,
        now: float,
        priority: int,
    ) -> Generation:
        generation = Generation(str(self._next_id), text, token_ids)
        self._next_id += 1
        limit = self.scheduler.max_total_tokens
        if params.max_tokens is not None:
            limit = min(limit, len(token_ids) + params.max_tokens)
        stop_ids: dict[int, int | None] = {}
        if not params.ignore_eos:
            stop_ids.update(dict.fromkeys(self.eos_token_ids))
        for token in params.stop_token_ids or ():
            stop_ids.setdefault(token, token)
        seed = self._random.getrandbits(63) if params.seed is None else params.seed
        first: Request | None = None
        for index in range(params.n):
            request = Request(
                request_id=f"{generation.request_id}.{index}",
                tokens=list(token_ids),
                sampling=params,
                seed=(seed + index + 2**63) % 2**64 - 2**63,  # wraps around in 64 signed bits
                max_total_tokens=limit,
                metrics=RequestMetrics(arrival_time=now),
                stop_ids=stop_ids,
                fork_of=first,
                priority=priority,
            )
            first = first or request
            completion = Completion(request, index, self._detokenizer(params, token_ids))
            if self.tokenizer is not None:
                completion.token_bytes = self.tokenizer.token_bytes
            request.followed = completion.detokenizer is not None or params.logprobs is not None
            generation.completions.append(completion)
            self._completions[request.request_id] = (generation, completion)
            self.scheduler.add(request)
        return generation

    def _detokenizer(self, params: SamplingParams, prompt: list[int]) -> Any:
        if self.tokenizer is None or not params.detokenize:
            return None
        from ..text import IncrementalDetokenizer

        return IncrementalDetokenizer(
            self.tokenizer,
            skip_special_tokens=params.skip_special_tokens,
            stop=params.stop,
            include_stop_str=params.include_stop_str_in_output,
            prompt_token_ids=prompt,
        )

    @property
    def has_work(self) -> bool:
        """Whether any request is unfinished."""
        return bool(self.scheduler.requests)

    def step(self) -> None:
        """Run one step for whoever is due. After an exception its requests have ended."""
        with self.lock, InterruptsDeferred():
            self._drop_abandoned()
            speculates = self.speculator is not None and self.speculator.wants(
                self.scheduler.running
            )
            if speculates and self._go_on():
                return
            if self.stages == 1 and (speculates or any(s.needed_now for s in self._launched)):
                self._finish_launched()
            if speculates:
                self._propose()
            launched = self._launch(speculates)
            if launched is not None:
                self._launched.append(launched)
            elif self._launched:  # nothing to run until a token arrives
                self._finish(self._launched.popleft())
            while len(self._launched) > self.depth:
                self._finish(self._launched.popleft())

    def _go_on(self) -> bool:
        """Launch a burst behind the one that runs, then look at that one: whether it was so."""
        speculator, bursts = self.speculator, self.runner.bursts
        if speculator is None or bursts is None or not self.depth or len(self._launched) != 1:
            return False
        running = self._launched[0]
        try:
            room = speculator.goes_on(self.scheduler, running.plan)
            if room is None:
                return False
            behind = [ScheduledChunk(c.request, -1, 0, 0, True) for c in running.plan.chunks]
            plan = SchedulePlan(behind, burst=running.plan.burst)
            self._launched.append(_Launched(plan, [], bursts.go_on(plan, room)))
            self.num_steps += 1
        except BaseException as error:
            self._fail(running.plan, error)
            raise
        self._finish(self._launched.popleft())
        return True

    def _propose(self) -> None:
        assert self.speculator is not None
        try:
            self.speculator.propose(self.scheduler)
        except BaseException as error:
            self._fail(None, error)
            raise

    def _launch(self, speculates: bool) -> _Launched | None:
        plan: SchedulePlan | None = None
        try:
            plan = self.scheduler.schedule()
            if speculates and self.speculator is not None:
                plan.burst = self.speculator.burst
            if not plan.chunks:
                self.runner.move_blocks(plan)
                self._finished_at = 0.0
                return None
            if self.on_plan is not None:
                self.on_plan(plan)
            launched = _Launched(plan, *self.runner.step(plan))
            self.num_steps += 1
            return launched
        except BaseException as error:
            self._fail(plan, error)
            raise

    def _finish_launched(self) -> None:
        while self._launched:
            self._finish(self._launched.popleft())

    def drop_launched(self) -> None:
        """Forget the steps that run, and what holds the model; for the end of an engine."""
        self._launched.clear()
        self.speculator = None

    def _finish(self, launched: _Launched) -> None:
        try:
            self._deliver(launched.plan, launched.drawn.result(), launched.sampling)
        except BaseException as error:
            self._fail(launched.plan, error)
            raise

    def _deliver(
        self, plan: SchedulePlan, result: SampleResult, sampled: Sequence[Request]
    ) -> None:
        tokens: list[Any] = result.token_ids
        if result.runs is not None:
            tokens = result.runs
            if any(chunk.start < 0 for chunk in plan.chunks):
                self.scheduler.plan_afterwards(plan, result.runs)
                if self.on_plan is not None:
                    self.on_plan(plan)
        elif result.first_rows is not None:
            tokens = tokens_that_stand(plan, result.token_ids, result.first_rows)
        elif len(tokens) != len(plan.chunks):
            drawn = iter(result.token_ids)  # in the order of the chunks that are sampled from
            tokens = [[next(drawn)] if chunk.samples else [] for chunk in plan.chunks]
        rows: dict[str, int] = {}
        if result.logprobs is not None:
            for row, request in enumerate(sampled):
                rows.setdefault(request.request_id, row)
        before, self._finished_at = self._finished_at, self.clock()
        seconds = self._finished_at - before if before else 0.0
        if self.speculator is not None:
            self.speculator.learn(plan, tokens, seconds, result.checks)
        if self.scheduler.swap is not None and plan.burst is None:
            self.scheduler.swap.observe(plan.num_tokens - len(plan.chunks), seconds)
        for request in self.scheduler.commit(plan, tokens):
            _, completion = self._completions[request.request_id]
            stop = completion.take(result, rows.get(request.request_id, -1))
            if stop is not None:
                self.scheduler.finish(request, "stop")
                request.finish_reason, request.stop_reason = "stop", stop
            if request.finished:
                self._forget(request)
        if plan.burst is not None and self.runner.bursts is not None:
            for chunk in plan.chunks:
                self.runner.bursts.took(chunk.request)

    def _fail(self, plan: SchedulePlan | None, error: BaseException) -> None:
        failed = (
            list(self.scheduler.requests.values())
            if plan is None
            else [chunk.request for chunk in plan.chunks]
        )
        for request in failed:
            if request.request_id in self._completions:
                self._completions[request.request_id][0].error = error
                self._abort(request)

    def _abort(self, request: Request) -> None:
        self.scheduler.finish(request, "abort")
        self._forget(request)

    def _forget(self, request: Request) -> None:
        if self._completions.pop(request.request_id, None) is not None:
            self.records.append(request.metrics)
            self.num_ended += 1

    def abort(self, generations: Sequence[Generation]) -> None:
        """End these generations, if they have not ended, and free their blocks."""
        with self.lock, InterruptsDeferred():
            for generation in generations:
                for completion in generation.completions:
                    if not completion.request.finished:
                        completion.flush()
                        self._abort(completion.request)

    def abort_all(self) -> None:
        """End everything."""
        with self.lock:
            self.abort([generation for generation, _ in list(self._completions.values())])

    def abandon(self, generation: Generation) -> None:
        """Like `abort`, at the next step: safe to call from a finalizer, at any moment."""
        self._abandoned.append(generation)

    def _drop_abandoned(self) -> None:
        while self._abandoned:
            self.abort([self._abandoned.popleft()])

    def stats(self) -> EngineStats:
        """What is in the engine now."""
        with self.lock:
            self._drop_abandoned()
            scheduler, spec = self.scheduler, self.speculator
            return EngineStats(
                running=len(scheduler.running),
                waiting=len(scheduler.waiting),
                kv_blocks_used=scheduler.pool.num_used,
                kv_blocks_total=scheduler.pool.num_blocks,
                kv_blocks_peak=scheduler.peak_blocks,
                kv_block_bytes=self.runner.block_bytes,
                num_steps=self.num_steps,
                num_preemptions=scheduler.num_preemptions,
                prefix_hit_tokens=scheduler.prefix_hit_tokens,
                prefix_query_tokens=scheduler.prefix_query_tokens,
                num_draft_tokens=spec.num_draft_tokens if spec else 0,
                num_accepted_tokens=spec.num_accepted_tokens if spec else 0,
                num_verifications=spec.num_verifications if spec else 0,
                num_swapped=scheduler.num_swapped,
            )
