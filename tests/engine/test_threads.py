"""One `LLM`, several threads: whoever steps brings news for all, and nobody reads half of it."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Iterator

import pytest
from engine_toy import assert_idle, greedy, toy_llm

from fastinfer import SamplingParams


@pytest.fixture
def _eager_switches() -> Iterator[None]:
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    yield
    sys.setswitchinterval(before)


def test_a_stream_waits_for_results_that_another_thread_takes_in() -> None:
    llm = toy_llm()
    stream = llm.stream([1, 2, 3], greedy(4, logprobs=1))
    commit, got = llm.core.scheduler.commit, []
    readers: list[threading.Thread] = []

    def slow_commit(*args: object) -> object:
        updated = commit(*args)  # the token is there, its log-probability is not
        readers.append(threading.Thread(target=lambda: got.append(next(stream).outputs[0])))
        readers[-1].start()
        readers[-1].join(0.1)
        return updated

    llm.core.scheduler.commit = slow_commit
    llm.core.step()
    llm.core.scheduler.commit = commit
    readers[0].join()
    got += [output.outputs[0] for output in stream]
    assert [len(each.token_ids) for each in got] == [len(each.logprobs) for each in got]
    assert sum(len(each.logprobs) for each in got) == 4
    assert_idle(llm)


def test_generate_sees_the_end_that_another_thread_brings(_eager_switches: None) -> None:
    llm = toy_llm()
    step, waits = llm.core.step, threading.current_thread()
    llm.core.step = lambda: None if threading.current_thread() is waits else step()
    stop = threading.Event()

    def others() -> None:
        while not stop.is_set():
            step()

    thread = threading.Thread(target=others)
    thread.start()
    deadline = time.monotonic() + 20

    def in_time(event: str, *_: object) -> None:
        if time.monotonic() > deadline:
            raise TimeoutError("generate has not seen the end of its requests")

    sys.setprofile(lambda *args: in_time(args[1]))
    try:
        for _ in range(100):
            assert len(llm.generate([1, 2], greedy(1))[0].outputs[0].token_ids) == 1
    finally:
        sys.setprofile(None)
        stop.set()
        thread.join()


def test_ranks_do_not_depend_on_what_others_ask_for() -> None:
    llm = toy_llm()
    none = SamplingParams(temperature=0, max_tokens=3, ignore_eos=True, logprobs=0)
    many = SamplingParams(temperature=0, max_tokens=3, ignore_eos=True, logprobs=5)
    alone = llm.generate([1, 2], none)[0].outputs[0].logprobs
    together = llm.generate([[1, 2], [3]], [none, many])[0].outputs[0].logprobs
    assert alone == together
    assert [[entry.rank for entry in each.values()] for each in alone] == [[None]] * 3
