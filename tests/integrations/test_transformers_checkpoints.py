"""GPTQ, AWQ and other quantised checkpoints inside transformers models, through load_quantized."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from fastinfer.quant import QuantLinear, load_quantized
from integrations.hf_models import generate, logits, prompts

sys.path.insert(0, str(Path(__file__).parents[1] / "quant"))
from quant_checkpoints import CASES, write_checkpoint

FORMATS = ("gptq", "gptq_v2_act_order", "awq")


def dequantised(model: nn.Module) -> nn.Module:
    """The same weights in nn.Linear."""
    for name, layer in list(model.named_modules()):
        if isinstance(layer, QuantLinear):
            plain = nn.Linear(layer.in_features, layer.out_features, layer.bias is not None)
            weight = layer.canonical()
            plain.weight.data.copy_(weight.dequantize())
            if layer.bias is not None:
                plain.bias.data.copy_(layer.bias)
            parent, _, child = name.rpartition(".")
            setattr(model.get_submodule(parent), child, plain)
    return model


@pytest.mark.parametrize("name", FORMATS)
def test_checkpoint_in_a_transformers_model(name: str, tmp_path: Path) -> None:
    write_checkpoint(CASES[name], tmp_path)
    models = []
    for attention in ("fastinfer", "eager"):
        config = AutoConfig.from_pretrained(tmp_path)
        del config.quantization_config
        model = AutoModelForCausalLM.from_config(config, attn_implementation=attention)
        models.append(load_quantized(model, tmp_path, progress=False))
    ours, plain = models[0], dequantised(models[1])
    assert sum(isinstance(m, QuantLinear) for m in ours.modules()) >= 7
    ids, mask = prompts(2, 11, [3, 0])
    real = mask.bool()
    got, want = logits(ours, ids, mask)[real], logits(plain, ids, mask)[real]
    torch.testing.assert_close(got, want, atol=2e-3, rtol=1e-3)
    for options in ({}, {"cache_implementation": "static", "disable_compile": True}):
        assert torch.equal(generate(ours, ids, mask, **options), generate(plain, ids, mask))
