"""Files we write, read by others: transformers with the compressed-tensors package, where that is
installed, and names, shapes and dtypes as vLLM registers them (test_vllm_loads.py runs its loader).
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from quantizing import MODEL, calibration_text, quantized
from safetensors.torch import load_file
from torch import nn

from fastinfer.quant import load_quantized

IDS = torch.arange(3, 40)[None]


# ---- transformers ----------------------------------------------------------------------------


def theirs(folder: Path, **options: Any) -> nn.Module:
    """transformers' own reader of compressed-tensors files."""
    for package in ("compressed_tensors", "accelerate"):
        pytest.importorskip(package, reason=f"{package} is not installed")
    return transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager", **options
    ).eval()


def plain_model(folder: Path) -> nn.Module:
    """Without the quantisation config: the architecture alone."""
    config = transformers.AutoConfig.from_pretrained(folder)
    del config.quantization_config
    config._attn_implementation = "eager"
    return transformers.AutoModelForCausalLM.from_config(config).float().eval()


@torch.no_grad()
def logits(model: nn.Module) -> torch.Tensor:
    return model(IDS).logits


def tokens(model: nn.Module) -> list[int]:
    options = {"max_new_tokens": 16, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    return model.generate(IDS, attention_mask=torch.ones_like(IDS), **options)[0].tolist()


@pytest.mark.parametrize(
    "options",
    [
        {"bits": 4},
        {"bits": 8},
        {"group_size": -1},
        {"skip": ("lm_head", "k_proj", "layers.1")},
        {"method": "gptq", "act_order": True, "samples": 4, "seqlen": 64},
    ],
    ids=str,
)
def test_transformers_loads_compressed_tensors(options: dict, tmp_path: Path) -> None:
    """It calculates what we do, and makes the same tokens."""
    calib = tmp_path / "calib.txt"
    calib.write_text(calibration_text(20_000), encoding="utf-8")
    chosen = {"method": "rtn", "format": "compressed-tensors", **options}
    quantized(tmp_path / "out", calib if chosen["method"] == "gptq" else None, **chosen)
    other = theirs(tmp_path / "out")
    ours = load_quantized(plain_model(tmp_path / "out"), tmp_path / "out")
    torch.testing.assert_close(logits(ours), logits(other), atol=2e-4, rtol=0)
    assert tokens(ours) == tokens(other)


def test_transformers_loads_asymmetric_compressed_tensors(tmp_path: Path) -> None:
    """Dequantised at load: without that, release 0.20 of the package refuses its own files too. It
    rounds the weights to the fp16 of the scales.
    """
    package = pytest.importorskip(
        "compressed_tensors", reason="compressed_tensors is not installed"
    )
    assert package is not None
    quantized(tmp_path / "out", method="rtn", symmetric=False)
    dense = transformers.CompressedTensorsConfig(run_compressed=False)
    other = theirs(tmp_path / "out", quantization_config=dense)
    ours = load_quantized(plain_model(tmp_path / "out"), tmp_path / "out")
    got, want = logits(other), logits(ours)
    assert (got - want).norm() <= 1e-3 * want.norm()


def test_transformers_loads_w8a8(tmp_path: Path) -> None:
    """The package rounds activations with absmax / 127.5, we with absmax / 127: the weights are
    compared in a plain model whose inputs are rounded in its way.
    """
    calib = tmp_path / "calib.txt"
    calib.write_text(calibration_text(20_000), encoding="utf-8")
    quantized(tmp_path / "out", calib, method="smoothquant", samples=4, seqlen=64)
    other = theirs(tmp_path / "out")
    ours, twin = plain_model(tmp_path / "out"), plain_model(tmp_path / "out")
    load_quantized(ours, tmp_path / "out")
    state = load_file(tmp_path / "out" / "model.safetensors")
    for name, layer in ours.named_modules():
        if hasattr(layer, "canonical"):
            state[f"{name}.weight"] = layer.canonical().dequantize()
    missing = twin.load_state_dict(state, strict=False).missing_keys
    assert missing in ([], ["lm_head.weight"])  # a tied head is the embedding

    def rounded(module: nn.Module, inputs: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor]:
        scale = inputs[0].abs().amax(-1, keepdim=True) / 127.5
        return ((inputs[0] / scale).round().clamp(-128, 127) * scale,)

    for name, layer in twin.named_modules():
        if isinstance(layer, nn.Linear) and name != "lm_head":
            layer.register_forward_pre_hook(rounded)
    torch.testing.assert_close(logits(other), logits(twin), atol=1e-5, rtol=1e-5)


# ---- vLLM ------------------------------------------------------------------------------------


def gptq_parameters(n: int, k: int, bits: int, size: int, **_: Any) -> dict[str, tuple]:
    pack, groups = 32 // bits, k // size
    return {
        "qweight": (torch.int32, (k // pack, n)),
        "qzeros": (torch.int32, (groups, n // pack)),
        "scales": (torch.float16, (groups, n)),
        "g_idx": (torch.int32, (k,)),
    }


def awq_parameters(n: int, k: int, bits: int, size: int, **_: Any) -> dict[str, tuple]:
    pack, groups = 32 // bits, k // size
    return {
        "qweight": (torch.int32, (k, n // pack)),
        "qzeros": (torch.int32, (groups, n // pack)),
        "scales": (torch.float16, (groups, n)),
    }


def packed_parameters(
    n: int, k: int, bits: int, size: int, *, zeros: bool, act_order: bool = False
) -> dict[str, tuple]:
    pack, groups = 32 // bits, k // size
    found = {
        "weight_packed": (torch.int32, (n, k // pack)),
        "weight_scale": (torch.float16, (n, groups)),
        "weight_shape": (torch.int64, (2,)),
    }
    if zeros:
        found["weight_zero_point"] = (torch.int32, (n // pack, groups))
    if act_order:
        found["weight_g_idx"] = (torch.int32, (k,))
    return found


def int8_parameters(n: int, k: int, *_: Any, **__: Any) -> dict[str, tuple]:
    return {"weight": (torch.int8, (n, k)), "weight_scale": (torch.float32, (n, 1))}


PARAMETERS = {
    "gptq": gptq_parameters,
    "awq": awq_parameters,
    "pack-quantized": packed_parameters,
    "int-quantized": int8_parameters,
}
VLLM = [
    ("gptq", {"method": "rtn", "format": "gptq"}),
    ("gptq", {"method": "rtn", "format": "gptq", "bits": 8}),
    (
        "gptq",
        {"method": "gptq", "format": "gptq", "act_order": True, "static_groups": False},
    ),
    ("gptq", {"method": "rtn", "format": "gptq_v2", "symmetric": False}),
    ("awq", {"method": "rtn", "format": "awq", "symmetric": False}),
    ("pack-quantized", {"method": "rtn"}),
    ("pack-quantized", {"method": "rtn", "bits": 8}),
    ("pack-quantized", {"method": "rtn", "group_size": -1}),
    ("pack-quantized", {"method": "rtn", "symmetric": False}),
    (
        "pack-quantized",
        {
            "method": "gptq",
            "format": "compressed-tensors",
            "act_order": True,
            "static_groups": False,
        },
    ),
    ("int-quantized", {"method": "smoothquant"}),
]


@pytest.mark.parametrize(("kind", "options"), VLLM, ids=str)
def test_names_shapes_and_dtypes_are_those_vllm_registers(
    kind: str, options: dict, tmp_path: Path
) -> None:
    calib = tmp_path / "calib.txt"
    calib.write_text(calibration_text(20_000), encoding="utf-8")
    needs_text = options["method"] != "rtn"
    out = tmp_path / "out"
    quantized(out, calib if needs_text else None, **({"samples": 4, "seqlen": 64} | options))
    plain, found = (load_file(folder / "model.safetensors") for folder in (MODEL, out))
    config = json.loads((out / "config.json").read_text())["quantization_config"]
    assert config["quant_method"] == (kind if kind in ("gptq", "awq") else "compressed-tensors")
    CHECKS[kind](config, options)

    bits = options.get("bits", 8 if kind == "int-quantized" else 4)
    act_order = options.get("act_order", False) and not options.get("static_groups", True)
    wanted: dict[str, tuple] = {}
    for name, tensor in plain.items():
        n, *k = tensor.shape
        if not name.endswith("_proj.weight"):
            wanted[name] = (tensor.dtype, tuple(tensor.shape))
            continue
        size = options.get("group_size", 64)
        of_layer = PARAMETERS[kind](
            n,
            k[0],
            bits,
            k[0] if size == -1 else size,
            zeros=not options.get("symmetric", True),
            act_order=act_order,
        )
        wanted |= {f"{name.removesuffix('weight')}{key}": want for key, want in of_layer.items()}
    got = {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in found.items()}
    assert got == wanted
    for name, tensor in found.items():
        if name.endswith("weight_shape"):
            assert tensor.tolist() == list(plain[name.replace("weight_shape", "weight")].shape)


def check_gptq_config(config: dict[str, Any], options: dict) -> None:
    """What GPTQConfig.from_config reads; `desc_act` where columns are permuted at run time."""
    assert config["bits"] == options.get("bits", 4) and config["group_size"] == 64
    assert config["sym"] == options.get("symmetric", True)
    assert config["desc_act"] == (not options.get("static_groups", True))
    assert config["lm_head"] is False
    assert config["checkpoint_format"] == options["format"]


def check_awq_config(config: dict[str, Any], options: dict) -> None:
    assert config["bits"] == 4 and config["group_size"] == 64
    assert config["zero_point"] is True and config["version"] == "gemm"
    assert "modules_to_not_convert" in config


def check_packed_config(config: dict[str, Any], options: dict) -> None:
    """One scheme for all Linear layers, weights alone, in groups or per channel."""
    size = options.get("group_size", 64)
    assert config["format"] == "pack-quantized" and config["quantization_status"] == "compressed"
    assert config["ignore"] == ["lm_head"]
    (group,) = config["config_groups"].values()
    assert group["targets"] == ["Linear"] and group["input_activations"] is None
    weights = group["weights"]
    assert weights["num_bits"] == options.get("bits", 4) and weights["type"] == "int"
    assert weights["symmetric"] == options.get("symmetric", True)
    assert weights["strategy"] == ("channel" if size == -1 else "group")
    assert weights["group_size"] == (None if size == -1 else size)
    assert weights["dynamic"] is False
    permuted = options.get("act_order", False) and not options.get("static_groups", True)
    assert weights["actorder"] == ("group" if permuted else None)


def check_int8_config(config: dict[str, Any], options: dict) -> None:
    """Channels of weights, tokens of activations, the latter measured at run time."""
    assert config["format"] == "int-quantized"
    (group,) = config["config_groups"].values()
    for side, strategy, dynamic in (
        ("weights", "channel", False),
        ("input_activations", "token", True),
    ):
        args = group[side]
        assert (args["num_bits"], args["type"], args["symmetric"]) == (8, "int", True)
        assert (args["strategy"], args["dynamic"]) == (strategy, dynamic)


CHECKS = {
    "gptq": check_gptq_config,
    "awq": check_awq_config,
    "pack-quantized": check_packed_config,
    "int-quantized": check_int8_config,
}
