"""Reading ahead with threads: every byte in its place, errors and early ends clean."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from fastinfer.models import device_read
from fastinfer.models.device_read import can_send, read_to_device

CPU = torch.device("cpu")
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


@pytest.fixture(autouse=True)
def _small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(device_read, "_PIECE", 1000)
    monkeypatch.setattr(device_read, "_AHEAD", 20_000)


@pytest.fixture
def files(tmp_path: Path) -> tuple[list[Path], dict[str, torch.Tensor]]:
    tensors: dict[str, torch.Tensor] = {}
    paths = []
    for i in range(3):
        mine = {
            f"{i}.bf16": torch.randn(37, 91).bfloat16(),
            f"{i}.fp32": torch.randn(5001),
            f"{i}.fp16": torch.randn(3, 1, 7).half(),
            f"{i}.empty": torch.empty(0, 4),
            f"{i}.scalar": torch.tensor(2.5 + i),
            f"{i}.codes": torch.arange(11),
        }
        path = tmp_path / f"{i}.safetensors"
        save_file(mine, path)
        paths.append(path)
        tensors |= mine
    return paths, tensors


@pytest.mark.parametrize("device", DEVICES)
def test_every_tensor_in_its_place(files, device: str) -> None:
    paths, tensors = files
    names = {n for n in tensors if not n.endswith("codes")} - {"1.fp32"}
    seen = {}
    for name, tensor in read_to_device(paths, names, torch.device(device)):
        assert name not in seen and tensor.device.type == device
        seen[name] = tensor.clone()  # what is read ahead must not touch it
        tensor.zero_()
        del tensor  # its memory is used again
    assert seen.keys() == names
    for name, tensor in seen.items():
        assert tensor.dtype == tensors[name].dtype and tensor.shape == tensors[name].shape
        assert torch.equal(tensor.cpu(), tensors[name]), name
    assert can_send("BF16") and not can_send("I64")


def test_a_reader_that_stops_early_leaves_no_thread(files) -> None:
    paths, tensors = files
    reader = read_to_device(paths, {n for n in tensors if n.endswith("fp32")}, CPU)
    next(reader)
    reader.close()
    assert not [t for t in threading.enumerate() if t.name.startswith("fastinfer-read")]


def test_a_file_that_has_become_shorter(files) -> None:
    paths, tensors = files
    size = paths[0].stat().st_size
    with open(paths[0], "r+b") as stream:
        stream.truncate(size - 100)
    with pytest.raises(ValueError, match=r"0\.safetensors ended early"):
        list(read_to_device(paths, {n for n in tensors if not n.endswith("codes")}, CPU))
    assert not [t for t in threading.enumerate() if t.name.startswith("fastinfer-read")]
