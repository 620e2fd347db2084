"""Written tensors against slow packers, round trips, configurations, sharded folders."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import quant_packers as qp
import torch
import transformers
from quantizing import MODEL, quantized
from safetensors.torch import load_file
from torch import Tensor

from fastinfer.checkpoint import INDEX
from fastinfer.models import load_model
from fastinfer.quant import (
    CanonicalWeight,
    Int8Weight,
    QuantError,
    QuantizeOptions,
    load_quantized,
    quantize_checkpoint,
)
from fastinfer.quant.config import parse_quant_config
from fastinfer.quant.formats import read_linear
from fastinfer.quant.perplexity import perplexity
from fastinfer.quant.rtn import GridOptions, rtn, rtn_int8
from fastinfer.quant.save import FORMATS, format_config, write_linear

NAME = "model.layers.0.mlp.up_proj"


def canonical(w: qp.Weight, *, symmetric: bool, group_size: int) -> CanonicalWeight:
    perm = torch.argsort(w.group, stable=True)
    trivial = torch.equal(perm, torch.arange(perm.numel()))
    return CanonicalWeight(
        w.codes[:, perm].to(torch.uint8),
        w.scales.clone(),
        None if symmetric else w.zeros.to(torch.uint8),
        w.bits,
        group_size,
        None if trivial else perm.to(torch.int32),
        torch.arange(w.codes.shape[0]).float(),
    )


def slow(form: str, w: qp.Weight, *, symmetric: bool, act_order: bool) -> dict[str, Tensor]:
    if form in ("gptq", "gptq_v2"):
        return qp.gptq(w, version=2 if form == "gptq_v2" else 1)
    if form == "awq":
        return qp.awq(w)
    if form == "native":
        return qp.native(w, symmetric=symmetric)
    return qp.pack_quantized(w, symmetric=symmetric, act_order=act_order)


CASES = [
    (form, bits, group_size, symmetric, act_order)
    for form in FORMATS
    for bits, group_size, symmetric, act_order in (
        (4, 16, True, False),
        (4, 16, False, True),
        (4, -1, False, False),
        (8, 32, True, True),
        (8, 16, False, False),
    )
    if form != "awq" or (bits == 4 and not act_order)
]


def read_back(form: str, weight: Any, tensors: dict[str, Tensor], config: dict[str, Any]) -> Any:
    scheme = parse_quant_config(json.loads(json.dumps(config))).for_module(NAME)
    assert scheme is not None
    return read_linear(NAME, tensors, scheme, weight.in_features, weight.out_features)


@pytest.mark.parametrize(("form", "bits", "group_size", "symmetric", "act_order"), CASES)
def test_words_are_those_of_the_slow_packer(
    form: str, bits: int, group_size: int, symmetric: bool, act_order: bool
) -> None:
    w = qp.random_weight(
        24, 64, bits=bits, group_size=group_size, symmetric=symmetric, act_order=act_order
    )
    weight = canonical(w, symmetric=symmetric, group_size=group_size)
    tensors = write_linear(form, NAME, weight)
    expected = slow(form, w, symmetric=symmetric, act_order=act_order)
    expected["bias"] = weight.bias
    assert set(tensors) == {f"{NAME}.{name}" for name in expected}
    for name, tensor in expected.items():
        written = tensors[f"{NAME}.{name}"]
        assert written.dtype == tensor.dtype, name
        assert torch.equal(written, tensor), name
        assert written.is_contiguous()
    config = format_config(
        form, bits=bits, group_size=group_size, symmetric=symmetric, permuted=act_order
    )
    back = read_back(form, weight, tensors, config)
    assert torch.equal(back.dequantize(), weight.dequantize())
    assert torch.equal(back.codes, weight.codes)
    assert torch.equal(back.scales, weight.scales)
    assert back.scales.dtype == weight.scales.dtype
    if form != "awq":
        assert (back.zeros is None) == symmetric
    assert torch.equal(back.bias, weight.bias)


@pytest.mark.parametrize("form", ["compressed-tensors", "native"])
def test_w8a8_round_trip(form: str) -> None:
    weight = rtn_int8(torch.randn(12, 40))
    tensors = write_linear(form, NAME, weight)
    config = format_config(form, bits=8, group_size=-1, symmetric=True, int8=True)
    back = read_back(form, weight, tensors, config)
    assert isinstance(back, Int8Weight)
    assert torch.equal(back.codes, weight.codes)
    assert torch.equal(back.scales, weight.scales)
    with pytest.raises(QuantError, match="W8A8"):
        write_linear("gptq", NAME, weight)


def test_zero_points_of_0_and_15_survive() -> None:
    weight = torch.randn(16, 32)
    weight[:8] = weight[:8].abs() + 0.1  # z = 0
    weight[8:] = -weight[8:].abs() - 0.1  # z = 15
    stored = rtn(weight, GridOptions(4, 32, False, torch.float16))
    assert set(stored.zeros.flatten().tolist()) == {0, 15}
    for form in FORMATS:
        config = format_config(form, bits=4, group_size=32, symmetric=False)
        back = read_back(form, stored, write_linear(form, NAME, stored), config)
        assert torch.equal(back.zeros, stored.zeros)


def test_what_formats_cannot_hold_is_refused() -> None:
    odd = rtn(torch.randn(7, 40), GridOptions(4, 16, False))
    for form, match in (("awq", "multiple of 8"), ("compressed-tensors", "group_size")):
        with pytest.raises(QuantError, match=match):
            write_linear(form, NAME, odd)
    eight = rtn(torch.randn(8, 32), GridOptions(8, 16, False))
    with pytest.raises(QuantError, match="4 bits"):
        write_linear("awq", NAME, eight)
    eight.zeros = torch.zeros_like(eight.scales)
    for form in ("gptq", "compressed-tensors"):
        with pytest.raises(QuantError, match="integers"):
            write_linear(form, NAME, eight)
    with pytest.raises(QuantError, match="lm_head"):
        format_config("awq", bits=4, group_size=128, symmetric=False, lm_head=True)


def test_zero_points_that_v1_readers_get_wrong_are_said_aloud(
    caplog: pytest.LogCaptureFixture,
) -> None:
    weight = rtn(torch.rand(8, 32), GridOptions(4, 16, False))  # nothing negative: zero points 0
    write_linear("gptq_v2", NAME, weight)
    assert not caplog.text
    tensors = write_linear("gptq", NAME, weight)
    assert "write gptq_v2" in caplog.text
    assert (tensors[f"{NAME}.qzeros"] == -1).all()


@pytest.mark.parametrize("form", list(FORMATS))
def test_ignored_layers_and_heads_are_found_again(form: str) -> None:
    other = "model.layers.1.mlp.up_proj"
    shared = {"bits": 4, "group_size": 64, "symmetric": True}
    config = parse_quant_config(format_config(form, ignore=[other, "lm_head"], **shared))
    assert config.for_module(NAME) is not None
    assert config.for_module(other) is None
    assert config.for_module("lm_head") is None
    if form != "awq":
        config = parse_quant_config(format_config(form, lm_head=True, **shared))
        assert config.for_module("lm_head") is not None


def test_shards(tmp_path: Path) -> None:
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    options = QuantizeOptions(group_size=64)
    for out, limit in ((whole, 10**9), (parts, 300_000)):
        quantize_checkpoint(MODEL, out, options, max_shard_bytes=limit, progress=False)
    index = json.loads((parts / INDEX).read_text())
    files = sorted(parts.glob("model-*.safetensors"))
    assert len(files) > 3
    tensors = {name: t for file in files for name, t in load_file(file).items()}
    expected = load_file(whole / "model.safetensors")
    assert tensors.keys() == expected.keys() == index["weight_map"].keys()
    assert all(torch.equal(tensors[name], t) for name, t in expected.items())
    size = sum(t.numel() * t.element_size() for t in tensors.values())
    assert index["metadata"]["total_size"] == size
    ids = torch.arange(3, 60)
    a, b = (perplexity(load_model(p, progress=False), ids) for p in (whole, parts))
    assert a == b
    # Overwriting a sharded folder with a single file leaves no shard behind.
    quantize_checkpoint(MODEL, parts, options, overwrite=True, progress=False)
    assert not list(parts.glob("model-*")) and not (parts / INDEX).exists()


@pytest.mark.parametrize(
    "options",
    [
        {"method": "rtn"},
        {"method": "rtn", "format": "gptq"},
        {"method": "rtn", "format": "awq", "symmetric": False},
        {"method": "rtn", "format": "native"},
    ],
    ids=lambda o: o.get("format", "compressed-tensors"),
)
def test_transformers_models_take_the_folder(options: dict, tmp_path: Path) -> None:
    """The configuration parses, and load_quantized fills transformers' own model: its logits are
    those of the dequantised weights.
    """
    quantized(tmp_path / "out", **options)
    config = transformers.AutoConfig.from_pretrained(tmp_path / "out")
    assert config.quantization_config["quant_method"] != ""
    raw = config.quantization_config
    del config.quantization_config
    config._attn_implementation = "eager"
    model = load_quantized(
        transformers.AutoModelForCausalLM.from_config(config).float(), tmp_path / "out"
    )
    twin = transformers.AutoModelForCausalLM.from_pretrained(
        MODEL, dtype=torch.float32, attn_implementation="eager"
    )
    tensors = load_file(tmp_path / "out" / "model.safetensors")
    quant = parse_quant_config(raw)
    for name, module in twin.named_modules():
        scheme = quant.for_module(name) if isinstance(module, torch.nn.Linear) else None
        if scheme is not None:
            shape = (module.in_features, module.out_features)
            module.weight.data.copy_(read_linear(name, tensors, scheme, *shape).dequantize())
    ids = torch.arange(3, 40)[None]
    with torch.no_grad():
        ours, theirs = model(ids).logits, twin(ids).logits
    assert torch.allclose(ours, theirs, atol=2e-4)


@pytest.mark.parametrize("form", ["gptq", "awq", "compressed-tensors"])
def test_transformers_parses_the_quantization_config(form: str) -> None:
    """transformers' own classes accept the dictionary, where they need no further package."""
    config = format_config(form, bits=4, group_size=64, symmetric=form != "awq")
    from transformers.quantizers.auto import AutoQuantizationConfig

    if form == "compressed-tensors":
        pytest.importorskip("compressed_tensors", reason="compressed-tensors is not installed")
    parsed = AutoQuantizationConfig.from_dict(dict(config))
    if form != "compressed-tensors":
        assert (parsed.bits, parsed.group_size) == (4, 64)
