"""Weights that arrive in the background: each in its place, errors at the end, no thread left.

On a GPU this is how checkpoints are read; here the CPU does it.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from _model_harness import Tiny

from fastinfer import LLM, SamplingParams
from fastinfer.engine import runner
from fastinfer.models import device_read, filling, load_model, start_loading
from fastinfer.models.layers import Linear
from fastinfer.models.shard import Shard

GetTiny = Callable[[str], Tiny]
FAMILIES = ["llama", "llama_biases", "qwen2", "qwen3", "baichuan"]


@pytest.fixture
def in_background(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(filling, "_in_background", lambda device: True)
    monkeypatch.setattr(device_read, "_PIECE", 1000)


def no_thread_left() -> bool:
    return not [t for t in threading.enumerate() if t.name.startswith("fastinfer-read")]


@pytest.fixture
def held(monkeypatch: pytest.MonkeyPatch) -> threading.Event:
    """Nothing is read before this is set."""
    gate, fetch = threading.Event(), device_read._Slots.fetch

    def wait_and_fetch(*arguments: object) -> object:
        assert gate.wait(30)
        return fetch(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(device_read._Slots, "fetch", wait_and_fetch)
    return gate


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.usefixtures("in_background")
def test_the_same_model(tiny: GetTiny, family: str) -> None:
    expected = tiny(family).model
    with start_loading(tiny(family).folder, progress=False) as loading:
        assert loading.filler is not None and loading.filler.background is not None
        model = loading.finish()
    want = {**dict(expected.named_parameters()), **dict(expected.named_buffers())}
    have = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    assert want.keys() == have.keys()
    for name, tensor in want.items():
        assert torch.equal(tensor, have[name]), name
    assert no_thread_left()


@pytest.mark.usefixtures("in_background")
def test_other_dtypes_are_converted_before(tiny: GetTiny) -> None:
    with start_loading(tiny("llama").folder, dtype="bfloat16", progress=False) as loading:
        assert loading.filler is not None and loading.filler.background is None
        model = loading.finish()
    expected = load_model(tiny("llama").folder, dtype="bfloat16", progress=False)
    for name, tensor in expected.named_parameters():
        assert torch.equal(tensor, model.get_parameter(name)), name


@pytest.mark.usefixtures("in_background")
def test_zeros_until_they_arrive(tiny: GetTiny, held: threading.Event) -> None:
    with start_loading(tiny("llama").folder, progress=False) as loading:
        assert not any(bool(param.any()) for param in loading.model.parameters())
        held.set()
        loading.finish()
        assert all(bool(param.any()) for param in loading.model.parameters())


@pytest.mark.usefixtures("in_background")
def test_the_engine_is_ready_when_they_are_there(
    tiny: GetTiny, held: threading.Event, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, params = tiny("llama").folder, SamplingParams(temperature=0, max_tokens=8)
    set_up = runner.ModelRunner._set_up

    def late(*arguments: object) -> None:  # the first weight arrives when everything else is ready
        set_up(*arguments)  # type: ignore[arg-type]
        held.set()

    monkeypatch.setattr(runner.ModelRunner, "_set_up", late)
    with LLM(folder, device="cpu", num_blocks=64, cuda_graphs=True, progress=False) as llm:
        (output,) = llm.generate([3, 4, 5], params)
    ids = torch.tensor([[3, 4, 5]])
    expected = tiny("llama").reference.generate(ids, max_new_tokens=8, do_sample=False)[0, 3:]
    assert (
        list(output.outputs[0].token_ids) == expected.tolist()[: len(output.outputs[0].token_ids)]
    )
    assert no_thread_left()


@pytest.mark.usefixtures("in_background")
def test_errors_come_at_the_end(tiny: GetTiny, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*arguments: object) -> None:
        raise ValueError("load_model: file ended early")

    monkeypatch.setattr(device_read._Slots, "fetch", fail)
    with pytest.raises(ValueError, match="file ended early"):
        load_model(tiny("llama").folder, progress=False)
    with pytest.raises(ValueError, match="file ended early"):
        LLM(tiny("llama").folder, device="cpu", num_blocks=64, progress=False)
    assert no_thread_left()


@pytest.mark.usefixtures("in_background")
def test_giving_up_in_between_stops_the_threads(
    tiny: GetTiny, held: threading.Event, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*arguments: object) -> None:
        held.set()
        raise RuntimeError("no room")

    monkeypatch.setattr(runner.ModelRunner, "_set_up", fail)
    with pytest.raises(RuntimeError, match="no room"):
        LLM(tiny("llama").folder, device="cpu", num_blocks=64, progress=False)
    assert no_thread_left()


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("rank", [0, 1])
def test_the_same_part_of_a_model(
    tiny: GetTiny, family: str, rank: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    others: Any = object()  # nothing is run
    shard = Shard(rank=rank, ranks=2, group=others)
    expected = load_model(tiny(family).folder, shard=shard, progress=False)
    monkeypatch.setattr(filling, "_in_background", lambda device: True)
    monkeypatch.setattr(device_read, "_PIECE", 1000)
    with start_loading(tiny(family).folder, shard=shard, progress=False) as loading:
        assert loading.filler is not None and loading.filler.background is not None
        model = loading.finish()
    for name, tensor in expected.named_parameters():
        assert torch.equal(tensor, model.get_parameter(name)), name
    assert no_thread_left()


def test_places_are_what_load_copies_to() -> None:
    layer = Linear(4, {"q": 3, "k": 2, "v": 1}, bias=True, dtype=torch.float32)
    for parts in (("q",), ("k",), ("k", "v"), ("q", "k", "v"), ()):
        for param in ("weight", "bias"):
            layer.get_parameter(param).zero_()
            place = layer.place(param, parts)
            assert place is not None and place.is_contiguous()
            assert tuple(place.shape) == layer.part_shape(param, parts)
            layer.load(param, parts, torch.ones(layer.part_shape(param, parts)))
            assert bool(place.all()) and place.numel() == int(layer.get_parameter(param).sum())
    assert layer.place("weight", ("q", "v")) is None
    assert layer.place("weight", ("v", "k")) is None


def test_background_read_of_a_shorter_file(tiny: GetTiny, tmp_path: Path) -> None:
    file = tmp_path / "model.safetensors"
    data = (tiny("llama").folder / "model.safetensors").read_bytes()
    file.write_bytes(data)
    name, shape = "model.embed_tokens.weight", tiny("llama").model.embed_tokens.weight.shape
    place = torch.zeros(shape)
    reading = device_read.BackgroundRead([file], {name: place}, torch.device("cpu"))
    arrived: list[None] = []
    reading.wait(lambda: arrived.append(None))
    reading.close()
    assert len(arrived) == 1 and torch.equal(place, tiny("llama").model.embed_tokens.weight)
    (begin,) = (s.begin for s in device_read._layout(file, {name}))
    file.write_bytes(data[: begin + 10])
    reading = device_read.BackgroundRead([file], {name: place}, torch.device("cpu"))
    with pytest.raises(ValueError, match=r"model\.safetensors ended early"):
        reading.wait()
    assert no_thread_left()
