"""Quantised checkpoints: formats, layers, loading into any model.

from fastinfer.quant import load_quantized
model = load_quantized(transformers_model, "path/to/gptq-checkpoint")
"""

from __future__ import annotations

import importlib
from typing import Any

# Public name -> module that defines it; imported at first use.
_HOME = {
    "CanonicalWeight": "canonical",
    "Int8Weight": "canonical",
    "LinearScheme": "config",
    "QuantConfig": "config",
    "QuantError": "canonical",
    "QuantLinear": "layers",
    "W8A8Linear": "layers",
    "QuantizeOptions": "options",
    "load_quantized": "load",
    "quantize_checkpoint": "pipeline",
    "quantize_model": "model",
    "read_quant_config": "config",
}

__all__ = [
    "CanonicalWeight",
    "Int8Weight",
    "LinearScheme",
    "QuantConfig",
    "QuantError",
    "QuantLinear",
    "QuantizeOptions",
    "W8A8Linear",
    "load_quantized",
    "quantize_checkpoint",
    "quantize_model",
    "read_quant_config",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f".{_HOME[name]}", __name__), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
