"""GPTQ and AWQ files we write, run by GPTQModel's plain-PyTorch layers, which transformers uses for
both formats. Where GPTQModel is installed; seen with 7.7.0 under torch 2.14.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from quantizing import calibration_text, quantized

from fastinfer.quant import load_quantized

gptqmodel = pytest.importorskip("gptqmodel", reason="GPTQModel is not installed")
IDS = torch.arange(3, 40)[None]


@pytest.mark.parametrize(
    "options",
    [
        {"method": "gptq"},
        {"method": "gptq", "bits": 8},
        {"method": "gptq", "act_order": True},
        {"method": "gptq", "act_order": True, "static_groups": False},
        {"method": "gptq", "format": "gptq_v2", "symmetric": False},
        {"method": "awq", "symmetric": False},
    ],
    ids=str,
)
@torch.no_grad()
def test_gptqmodel_computes_the_same(options: dict[str, Any], tmp_path: Path) -> None:
    calib = tmp_path / "calib.txt"
    calib.write_text(calibration_text(20_000), encoding="utf-8")
    out = tmp_path / "out"
    quantized(out, calib, **({"samples": 4, "seqlen": 64} | options))

    awq = options["method"] == "awq"
    backend = gptqmodel.BACKEND.AWQ_TORCH if awq else gptqmodel.BACKEND.TORCH
    theirs = gptqmodel.GPTQModel.load(
        str(out), backend=backend, device="cpu", dtype=torch.float16
    ).model
    config = transformers.AutoConfig.from_pretrained(out)
    del config.quantization_config
    ours = transformers.AutoModelForCausalLM.from_config(config).float().eval()
    load_quantized(ours, out)

    # Theirs computes in fp16: ten bits of each of some hundred roundings.
    want = ours(IDS).logits
    assert (theirs(IDS).logits.float() - want).abs().max() < 4e-3 * want.abs().max()
