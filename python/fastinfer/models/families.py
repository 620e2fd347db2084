"""The supported architectures: what each fixes in its code, and which settings are refused."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, slots=True)
class Family:
    """What one architecture fixes in its code rather than in its config file."""

    model_type: str
    num_kv_heads: int | None = None  # default when the key is absent; None: as many as query heads
    head_dim: int | None = None  # default when the key is absent; None: hidden_size / num_heads
    max_position: int = 2048
    bos_token_id: int | None = None
    eos_token_id: int | None = None
    qkv_bias: bool = False
    reads_attention_bias: bool = False  # `attention_bias` puts a bias on q, k, v and o
    reads_mlp_bias: bool = False
    qk_norm: bool = False
    window_default: int | None = None  # `sliding_window` when the key is absent
    window_needs_flag: bool = False  # `use_sliding_window` switches the window on
    reads_window: bool = False
    packed_qkv: bool = False  # one W_pack tensor [3H, H] instead of q, k and v
    normalized_head: bool = False  # rows of the output head have length 1


FAMILIES: dict[str, Family] = {
    "LlamaForCausalLM": Family(
        "llama", bos_token_id=1, eos_token_id=2, reads_attention_bias=True, reads_mlp_bias=True
    ),
    "MistralForCausalLM": Family(
        "mistral",
        num_kv_heads=8,
        max_position=131072,
        bos_token_id=1,
        eos_token_id=2,
        reads_window=True,
        window_default=4096,
    ),
    "Qwen2ForCausalLM": Family(
        "qwen2",
        num_kv_heads=32,
        max_position=32768,
        qkv_bias=True,
        reads_window=True,
        window_default=4096,
        window_needs_flag=True,
    ),
    "Qwen3ForCausalLM": Family(
        "qwen3",
        num_kv_heads=32,
        head_dim=128,
        max_position=32768,
        reads_attention_bias=True,
        qk_norm=True,
        reads_window=True,
        window_default=4096,
        window_needs_flag=True,
    ),
    "BaichuanForCausalLM": Family(
        "baichuan",
        max_position=4096,
        bos_token_id=1,
        eos_token_id=2,
        packed_qkv=True,
        normalized_head=True,
    ),
}

# Keys that change the mathematics in a way the decoder does not have. A falsy value is harmless.
_UNSUPPORTED_KEYS = {
    "dual_chunk_attention_config": "remove the key to use plain attention at the trained length",
    "use_mrope": "multimodal rotary embedding is not implemented",
    "add_cross_attention": "only decoder-only models are implemented",
}


def find_architecture(raw: Mapping[str, Any]) -> str:
    """The supported architecture that `config.json` names."""
    names = raw.get("architectures") or []
    if not isinstance(names, list):
        names = [names]
    for name in names:
        if isinstance(name, str) and name in FAMILIES:
            return name
    if not names:
        for name, family in FAMILIES.items():
            if raw.get("model_type") == family.model_type:
                return name
    got = ", ".join(map(str, names)) or f"model_type {raw.get('model_type')!r}"
    raise ValueError(
        f"load_config: architectures must name one of {', '.join(FAMILIES)}, got {got}; use a "
        "checkpoint of a supported architecture"
    )


def refuse_unsupported(raw: Mapping[str, Any], architecture: str) -> None:
    """Raise ValueError for settings that the decoder would compute wrongly."""
    for key, remedy in _UNSUPPORTED_KEYS.items():
        if raw.get(key):
            raise ValueError(
                f"load_config: {key} must be absent from config.json, got {_short(raw[key])}; "
                f"{remedy}"
            )
    activation = raw.get("hidden_act", "silu")
    if activation not in ("silu", "swish"):
        raise ValueError(
            "load_config: hidden_act must be 'silu' (supported for every architecture here), got "
            f"{activation!r}; use a checkpoint with the silu activation"
        )
    # The 13B Baichuan models share the architecture name but use ALiBi instead of rotary positions.
    # Their config files tell only by geometry: 40 heads, and a model_max_length without
    # max_position_embeddings.
    if architecture == "BaichuanForCausalLM" and (
        "max_position_embeddings" not in raw or raw.get("num_attention_heads") == 40
    ):
        raise ValueError(
            "load_config: BaichuanForCausalLM must be the 7B geometry (rotary positions, "
            f"max_position_embeddings in config.json), got hidden_size {raw.get('hidden_size')} "
            f"with {raw.get('num_attention_heads')} heads; the 13B models use ALiBi, which is not "
            "supported"
        )
    if architecture == "BaichuanForCausalLM" and raw.get("vocab_size") == 64000:
        raise ValueError(
            "load_config: BaichuanForCausalLM must be a Baichuan2 model, got the 64000-token "
            "vocabulary of the first Baichuan generation, whose output head is not normalised; "
            "use a Baichuan2 checkpoint"
        )


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 80 else text[:77] + "..."
