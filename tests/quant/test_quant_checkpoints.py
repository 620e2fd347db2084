"""Every format, end to end: a packed tiny model gives the tokens of its dequantised twin."""

from __future__ import annotations

import json
import random
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
import transformers
from quant_checkpoints import CASES, new_model, write_checkpoint

from fastinfer.cli.main import main
from fastinfer.models import load_model
from fastinfer.quant import load_quantized
from models._model_harness import PagedRun, greedy

IDS = random.Random(3).choices(range(136), k=11)


@dataclass
class Pair:
    folder: Path
    twin: transformers.PreTrainedModel


_made: dict[str, Pair] = {}


@pytest.fixture(scope="session")
def checkpoints(tmp_path_factory: pytest.TempPathFactory):
    """Name -> checkpoint and twin, made once. Treat the folders as read-only."""

    def get(name: str) -> Pair:
        if name not in _made:
            folder = tmp_path_factory.mktemp(name)
            _made[name] = Pair(folder, write_checkpoint(CASES[name], folder))
        return _made[name]

    return get


def twin_logits(twin: transformers.PreTrainedModel, ids: list[int]) -> torch.Tensor:
    with torch.no_grad():
        return twin(torch.tensor([ids])).logits[0]


@pytest.mark.parametrize("name", CASES)
def test_load_model_equals_the_dequantised_twin(checkpoints, name: str) -> None:
    pair = checkpoints(name)
    model = load_model(pair.folder, progress=False)
    (logits,) = PagedRun(model, 1, block_size=4).step([(0, IDS)])
    expected = twin_logits(pair.twin, IDS)
    assert expected.std() > 0.1
    torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4)
    (tokens,) = greedy(model, [IDS], 8, block_size=4)
    ids = list(IDS)
    for _ in range(8):
        ids.append(int(twin_logits(pair.twin, ids)[-1].argmax()))
    assert tokens == ids[len(IDS) :]


@pytest.mark.parametrize("name", CASES)
def test_load_quantized_equals_the_dequantised_twin(checkpoints, name: str) -> None:
    pair = checkpoints(name)
    model = load_quantized(new_model(CASES[name].family), pair.folder)
    with torch.no_grad():
        logits = model(torch.tensor([IDS])).logits[0]
    torch.testing.assert_close(logits, twin_logits(pair.twin, IDS), rtol=1e-4, atol=1e-4)


ONE_OF_EACH = ["gptq_v2_act_order", "awq", "ct_asymmetric", "ct_w8a8", "bnb_nf4", "native"]


@pytest.mark.parametrize("name", ONE_OF_EACH)
def test_generate_command(checkpoints, name: str, capsys: pytest.CaptureFixture[str]) -> None:
    pair = checkpoints(name)
    ids = ",".join(map(str, IDS))
    asked = ["--token-ids", ids, "--max-tokens", "5", "--temperature", "0", "--json"]
    assert main(["generate", "--model", str(pair.folder), *asked, "--num-blocks", "16"]) == 0
    report = json.loads(capsys.readouterr().out)
    expected = list(IDS)
    for _ in range(5):
        expected.append(int(twin_logits(pair.twin, expected)[-1].argmax()))
    assert report["outputs"][0]["completions"][0]["token_ids"] == expected[len(IDS) :]
