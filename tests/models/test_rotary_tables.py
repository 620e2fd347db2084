"""Frequencies and tables equal those of transformers for every rope type."""

from __future__ import annotations

import pytest
import torch
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from fastinfer.models.config import parse_config
from fastinfer.models.rotary import RotaryTable, inverse_frequencies, rotary_tables

MAX_POSITION = 256

ROPES = {
    "default": {"rope_type": "default"},
    "default big theta": {"rope_type": "default", "rope_theta": 1e6},
    "linear": {"rope_type": "linear", "factor": 2.5},
    "dynamic": {"rope_type": "dynamic", "factor": 1.7},
    "llama3": {
        "rope_type": "llama3",
        "rope_theta": 5e5,
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64,
    },
    "yarn": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64},
    "yarn factor from lengths": {
        "rope_type": "yarn",
        "factor": None,
        "original_max_position_embeddings": 32,
    },
    "yarn without original length": {"rope_type": "yarn", "factor": 3.0},
    "yarn attention_factor": {
        "rope_type": "yarn",
        "factor": 4.0,
        "attention_factor": 0.8,
        "original_max_position_embeddings": 64,
    },
    "yarn mscale": {
        "rope_type": "yarn",
        "factor": 40.0,
        "mscale": 1.0,
        "mscale_all_dim": 0.707,
        "original_max_position_embeddings": 64,
    },
    "yarn only mscale": {
        "rope_type": "yarn",
        "factor": 40.0,
        "mscale": 2.0,
        "original_max_position_embeddings": 64,
    },
    "yarn betas": {
        "rope_type": "yarn",
        "factor": 4.0,
        "beta_fast": 16,
        "beta_slow": 2,
        "original_max_position_embeddings": 64,
    },
    "yarn not truncated": {
        "rope_type": "yarn",
        "factor": 4.0,
        "truncate": False,
        "original_max_position_embeddings": 64,
    },
    "yarn factor below one": {
        "rope_type": "yarn",
        "factor": 0.5,
        "original_max_position_embeddings": 64,
    },
    "yarn degenerate ramp": {
        "rope_type": "yarn",
        "factor": 4.0,
        "beta_fast": 1.0,
        "beta_slow": 1.0,
        "truncate": False,
        "original_max_position_embeddings": 64,
    },
}


def _pair(rope: dict[str, object], head_dim: int) -> tuple[LlamaRotaryEmbedding, object]:
    settings = {"rope_theta": 10000.0, **rope}
    theirs = LlamaConfig(
        hidden_size=head_dim * 2,
        num_attention_heads=2,
        head_dim=head_dim,
        max_position_embeddings=MAX_POSITION,
        rope_parameters=dict(settings),
    )
    raw = {
        "architectures": ["LlamaForCausalLM"],
        "hidden_size": head_dim * 2,
        "intermediate_size": 8,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "vocab_size": 8,
        "head_dim": head_dim,
        "max_position_embeddings": MAX_POSITION,
        "rope_parameters": settings,
    }
    return LlamaRotaryEmbedding(theirs), parse_config(raw)


@pytest.mark.parametrize("head_dim", [16, 64, 128])
@pytest.mark.parametrize("name", ROPES)
def test_equals_transformers(name: str, head_dim: int) -> None:
    theirs, config = _pair(ROPES[name], head_dim)
    rope = config.rope["full_attention"]
    frequencies, scale = inverse_frequencies(
        rope, head_dim, length=MAX_POSITION, max_position=MAX_POSITION
    )
    torch.testing.assert_close(frequencies, theirs.inv_freq, rtol=1e-6, atol=0)
    assert scale == pytest.approx(theirs.attention_scaling, rel=1e-12)
    cos, sin = rotary_tables(rope, head_dim, length=MAX_POSITION, max_position=MAX_POSITION)
    expected = theirs(torch.zeros(1), torch.arange(MAX_POSITION)[None])
    for table, full in zip((cos, sin), expected, strict=True):
        assert table.shape == (MAX_POSITION, head_dim // 2)
        assert table.dtype == torch.float32
        torch.testing.assert_close(table, full[0, :, : head_dim // 2], rtol=0, atol=5e-5)


def test_types_differ_from_each_other() -> None:
    """No type silently falls back to the plain embedding."""
    tables = []
    for name in ("default", "linear", "llama3", "yarn"):
        _, config = _pair({"rope_theta": 10000.0, **ROPES[name]}, 64)
        rope = config.rope["full_attention"]
        tables.append(rotary_tables(rope, 64, length=64, max_position=MAX_POSITION)[0])
    for i, table in enumerate(tables):
        for other in tables[:i]:
            assert (table - other).abs().max() > 0.01


@pytest.mark.parametrize("length", [1, 200, MAX_POSITION])
def test_dynamic_is_plain_up_to_the_trained_length(length: int) -> None:
    _, dynamic = _pair(ROPES["dynamic"], 64)
    _, plain = _pair(ROPES["default"], 64)
    tables = [
        rotary_tables(config.rope["full_attention"], 64, length=length, max_position=MAX_POSITION)[
            0
        ]
        for config in (dynamic, plain)
    ]
    torch.testing.assert_close(*tables, rtol=0, atol=1e-4)


def test_dynamic_beyond_the_trained_length_equals_one_pass_of_that_length() -> None:
    length = 1000
    theirs, config = _pair(ROPES["dynamic"], 64)
    expected = theirs(torch.zeros(1), torch.arange(length)[None])[0][0, :, :32]
    rope = config.rope["full_attention"]
    cos, _ = rotary_tables(rope, 64, length=length, max_position=MAX_POSITION)
    torch.testing.assert_close(cos, expected, rtol=0, atol=2e-4)
    plain, _ = rotary_tables(rope, 64, length=MAX_POSITION, max_position=MAX_POSITION)
    assert (cos[:MAX_POSITION] - plain).abs().max() > 0.1


def test_module_fills_its_buffers_after_meta() -> None:
    _, config = _pair(ROPES["yarn"], 32)
    rope = config.rope["full_attention"]
    with torch.device("meta"):
        table = RotaryTable(rope, 32, length=40, max_position=MAX_POSITION)
    assert table.cos.is_meta
    table.to_empty(device="cpu")
    table.fill()
    cos, sin = rotary_tables(rope, 32, length=40, max_position=MAX_POSITION)
    assert torch.equal(table.cos, cos)
    assert torch.equal(table.sin, sin)
    assert not table.state_dict()  # tables are derived, they are not weights
