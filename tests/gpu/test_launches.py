"""What every CUDA operator promises whatever it computes: it runs on the current stream, in a CUDA
graph, on any device, gives the same bits every time, writes every element, and works under
programmatic dependent launch.
"""

from __future__ import annotations

import pytest
import torch
from all_cases import all_cases
from gpu_case import Case
from torch import Tensor

from fastinfer import _lib

CASES = all_cases()
each_case = pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)


def bits(t: Tensor) -> Tensor:
    """The bytes of t: NaN equals itself, -0 differs from 0."""
    return t.detach().contiguous().view(torch.uint8).clone()


def poison(outputs: list[Tensor], byte: int) -> None:
    for t in outputs:
        if t.is_contiguous():
            t.view(torch.uint8).fill_(byte)


def first_run(case: Case, device: str = "cuda", seed: int = 1):
    run, outputs = case.make(device, seed)
    run()
    torch.cuda.synchronize()
    return run, outputs, [bits(t) for t in outputs]


def same(outputs: list[Tensor], expected: list[Tensor]) -> bool:
    return all(torch.equal(bits(t), want) for t, want in zip(outputs, expected, strict=True))


@each_case
def test_current_stream(case: Case) -> None:
    """On a stream held up by other work, the call waits its turn and nothing else waits for it."""
    run, outputs, expected = first_run(case)
    stream = torch.cuda.Stream()
    for cycles in (20_000_000, 2_000_000_000):  # 10 ms; a second, should this host have been busy
        with torch.cuda.stream(stream):
            torch.cuda._sleep(cycles)
            run()
            done = stream.record_event()
        waited = not done.query()
        stream.synchronize()
        if waited:
            break
    assert waited, "the call ran before the work in front of it on its stream"
    assert same(outputs, expected)


@each_case
def test_two_streams_at_once(case: Case) -> None:
    """Calls on two streams, each with its own buffers, do not meet: no scratch memory is shared."""
    made = [first_run(case, seed=seed) for seed in (1, 2)]
    streams = [torch.cuda.Stream() for _ in made]
    torch.cuda.synchronize()
    different = torch.zeros(2, dtype=torch.bool, device="cuda")
    for _ in range(20):
        for i, ((run, outputs, expected), stream) in enumerate(zip(made, streams, strict=True)):
            with torch.cuda.stream(stream):
                run()
                for t, want in zip(outputs, expected, strict=True):
                    different[i].logical_or_((t.contiguous().view(torch.uint8) != want).any())
    torch.cuda.synchronize()
    assert not different.any()


@each_case
def test_graph_replays(case: Case) -> None:
    """1000 replays, each compared on the device with the eager result, bit for bit."""
    run, outputs, expected = first_run(case)
    graph = torch.cuda.CUDAGraph()
    different = torch.zeros((), dtype=torch.bool, device="cuda")
    with torch.cuda.graph(graph):
        run()
        for t, want in zip(outputs, expected, strict=True):
            different.logical_or_((t.contiguous().view(torch.uint8) != want).any())
    for _ in range(1000):
        graph.replay()
    assert not different.item()


@each_case
def test_programmatic_launch(case: Case) -> None:
    """A chain of launches that may overlap gives the same bits."""
    run, outputs, expected = first_run(case)
    graph = torch.cuda.CUDAGraph()
    with _lib.programmatic_launch(), torch.cuda.graph(graph):
        for _ in range(4):
            run()
    for _ in range(20):
        graph.replay()
    torch.cuda.synchronize()
    assert same(outputs, expected)


@each_case
def test_every_element_is_written(case: Case) -> None:
    """Outputs that held other bytes before come out the same, apart from what the case restores."""
    run, outputs, expected = first_run(case)
    for byte in (0x00, 0xFF, 0x5A):
        poison(outputs, byte)
        run()
        assert same(outputs, expected), f"bytes of {byte:#x} show through"


@each_case
def test_portable_kernels(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    """The code of sm_80 runs here too; its results are tested by tests/ops under the same switch,
    here that it is deterministic and writes everything.
    """
    monkeypatch.setenv("FASTINFER_FORCE_ARCH", "80")
    run, outputs, expected = first_run(case)
    poison(outputs, 0xFF)
    run()
    assert same(outputs, expected)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs a second CUDA device")
@each_case
def test_second_device(case: Case) -> None:
    """The tensors' device decides, not the current one."""
    _, _, expected = first_run(case)
    run, outputs = case.make("cuda:1", 1)
    with torch.cuda.device(0):
        run()
    torch.cuda.synchronize(1)
    assert same(outputs, [want.to("cuda:1") for want in expected])
