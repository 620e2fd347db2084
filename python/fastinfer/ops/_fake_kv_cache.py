"""Fake kernels of the KV-cache operators: their shape and dtype checks, for tracing."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import _lib

_INDEX = (torch.int32, torch.int64)


def repeated_shape(x: Tensor, n_rep: int, dim: int) -> list[int]:
    """Shape of repeat_kv's result; raises on arguments that have none."""
    d = dim + x.dim() if dim < 0 else dim
    _lib.check(
        x.dim() >= 2 and 0 <= d < x.dim() - 1,
        f"repeat_kv: dim must name a dimension of x other than its last, got {dim} for x of "
        f"{_lib.describe(x)}",
    )
    if n_rep < 1:
        raise RuntimeError(f"repeat_kv: n_rep must be at least 1, got {n_rep}")
    return [size * n_rep if i == d else size for i, size in enumerate(x.shape)]


def _check_shape(name: str, arg: str, t: Tensor, shape: tuple[int, ...]) -> None:
    _lib.check(
        t.dim() == len(shape) and all(a == b for a, b in zip(t.shape, shape, strict=True)),
        f"{name}: {arg} must have shape {list(shape)}, got {_lib.describe(t)}",
    )


def _check_caches(
    name: str,
    key_cache: Tensor,
    value_cache: Tensor,
    k_scale: Tensor | None,
    v_scale: Tensor | None,
) -> None:
    _lib.check_dtype(name, "key_cache", key_cache, _lib.FLOATS + _lib.EIGHT_BIT)
    _lib.check(
        key_cache.dim() == 4,
        f"{name}: key_cache must have 4 dimensions, got {_lib.describe(key_cache)}",
    )
    _lib.check_dtype(name, "value_cache", value_cache, (key_cache.dtype,))
    _check_shape(name, "value_cache", value_cache, tuple(key_cache.shape))
    blocks, positions, heads, _ = key_cache.shape
    for arg, scale in (("k_scale", k_scale), ("v_scale", v_scale)):
        eight_bit = key_cache.dtype in _lib.EIGHT_BIT
        _lib.check(
            (scale is not None) == eight_bit,
            f"{name}: {arg} must be {'given' if eight_bit else 'None'} for a cache of "
            f"{key_cache.dtype}",
        )
        if scale is not None:
            _lib.check_dtype(name, arg, scale, (torch.float32,))
            if scale.dim() == 1 and scale.shape[0] != 1:
                _check_shape(name, arg, scale, (heads,))
            elif scale.dim() > 1:
                _check_shape(name, arg, scale, (blocks, positions, heads))


def check_cache_write(
    name: str,
    key: Tensor,
    value: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    slot_mapping: Tensor,
    k_scale: Tensor | None,
    v_scale: Tensor | None,
) -> None:
    """Fake-kernel check of every operator that writes tokens [T, Hkv, D] into a paged cache."""
    _check_caches(name, key_cache, value_cache, k_scale, v_scale)
    float_cache = key_cache.dtype in _lib.FLOATS
    allowed = (key_cache.dtype,) if float_cache else _lib.FLOATS
    _lib.check_dtype(name, "key", key, allowed)
    _lib.check_dtype(name, "value", value, (key.dtype,))
    _lib.check(key.dim() == 3, f"{name}: key must have 3 dimensions, got {_lib.describe(key)}")
    _check_shape(name, "key", key, (key.shape[0], *key_cache.shape[2:]))
    _check_shape(name, "value", value, tuple(key.shape))
    _lib.check_dtype(name, "slot_mapping", slot_mapping, _INDEX)
    _check_shape(name, "slot_mapping", slot_mapping, (key.shape[0],))


@_lib.register_fake("reshape_and_cache")
def _(
    key: Tensor,
    value: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    slot_mapping: Tensor,
    k_scale: Tensor | None,
    v_scale: Tensor | None,
) -> None:
    check_cache_write(
        "reshape_and_cache", key, value, key_cache, value_cache, slot_mapping, k_scale, v_scale
    )


@_lib.register_fake("gather_cache")
def _(
    key_cache: Tensor,
    value_cache: Tensor,
    block_table: Tensor,
    cu_seqlens: Tensor,
    seq_starts: Tensor | None,
    k_scale: Tensor | None,
    v_scale: Tensor | None,
    key_out: Tensor,
    value_out: Tensor,
) -> None:
    name = "gather_cache"
    _check_caches(name, key_cache, value_cache, k_scale, v_scale)
    _lib.check_dtype(name, "block_table", block_table, _INDEX)
    _lib.check(
        block_table.dim() == 2,
        f"{name}: block_table must have 2 dimensions, got {_lib.describe(block_table)}",
    )
    _lib.check_dtype(name, "cu_seqlens", cu_seqlens, _INDEX)
    _check_shape(name, "cu_seqlens", cu_seqlens, (block_table.shape[0] + 1,))
    if seq_starts is not None:
        _lib.check_dtype(name, "seq_starts", seq_starts, _INDEX)
        _check_shape(name, "seq_starts", seq_starts, (block_table.shape[0],))
    _lib.check_dtype(name, "key_out", key_out, _lib.FLOATS)
    _lib.check_dtype(name, "value_out", value_out, (key_out.dtype,))
    for arg, t in (("key_out", key_out), ("value_out", value_out)):
        _check_shape(name, arg, t, (key_out.shape[0], *key_cache.shape[2:]))


@_lib.register_fake("copy_blocks")
def _(caches: list[Tensor], block_mapping: Tensor) -> None:
    _lib.check_dtype("copy_blocks", "block_mapping", block_mapping, _INDEX)
    _check_shape("copy_blocks", "block_mapping", block_mapping, (block_mapping.shape[0], 2))


@_lib.register_fake("swap_blocks", any_device=("src", "dst", "block_mapping"))
def _(src: list[Tensor], dst: list[Tensor], block_mapping: Tensor) -> None:
    name = "swap_blocks"
    _lib.check_dtype(name, "block_mapping", block_mapping, _INDEX)
    _check_shape(name, "block_mapping", block_mapping, (block_mapping.shape[0], 2))
    _lib.check(
        len(src) == len(dst) and len(src) > 0,
        f"{name}: src and dst must be lists of the same length, at least 1, "
        f"got {len(src)} and {len(dst)}",
    )
    for a, b in zip(src, dst, strict=True):
        _lib.check(
            a.is_meta == b.is_meta,
            f"{name}: src and dst must both hold data, got {_lib.describe(a)} and "
            f"{_lib.describe(b)}; a meta tensor has none",
        )
        _lib.check_dtype(name, "dst", b, (a.dtype,))
        _check_shape(name, "dst", b, (b.shape[0], *a.shape[1:]))


@_lib.register_fake("repeat_kv")
def _(x: Tensor, n_rep: int, dim: int, out: Tensor) -> None:
    _lib.check_dtype("repeat_kv", "out", out, (x.dtype,))
    _check_shape("repeat_kv", "out", out, tuple(repeated_shape(x, n_rep, dim)))
