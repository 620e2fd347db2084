"""quantization_config: what is read, which module gets which scheme, what is refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from quant_checkpoints import ct_config, gptq_config

from fastinfer.quant import LinearScheme, QuantError, read_quant_config
from fastinfer.quant.config import matches, parse_quant_config

Q = "model.layers.1.self_attn.q_proj"


def test_plain_checkpoints_have_none(tmp_path: Path) -> None:
    assert read_quant_config(tmp_path) is None
    (tmp_path / "config.json").write_text('{"quantization_config": null}')
    assert read_quant_config(tmp_path) is None


@pytest.mark.parametrize(
    ("file", "raw", "method", "group_size"),
    [
        ("quantize_config.json", {"bits": 4, "group_size": 128, "desc_act": True}, "gptq", 128),
        ("quant_config.json", {"w_bit": 4, "q_group_size": 64, "zero_point": True}, "awq", 64),
    ],
)
def test_configs_beside_config_json(
    tmp_path: Path, file: str, raw: dict[str, object], method: str, group_size: int
) -> None:
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / file).write_text(json.dumps(raw))
    config = read_quant_config(tmp_path)
    assert (config.method, config.scheme.group_size) == (method, group_size)
    (tmp_path / "config.json").write_text(json.dumps({"quantization_config": gptq_config(bits=8)}))
    assert read_quant_config(tmp_path).scheme.bits == 8  # config.json wins


@pytest.mark.parametrize(
    ("raw", "method"),
    [
        ({"bits": 4, "desc_act": False}, "gptq"),
        ({"w_bit": 4, "zero_point": True}, "awq"),
        ({"load_in_8bit": True}, "bitsandbytes"),
        ({k: v for k, v in ct_config().items() if k != "quant_method"}, "compressed-tensors"),
    ],
)
def test_old_files_without_a_method(raw: dict[str, object], method: str) -> None:
    assert parse_quant_config(raw).method == method


def test_symmetry_of_gptq_may_be_unknown() -> None:
    raw = gptq_config()
    assert parse_quant_config(raw).scheme.symmetric is True
    assert parse_quant_config(raw | {"sym": False}).scheme.symmetric is False
    del raw["sym"]
    assert parse_quant_config(raw).scheme.symmetric is None


@pytest.mark.parametrize(
    ("pattern", "expected"),
    [
        ("lm_head", False),
        (Q, True),
        ("q_proj", True),
        ("self_attn.q_proj", True),
        ("model.layers.1", True),
        ("model.layers.1.", True),
        ("layers.1", True),
        ("layers.11", False),
        ("proj", False),
        ("Linear", True),
        (r"re:.*q_proj$", True),
        (r"re:q_proj", False),
        (r"re:model\.layers\.\d+\.mlp", False),
    ],
)
def test_patterns(pattern: str, expected: bool) -> None:
    assert matches(pattern, Q) is expected


def test_gptq_rules_per_module() -> None:
    config = parse_quant_config(
        gptq_config(
            dynamic={
                r"-:.*\.0\.": {},
                r"+:.*q_proj": {"bits": 8},
                r".*down_proj": {"group_size": 32, "sym": False, "desc_act": True},
            }
        )
    )
    assert config.for_module("model.layers.0.self_attn.q_proj") is None
    assert config.for_module("lm_head") is None
    assert config.for_module(Q).bits == 8
    down = config.for_module("model.layers.1.mlp.down_proj")
    assert (down.bits, down.group_size, down.symmetric, down.act_order) == (4, 32, False, True)
    assert config.for_module("model.layers.1.mlp.up_proj") == config.scheme
    assert parse_quant_config(gptq_config(lm_head=True)).for_module("lm_head") is not None


def test_gptq_modules_in_block() -> None:
    config = parse_quant_config(
        gptq_config(modules_in_block_to_quantize=[["self_attn.q_proj"], ["mlp.up_proj"]])
    )
    assert config.for_module(Q) is not None
    assert config.for_module("model.layers.1.self_attn.k_proj") is None


def test_awq_and_bitsandbytes_exceptions() -> None:
    awq = {"quant_method": "awq", "bits": 4, "group_size": 128}
    config = parse_quant_config(awq | {"modules_to_not_convert": ["self_attn"]})
    assert config.for_module(Q) is None
    assert config.for_module("model.layers.1.mlp.up_proj") is not None
    bnb = {"quant_method": "bitsandbytes", "load_in_4bit": True}
    config = parse_quant_config(bnb | {"llm_int8_skip_modules": ["lm_head", "q_proj"]})
    assert config.for_module(Q) is None
    assert config.for_module("lm_head") is None
    assert config.scheme.style == "fp4"


def test_compressed_tensors_groups() -> None:
    raw = ct_config()
    eight = ct_config(num_bits=8, strategy="channel", group_size=None)["config_groups"]["group_0"]
    raw["config_groups"]["group_1"] = eight | {"targets": [r"re:.*q_proj"]}
    config = parse_quant_config(raw)
    assert config.for_module(Q).bits == 8
    assert config.for_module(Q).group_size == -1
    assert config.for_module("model.layers.1.mlp.up_proj") == LinearScheme(
        "compressed-tensors", 4, 16, True, style="pack-quantized"
    )
    assert config.for_module("lm_head") is None


def _ct(weights: dict[str, object] | None = None, **group: object) -> dict[str, object]:
    raw = ct_config(**(weights or {}))
    raw["config_groups"]["group_0"] |= group
    return raw


_STATIC = {"num_bits": 8, "type": "int", "strategy": "tensor", "dynamic": False}


@pytest.mark.parametrize(
    ("raw", "words"),
    [
        ({"quant_method": "fp8"}, ["'fp8'", "gptq, awq, compressed-tensors", "bitsandbytes"]),
        ({"quant_method": "gptq", "bits": 3}, ["bits must be 4 or 8", "3"]),
        (gptq_config(group_size=0), ["group_size", "0"]),
        (gptq_config(group_size="128"), ["group_size", "'128'"]),
        (gptq_config(checkpoint_format="marlin"), ["checkpoint_format", "'marlin'"]),
        (gptq_config(is_marlin_format=True), ["'marlin'"]),
        ({"quant_method": "awq", "bits": 4, "version": "gemv"}, ["gemm", "'gemv'"]),
        ({"quant_method": "awq", "bits": 8}, ["bits must be 4", "8"]),
        ({"quant_method": "bitsandbytes"}, ["load_in_8bit or load_in_4bit"]),
        ({"quant_method": "compressed-tensors"}, ["config_groups is empty"]),
        (_ct({"type": "float"}), ["type must be int", "'float'"]),
        (_ct({"strategy": "block"}), ["strategy", "'block'"]),
        (_ct({"num_bits": 2}), ["4 or 8", "2"]),
        (_ct(format="float-quantized"), ["group_0", "pack-quantized", "'float-quantized'"]),
        (_ct(input_activations=_STATIC), ["group_0", "input_activations", "per token"]),
        ({"quant_method": "fastinfer", "bits": 4, "activations": "fp8"}, ["activations", "'fp8'"]),
    ],
)
def test_unsupported_settings_are_refused(raw: dict[str, object], words: list[str]) -> None:
    with pytest.raises(QuantError, match=r"^quantization_config: ") as caught:
        parse_quant_config(raw)
    assert all(word in str(caught.value) for word in words), str(caught.value)


def test_bad_regular_expressions() -> None:
    config = parse_quant_config(gptq_config(dynamic={"-:(": {}}))
    with pytest.raises(QuantError, match="regular expression"):
        config.for_module(Q)


@pytest.mark.parametrize("text", ["{", "[]", '{"quantization_config": 4}'])
def test_damaged_json(tmp_path: Path, text: str) -> None:
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(QuantError, match=r"config\.json"):
        read_quant_config(tmp_path)


@pytest.mark.parametrize(
    ("raw", "words"),
    [
        ({"quant_method": "awq", "modules_to_not_convert": 3}, "modules_to_not_convert"),
        ({"quant_method": "fastinfer", "bits": 4, "ignore": [1]}, "ignore"),
        ({"quant_method": "gptq", "bits": 4, "dynamic": ["a"]}, "dynamic"),
        ({"quant_method": "gptq", "bits": 4, "dynamic": {"a": [1]}}, "dynamic.a"),
        ({"quant_method": "compressed-tensors", "config_groups": [1]}, "config_groups"),
        ({"quant_method": "compressed-tensors", "config_groups": {"g": 1}}, "config_groups.g"),
        (
            {"quant_method": "compressed-tensors", "config_groups": {"g": {"weights": [1]}}},
            "config_groups.g.weights",
        ),
        ({"quant_method": "gptq", "bits": 4, "modules_in_block_to_quantize": [[1]]}, "in_block"),
    ],
)
def test_values_of_another_kind_are_refused_by_name(raw: dict, words: str) -> None:
    with pytest.raises(QuantError, match=f"quantization_config: .*{words}.* must be"):
        parse_quant_config(raw)


def test_a_single_name_is_a_list_of_one() -> None:
    raw = {"quant_method": "bitsandbytes", "load_in_8bit": True, "llm_int8_skip_modules": "q_proj"}
    config = parse_quant_config(raw)
    assert config.for_module("layers.0.q_proj") is None
    assert config.for_module("layers.0.k_proj") is not None
