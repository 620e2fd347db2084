"""Quantising while transformers loads, saving, loading again."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from fastinfer.integrations.transformers import FastinferInt4Config, FastinferInt8Config
from fastinfer.quant import QuantLinear, quantize_model
from integrations.hf_models import generate, logits, prompts, tiny

CONFIGS = {
    "int4": lambda: FastinferInt4Config(group_size=32),
    "int4_channel_zeros": lambda: FastinferInt4Config(group_size=-1, symmetric=False),
    "int8": lambda: FastinferInt8Config(),
    "int8_zeros": lambda: FastinferInt8Config(group_size=16, symmetric=False),
}


def load(folder, **kwargs):
    return AutoModelForCausalLM.from_pretrained(
        folder, attn_implementation="fastinfer", **kwargs
    ).eval()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", ["llama_biases"])
@pytest.mark.parametrize("config", CONFIGS)
def test_quantise_save_load(config: str, name: str, dtype: torch.dtype, tmp_path) -> None:
    tiny(name, dtype).save_pretrained(tmp_path / "plain")
    options = CONFIGS[config]()
    model = load(tmp_path / "plain", quantization_config=options, dtype=dtype)
    layers = [m for m in model.modules() if isinstance(m, QuantLinear)]
    assert len(layers) == 7 * model.config.num_hidden_layers
    assert {m.bits for m in layers} == {options.bits}
    assert not isinstance(model.lm_head, QuantLinear)

    ids, mask = prompts(2, 13, [4, 0])
    got = logits(model, ids, mask)
    # The same rounding as quantize_model.
    plain = load(tmp_path / "plain", dtype=dtype)
    quantize_model(plain, options.bits, options.group_size, options.symmetric)
    assert torch.equal(got, logits(plain, ids, mask))

    model.save_pretrained(tmp_path / "quantised")
    again = load(tmp_path / "quantised", dtype=dtype)
    assert torch.equal(logits(again, ids, mask), got)
    assert torch.equal(generate(again, ids, mask), generate(model, ids, mask))
    before, after = model.state_dict(), again.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[key], after[key]) for key in before)


def test_files(tmp_path) -> None:
    tiny("llama").save_pretrained(tmp_path / "plain")
    config = FastinferInt4Config(group_size=32, modules_to_not_convert=["o_proj"])
    model = load(tmp_path / "plain", quantization_config=config)
    model.save_pretrained(tmp_path / "quantised")
    stored = json.loads((tmp_path / "quantised/config.json").read_text())["quantization_config"]
    assert stored["quant_method"] == "fastinfer_int4" and stored["group_size"] == 32
    state = load_file(tmp_path / "quantised/model.safetensors")
    layer = "model.layers.0.self_attn"
    assert state[f"{layer}.q_proj.qweight"].shape == (64 * 4 // 32, 64)
    assert f"{layer}.q_proj.weight" not in state
    assert f"{layer}.o_proj.weight" in state and "lm_head.weight" in state
    assert type(load(tmp_path / "quantised").model.layers[0].self_attn.o_proj) is torch.nn.Linear


def test_errors(tmp_path) -> None:
    with pytest.raises(ValueError, match="group_size must be -1 or a positive multiple of 8"):
        FastinferInt4Config(group_size=12)
    model = tiny("llama")
    model.model.layers[1].mlp.up_proj.weight.data[3, 4] = float("nan")
    model.save_pretrained(tmp_path)
    with pytest.raises(RuntimeError):
        load(tmp_path, quantization_config=FastinferInt8Config())
