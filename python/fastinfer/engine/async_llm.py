"""`AsyncLLM`: the engine behind asyncio. One thread steps, any number of tasks listen.

    task                       engine thread
    generate() --- inbox --->  core.add
    await next --- hungry -->  after a step: whoever is hungry and has news gets one delta
               <-- one call_soon_threadsafe per event loop and step

A reader gets what has come since it last asked. One that is slow gets more at once and is the only
one to wait: the engine never waits for a reader, and what it has not fetched costs its own tokens.
A stream that is closed, cancelled, timed out or dropped ends its request at the next step.
"""

from __future__ import annotations

import asyncio
import logging
import os
import threading
from collections import deque
from collections.abc import AsyncIterator, Sequence
from typing import Any

from .config import SamplingParams
from .core import EngineCore
from .generation import Generation
from .llm import LLM
from .metrics import EngineStats
from .outputs import RequestOutput
from .prompts import ParsedPrompt, Prompt, parse_prompts

_log = logging.getLogger("fastinfer")


class EngineBusy(RuntimeError):
    """As many requests as allowed are in the engine; try again later."""


class EngineStopped(RuntimeError):
    """The engine has been closed, or one of its processes has ended."""


class AsyncLLM:
    """`LLM` for asyncio programs: streams, cancellation, timeouts.

    Args:
        model: Checkpoint folder, or an `LLM` that nobody else steps; it is closed with this object.
        max_requests: Most unfinished requests (waiting and running, n completions are one);
            None is no limit.
        **options: Those of `LLM`, for a folder.

    Raises:
        ValueError, FileNotFoundError: As `LLM`.

    Example:
        >>> async with AsyncLLM("path/to/checkpoint") as llm:
        ...     async for output in llm.generate("Once upon a time"):
        ...         print(output.text, end="", flush=True)
    """

    def __init__(
        self,
        model: str | os.PathLike[str] | LLM,
        *,
        max_requests: int | None = None,
        **options: Any,
    ) -> None:
        if max_requests is not None and max_requests < 1:
            raise ValueError(f"AsyncLLM: max_requests must be at least 1, got {max_requests}")
        if isinstance(model, LLM) and options:
            raise ValueError(f"AsyncLLM: an LLM takes no further options, got {sorted(options)}")
        self.llm = model if isinstance(model, LLM) else LLM(model, **options)
        self.max_requests = max_requests
        self.failed_steps = 0  # in a row
        self._core: EngineCore = self.llm.core
        self._inbox: deque[AsyncStream] = deque()
        self._hungry: deque[AsyncStream] = deque()
        self._open = 0  # streams whose request has not ended
        self._count = threading.Lock()
        self._wake = threading.Event()
        self._closing = self._stopped = False
        self._thread = threading.Thread(target=self._run, name="fastinfer-engine", daemon=True)
        self._thread.start()

    @property
    def num_requests(self) -> int:
        """Requests that have not ended."""
        return self._open

    @property
    def alive(self) -> bool:
        """Whether the engine's thread runs, and with it every process of the model."""
        running = self._thread.is_alive() and not self._closing
        return running and self._core.runner.failure is None

    def parse(self, prompt: Prompt, sampling_params: SamplingParams | None = None) -> ParsedPrompt:
        """Text, token ids and checked parameters of a prompt; may run in any thread.

        Raises:
            ValueError: The prompt could never run.
        """
        (parsed,) = parse_prompts(
            [prompt], sampling_params, self.llm.tokenizer, self.llm.config.model
        )
        self._core.check(parsed[1], parsed[2])
        return parsed

    def generate(
        self,
        prompt: Prompt,
        sampling_params: SamplingParams | None = None,
        *,
        timeout: float | None = None,
        priority: int = 0,
    ) -> AsyncStream:
        """Complete a prompt, handing out what is new as it comes.

        Args:
            prompt: Text, token ids, {"prompt": text} or {"prompt_token_ids": ids}.
            sampling_params: None is `SamplingParams()`.
            timeout: Seconds from now until the request is ended.
            priority: Lower is served first, equal ones as they came.

        Returns:
            An asynchronous iterator of `RequestOutput` with new text and tokens only; the last one
            has `finished` set.

        Raises:
            ValueError: The prompt could never run.
            EngineBusy: `max_requests` are in the engine.
            EngineStopped: It is closed, or one of its processes has ended.
            RuntimeError: While iterating: the step of this request failed.
            TimeoutError: While iterating: the time is up; the request has ended.
        """
        parsed = self.parse(prompt, sampling_params)
        return self.start(parsed, timeout=timeout, priority=priority)

    async def complete(
        self,
        prompt: Prompt,
        sampling_params: SamplingParams | None = None,
        *,
        timeout: float | None = None,
        priority: int = 0,
    ) -> RequestOutput:
        """Like `generate`, for readers that want the whole output at once."""
        parsed = self.parse(prompt, sampling_params)
        stream = self.start(parsed, timeout=timeout, whole=True, priority=priority)
        return await stream.__anext__()

    def start(
        self,
        parsed: ParsedPrompt,
        *,
        timeout: float | None = None,
        whole: bool = False,
        priority: int = 0,
    ) -> AsyncStream:
        """Queue what `parse` returned; `whole` makes a stream of one, complete output."""
        if not self.alive:
            why = self._core.runner.failure or "AsyncLLM: this object is closed"
            raise EngineStopped(f"{why}; create a new one")
        with self._count:
            if self.max_requests is not None and self._open >= self.max_requests:
                raise EngineBusy(
                    f"AsyncLLM: {self._open} requests are in the engine, as many as max_requests "
                    "allows; try again later"
                )
            self._open += 1
        stream = AsyncStream(self, parsed, self._core.clock(), timeout, whole, priority)
        self._inbox.append(stream)
        self._wake.set()
        return stream

    def stats(self) -> EngineStats:
        """As `LLM.stats`; waits for the step that is running."""
        return self.llm.stats()

    def close(self) -> None:
        """End all requests, stop the thread, let go of the model. May be called twice."""
        self._closing = True
        self._wake.set()
        if self._thread is not threading.current_thread():
            self._thread.join()
        self.llm.close()

    async def __aenter__(self) -> AsyncLLM:
        return self

    async def __aexit__(self, *exc: object) -> None:
        await asyncio.to_thread(self.close)

    # -- the engine's thread -----------------------------------------------------------------

    def _run(self) -> None:
        core = self._core
        # Not the streams: one that its reader has dropped must be collected, and end its request.
        active: set[Generation] = set()
        hungry: list[AsyncStream] = []
        while not self._closing:
            self._wake.clear()  # before looking, so that nothing put there since is missed
            while self._inbox:
                self._admit(self._inbox.popleft(), active)
            while self._hungry:
                hungry.append(self._hungry.popleft())
            ended = core.num_ended
            if core.has_work:
                self._step()
            if core.num_ended != ended or not core.has_work:
                done = {generation for generation in active if generation.finished}
                active -= done
                self._release(len(done))
            hungry = self._feed(hungry)
            if not (core.has_work or self._inbox or self._hungry or self._closing):
                self._wake.wait()
        core.abort_all()
        self._stopped = True
        self._feed(hungry, closing=True)
        self._turn_away()

    def _turn_away(self) -> None:
        """Tell those who still ask, now that no step will come, how their request ended."""
        while self._hungry:
            try:
                stream = self._hungry.popleft()
            except IndexError:  # taken by the other thread
                return
            self._feed([stream], closing=True)

    def _admit(self, stream: AsyncStream, active: set[Generation]) -> None:
        if stream._closed:
            self._release(1)
            return
        try:
            (generation,) = self._core.add(
                [stream._parsed], arrival_time=stream._arrival, priority=stream._priority
            )
        except Exception as error:
            stream._error = error
            self._release(1)
            return
        active.add(generation)
        stream._generation = generation
        if stream._closed:  # while it was added
            self._core.abandon(generation)

    def _step(self) -> None:
        try:
            self._core.step()
            self.failed_steps = 0
        except Exception:  # its requests have ended and know why
            self.failed_steps += 1
            _log.exception("a step of the engine failed")

    def _release(self, count: int) -> None:
        with self._count:
            self._open -= count

    def _feed(self, hungry: list[AsyncStream], *, closing: bool = False) -> list[AsyncStream]:
        """Hand out what is new; returns those for whom there is nothing."""
        ready: dict[asyncio.AbstractEventLoop, list[tuple[AsyncStream, Any]]] = {}
        rest: list[AsyncStream] = []
        for stream in hungry:
            if stream._closed:
                continue
            news = stream._news(closing)
            if news is None:
                rest.append(stream)
            else:
                ready.setdefault(stream._loop, []).append((stream, news))
        for loop, batch in ready.items():
            try:
                loop.call_soon_threadsafe(_hand_over, batch)
            except RuntimeError:  # that loop has ended, and its readers with it
                for stream, _ in batch:
                    stream.close()
        return rest

    def _ask(self, stream: AsyncStream) -> None:
        self._hungry.append(stream)
        self._wake.set()
        if self._stopped:
            self._turn_away()

    def _abandon(self, generation: Generation) -> None:
        self._core.abandon(generation)
        self._wake.set()


class AsyncStream(AsyncIterator[RequestOutput]):
    """Outputs of one request as they come; see `AsyncLLM.generate`. For one reader."""

    def __init__(
        self,
        owner: AsyncLLM,
        parsed: ParsedPrompt,
        arrival: float,
        timeout: float | None,
        whole: bool,
        priority: int,
    ) -> None:
        self._owner = owner
        self._parsed = parsed
        self._arrival = arrival
        self._whole, self._priority = whole, priority
        self._loop = asyncio.get_running_loop()
        self._generation: Generation | None = None
        self._error: BaseException | None = None
        self._waiter: asyncio.Future[RequestOutput] | None = None
        self._finished = self._closed = self._timed_out = False
        self._timer = None if timeout is None else self._loop.call_later(timeout, self._expire)
        self._timeout = timeout

    @property
    def prompt_token_ids(self) -> Sequence[int]:
        """The prompt as tokens."""
        return self._parsed[1]

    async def __anext__(self) -> RequestOutput:
        if self._timed_out:
            raise self._late()
        if self._finished or self._closed:
            raise StopAsyncIteration
        if self._waiter is not None:
            raise RuntimeError("AsyncLLM: a stream is for one reader, and this one has one")
        self._waiter = self._loop.create_future()
        self._owner._ask(self)
        try:
            output = await self._waiter
        except BaseException:  # failure, timeout, or the task was cancelled
            self.close()
            raise
        finally:
            self._waiter = None
        if output.finished:
            self._finished = True
            self._stop_timer()
        return output

    def close(self) -> None:
        """End the request, if it has not ended. Does not wait."""
        self._stop_timer()
        if not self._closed:
            self._closed = True
            if self._generation is not None and not self._generation.finished:
                self._owner._abandon(self._generation)

    async def aclose(self) -> None:
        """End the request."""
        self.close()

    def __del__(self) -> None:
        generation = getattr(self, "_generation", None)
        if generation is not None and not generation.finished:
            self._owner._abandon(generation)

    def _news(self, closing: bool) -> RequestOutput | BaseException | None:
        """What to tell the reader, None for nothing yet. In the engine's thread."""
        generation = self._generation
        if self._error is not None:
            return self._error
        if generation is None:
            return RuntimeError("AsyncLLM: the engine was closed") if closing else None
        if generation.error is not None:
            return RuntimeError(
                f"LLM: the request was ended because the step it was in failed: {generation.error}"
            )
        if self._whole:
            return generation.output() if generation.finished else None
        return generation.output(delta=True) if generation.has_news else None

    def _late(self) -> TimeoutError:
        return TimeoutError(f"AsyncLLM: the request was not done within {self._timeout:g} seconds")

    def _expire(self) -> None:
        self._timed_out = True
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_exception(self._late())
        else:
            self.close()

    def _stop_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None


def _hand_over(batch: list[tuple[AsyncStream, Any]]) -> None:
    """In the readers' event loop."""
    for stream, news in batch:
        waiter = stream._waiter
        if waiter is None or waiter.done():
            continue  # cancelled meanwhile
        if isinstance(news, BaseException):
            waiter.set_exception(news)
        else:
            waiter.set_result(news)
