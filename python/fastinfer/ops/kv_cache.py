"""The paged KV cache: writing tokens, gathering them, moving blocks; and the GQA broadcast.

K and V are separate tensors [num_blocks, P, Hkv, D], last dimension contiguous, any outer strides,
any block size P >= 1. Slot = block * P + offset. A cache has the dtype of the activations, or is
8-bit (float8_e4m3fn, int8) with fp32 scales: value = code * scale, where the scale is

    a scalar or [Hkv]           static: given by the caller, read by the write
    [num_blocks, P, Hkv]        dynamic: one per token and head, computed and stored by the write

Reference: Kwon et al., "Efficient Memory Management for Large Language Model Serving with
PagedAttention", 2023.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence

import torch
from torch import Tensor

from .. import _lib
from ._fake_kv_cache import repeated_shape

_repeat_kv = _lib.op("repeat_kv")
_reshape_and_cache = _lib.op("reshape_and_cache")
_reshape_and_cache_entry = _lib.entry("reshape_and_cache")
_gather_cache = _lib.op("gather_cache")
_copy_blocks = _lib.op("copy_blocks")
_swap_blocks = _lib.op("swap_blocks")


def reshape_and_cache(
    key: Tensor,
    value: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    slot_mapping: Tensor,
    *,
    k_scale: Tensor | None = None,
    v_scale: Tensor | None = None,
) -> None:
    """Write keys and values of new tokens into their slots of the paged cache, in place.

    8-bit caches: code = x / scale rounded to nearest even, saturating at 127 (int8) or 448
    (float8_e4m3fn); a dynamic scale is max|x| / 127 or / 448 of the token's head, 1 where that
    is 0, and NaN where the head holds inf or NaN.

    Args:
        key, value: [T, Hkv, D], fp32, fp16 or bf16, any outer strides.
        key_cache, value_cache: [num_blocks, P, Hkv, D]; the dtype of key, float8_e4m3fn or int8.
        slot_mapping: [T], int32 or int64, block * P + offset; -1 skips the token. No slot may be
            named twice (checked with FASTINFER_VALIDATE=1; the content is undefined otherwise).
        k_scale, v_scale: fp32, required by 8-bit caches: scalar or [Hkv] (static), or
            [num_blocks, P, Hkv] (dynamic: written here). None for float caches.

    Raises:
        RuntimeError: wrong dtype, shape, device or strides; a slot out of range (CPU; nothing has
            been written then); an input requires grad.

    Reference: Kwon et al. 2023 (PagedAttention).
    """
    try:
        if torch.is_grad_enabled():
            _lib.refuse_grad("reshape_and_cache", key, value, key_cache, value_cache)
        call = _reshape_and_cache_entry
        if torch.compiler.is_compiling():
            call = _reshape_and_cache
        call(key, value, key_cache, value_cache, slot_mapping, k_scale, v_scale)
    except Exception:  # five tensors: looked at only when something was wrong
        _lib.require_tensors(
            "reshape_and_cache",
            key=key,
            value=value,
            key_cache=key_cache,
            value_cache=value_cache,
            slot_mapping=slot_mapping,
        )
        raise


def gather_cache(
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
    out: tuple[Tensor, Tensor] | None = None,
) -> tuple[Tensor, Tensor]:
    """Copy cached tokens of several sequences into packed tensors, dequantising 8-bit caches.

    Token t of sequence b, cu_seqlens[b] <= t < cu_seqlens[b + 1], is cached position
    seq_starts[b] + t - cu_seqlens[b] of that sequence.

    Args:
        key_cache, value_cache: [num_blocks, P, Hkv, D].
        block_table: [B, max_blocks], int32 or int64; entries that hold no wanted position are never
            read.
        cu_seqlens: [B + 1], int32 or int64, offsets into the output, starting with 0.
        num_tokens: rows of the output; those from cu_seqlens[B] on are zero.
        seq_starts: [B], int32 or int64, first position to read; None: 0.
        k_scale, v_scale: fp32 scales of an 8-bit cache, see reshape_and_cache.
        dtype: fp32, fp16 or bf16; None: the cache's dtype (must be given for 8-bit caches).
        out: (k, v) to write to, of `dtype` when that is given too.

    Returns:
        (k, v), each [num_tokens, Hkv, D].

    Raises:
        RuntimeError: wrong dtype, shape, device or strides; decreasing cu_seqlens, a position
            outside the table or a block id out of range (CPU, and CUDA with FASTINFER_VALIDATE=1).

    Reference: Kwon et al. 2023 (PagedAttention).
    """
    name = "gather_cache"
    _lib.require_tensors(
        name,
        key_cache=key_cache,
        value_cache=value_cache,
        block_table=block_table,
        cu_seqlens=cu_seqlens,
    )
    if out is None:
        if dtype is None:
            _lib.check(
                key_cache.dtype not in _lib.EIGHT_BIT,
                f"{name}: dtype must be given for a cache of {key_cache.dtype}, got None; "
                "pass the dtype to dequantise to",
            )
            dtype = key_cache.dtype
        _lib.check(
            key_cache.dim() == 4,
            f"{name}: key_cache must have 4 dimensions, got {_lib.describe(key_cache)}",
        )
        if num_tokens < 0:  # (messages with numbers only when needed: they may be symbols)
            raise RuntimeError(f"{name}: num_tokens must be at least 0, got {num_tokens}")
        shape = (num_tokens, key_cache.shape[2], key_cache.shape[3])
        out = (
            torch.empty(shape, dtype=dtype, device=key_cache.device),
            torch.empty(shape, dtype=dtype, device=key_cache.device),
        )
    else:
        if out[0].shape[0] != num_tokens or dtype not in (None, out[0].dtype):
            raise RuntimeError(
                f"{name}: out must hold num_tokens ({num_tokens}) rows of dtype {dtype}, "
                f"got {_lib.describe(out[0])}"
            )
    _gather_cache(
        key_cache,
        value_cache,
        block_table,
        cu_seqlens,
        seq_starts,
        k_scale,
        v_scale,
        out[0],
        out[1],
    )
    return out


def copy_blocks(
    key_caches: Tensor | Sequence[Tensor],
    value_caches: Tensor | Sequence[Tensor],
    block_mapping: Tensor,
) -> None:
    """Copy whole blocks inside every cache: cache[dst] = cache[src] for every pair, in place.

    Pairs run in parallel: a destination that is named twice, or that is also a source, has no
    defined content (refused with FASTINFER_VALIDATE=1); use two calls for chains.

    Args:
        key_caches, value_caches: tensors or lists (one per layer) whose first dimension are the
            blocks; any dtype, any other dimensions, any strides. Dynamic scales
            [num_blocks, P, Hkv] move with their cache when they are put in the lists too.
        block_mapping: [n, 2], int32 or int64, (source, destination), on the caches' device.

    Raises:
        RuntimeError: wrong dtype, shape or device; a block id out of range (CPU; nothing has been
            copied then).

    Reference: Kwon et al. 2023 (copy on write of PagedAttention).
    """
    _lib.require_tensors("copy_blocks", block_mapping=block_mapping)
    _copy_blocks([*_as_list(key_caches), *_as_list(value_caches)], block_mapping)


def swap_blocks(
    src: Tensor | Sequence[Tensor], dst: Tensor | Sequence[Tensor], block_mapping: Tensor
) -> None:
    """Copy whole blocks from one set of caches to another: dst[i][d] = src[i][s] for every pair.

    Args:
        src, dst: tensors or lists of the same length; dst[i] has the dtype of src[i] and blocks
            (all dimensions but the first) of its shape; any strides. They may be on different
            devices (between host and GPU: swapping out and in). With a GPU on one side the
            copies run on the current stream of that GPU (of the source's between two): what lies
            on the host is there once that stream has been synchronized, and must neither be
            changed nor freed before. Host memory should be pinned (`pin_memory()`): a pageable
            tensor is correct, but slow and waited for, which is said once in a warning.
        block_mapping: [n, 2], int32 or int64, (source, destination), on the CPU. No destination may
            be named twice (checked with FASTINFER_VALIDATE=1).

    Raises:
        RuntimeError: wrong dtype, shape or device; a block id out of range (nothing has been copied
            then).

    Reference: Kwon et al. 2023 (swapping of PagedAttention).
    """
    _lib.require_tensors("swap_blocks", block_mapping=block_mapping)
    src, dst = _as_list(src), _as_list(dst)
    if not torch.compiler.is_compiling():
        _warn_of_pageable(src, dst)
    _swap_blocks(src, dst, block_mapping)


def repeat_kv(x: Tensor, n_rep: int, *, dim: int = -2, out: Tensor | None = None) -> Tensor:
    """Repeat every head n_rep times in a row (GQA broadcast), as torch.repeat_interleave does.

    The attention operators need no repeated heads; this is for code that does.

    Args:
        x: [..., Hkv, D] (or heads at `dim`), any dtype; last dimension contiguous, any outer
            strides.
        n_rep: repetitions, >= 1.
        dim: the head dimension; any but the last.
        out: tensor of the result's shape and x's dtype to write to.

    Returns:
        x with its dimension `dim` n_rep times as long; head h * n_rep + r is head h of x.

    Raises:
        RuntimeError: wrong shape, dtype, device or strides, or x requires grad.

    Reference: Ainslie et al., "GQA: Training Generalized Multi-Query Transformer Models from
    Multi-Head Checkpoints", 2023.
    """
    _lib.require_tensors("repeat_kv", x=x)
    _lib.refuse_grad("repeat_kv", x)
    if out is None:
        out = torch.empty(repeated_shape(x, n_rep, dim), dtype=x.dtype, device=x.device)
    _repeat_kv(x, n_rep, dim, out)
    return out


_warned_of_pageable = False


def _warn_of_pageable(src: list[Tensor], dst: list[Tensor]) -> None:
    global _warned_of_pageable
    if _warned_of_pageable:
        return
    for a, b in zip(src, dst, strict=False):
        host, other = (a, b) if a.device.type == "cpu" else (b, a)
        if host.device.type == "cpu" and other.device.type == "cuda" and not host.is_pinned():
            _warned_of_pageable = True
            warnings.warn(
                "swap_blocks: a host tensor is in pageable memory: its copies are slow and waited "
                "for; allocate it with pin_memory=True",
                stacklevel=3,
            )
            return


def _as_list(caches: Tensor | Sequence[Tensor]) -> list[Tensor]:
    return [caches] if isinstance(caches, Tensor) else list(caches)
