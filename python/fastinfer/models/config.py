"""Reads `config.json` (and `generation_config.json`) of a checkpoint folder into one `ModelConfig`.

Both generations of the format are read: `rope_theta` + `rope_scaling` + `torch_dtype` (transformers
4) and `rope_parameters` + `dtype` (transformers 5). Where a key is absent, the family's default in
transformers holds, so that a checkpoint means the same here and there. What the decoder cannot
compute is refused here, before any weight is read.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from .families import FAMILIES, Family, find_architecture, refuse_unsupported
from .rope_config import LAYER_TYPES, RopeConfig, parse_rope, positive

_DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


@dataclass(slots=True)
class ModelConfig:
    """Everything the decoder needs to know about a checkpoint.

    Sizes are counts (tokens, heads, channels); `head_dim` is D, `num_heads` Hq, `num_kv_heads` Hkv.
    """

    architecture: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    max_position: int  # positions the checkpoint was trained (or declared) for
    rms_norm_eps: float
    layer_types: tuple[str, ...]  # "full_attention" or "sliding_attention", one per layer
    sliding_window: int | None  # keys a sliding layer sees, the current token included
    rope: dict[str, RopeConfig]  # one entry per layer type in use
    tie_word_embeddings: bool = False
    qkv_bias: bool = False
    o_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False
    packed_qkv: bool = False
    normalized_head: bool = False
    dtype: torch.dtype | None = None  # what config.json states; None when it does not
    bos_token_id: int | None = None
    eos_token_ids: tuple[int, ...] = ()
    pad_token_id: int | None = None

    def window_of(self, layer: int) -> tuple[int, int]:
        """`window_size` of the attention ops for one layer: (left, right), -1 is unlimited."""
        if self.layer_types[layer] == "full_attention" or self.sliding_window is None:
            return (-1, -1)
        return (self.sliding_window - 1, 0)  # the op counts keys to the left of the current token


def load_config(path: str | os.PathLike[str]) -> ModelConfig:
    """Read the configuration of a checkpoint folder.

    Args:
        path: folder in Hugging Face layout. `config.json` is needed; `generation_config.json`,
            where present, wins for `eos_token_id`, because instruction-tuned checkpoints keep their
            extra stop tokens there.

    Returns:
        The configuration, normalised: old and new spellings of the same model give equal objects.

    Raises:
        FileNotFoundError: there is no such folder, or no `config.json` in it.
        ValueError: the architecture, a rope type, an activation or another setting is not
            supported.
    """
    folder = Path(path)
    if not folder.is_dir():
        raise FileNotFoundError(
            f"load_config: path must be a checkpoint folder on this machine, got {str(path)!r}; "
            "download the checkpoint first"
        )
    if not (folder / "config.json").is_file():
        raise FileNotFoundError(
            f"load_config: path must contain config.json, got {str(path)!r} without one; point to "
            "the folder of a Hugging Face checkpoint"
        )
    raw = _read_json(folder / "config.json")
    generation_file = folder / "generation_config.json"
    generation = _read_json(generation_file) if generation_file.is_file() else {}
    return parse_config(raw, generation)


def parse_config(
    raw: Mapping[str, Any], generation: Mapping[str, Any] | None = None
) -> ModelConfig:
    """Build a `ModelConfig` from the contents of `config.json` (and `generation_config.json`).

    Args:
        raw: the parsed `config.json`.
        generation: the parsed `generation_config.json`, if there is one.

    Returns:
        The configuration.

    Raises:
        ValueError: something in the files is missing, malformed or not supported.
    """
    generation = generation or {}
    architecture = find_architecture(raw)
    family = FAMILIES[architecture]
    refuse_unsupported(raw, architecture)

    hidden_size = _count(raw, "hidden_size")
    num_heads = _count(raw, "num_attention_heads")
    num_kv_heads = num_heads
    if "num_key_value_heads" not in raw:
        num_kv_heads = family.num_kv_heads or num_heads
    elif not family.packed_qkv:
        num_kv_heads = _count(raw, "num_key_value_heads", num_heads)
    max_position = _count(raw, "max_position_embeddings", family.max_position)
    num_layers = _count(raw, "num_hidden_layers")
    layer_types, window = _layer_types(raw, family, num_layers)
    attention_bias = family.reads_attention_bias and bool(raw.get("attention_bias"))
    tied = bool(raw.get("tie_word_embeddings"))
    if tied and family.normalized_head:
        raise ValueError(
            f"load_config: tie_word_embeddings must be false for {architecture}, got true; its "
            "normalised output head cannot share the embedding"
        )
    config = ModelConfig(
        architecture=architecture,
        vocab_size=_count(raw, "vocab_size"),
        hidden_size=hidden_size,
        intermediate_size=_count(raw, "intermediate_size"),
        num_layers=num_layers,
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_dim=_head_dim(raw, family, hidden_size, num_heads),
        max_position=max_position,
        rms_norm_eps=positive(raw.get("rms_norm_eps", 1e-6), "rms_norm_eps"),
        layer_types=layer_types,
        sliding_window=window,
        rope=parse_rope(raw, max_position, layer_types),
        tie_word_embeddings=tied,
        qkv_bias=family.qkv_bias or attention_bias,
        o_bias=attention_bias,
        mlp_bias=family.reads_mlp_bias and bool(raw.get("mlp_bias")),
        qk_norm=family.qk_norm,
        packed_qkv=family.packed_qkv,
        normalized_head=family.normalized_head,
        dtype=_dtype(raw),
        bos_token_id=_first_id(_token(raw, generation, "bos_token_id", family.bos_token_id)),
        eos_token_ids=_ids(_token(generation, raw, "eos_token_id", family.eos_token_id)),
        pad_token_id=_first_id(_token(raw, generation, "pad_token_id", None)),
    )
    if config.num_heads % config.num_kv_heads:
        raise ValueError(
            "load_config: num_attention_heads must be a multiple of num_key_value_heads, got "
            f"{config.num_heads} and {config.num_kv_heads}; fix config.json"
        )
    return config


def _read_json(file: Path) -> dict[str, Any]:
    try:
        data = json.loads(file.read_text(encoding="utf-8"))
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ValueError(
            f"load_config: {file} must be valid JSON, got {error}; download the file again"
        ) from error
    if not isinstance(data, dict):
        raise ValueError(
            f"load_config: {file} must hold a JSON object, got {type(data).__name__}; download the "
            "file again"
        )
    return data


def _layer_types(
    raw: Mapping[str, Any], family: Family, num_layers: int
) -> tuple[tuple[str, ...], int | None]:
    window = raw.get("sliding_window", family.window_default)
    if family.window_needs_flag and not raw.get("use_sliding_window", False):
        window = None
    given = raw.get("layer_types")
    if window is not None and (family.reads_window or given is not None):
        window = _count({"sliding_window": window}, "sliding_window")
    if given is not None:
        types = tuple(given) if isinstance(given, list) else ()
        if len(types) != num_layers or any(t not in LAYER_TYPES for t in types):
            raise ValueError(
                f"load_config: layer_types must list {num_layers} entries out of "
                f"{', '.join(LAYER_TYPES)}, got {given}; use a checkpoint with these "
                "attention types"
            )
        if "sliding_attention" in types and window is None:
            raise ValueError(
                "load_config: layer_types must not contain sliding_attention while no sliding "
                f"window is in force, got sliding_window {raw.get('sliding_window')} with "
                f"use_sliding_window {raw.get('use_sliding_window')}; fix config.json"
            )
    elif not family.reads_window or window is None:
        types = ("full_attention",) * num_layers
    else:
        first = _count(raw, "max_window_layers", 28, least=0) if family.window_needs_flag else 0
        types = tuple(
            "sliding_attention" if i >= first else "full_attention" for i in range(num_layers)
        )
    return types, (window if "sliding_attention" in types else None)


def _head_dim(raw: Mapping[str, Any], family: Family, hidden_size: int, num_heads: int) -> int:
    head_dim = raw.get("head_dim")
    if head_dim is None and family.head_dim is not None and "head_dim" not in raw:
        head_dim = family.head_dim
    if head_dim is None:
        if hidden_size % num_heads:
            raise ValueError(
                "load_config: hidden_size must be a multiple of num_attention_heads when head_dim "
                f"is absent, got {hidden_size} and {num_heads}; add head_dim to config.json"
            )
        head_dim = hidden_size // num_heads
    if isinstance(head_dim, bool) or not isinstance(head_dim, int) or head_dim % 8:
        valid = False
    else:
        valid = 16 <= head_dim <= 256
    if not valid:
        raise ValueError(
            "load_config: head_dim must be a multiple of 8 between 16 and 256 (what the attention "
            f"kernels take), got {head_dim}; use a checkpoint with such heads"
        )
    return head_dim


def _dtype(raw: Mapping[str, Any]) -> torch.dtype | None:
    name = raw.get("dtype", raw.get("torch_dtype"))
    if name is None:
        return None
    dtype = _DTYPES.get(str(name).removeprefix("torch."))
    if dtype is None:
        raise ValueError(
            f"load_config: dtype must be one of {', '.join(_DTYPES)}, got {name!r}; fix config.json"
        )
    return dtype


def _count(raw: Mapping[str, Any], key: str, default: int | None = None, *, least: int = 1) -> int:
    value = raw.get(key)
    if value is None:
        value = default
    number = isinstance(value, int) and not isinstance(value, bool)
    if not number or not least <= value < 2**31:
        raise ValueError(
            f"load_config: {key} must be an integer in [{least}, 2**31), got {value!r}; "
            "fix config.json"
        )
    return value


def _token(
    first: Mapping[str, Any], second: Mapping[str, Any], key: str, default: int | None
) -> Any:
    for source in (first, second):
        if source.get(key) is not None:
            return source[key]
    # An explicit null means "none"; only a key that is nowhere takes the family's default.
    return None if key in first or key in second else default


def _ids(value: Any) -> tuple[int, ...]:
    if value is None:
        return ()
    ids = tuple(value) if isinstance(value, (list, tuple)) else (value,)
    if any(isinstance(i, bool) or not isinstance(i, int) for i in ids):
        raise ValueError(
            f"load_config: token ids must be an integer or a list of integers, got {value!r}; fix "
            "config.json or generation_config.json"
        )
    return ids


def _first_id(value: Any) -> int | None:
    ids = _ids(value)
    return ids[0] if ids else None
