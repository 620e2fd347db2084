"""The KV-cache operators in plain torch: simple, slow, on any device."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

# Largest magnitude that an 8-bit code stands for.
CODE_MAX = {torch.int8: 127.0, torch.float8_e4m3fn: 448.0}


def encode(x: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """Codes of x under a broadcastable scale: round to nearest even, saturating."""
    limit = CODE_MAX[dtype]
    codes = (x.float() / scale.float()).clamp(-limit, limit)
    return codes.round().nan_to_num(0).to(dtype) if dtype == torch.int8 else codes.to(dtype)


def dynamic_scale(x: Tensor, dtype: torch.dtype) -> Tensor:
    """absmax over the last dimension / 127 or 448; 1 where that is 0, NaN where it is infinite."""
    scale = x.float().abs().amax(-1) / CODE_MAX[dtype]
    return torch.where(scale == 0, 1.0, torch.where(scale.isinf(), torch.nan, scale))


def _raw(t: Tensor) -> Tensor:
    """8-bit tensors as bytes: torch has few indexing kernels for float8."""
    return t.view(torch.uint8) if t.element_size() == 1 else t


def _scale_of(scale: Tensor, block: Tensor, offset: Tensor) -> Tensor:
    """Scale of the given cache rows, broadcastable against [rows, Hkv, D]."""
    if scale.dim() == 3:
        return scale[block, offset].unsqueeze(-1)
    return scale.reshape(-1, 1)


def reshape_and_cache_reference(
    key: Tensor,
    value: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    slot_mapping: Tensor,
    *,
    k_scale: Tensor | None = None,
    v_scale: Tensor | None = None,
) -> None:
    """reshape_and_cache in plain torch."""
    keep = slot_mapping >= 0
    slots = slot_mapping[keep].long()
    block, offset = slots // key_cache.shape[1], slots % key_cache.shape[1]
    for x, cache, scale in ((key, key_cache, k_scale), (value, value_cache, v_scale)):
        rows = x[keep]
        if scale is not None:
            if scale.dim() == 3:
                scale[block, offset] = dynamic_scale(rows, cache.dtype)
            rows = encode(rows, _scale_of(scale, block, offset), cache.dtype)
        _raw(cache)[block, offset] = _raw(rows)


def gather_cache_reference(
    key_cache: Tensor,
    value_cache: Tensor,
    block_table: Tensor,
    cu_seqlens: Tensor,
    num_tokens: int,
    *,
    seq_starts: Tensor | None = None,
    k_scale: Tensor | None = None,
    v_scale: Tensor | None = None,
    dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor]:
    """gather_cache in plain torch."""
    block_size = key_cache.shape[1]
    outs = []
    for cache, scale in ((key_cache, k_scale), (value_cache, v_scale)):
        out = torch.zeros(
            num_tokens, *cache.shape[2:], dtype=dtype or cache.dtype, device=cache.device
        )
        for b in range(block_table.shape[0]):
            begin, end = int(cu_seqlens[b]), int(cu_seqlens[b + 1])
            first = 0 if seq_starts is None else int(seq_starts[b])
            position = torch.arange(first, first + end - begin, device=cache.device)
            block, offset = block_table[b].long()[position // block_size], position % block_size
            rows = _raw(cache)[block, offset].view(cache.dtype).float()
            if scale is not None:
                rows = rows * _scale_of(scale, block, offset)
            out[begin:end] = rows.to(out.dtype)
        outs.append(out)
    return outs[0], outs[1]


def repeat_kv_reference(x: Tensor, n_rep: int, *, dim: int = -2) -> Tensor:
    """repeat_kv in plain torch."""
    return x.repeat_interleave(n_rep, dim)


def copy_blocks_reference(
    key_caches: Sequence[Tensor], value_caches: Sequence[Tensor], block_mapping: Tensor
) -> None:
    """copy_blocks in plain torch."""
    for cache in (*key_caches, *value_caches):
        for src, dst in block_mapping.tolist():
            cache[dst].copy_(cache[src])


def swap_blocks_reference(
    src: Sequence[Tensor], dst: Sequence[Tensor], block_mapping: Tensor
) -> None:
    """swap_blocks in plain torch."""
    for a, b in zip(src, dst, strict=True):
        for i, j in block_mapping.tolist():
            b[j].copy_(a[i])
