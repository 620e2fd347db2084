"""config.json in all its spellings, and one clear sentence for what is not supported."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from fastinfer.models import ModelConfig, RopeConfig, load_config
from fastinfer.models.config import parse_config

BASE: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_act": "silu",
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "rms_norm_eps": 1e-5,
    "vocab_size": 131,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
LLAMA3 = {
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 128,
}


def parse(generation: dict[str, Any] | None = None, **changes: Any) -> ModelConfig:
    raw = {k: v for k, v in {**BASE, **changes}.items() if v is not ...}
    return parse_config(copy.deepcopy(raw), generation)


def family(name: str, **changes: Any) -> ModelConfig:
    return parse(architectures=[f"{name}ForCausalLM"], model_type=name.lower(), **changes)


def refuses(words: list[str], **changes: Any) -> None:
    with pytest.raises(ValueError, match=r"^load_config: ") as caught:
        parse(**changes)
    text = str(caught.value)
    assert "\n" not in text
    for word in words:
        assert word in text, f"{word!r} not in: {text}"


def test_llama_defaults() -> None:
    config = parse()
    assert config.num_layers == 3
    assert (config.num_heads, config.num_kv_heads, config.head_dim) == (4, 2, 16)
    assert config.rope == {"full_attention": RopeConfig(theta=10000.0)}
    assert config.layer_types == ("full_attention",) * 3
    assert config.window_of(0) == (-1, -1)
    assert config.dtype is None
    assert config.eos_token_ids == (2,)
    flags = (config.qkv_bias, config.o_bias, config.mlp_bias, config.qk_norm)
    assert not any(flags)
    assert not config.tie_word_embeddings


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ({"rope_theta": 5e5}, {"rope_type": "default", "rope_theta": 5e5}),
        ({}, {"rope_type": "default", "rope_theta": 1e4}),
        (
            {"rope_theta": 1e6, "rope_scaling": {"type": "linear", "factor": 2.0}},
            {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e6},
        ),
        (
            {"rope_scaling": {"rope_type": "dynamic", "type": "dynamic", "factor": 4}},
            {"rope_type": "dynamic", "factor": 4.0, "rope_theta": 1e4},
        ),
        (
            {"rope_theta": 5e5, "rope_scaling": {"rope_type": "llama3", **LLAMA3}},
            {"rope_type": "llama3", "rope_theta": 5e5, **LLAMA3},
        ),
        (
            {"rope_scaling": {"type": "yarn", "factor": 4.0}},
            {
                "rope_type": "yarn",
                "factor": 4.0,
                "rope_theta": 1e4,
                "original_max_position_embeddings": 512,
            },
        ),
        (
            {"rope_scaling": {"type": "yarn"}, "original_max_position_embeddings": 128},
            {"rope_type": "yarn", "factor": None, "original_max_position_embeddings": 128},
        ),
    ],
)
def test_old_and_new_rope_spellings_are_equal(old: dict[str, Any], new: dict[str, Any]) -> None:
    assert parse(**old, torch_dtype="bfloat16") == parse(rope_parameters=new, dtype="bfloat16")


def test_rope_nested_by_layer_type() -> None:
    nested = {
        "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
        "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
    }
    types = ["sliding_attention", "full_attention", "sliding_attention"]
    config = family(
        "Qwen3",
        use_sliding_window=True,
        sliding_window=32,
        layer_types=types,
        head_dim=16,
        rope_parameters=nested,
    )
    assert config.rope == {
        "full_attention": RopeConfig("linear", 1e6, 8.0),
        "sliding_attention": RopeConfig("default", 1e4),
    }
    assert [config.window_of(i) for i in range(3)] == [(31, 0), (-1, -1), (31, 0)]
    only_full = family("Qwen3", head_dim=16, rope_parameters=nested)
    assert list(only_full.rope) == ["full_attention"]


@pytest.mark.parametrize(
    ("changes", "types", "window"),
    [
        ({}, "fff", None),
        ({"use_sliding_window": False, "sliding_window": 9}, "fff", None),
        ({"use_sliding_window": True, "sliding_window": 9, "max_window_layers": 2}, "ffs", 9),
        ({"use_sliding_window": True, "sliding_window": 9, "max_window_layers": 0}, "sss", 9),
        ({"use_sliding_window": True, "sliding_window": 9, "max_window_layers": 3}, "fff", None),
        ({"use_sliding_window": True, "max_window_layers": 1}, "fss", 4096),
        ({"use_sliding_window": True, "sliding_window": 9}, "fff", None),
        ({"use_sliding_window": True, "sliding_window": None}, "fff", None),
        (
            {
                "use_sliding_window": True,
                "sliding_window": 9,
                "layer_types": ["sliding_attention", "full_attention", "full_attention"],
            },
            "sff",
            9,
        ),
    ],
)
@pytest.mark.parametrize("name", ["Qwen2", "Qwen3"])
def test_qwen_windows(name: str, changes: dict[str, Any], types: str, window: int | None) -> None:
    config = family(name, **changes)
    assert "".join(t[0] for t in config.layer_types) == types
    assert config.sliding_window == window


@pytest.mark.parametrize(
    ("changes", "window"),
    [({"sliding_window": 9}, 9), ({"sliding_window": None}, None), ({}, 4096)],
)
def test_mistral_window(changes: dict[str, Any], window: int | None) -> None:
    config = family("Mistral", **changes)
    assert config.sliding_window == window
    expected = "full_attention" if window is None else "sliding_attention"
    assert config.layer_types == (expected,) * 3


def test_llama_ignores_a_stray_window() -> None:
    assert parse(sliding_window=9) == parse()


def test_family_flags() -> None:
    assert family("Qwen2").qkv_bias
    assert not family("Qwen2", attention_bias=True).o_bias
    assert family("Qwen3").qk_norm
    assert family("Qwen3").head_dim == 128
    assert family("Qwen3", head_dim=None).head_dim == 16
    with_bias = family("Qwen3", attention_bias=True)
    assert with_bias.qkv_bias
    assert with_bias.o_bias
    biased = parse(attention_bias=True, mlp_bias=True)
    assert (biased.qkv_bias, biased.o_bias, biased.mlp_bias) == (True, True, True)
    baichuan = family("Baichuan", num_key_value_heads=...)
    assert baichuan.packed_qkv
    assert baichuan.normalized_head
    assert baichuan.num_kv_heads == 4
    assert family("Mistral", num_key_value_heads=None).num_kv_heads == 4
    assert parse(tie_word_embeddings=True).tie_word_embeddings
    assert family("Mistral", head_dim=32).head_dim == 32


@pytest.mark.parametrize("name", ["Llama", "Mistral", "Qwen2", "Qwen3"])
def test_defaults_are_those_of_transformers(name: str, tmp_path: Path) -> None:
    """A file with nothing but the sizes means the same as it does there."""
    sizes = ("hidden_size", "intermediate_size", "num_hidden_layers", "vocab_size")
    raw = {key: BASE[key] for key in sizes} | {"num_attention_heads": 32, "hidden_size": 512}
    ours = parse_config({"architectures": [f"{name}ForCausalLM"], **raw})
    theirs = getattr(transformers, f"{name}Config")(**raw)
    assert ours.num_kv_heads == theirs.num_key_value_heads
    assert ours.max_position == theirs.max_position_embeddings
    assert ours.rms_norm_eps == theirs.rms_norm_eps
    assert ours.tie_word_embeddings == theirs.tie_word_embeddings
    assert ours.head_dim == getattr(theirs, "head_dim", 16)
    assert ours.rope["full_attention" if name != "Mistral" else "sliding_attention"].theta == 1e4
    assert ours.bos_token_id == theirs.bos_token_id
    assert ours.eos_token_ids == (() if theirs.eos_token_id is None else (theirs.eos_token_id,))
    assert ours.sliding_window == getattr(theirs, "sliding_window", None)


@pytest.mark.parametrize("key", ["dtype", "torch_dtype"])
def test_dtype_keys(key: str) -> None:
    assert parse(**{key: "float16"}).dtype == torch.float16
    assert parse(**{key: "torch.bfloat16"}).dtype == torch.bfloat16


def test_model_type_alone_is_enough() -> None:
    assert parse(architectures=...).architecture == "LlamaForCausalLM"
    assert parse(architectures=None, model_type="qwen2").architecture == "Qwen2ForCausalLM"


def test_token_ids() -> None:
    assert parse(eos_token_id=[5, 6]).eos_token_ids == (5, 6)
    assert parse({"eos_token_id": [7, 8]}).eos_token_ids == (7, 8)
    assert parse({"eos_token_id": None}).eos_token_ids == (2,)
    assert parse(eos_token_id=None).eos_token_ids == ()
    assert parse({"bos_token_id": 9}).bos_token_id == 1
    assert parse({"bos_token_id": 9, "pad_token_id": 3}, bos_token_id=None).bos_token_id == 9
    assert parse(pad_token_id=0).pad_token_id == 0


def test_generation_config_file_wins_for_eos(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(BASE))
    assert load_config(tmp_path).eos_token_ids == (2,)
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": [2, 77]}))
    assert load_config(str(tmp_path)).eos_token_ids == (2, 77)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"architectures": ["GPT2LMHeadModel"]}, ["GPT2LMHeadModel", "LlamaForCausalLM", "Qwen3"]),
        ({"architectures": None, "model_type": "gemma"}, ["'gemma'", "MistralForCausalLM"]),
        ({"architectures": 1}, ["architectures", "LlamaForCausalLM", "got 1"]),
        ({"architectures": [[]]}, ["architectures", "got []"]),
        ({"num_hidden_layers": 10**30}, ["num_hidden_layers", "integer"]),
        ({"rms_norm_eps": float("nan")}, ["rms_norm_eps", "above 0", "nan"]),
        ({"rope_theta": float("inf")}, ["rope_theta", "inf"]),
        ({"hidden_act": "gelu"}, ["hidden_act", "'silu'", "'gelu'"]),
        ({"dual_chunk_attention_config": {"chunk_size": 1}}, ["dual_chunk_attention_config"]),
        ({"use_mrope": True}, ["use_mrope"]),
        ({"rope_scaling": {"type": "longrope"}}, ["rope_type", "yarn", "'longrope'"]),
        ({"rope_scaling": {"type": "mrope", "mrope_section": [1]}}, ["rope_type", "mrope"]),
        (
            {"rope_scaling": {"rope_type": "default", "mrope_section": [1, 2]}},
            ["'default' with mrope_section"],
        ),
        ({"rope_scaling": {"type": "linear"}}, ["linear", "factor"]),
        ({"rope_scaling": {"type": "linear", "factor": "2"}}, ["factor", "'2'"]),
        ({"rope_scaling": {"type": "linear", "factor": 0}}, ["factor", "above 0"]),
        ({"rope_scaling": {"type": "llama3", "factor": 8.0}}, ["llama3", "low_freq_factor"]),
        (
            {"rope_scaling": {"type": "llama3", **LLAMA3, "high_freq_factor": 0.5}},
            ["high_freq_factor", "0.5"],
        ),
        ({"rope_parameters": "default"}, ["rope_parameters", "'default'"]),
        ({"rope_parameters": {"sliding_attention": {}}}, ["full_attention", "None"]),
        ({"rope_parameters": {"full_attention": None}}, ["full_attention", "None"]),
        ({"partial_rotary_factor": 0.5}, ["partial_rotary_factor", "0.5"]),
        ({"num_key_value_heads": 3}, ["num_attention_heads", "4 and 3"]),
        ({"num_attention_heads": 7}, ["hidden_size", "64 and 7"]),
        ({"head_dim": 20}, ["head_dim", "multiple of 8", "20"]),
        ({"head_dim": 8}, ["head_dim", "between 16 and 256", "8"]),
        ({"head_dim": 264}, ["head_dim", "264"]),
        ({"vocab_size": ...}, ["vocab_size", "None"]),
        ({"rms_norm_eps": "small"}, ["rms_norm_eps", "'small'"]),
        ({"layer_types": "full_attention"}, ["layer_types", "3 entries"]),
        ({"num_hidden_layers": 0}, ["num_hidden_layers", "0"]),
        ({"hidden_size": "64"}, ["hidden_size", "'64'"]),
        ({"intermediate_size": True}, ["intermediate_size", "True"]),
        ({"dtype": "float8_e4m3fn"}, ["dtype", "bfloat16", "float8_e4m3fn"]),
        ({"eos_token_id": "2"}, ["token ids", "'2'"]),
        ({"layer_types": ["full_attention"]}, ["layer_types", "3 entries"]),
        ({"layer_types": ["chunked_attention"] * 3}, ["layer_types", "chunked_attention"]),
        ({"layer_types": ["sliding_attention"] * 3}, ["layer_types", "sliding_window None"]),
    ],
)
def test_refusals(changes: dict[str, Any], words: list[str]) -> None:
    refuses(words, **changes)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"num_attention_heads": 40, "hidden_size": 640}, ["7B", "ALiBi", "640"]),
        ({"max_position_embeddings": ..., "model_max_length": 4096}, ["7B", "ALiBi"]),
        ({"vocab_size": 64000}, ["Baichuan2", "64000"]),
        ({"tie_word_embeddings": True}, ["tie_word_embeddings"]),
    ],
)
def test_baichuan_refusals(changes: dict[str, Any], words: list[str]) -> None:
    refuses(words, architectures=["BaichuanForCausalLM"], model_type="baichuan", **changes)


def test_folder_errors(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"load_config: path .*'no/such/folder'; download"):
        load_config("no/such/folder")
    with pytest.raises(FileNotFoundError, match=r"load_config: path must contain config\.json"):
        load_config(tmp_path)
    file = tmp_path / "config.json"
    file.write_text('{"architectures": [')
    with pytest.raises(ValueError, match=r"load_config: .*config\.json must be valid JSON"):
        load_config(tmp_path)
    file.write_text("[]")
    with pytest.raises(ValueError, match=r"must hold a JSON object, got list"):
        load_config(tmp_path)
