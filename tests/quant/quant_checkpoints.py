"""Tiny random checkpoints in every quantised format, with their dequantised twins."""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import quant_packers as qp
import torch
import transformers
from safetensors.torch import save_file
from torch import Tensor, nn

Made = tuple[dict[str, Tensor], Tensor]  # tensors of one linear layer, its dequantised weight
Maker = Callable[[str, int, int, int], Made]  # (name, N, K, seed)


@dataclass(frozen=True)
class Case:
    """One way of storing a checkpoint."""

    config: dict[str, Any]
    make: Maker
    family: str = "Llama"
    plain: str = "lm_head"  # regex: layers that stay in floating point
    activations: bool = False  # int8 per token


def _gptq(version: int = 1, **options: Any) -> Maker:
    def make(name: str, n: int, k: int, seed: int) -> Made:
        w = qp.random_weight(n, k, seed=seed, **options)
        return qp.gptq(w, version=version), w.dense()

    return make


def _irregular(name: str, n: int, k: int, seed: int) -> Made:
    w = qp.random_weight(n, k, seed=seed)
    w = w.with_group((torch.arange(k) // 16 + torch.arange(k) % 3).clamp(max=k // 16 - 1))
    return qp.gptq(w), w.dense()


def _shared_order(name: str, n: int, k: int, seed: int) -> Made:
    """q, k, v (and gate, up) with one act-order, as a quantizer of whole blocks writes them."""
    w = qp.random_weight(n, k, seed=seed, act_order=True)
    shared = qp.random_weight(1, k, act_order=True, seed=len(name.rsplit(".", 1)[0]))
    w = w.with_group(shared.group)
    return qp.gptq(w), w.dense()


def _mixed(name: str, n: int, k: int, seed: int) -> Made:
    if re.search("k_proj", name):
        w = qp.random_weight(n, k, bits=8, group_size=32, symmetric=False, seed=seed)
        return qp.gptq(w, version=1), w.dense()
    w = qp.random_weight(n, k, seed=seed)
    return qp.gptq(w), w.dense()


def _awq(name: str, n: int, k: int, seed: int) -> Made:
    w = qp.random_weight(n, k, symmetric=False, seed=seed)
    return qp.awq(w), w.dense()


def _packed(symmetric: bool, packed_zeros: bool = True, **options: Any) -> Maker:
    def make(name: str, n: int, k: int, seed: int) -> Made:
        w = qp.random_weight(n, k, symmetric=symmetric, seed=seed, **options)
        act_order = bool(options.get("act_order"))
        tensors = qp.pack_quantized(
            w, symmetric=symmetric, act_order=act_order, packed_zeros=packed_zeros
        )
        return tensors, w.dense()

    return make


def _int8(symmetric: bool = True) -> Maker:
    def make(name: str, n: int, k: int, seed: int) -> Made:
        w = qp.random_weight(n, k, bits=8, group_size=-1, symmetric=symmetric, seed=seed)
        return qp.int_quantized(w, symmetric=symmetric), w.dense()

    return make


def _bnb4(**options: Any) -> Maker:
    return lambda name, n, k, seed: qp.bnb_4bit(n, k, seed, **options)


def _native(symmetric: bool, **options: Any) -> Maker:
    def make(name: str, n: int, k: int, seed: int) -> Made:
        w = qp.random_weight(n, k, symmetric=symmetric, seed=seed, **options)
        return qp.native(w, symmetric=symmetric), w.dense()

    return make


def _native_w8a8(name: str, n: int, k: int, seed: int) -> Made:
    w = qp.random_weight(n, k, bits=8, group_size=-1, scale_dtype=torch.float32, seed=seed)
    tensors = qp.int_quantized(w)
    return tensors | {"weight_scale": tensors["weight_scale"].reshape(n)}, w.dense()


def gptq_config(**changes: Any) -> dict[str, Any]:
    return {"quant_method": "gptq", "bits": 4, "group_size": 16, "sym": True} | changes


def ct_config(
    *, num_bits: int = 4, symmetric: bool = True, style: str = "pack-quantized", **weights: Any
) -> dict[str, Any]:
    scheme = {"num_bits": num_bits, "type": "int", "symmetric": symmetric}
    scheme |= {"strategy": "group", "group_size": 16, "dynamic": False} | weights
    group = {"targets": ["Linear"], "weights": scheme, "input_activations": None}
    return {
        "quant_method": "compressed-tensors",
        "format": style,
        "quantization_status": "compressed",
        "ignore": ["lm_head"],
        "config_groups": {"group_0": group},
    }


def _ct_w8a8() -> dict[str, Any]:
    config = ct_config(num_bits=8, style="int-quantized", strategy="channel", group_size=None)
    config["config_groups"]["group_0"]["input_activations"] = {
        "num_bits": 8,
        "type": "int",
        "symmetric": True,
        "strategy": "token",
        "dynamic": True,
    }
    return config


_CHANNEL = {"num_bits": 8, "strategy": "channel", "group_size": None}
_BNB4 = {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}

CASES: dict[str, Case] = {
    "gptq": Case(gptq_config(), _gptq()),
    "gptq_asymmetric": Case(gptq_config(sym=False), _gptq(symmetric=False), "Qwen2"),
    "gptq_v2_act_order": Case(
        gptq_config(sym=False, desc_act=True, checkpoint_format="gptq_v2"),
        _gptq(2, symmetric=False, act_order=True),
    ),
    "gptq_mislabelled": Case(gptq_config(), _gptq(2)),
    "gptq_shared_act_order": Case(gptq_config(desc_act=True), _shared_order, "Qwen2"),
    "gptq_8bit_act_order": Case(
        gptq_config(bits=8, desc_act=True, group_size=32),
        _gptq(bits=8, act_order=True, group_size=32),
        "Qwen2",
    ),
    "gptq_per_channel": Case(gptq_config(group_size=-1), _gptq(group_size=-1)),
    "gptq_short_group": Case(gptq_config(group_size=40), _gptq(group_size=40)),
    "gptq_odd_group": Case(gptq_config(group_size=12), _gptq(group_size=12)),
    "gptq_irregular": Case(gptq_config(desc_act=True), _irregular),
    "gptq_mixed": Case(
        gptq_config(
            dynamic={
                r".*\.k_proj": {"bits": 8, "group_size": 32, "sym": False},
                r"-:.*\.1\.mlp\.up_proj": {},
            }
        ),
        _mixed,
        plain=r"lm_head|\.1\.mlp\.up_proj",
    ),
    "gptq_head": Case(gptq_config(lm_head=True), _gptq(), plain="^$"),
    "awq": Case(
        {"quant_method": "awq", "bits": 4, "group_size": 16, "zero_point": True, "version": "gemm"},
        _awq,
        "Qwen2",
    ),
    "awq_skips": Case(
        {
            "quant_method": "awq",
            "w_bit": 4,
            "q_group_size": 16,
            "zero_point": True,
            "version": "GEMM",
            "modules_to_not_convert": ["model.layers.0."],
        },
        _awq,
        plain=r"lm_head|layers\.0\.",
    ),
    "ct_symmetric": Case(ct_config(), _packed(True)),
    "ct_asymmetric": Case(ct_config(symmetric=False), _packed(False), "Qwen2"),
    "ct_old_zero_points": Case(ct_config(symmetric=False), _packed(False, packed_zeros=False)),
    "ct_act_order": Case(
        ct_config(actorder="group"), _packed(True, act_order=True, scale_dtype=torch.bfloat16)
    ),
    "ct_8bit": Case(ct_config(**_CHANNEL), _packed(True, bits=8, group_size=-1)),
    "ct_8bit_asymmetric": Case(
        ct_config(**_CHANNEL, symmetric=False), _packed(False, bits=8, group_size=-1)
    ),
    "ct_int8": Case(ct_config(**_CHANNEL, style="int-quantized"), _int8(), "Qwen2"),
    "ct_int8_asymmetric": Case(
        ct_config(**_CHANNEL, style="int-quantized", symmetric=False), _int8(False)
    ),
    "ct_w8a8": Case(_ct_w8a8(), _int8(), "Qwen2", activations=True),
    "bnb_int8": Case(
        {"quant_method": "bitsandbytes", "load_in_8bit": True},
        lambda name, n, k, seed: qp.bnb_int8(n, k, seed),
    ),
    "bnb_nf4": Case(_BNB4, _bnb4()),
    "bnb_nf4_nested": Case(_BNB4, _bnb4(nested=True, storage=torch.bfloat16), "Qwen2"),
    "bnb_fp4": Case(_BNB4 | {"bnb_4bit_quant_type": "fp4"}, _bnb4(kind="fp4")),
    "native": Case(
        {"quant_method": "fastinfer", "bits": 4, "group_size": 16, "symmetric": False},
        _native(False),
    ),
    "native_8bit_act_order": Case(
        {"quant_method": "fastinfer", "bits": 8, "group_size": 32, "act_order": True},
        _native(True, bits=8, group_size=32, act_order=True),
        "Qwen2",
    ),
    "native_w8a8": Case(
        {"quant_method": "fastinfer", "bits": 8, "activations": "int8_token"},
        _native_w8a8,
        activations=True,
    ),
}

_SIZES = {
    "vocab_size": 136,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "initializer_range": 0.15,
    "eos_token_id": None,
    "bos_token_id": None,
    "pad_token_id": 0,
    "tie_word_embeddings": False,
}


def new_model(family: str, **changes: Any) -> transformers.PreTrainedModel:
    """A random fp32 transformers model."""
    config = getattr(transformers, f"{family}Config")(**(_SIZES | changes))
    config._attn_implementation = "eager"
    torch.manual_seed(0)
    return getattr(transformers, f"{family}ForCausalLM")(config).eval()


class Int8Activations(nn.Module):
    """What a W8A8 layer computes, in plain torch."""

    def __init__(self, linear: nn.Linear, scale: Tensor) -> None:
        super().__init__()
        self.codes = torch.round(linear.weight.double() / scale.double())
        self.scale, self.bias = scale, linear.bias

    def forward(self, x: Tensor) -> Tensor:
        largest = x.abs().amax(-1, keepdim=True)
        step = torch.where(largest == 0, 1.0, largest / 127)
        codes = torch.clamp(torch.round(x / step), -127, 127)
        sums = (codes.double() @ self.codes.t()).float()
        out = sums * step * self.scale.reshape(-1)
        return out if self.bias is None else out + self.bias


def write_checkpoint(case: Case, folder: Path, **changes: Any) -> transformers.PreTrainedModel:
    """Write the checkpoint; returns the twin that computes the same from dequantised weights."""
    twin = new_model(case.family, **changes)
    tensors = {}
    quantized = set()
    with torch.no_grad():
        for seed, (name, module) in enumerate(list(twin.named_modules())):
            if isinstance(module, nn.Linear) and module.bias is not None:
                module.bias.normal_(std=0.3)
            if not isinstance(module, nn.Linear) or re.search(case.plain, name):
                continue
            made, dense = case.make(name, *module.weight.shape, seed)
            tensors |= {f"{name}.{suffix}": tensor for suffix, tensor in made.items()}
            module.weight.copy_(dense)
            quantized.add(f"{name}.weight")
            if case.activations:
                scale = made["weight_scale"].float().reshape(-1, 1)
                parent, _, child = name.rpartition(".")
                setattr(twin.get_submodule(parent), child, Int8Activations(module, scale))
    for name, tensor in new_state(twin).items():
        if name not in quantized and not name.endswith((".codes", ".scale")):
            tensors[name] = tensor
    save_file(tensors, folder / "model.safetensors")
    config = twin.config.to_dict()
    config |= {"quantization_config": case.config, "architectures": [type(twin).__name__]}
    config |= {"dtype": "float32"}
    (folder / "config.json").write_text(json.dumps(config))
    return twin


def rounded_twin(twin: nn.Module) -> nn.Module:
    """The twin with the output of every module that computes something rounded to fp16."""

    def to_fp16(module: nn.Module, args: Any, out: Any) -> Any:
        return out.half().float() if isinstance(out, Tensor) and out.is_floating_point() else out

    rounded = copy.deepcopy(twin)
    for module in rounded.modules():
        if not any(module.children()):
            module.register_forward_hook(to_fp16)
    return rounded


def new_state(model: nn.Module) -> dict[str, Tensor]:
    """Parameters as safetensors takes them: no shared memory."""
    seen, state = set(), {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if id(parameter) not in seen:
            seen.add(id(parameter))
            state[name] = parameter.detach().clone()
    return state
