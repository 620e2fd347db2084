"""The rotary-embedding part of a model configuration: which variant, with which numbers.

Read from `rope_parameters` (transformers 5; flat, or nested per layer type) or from `rope_theta` +
`rope_scaling` (transformers 4, whose oldest files spell `rope_type` as `type`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

LAYER_TYPES = ("full_attention", "sliding_attention")

ROPE_TYPES = ("default", "linear", "dynamic", "llama3", "yarn")

_REQUIRED = {
    "default": (),
    "linear": ("factor",),
    "dynamic": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor"),
    "yarn": (),  # factor may be left to the ratio of the two context lengths
}


@dataclass(frozen=True, slots=True)
class RopeConfig:
    """One rotary embedding. Fields that the type does not use keep their defaults."""

    rope_type: str = "default"
    theta: float = 10000.0
    factor: float = 1.0
    original_max_position: int | None = None  # llama3, yarn: length before stretching
    low_freq_factor: float | None = None  # llama3
    high_freq_factor: float | None = None  # llama3
    attention_factor: float | None = None  # yarn: scale of cos and sin; None: derived from factor
    beta_fast: float = 32.0  # yarn: rotations above which a frequency is kept
    beta_slow: float = 1.0  # yarn: rotations below which it is divided by factor
    mscale: float | None = None  # yarn
    mscale_all_dim: float | None = None  # yarn
    truncate: bool = True  # yarn: round the blend range outwards to whole dimensions


def parse_rope(
    raw: Mapping[str, Any], max_position: int, layer_types: Sequence[str]
) -> dict[str, RopeConfig]:
    """Read the rotary settings of every layer type that the model uses.

    Args:
        raw: the parsed `config.json`.
        max_position: tokens the model is declared for; the original length where none is stated.
        layer_types: one entry per layer.

    Returns:
        Layer type -> settings, for the types that occur in `layer_types`.

    Raises:
        ValueError: an unknown rope type, a missing number, or a partial rotation.
    """
    settings = raw.get("rope_scaling") or raw.get("rope_parameters") or {}
    if not isinstance(settings, Mapping):
        raise ValueError(
            f"load_config: rope_parameters must be an object, got {settings!r}; fix config.json"
        )
    nested = any(key in LAYER_TYPES for key in settings)
    used = [t for t in LAYER_TYPES if t in layer_types]
    result = {}
    for layer_type in used:
        part = settings.get(layer_type) if nested else settings
        if not isinstance(part, Mapping):
            raise ValueError(
                f"load_config: rope_parameters must have an object for {layer_type} layers, got "
                f"{part!r}; layers without rotary positions are not supported"
            )
        result[layer_type] = _parse_one(part, raw, max_position)
    return result


def _parse_one(
    settings: Mapping[str, Any], raw: Mapping[str, Any], max_position: int
) -> RopeConfig:
    rope_type = settings.get("rope_type", settings.get("type", "default"))
    if rope_type not in ROPE_TYPES or settings.get("mrope_section"):
        got = repr(rope_type) + (" with mrope_section" if settings.get("mrope_section") else "")
        raise ValueError(
            f"load_config: rope_type must be one of {', '.join(ROPE_TYPES)}, got {got}; use a "
            "checkpoint with a supported rotary embedding"
        )
    for key in _REQUIRED[rope_type]:
        if settings.get(key) is None:
            raise ValueError(
                f"load_config: rope type {rope_type} must come with {key}, got none; fix "
                "config.json"
            )
    partial = settings.get("partial_rotary_factor", raw.get("partial_rotary_factor"))
    if partial not in (None, 1):
        raise ValueError(
            "load_config: partial_rotary_factor must be 1 (the whole head is rotated), got "
            f"{partial}; use a checkpoint with full rotary heads"
        )
    theta = positive(settings.get("rope_theta") or raw.get("rope_theta") or 10000.0, "rope_theta")
    if rope_type == "default":
        return RopeConfig(theta=theta)
    factor = settings.get("factor")
    if rope_type in ("linear", "dynamic"):
        return RopeConfig(rope_type=rope_type, theta=theta, factor=positive(factor, "factor"))

    # A top-level original length wins, as in transformers.
    original = (
        raw.get("original_max_position_embeddings")
        or settings.get("original_max_position_embeddings")
        or max_position
    )
    if factor is None:
        factor = max_position / original
    common = {
        "rope_type": rope_type,
        "theta": theta,
        "factor": positive(factor, "factor"),
        "original_max_position": int(positive(original, "original_max_position_embeddings")),
    }
    if rope_type == "llama3":
        low = positive(settings["low_freq_factor"], "low_freq_factor")
        high = positive(settings["high_freq_factor"], "high_freq_factor")
        if high <= low:
            raise ValueError(
                f"load_config: high_freq_factor must exceed low_freq_factor, got {high} and {low}; "
                "fix config.json"
            )
        return RopeConfig(**common, low_freq_factor=low, high_freq_factor=high)
    return RopeConfig(
        **common,
        attention_factor=_optional(settings, "attention_factor"),
        beta_fast=_optional(settings, "beta_fast") or 32.0,
        beta_slow=_optional(settings, "beta_slow") or 1.0,
        mscale=_optional(settings, "mscale"),
        mscale_all_dim=_optional(settings, "mscale_all_dim"),
        truncate=bool(settings.get("truncate", True)),
    )


def _optional(settings: Mapping[str, Any], key: str) -> float | None:
    value = settings.get(key)
    return None if value in (None, 0) else positive(value, key)


def positive(value: Any, key: str) -> float:
    """The number under `key`, or a ValueError when it is none or not above 0."""
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not number or not 0 < value < 1e300:  # JSON as Python reads it has NaN and Infinity
        raise ValueError(
            f"load_config: {key} must be a finite number above 0, got {value!r}; fix config.json"
        )
    return float(value)
