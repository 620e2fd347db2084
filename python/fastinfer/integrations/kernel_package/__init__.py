"""fastinfer's attention as a local package of Hugging Face's `kernels` library, which loads this
folder for LOCAL_KERNELS=fastinfer/flash-attn2=<this folder>.
"""

from fastinfer import flash_attn_func, flash_attn_varlen_func, flash_attn_with_kvcache

__all__ = ["flash_attn_func", "flash_attn_varlen_func", "flash_attn_with_kvcache"]
