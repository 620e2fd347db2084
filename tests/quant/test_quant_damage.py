"""Damaged and mismatched tensors of every format: the error names tensor, expected and found."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import quant_packers as qp
import torch
from test_quant_formats import AWQ, BNB8, CT, GPTQ, NATIVE, NF4, read

from fastinfer.quant import QuantError

W = qp.random_weight(24, 64)
W8 = qp.random_weight(24, 64, bits=8, group_size=-1)
INT8 = replace(CT, bits=8, group_size=-1, style="int-quantized")
NF4_STATE = "weight.quant_state.bitsandbytes__nf4"


def _state(**changes: object) -> torch.Tensor:
    state = {"shape": [24, 64], "blocksize": 64} | changes
    return torch.tensor(list(json.dumps(state).encode()), dtype=torch.uint8)


DAMAGED = {
    "missing scales": (GPTQ, qp.gptq(W), {"scales": None}, ["m.scales", "no such tensor"]),
    "missing qzeros": (
        replace(GPTQ, symmetric=False),
        qp.gptq(W),
        {"qzeros": None},
        ["m.qzeros", "no such tensor"],
    ),
    "other bits": (
        replace(GPTQ, bits=8),
        qp.gptq(W),
        {},
        ["m.qweight", "torch.int32 [16, 24]", "got torch.int32 [8, 24]"],
    ),
    "group count": (
        replace(GPTQ, group_size=32),
        qp.gptq(W),
        {},
        ["m.scales", "[2, 24]", "group_size 32", "[4, 24]"],
    ),
    "zero groups": (
        GPTQ,
        qp.gptq(W),
        {"qzeros": torch.zeros(2, 3, dtype=torch.int32)},
        ["m.qzeros", "[4, 3]", "[2, 3]"],
    ),
    "qweight dtype": (
        GPTQ,
        qp.gptq(W),
        {"qweight": torch.zeros(8, 24)},
        ["m.qweight", "torch.int32", "torch.float32"],
    ),
    "g_idx too high": (
        GPTQ,
        qp.gptq(W),
        {"g_idx": torch.arange(64, dtype=torch.int32) // 8},
        ["m.g_idx", "0..3", "0..7"],
    ),
    "g_idx negative": (
        GPTQ,
        qp.gptq(W),
        {"g_idx": torch.arange(64, dtype=torch.int32) // 16 - 1},
        ["m.g_idx", "0..3", "-1..2"],
    ),
    "g_idx length": (
        GPTQ,
        qp.gptq(W),
        {"g_idx": torch.arange(32, dtype=torch.int32)},
        ["m.g_idx", "[64]", "[32]"],
    ),
    "NaN scale": (
        GPTQ,
        qp.gptq(W),
        {"scales": torch.full((4, 24), float("nan"))},
        ["m: scales must be finite"],
    ),
    "awq packed like gptq": (AWQ, qp.gptq(W), {}, ["m.qweight", "[64, 3]", "[8, 24]"]),
    "awq zeros": (
        AWQ,
        qp.awq(W),
        {"qzeros": torch.zeros(4, 24, dtype=torch.int32)},
        ["m.qzeros", "[4, 3]", "[4, 24]"],
    ),
    "awq group count": (
        AWQ,
        qp.awq(W),
        {"scales": torch.ones(5, 24)},
        ["m.scales", "[4, 24]", "[5, 24]"],
    ),
    "weight_g_idx too high": (
        CT,
        qp.pack_quantized(W, symmetric=True),
        {"weight_g_idx": torch.arange(64, dtype=torch.int32) // 8},
        ["m.weight_g_idx", "0..3", "0..7"],
    ),
    "int8 weight": (
        INT8,
        qp.int_quantized(W8),
        {"weight": torch.zeros(24, 60, dtype=torch.int8)},
        ["m.weight", "[24, 64]", "[24, 60]"],
    ),
    "int8 group count": (
        INT8,
        qp.int_quantized(W8),
        {"weight_scale": torch.ones(24, 2)},
        ["m.weight_scale", "[24, 1]", "[24, 2]"],
    ),
    "weight_shape": (
        CT,
        qp.pack_quantized(W, symmetric=True),
        {"weight_shape": torch.tensor([24, 56])},
        ["m.weight_shape", "[24, 64]", "[24, 56]"],
    ),
    "weight_packed": (
        CT,
        qp.pack_quantized(W, symmetric=True),
        {"weight_packed": torch.zeros(24, 9, dtype=torch.int32)},
        ["m.weight_packed", "[24, 8]", "[24, 9]"],
    ),
    "weight_scale": (
        CT,
        qp.pack_quantized(W, symmetric=True),
        {"weight_scale": torch.ones(24, 3)},
        ["m.weight_scale", "[24, 4]", "[24, 3]"],
    ),
    "zero points not packed along out": (
        replace(CT, symmetric=False),
        qp.pack_quantized(W, symmetric=False),
        {"weight_zero_point": torch.zeros(24, 1, dtype=torch.int32)},
        ["m.weight_zero_point", "[3, 4]", "[24, 1]"],
    ),
    "zero point out of range": (
        replace(CT, symmetric=False),
        qp.pack_quantized(W, symmetric=False),
        {"weight_zero_point": torch.full((24, 4), 8, dtype=torch.int8)},
        ["m.weight_zero_point", "-8..7", "8..8"],
    ),
    "symmetric with zero points": (
        CT,
        qp.pack_quantized(W, symmetric=True),
        {"weight_zero_point": torch.full((24, 4), 1, dtype=torch.int8)},
        ["m.weight_zero_point", "symmetric"],
    ),
    "SCB": (BNB8, qp.bnb_int8(24, 64, 0)[0], {"SCB": torch.ones(64)}, ["m.SCB", "[24]", "[64]"]),
    "bitsandbytes int8 weight": (
        BNB8,
        qp.bnb_int8(24, 64, 0)[0],
        {"weight": torch.zeros(64, 24, dtype=torch.int8)},
        ["m.weight", "[24, 64]", "[64, 24]"],
    ),
    "int8 layout of a GPU": (
        BNB8,
        qp.bnb_int8(24, 64, 0)[0],
        {"weight_format": torch.tensor(2, dtype=torch.uint8)},
        ["m.weight_format", "row-major", "2"],
    ),
    "nf4 shape": (
        NF4,
        qp.bnb_4bit(24, 64, 0)[0],
        {NF4_STATE: _state(shape=[64, 24])},
        ["m.weight", "[24, 64]", "[64, 24]"],
    ),
    "nf4 state": (
        NF4,
        qp.bnb_4bit(24, 64, 0)[0],
        {NF4_STATE: torch.tensor([123, 7], dtype=torch.uint8)},
        ["m." + NF4_STATE, "JSON"],
    ),
    "nf4 bytes": (
        NF4,
        qp.bnb_4bit(24, 64, 0)[0],
        {"weight": torch.zeros(700, 1, dtype=torch.uint8)},
        ["m.weight", "768 bytes", "700"],
    ),
    "nf4 blocks": (
        NF4,
        qp.bnb_4bit(24, 64, 0)[0],
        {NF4_STATE: _state(blocksize=128)},
        ["m.weight.absmax", "[12]", "[24]"],
    ),
    "native qweight": (
        NATIVE,
        qp.native(W, symmetric=True),
        {"qweight": torch.zeros(9, 24, dtype=torch.int32)},
        ["m.qweight", "[8, 24]", "[9, 24]"],
    ),
    "native group count": (
        NATIVE,
        qp.native(W, symmetric=True),
        {"scales": torch.ones(3, 24)},
        ["m.scales", "[4, 24]", "[3, 24]"],
    ),
    "native perm too high": (
        NATIVE,
        qp.native(W, symmetric=True),
        {"perm": torch.arange(1, 65, dtype=torch.int32)},
        ["m: perm", "0..63"],
    ),
    "native W8A8 scales": (
        replace(NATIVE, bits=8, group_size=-1, activations="int8_token"),
        qp.int_quantized(W8),
        {"weight_scale": torch.ones(23)},
        ["m.weight_scale", "[24]", "[23]"],
    ),
    "native perm": (
        NATIVE,
        qp.native(W, symmetric=True),
        {"perm": torch.zeros(64, dtype=torch.int32)},
        ["m: perm", "0..63"],
    ),
}


@pytest.mark.parametrize("case", DAMAGED)
def test_damaged_tensors_are_named(case: str) -> None:
    scheme, tensors, changes, words = DAMAGED[case]
    tensors = {k: t for k, t in (tensors | changes).items() if t is not None}
    with pytest.raises(QuantError) as caught:
        read(tensors, scheme)
    message = str(caught.value)
    assert all(word in message for word in words), message
    assert "\n" not in message
