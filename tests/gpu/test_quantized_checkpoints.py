"""Every quantised format on the GPU: the tokens of its dequantised twin, from weights in the CUDA
layout; state dicts that do not depend on the device; models quantised in place.
"""

from __future__ import annotations

import copy
import json
import random
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from helpers import devices

sys.path.insert(0, str(Path(__file__).parents[1] / "quant"))
from quant_checkpoints import CASES, new_model, rounded_twin, write_checkpoint

from fastinfer.cli.main import main
from fastinfer.models import load_model
from fastinfer.quant import QuantLinear, W8A8Linear, load_quantized, quantize_model
from models._model_harness import PagedRun

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU"),
]
IDS = random.Random(3).choices(range(136), k=11)
NEW = 8
WEIGHT_ONLY = "cuda" in devices("int4_linear") and "cuda" in devices("int8_linear")


def runs(name: str) -> bool:
    return CASES[name].activations or WEIGHT_ONLY


NAMES = [name for name in CASES if runs(name)]
_made: dict[str, tuple[Path, nn.Module]] = {}


@pytest.fixture(scope="session")
def checkpoints(tmp_path_factory: pytest.TempPathFactory):
    """Name -> folder and dequantised fp32 twin on the CPU, made once."""

    def get(name: str) -> tuple[Path, nn.Module]:
        if name not in _made:
            folder = tmp_path_factory.mktemp(name)
            _made[name] = folder, write_checkpoint(CASES[name], folder)
        return _made[name]

    return get


def twin_logits(twin: nn.Module, ids: list[int]) -> Tensor:
    with torch.no_grad():
        return twin(torch.tensor([ids], device="cpu")).logits[0]


def assert_greedy(twin: nn.Module, ids: list[int], begin: int, slack: float) -> None:
    """Every token from `begin` on is the twin's likeliest, or within `slack` of it: what 16-bit
    activations may change.
    """
    scores = twin_logits(twin, ids)[begin - 1 : -1]
    chosen = scores.gather(1, torch.tensor(ids[begin:], device="cpu")[:, None])[:, 0]
    assert (scores.amax(1) - chosen).max() <= slack * float(scores.std())


def quantized_layers(model: nn.Module) -> list[QuantLinear | W8A8Linear]:
    return [m for m in model.modules() if isinstance(m, (QuantLinear, W8A8Linear))]


def close(got: Tensor, twin: nn.Module, case: str) -> None:
    """fp16 activations. Where they are rounded to int8 after that, a last bit becomes a step of a
    hundredth now and then, layer after layer: there the twin, its activations rounded to fp16 in
    plain torch, is as far from itself (0.02 to 0.04 on these models), and that is the measure.
    """
    expected = twin_logits(twin, IDS)
    error = (got.cpu().float() - expected).norm() / expected.norm()
    limit = 0.01
    if CASES[case].activations:
        own = twin_logits(rounded_twin(twin), IDS)
        limit = 1.5 * float((own - expected).norm() / expected.norm())
    assert error < limit, (float(error), limit)


@pytest.mark.parametrize("name", NAMES)
def test_tokens_of_the_dequantised_twin(checkpoints, name: str) -> None:
    folder, twin = checkpoints(name)
    model = load_model(folder, device="cuda", dtype=torch.float16, progress=False)
    for layer in quantized_layers(model):
        assert layer.device.type == "cuda"
        if isinstance(layer, QuantLinear):
            assert layer.packed_qweight.shape[-1] == 128 * layer.bits  # the CUDA layout
    with torch.device("cuda"):
        run = PagedRun(model, 1, block_size=16)
        (logits,) = run.step([(0, IDS)])
        close(logits, twin, name)
        ids = list(IDS)
        for _ in range(NEW):
            ids.append(int(logits[-1].argmax()))
            (logits,) = run.step([(0, ids[-1:])])
    assert_greedy(twin, ids, len(IDS), 0.1)


@pytest.mark.parametrize("name", NAMES)
def test_load_quantized_on_the_gpu(checkpoints, name: str) -> None:
    folder, twin = checkpoints(name)
    model = load_quantized(new_model(CASES[name].family), folder, device="cuda").half()
    with torch.no_grad():
        logits = model(torch.tensor([IDS], device="cuda")).logits[0]
    close(logits, twin, name)


@pytest.mark.parametrize("name", [name for name in NAMES if CASES[name].activations])
def test_int8_activations_of_fp32(checkpoints, name: str) -> None:
    """Without 16-bit activations hardly a code differs from the twin's."""
    folder, twin = checkpoints(name)
    model = load_quantized(new_model(CASES[name].family), folder, device="cuda")
    expected = twin_logits(twin, IDS)
    with torch.no_grad():
        logits = model(torch.tensor([IDS], device="cuda")).logits[0].cpu()
    assert (logits - expected).norm() < 2e-3 * expected.norm()


ONE_OF_EACH = ["gptq_v2_act_order", "awq", "ct_asymmetric", "ct_w8a8", "bnb_nf4", "native"]


@pytest.mark.parametrize("name", [name for name in ONE_OF_EACH if name in NAMES])
def test_generate_command(checkpoints, name: str, capsys: pytest.CaptureFixture[str]) -> None:
    folder, twin = checkpoints(name)
    asked = ["--token-ids", ",".join(map(str, IDS)), "--max-tokens", "5", "--temperature", "0"]
    asked += ["--json", "--num-blocks", "16", "--device", "cuda", "--dtype", "float16"]
    assert main(["generate", "--model", str(folder), *asked]) == 0
    report = json.loads(capsys.readouterr().out)
    tokens = report["outputs"][0]["completions"][0]["token_ids"]
    assert len(tokens) == 5
    assert_greedy(twin, IDS + tokens, len(IDS), 0.1)


class Toy(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(200, 328), nn.Linear(328, 72, bias=False)
        self.head = nn.Linear(72, 40)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.relu(self.down(self.up(x))))


KINDS = {
    "int4": {"bits": 4, "group_size": 40},
    "int4 asymmetric": {"bits": 4, "group_size": 64, "symmetric": False},
    "int8": {"bits": 8, "group_size": -1},
    "w8a8": {"bits": 8, "activations": "int8_token"},
}


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_quantize_model_on_the_gpu(kind: str, dtype: torch.dtype) -> None:
    """The bits of the CPU's state dict; moved there and back; loaded into an empty model."""
    plain = Toy().to(dtype)
    here = quantize_model(copy.deepcopy(plain), skip=("head",), **KINDS[kind])
    model = quantize_model(copy.deepcopy(plain).cuda(), skip=("head",), **KINDS[kind])
    assert type(model.head) is nn.Linear and len(quantized_layers(model)) == 2
    assert all(layer.device.type == "cuda" for layer in quantized_layers(model))

    def same_state(a: nn.Module, b: nn.Module) -> None:
        left, right = a.state_dict(), b.state_dict()
        assert left.keys() == right.keys()
        for key, t in left.items():
            assert t.dtype == right[key].dtype and torch.equal(t.cpu(), right[key].cpu()), key

    same_state(model, here)
    packed = [{k: b.clone() for k, b in m.named_buffers()} for m in quantized_layers(model)]
    moved = copy.deepcopy(model).cpu()
    same_state(moved, here)
    moved.cuda()
    empty = quantize_model(Toy().to(dtype).cuda(), skip=("head",), **KINDS[kind])
    empty.load_state_dict(here.state_dict())
    for other in (moved, empty):
        for before, layer in zip(packed, quantized_layers(other), strict=True):
            for key, b in layer.named_buffers():
                assert torch.equal(b, before[key]), key
    if kind != "w8a8" and not WEIGHT_ONLY:
        return
    x = torch.randn(9, 200).to(dtype)
    with torch.no_grad():
        expected, got = here(x).float(), model(x.cuda())
    assert got.dtype == dtype
    assert (got.cpu().float() - expected).norm() < 0.02 * expected.norm()
