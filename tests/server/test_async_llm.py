"""`AsyncLLM`: the same text as `LLM`, cancellation, timeouts, limits; nothing left behind."""

from __future__ import annotations

import asyncio
import gc
from collections.abc import Callable, Coroutine
from typing import Any

import pytest
from server_helpers import make_llm, wait_until_idle

from fastinfer import SamplingParams
from fastinfer.engine import AsyncLLM, EngineBusy, async_llm

PROMPTS = ["Once upon a time", "The dog", "One day, Tom", "A bird sat"]
LONG = SamplingParams(temperature=0.0, max_tokens=600, ignore_eos=True)


def greedy(n: int) -> SamplingParams:
    return SamplingParams(temperature=0.0, max_tokens=n)


def with_engine(test: Callable[[AsyncLLM], Coroutine[Any, Any, None]], **options: Any) -> None:
    """Run a test coroutine; afterwards no request may be open and no block held."""
    engine = {name: options.pop(name) for name in ("max_num_seqs",) if name in options}
    llm = AsyncLLM(make_llm(**engine), **options)

    async def body() -> None:
        await test(llm)

    try:
        asyncio.run(body())
        wait_until_idle(llm)
    finally:
        llm.close()


async def read(llm: AsyncLLM, prompt: Any, params: SamplingParams) -> tuple[str, list[int], str]:
    text, tokens, reason = "", [], None
    async for output in llm.generate(prompt, params):
        (completion,) = output.outputs
        text += completion.text
        tokens += completion.token_ids
        reason = completion.finish_reason
    return text, tokens, reason


def test_a_lower_priority_number_is_served_first():
    ended: list[int] = []

    async def ask(llm: AsyncLLM, priority: int, params: SamplingParams, whole: bool) -> None:
        if whole:
            await llm.complete("The dog", params, priority=priority)
        else:
            async for _ in llm.generate("The dog", params, priority=priority):
                pass
        ended.append(priority)

    async def test(llm: AsyncLLM) -> None:
        tasks = [asyncio.create_task(ask(llm, -9, LONG, True))]
        while llm.stats().running == 0:
            await asyncio.sleep(0.01)
        for i, priority in enumerate((3, 0, -1)):
            tasks.append(asyncio.create_task(ask(llm, priority, greedy(3), i == 1)))
        await asyncio.gather(*tasks)
        assert ended == [-9, -1, 0, 3]

    with_engine(test, max_num_seqs=1)


def test_streams_give_what_generate_gives():
    with make_llm() as llm:
        wanted = [(o.text, o.outputs[0].token_ids) for o in llm.generate(PROMPTS, greedy(24))]

    async def test(llm: AsyncLLM) -> None:
        got = await asyncio.gather(*(read(llm, prompt, greedy(24)) for prompt in PROMPTS))
        assert [each[:2] for each in got] == wanted
        assert {each[2] for each in got} <= {"length", "stop"}
        whole = await asyncio.gather(*(llm.complete(prompt, greedy(24)) for prompt in PROMPTS))
        assert [(o.text, o.outputs[0].token_ids) for o in whole] == wanted

    with_engine(test)


def test_a_slow_reader_gets_everything_and_holds_nobody_up():
    async def test(llm: AsyncLLM) -> None:
        stream = llm.generate(PROMPTS[0], greedy(40))
        first = await stream.__anext__()
        fast = await read(llm, PROMPTS[1], greedy(40))  # to its end, while nobody reads the first
        rest = [output async for output in stream]
        tokens = first.outputs[0].token_ids + [t for o in rest for t in o.outputs[0].token_ids]
        whole = await llm.complete(PROMPTS[0], greedy(40))
        assert tokens == whole.outputs[0].token_ids and len(fast[1]) > 0
        assert len(rest) < 10  # what piled up came at once

    with_engine(test)


def test_several_completions_and_log_probabilities():
    async def test(llm: AsyncLLM) -> None:
        params = SamplingParams(n=3, max_tokens=9, seed=4, logprobs=2, ignore_eos=True)
        counts = {0: 0, 1: 0, 2: 0}
        async for output in llm.generate(PROMPTS[0], params):
            for completion in output.outputs:
                assert len(completion.logprobs) == len(completion.token_ids)
                counts[completion.index] += len(completion.token_ids)
        assert counts == {0: 9, 1: 9, 2: 9}

    with_engine(test)


def test_a_cancelled_task_ends_its_request():
    async def test(llm: AsyncLLM) -> None:
        tasks = [asyncio.ensure_future(read(llm, prompt, LONG)) for prompt in PROMPTS]
        await asyncio.sleep(0.1)
        other = asyncio.ensure_future(read(llm, "The cat", greedy(30)))
        for task in tasks:
            task.cancel()
        results = await asyncio.gather(*tasks, return_exceptions=True)
        assert all(isinstance(result, asyncio.CancelledError) for result in results)
        assert len((await other)[1]) > 0

    with_engine(test)


def test_a_stream_that_is_closed_or_dropped_ends_its_request():
    async def test(llm: AsyncLLM) -> None:
        closed = llm.generate(PROMPTS[0], LONG)
        await closed.__anext__()
        await closed.aclose()
        with pytest.raises(StopAsyncIteration):
            await closed.__anext__()
        dropped = llm.generate(PROMPTS[1], LONG)
        await dropped.__anext__()
        del dropped
        unread = llm.generate(PROMPTS[2], LONG)
        unread.close()  # perhaps before the engine has seen it
        del unread
        gc.collect()

    with_engine(test)


def test_time_is_up():
    async def test(llm: AsyncLLM) -> None:
        with pytest.raises(TimeoutError, match=r"within 0\.05 seconds"):
            async for _ in llm.generate(PROMPTS[0], LONG, timeout=0.05):
                pass
        idle = llm.generate(PROMPTS[0], LONG, timeout=0.05)
        await asyncio.sleep(0.2)  # nobody waits when the time is up
        with pytest.raises(TimeoutError):
            await idle.__anext__()
        await llm.complete(PROMPTS[0], greedy(4), timeout=60)

    with_engine(test)


def test_more_requests_than_allowed_are_refused_until_one_ends():
    async def test(llm: AsyncLLM) -> None:
        first = llm.generate(PROMPTS[0], LONG)
        second = llm.generate(PROMPTS[1], greedy(4))
        with pytest.raises(EngineBusy, match="max_requests"):
            llm.generate(PROMPTS[2], greedy(4))
        async for _ in second:
            pass
        while llm.num_requests > 1:
            await asyncio.sleep(0.01)
        await llm.complete(PROMPTS[2], greedy(4))
        first.close()

    with_engine(test, max_requests=2)


def test_wrong_requests_are_refused_before_they_start():
    async def test(llm: AsyncLLM) -> None:
        for prompt in ([10**9], [-1], [], [0] * 5000):
            with pytest.raises(ValueError):
                llm.generate(prompt, greedy(4))
        with pytest.raises(ValueError, match="at least 1"):
            AsyncLLM(llm.llm, max_requests=0)
        assert llm.num_requests == 0

    with_engine(test)


def test_one_reader_per_stream():
    async def test(llm: AsyncLLM) -> None:
        stream = llm.generate(PROMPTS[0], LONG)
        task = asyncio.ensure_future(stream.__anext__())
        await asyncio.sleep(0)
        with pytest.raises(RuntimeError, match="one reader"):
            await stream.__anext__()
        await task
        stream.close()

    with_engine(test)


def test_a_failed_step_reaches_its_readers_and_the_next_request_runs():
    async def test(llm: AsyncLLM) -> None:
        runner, step, calls = llm.llm.core.runner, llm.llm.core.runner.step, [0]

        def failing(plan: Any) -> Any:
            calls[0] += 1
            if calls[0] == 4:
                raise MemoryError("no memory for this step")
            return step(plan)

        runner.step = failing
        results = await asyncio.gather(
            *(read(llm, prompt, LONG) for prompt in PROMPTS), return_exceptions=True
        )
        assert any("no memory for this step" in str(result) for result in results)
        assert len((await read(llm, PROMPTS[0], greedy(5)))[1]) == 5
        assert llm.failed_steps == 0 and llm.alive

    with_engine(test)


def test_close_ends_readers_and_is_final():
    llm = AsyncLLM(make_llm())

    async def body() -> None:
        task = asyncio.ensure_future(read(llm, PROMPTS[0], LONG))
        await asyncio.sleep(0.1)
        await asyncio.to_thread(llm.close)
        _, tokens, reason = await asyncio.wait_for(task, 10)
        assert reason == "abort" and len(tokens) < 600
        with pytest.raises(RuntimeError, match="closed"):
            llm.generate(PROMPTS[0])

    asyncio.run(body())
    llm.close()


def test_readers_in_a_loop_that_has_ended_are_let_go():
    llm = AsyncLLM(make_llm())
    kept: list[Any] = []

    async def leave() -> None:
        stream = llm.generate(PROMPTS[0], LONG)
        kept.append(asyncio.ensure_future(stream.__anext__()))
        await asyncio.sleep(0)

    try:
        asyncio.run(leave())
        wait_until_idle(llm)
    finally:
        llm.close()


def test_a_timeout_at_the_moment_of_the_end_does_not_come_after_it(
    monkeypatch: pytest.MonkeyPatch,
):
    hand_over = async_llm._hand_over

    def and_expire(batch: list[tuple[Any, Any]]) -> None:
        hand_over(batch)
        for stream, news in batch:
            if news.finished:
                stream._expire()

    monkeypatch.setattr(async_llm, "_hand_over", and_expire)

    async def test(llm: AsyncLLM) -> None:
        outputs = [output async for output in llm.generate(PROMPTS[0], greedy(4), timeout=60)]
        assert outputs[-1].finished

    with_engine(test)


def test_a_request_that_could_not_be_made_is_not_counted():
    llm = AsyncLLM(make_llm(), max_requests=1)
    try:
        with pytest.raises(RuntimeError, match="event loop"):
            llm.generate(PROMPTS[0], greedy(4))
        assert llm.num_requests == 0
    finally:
        llm.close()
