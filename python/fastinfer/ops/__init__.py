"""Every public operator: typed wrapper, fake kernel and plain-torch reference, one module per
family.
"""

from __future__ import annotations

from . import all_reduce as all_reduce  # for fastinfer.distributed
from .activation import gelu_and_mul, silu_and_mul, silu_and_mul_quant
from .flash_attention import flash_attn_func, flash_attn_varlen_func
from .kv_cache import copy_blocks, gather_cache, repeat_kv, reshape_and_cache, swap_blocks
from .linear import int4_linear, int8_linear, linear, w8a8_linear
from .norm import fused_add_rms_norm, rms_norm, rms_norm_quant
from .paged_attention import flash_attn_with_kvcache, merge_attn_states, plan_decode
from .quantization import (
    PackedWeight,
    QuantizedWeight,
    dequantize_weight,
    pack_weight,
    quantize_per_token,
    quantize_weight,
)
from .rotary import apply_rotary, apply_rotary_and_cache
from .sampling import SampleOutput, VerifyOutput, sample, verify_draft

__all__ = [
    "PackedWeight",
    "QuantizedWeight",
    "SampleOutput",
    "VerifyOutput",
    "apply_rotary",
    "apply_rotary_and_cache",
    "copy_blocks",
    "dequantize_weight",
    "flash_attn_func",
    "flash_attn_varlen_func",
    "flash_attn_with_kvcache",
    "fused_add_rms_norm",
    "gather_cache",
    "gelu_and_mul",
    "int4_linear",
    "int8_linear",
    "linear",
    "merge_attn_states",
    "pack_weight",
    "plan_decode",
    "quantize_per_token",
    "quantize_weight",
    "repeat_kv",
    "reshape_and_cache",
    "rms_norm",
    "rms_norm_quant",
    "sample",
    "silu_and_mul",
    "silu_and_mul_quant",
    "swap_blocks",
    "verify_draft",
    "w8a8_linear",
]
