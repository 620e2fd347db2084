"""fastinfer: hand-written kernels for LLM inference as PyTorch operators, and a small generation
engine.

    from fastinfer import flash_attn_func                  # an operator
    from fastinfer import LLM, SamplingParams              # the engine

Everything is imported at first use: `import fastinfer` itself costs next to nothing beyond `import
torch`.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from ._version import __version__

# Public name -> module that defines it.
_OPS = {
    "ops.flash_attention": ("flash_attn_func", "flash_attn_varlen_func"),
    "ops.paged_attention": ("flash_attn_with_kvcache", "merge_attn_states", "plan_decode"),
    "ops.kv_cache": (
        "copy_blocks",
        "gather_cache",
        "repeat_kv",
        "reshape_and_cache",
        "swap_blocks",
    ),
    "ops.linear": ("int4_linear", "int8_linear", "linear", "w8a8_linear"),
    "ops.quantization": (
        "PackedWeight",
        "QuantizedWeight",
        "dequantize_weight",
        "pack_weight",
        "quantize_per_token",
        "quantize_weight",
    ),
    "ops.norm": ("fused_add_rms_norm", "rms_norm", "rms_norm_quant"),
    "ops.rotary": ("apply_rotary", "apply_rotary_and_cache"),
    "ops.activation": ("gelu_and_mul", "silu_and_mul", "silu_and_mul_quant"),
    "ops.sampling": ("SampleOutput", "VerifyOutput", "sample", "verify_draft"),
    "_lib": ("build_info", "cpu_isa"),
}
_ENGINE = {
    "engine.config": ("SamplingParams",),
    "engine.llm": ("LLM",),
    "engine.outputs": ("CompletionOutput", "RequestOutput"),
}
_CACHE = {"paged_cache": ("CacheStep", "PagedKVCache")}
_HOME = {
    name: module
    for table in (_OPS, _CACHE, _ENGINE)
    for module, names in table.items()
    for name in names
}

__all__ = ["__version__", *sorted(_HOME)]

if TYPE_CHECKING:
    from ._lib import build_info as build_info
    from ._lib import cpu_isa as cpu_isa
    from .engine.config import SamplingParams as SamplingParams
    from .engine.llm import LLM as LLM
    from .engine.outputs import CompletionOutput as CompletionOutput
    from .engine.outputs import RequestOutput as RequestOutput
    from .ops import *  # noqa: F403
    from .paged_cache import CacheStep as CacheStep
    from .paged_cache import PagedKVCache as PagedKVCache


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'fastinfer' has no attribute {name!r}")
    value = getattr(importlib.import_module(f".{_HOME[name]}", __name__), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
