"""What goes wrong around an engine and what must not: failing steps, Ctrl-C, closing, no memory."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from engine_toy import (
    PROMPTS,
    ToyModel,
    assert_idle,
    greedy,
    tokens_of,
    toy_greedy,
    toy_llm,
)

from fastinfer import LLM, _lib
from fastinfer.engine import EngineConfig, device, runner


def test_faults_of_an_overlapped_step_end_only_its_requests() -> None:
    model = ToyModel()
    llm = toy_llm(model, async_scheduling=True, max_num_seqs=1)
    stream = llm.stream([1], greedy(4))
    waiting = llm.stream([2], greedy(4))
    next(stream)
    model.before = raise_once(model)
    with pytest.raises(MemoryError):
        next(stream)
    with pytest.raises(RuntimeError, match="the step it was in failed"):
        next(stream)
    rest = [t for output in waiting for t in output.outputs[0].token_ids]
    assert rest == toy_greedy([2], 4)
    assert_idle(llm)
    stream = llm.stream([1], greedy(30))
    next(stream)
    stream.close()  # while a step of it is in flight
    assert tokens_of(llm.generate(PROMPTS, greedy())) == [toy_greedy(p, 10) for p in PROMPTS]
    assert_idle(llm)


def raise_once(model: ToyModel) -> Callable[[], None]:
    def explode() -> None:
        model.before = lambda: None
        raise MemoryError("no memory left")

    return explode


def test_a_failing_step_ends_its_requests_and_nothing_else() -> None:
    model = ToyModel()
    llm = toy_llm(model, max_num_seqs=2)
    stream = llm.stream([1], greedy(30))
    next(stream)
    calls = iter(range(100))

    def explode() -> None:
        if next(calls) == 2:
            raise MemoryError("no memory left")

    model.before = explode
    with pytest.raises(MemoryError, match="no memory left"):
        llm.generate([[2], [3]], greedy(30))
    with pytest.raises(RuntimeError, match="the step it was in failed: no memory left"):
        list(stream)
    assert_idle(llm)
    assert tokens_of(llm.generate(PROMPTS, greedy())) == [toy_greedy(p, 10) for p in PROMPTS]
    assert llm.metrics()["failed"] == 3  # the stream and both prompts of the call


@pytest.mark.parametrize("overlap", [False, True])
def test_ctrl_c_ends_the_call_after_its_step(overlap: bool) -> None:
    model = ToyModel()
    llm = toy_llm(model, async_scheduling=overlap)
    stream = llm.stream([1], greedy(12))
    first = list(next(stream).outputs[0].token_ids)
    calls = iter(range(1000))
    finished_steps = []

    def interrupt() -> None:
        if next(calls) == 3:
            signal.raise_signal(signal.SIGINT)
            finished_steps.append(True)  # the step goes on

    model.before = interrupt
    handler = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        llm.generate(PROMPTS, greedy(30))
    assert finished_steps == [True] and signal.getsignal(signal.SIGINT) is handler
    assert llm.stats().running == 1  # only the stream is left, and unharmed
    rest = [token for output in stream for token in output.outputs[0].token_ids]
    assert first + rest == toy_greedy([1], 12)
    assert_idle(llm)
    model.before = lambda: signal.raise_signal(signal.SIGINT)
    stream = llm.stream([1], greedy(12))
    with pytest.raises(KeyboardInterrupt):
        next(stream)
    assert_idle(llm)


@pytest.mark.parametrize("overlap", [False, True])
def test_a_second_ctrl_c_does_not_wait(overlap: bool) -> None:
    model = ToyModel()
    llm = toy_llm(model, async_scheduling=overlap)
    reached = []

    def twice() -> None:
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)
        reached.append(True)

    model.before = twice
    with pytest.raises(KeyboardInterrupt):
        llm.generate(PROMPTS, greedy())
    assert not reached
    assert_idle(llm)


@pytest.mark.parametrize("overlap", [False, True])
def test_threads_share_an_engine(overlap: bool) -> None:
    llm = toy_llm(num_blocks=20, async_scheduling=overlap)
    results: dict[int, list[list[int]]] = {}

    def work(i: int) -> None:
        if i % 2:
            results[i] = tokens_of(llm.generate([[i], [i, i]], greedy(8)))
        else:
            pieces = [list(llm.stream(prompt, greedy(8))) for prompt in ([i], [i, i])]
            results[i] = [[t for o in piece for t in o.outputs[0].token_ids] for piece in pieces]

    threads = [threading.Thread(target=work, args=(i,)) for i in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results == {i: [toy_greedy([i], 8), toy_greedy([i, i], 8)] for i in range(6)}
    assert_idle(llm)


@pytest.mark.parametrize("overlap", [False, True])
def test_close_ends_everything(overlap: bool) -> None:
    with toy_llm(async_scheduling=overlap) as llm:
        stream = llm.stream([1], greedy())
        next(stream)
    assert stream._generation.finished
    assert next(stream).outputs[0].finish_reason == "abort"
    assert list(stream) == []
    for use in (lambda: llm.generate([1]), llm.stats, llm.metrics, lambda: llm.stream([1])):
        with pytest.raises(RuntimeError, match="this object is closed"):
            use()
    llm.close()


def test_out_of_memory_at_start_is_one_sentence(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def fail(error: BaseException) -> Callable[..., object]:
        def call(*arguments: object, **named: object) -> object:
            raise error

        return call

    big = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1 GiB\nmore lines")
    monkeypatch.setattr(runner, "start_loading", fail(big))
    message = r"the weights of .* must fit into the memory of cpu; `fastinfer plan --model .*` says"
    with pytest.raises(ValueError, match=message) as caught:
        LLM(tmp_path, device="cpu")
    assert "\n" not in str(caught.value)
    monkeypatch.setattr(runner, "start_loading", fail(RuntimeError("something else")))
    with pytest.raises(RuntimeError, match="something else"):
        LLM(tmp_path, device="cpu")
    monkeypatch.undo()
    llm = toy_llm()
    llm.core.runner._largest_step = fail(big)
    message = "a step of 77 tokens must fit into the memory of cpu; lower max_num_batched_tokens"
    with pytest.raises(ValueError, match=message):
        llm.core.runner._measure_peak(EngineConfig(model="toy", max_num_batched_tokens=77))


def test_the_gpu_is_taken_only_when_a_step_can_run_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert device.choose_device(None) == torch.device("cpu")
    with pytest.raises(ValueError, match="torch sees no CUDA device; use device='cpu'"):
        device.choose_device("cuda:1")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 3)
    monkeypatch.setattr(_lib, "build_info", lambda: {"version": "0"})
    assert device.choose_device(None) == torch.device("cpu")  # a CPU-only build
    monkeypatch.setattr(_lib, "build_info", lambda: {"cuda_toolkit": "13.0"})
    monkeypatch.setattr(device, "_probe_cuda", lambda: None)
    assert device.choose_device(None) == torch.device("cuda:3")
    monkeypatch.setattr(device, "_probe_cuda", lambda: "linear: no CUDA kernel yet")
    with pytest.warns(UserWarning, match="running on the CPU .* because linear: no CUDA kernel"):
        assert device.choose_device(None) == torch.device("cpu")
    monkeypatch.setenv("FASTINFER_STRICT", "1")
    with pytest.raises(RuntimeError, match="linear: no CUDA kernel yet"):
        device.choose_device(None)
