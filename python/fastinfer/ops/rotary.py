"""Rotary position embedding, alone and fused with the KV-cache write.

    a' = a cos - b sin,  b' = b cos + a sin       (fp32 arithmetic, one rounding)

with cos, sin[position, i]; half-split style pairs a = x[i], b = x[i + rotary_dim / 2] (GPT-NeoX,
Llama), interleaved style a = x[2i], b = x[2i + 1] (GPT-J, the original paper).

Reference: Su et al., "RoFormer: Enhanced Transformer with Rotary Position Embedding", 2021.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .. import _lib
from ._fake_kv_cache import check_cache_write
from ._reference_kv_cache import reshape_and_cache_reference

_apply_rotary = _lib.op("apply_rotary")
_apply_rotary_inplace = _lib.op("apply_rotary_inplace")
_apply_rotary_and_cache = _lib.op("apply_rotary_and_cache")
_apply_rotary_and_cache_entry = _lib.entry("apply_rotary_and_cache")


def apply_rotary(
    q: Tensor,
    k: Tensor | None,
    cos: Tensor,
    sin: Tensor,
    positions: Tensor | None = None,
    *,
    interleaved: bool = False,
    inplace: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """Rotate the first rotary_dim columns of every head of q and k; the rest is copied.

    Args:
        q: [T, Hq, D] packed tokens or [B, S, Hq, D]; fp32, fp16 or bf16; last dimension contiguous,
            any outer strides, e.g. a view of a fused QKV projection.
        k: like q with Hkv heads, or None.
        cos, sin: [max_pos, rotary_dim / 2], rotary_dim <= D; fp32 (recommended: bf16 tables lose
            the phase of long positions) or q's dtype; last dimension contiguous.
        positions: int32 or int64, [T] or [B, S], row of cos and sin for each token; None: 0 to
            S - 1 in every sequence (0 to T - 1 for packed tokens).
        interleaved: pairs are (2i, 2i + 1) instead of (i, i + rotary_dim / 2).
        inplace: write to q and k themselves.

    Returns:
        (q, k): new contiguous tensors, or the inputs when inplace.

    Raises:
        RuntimeError: wrong dtype, shape, device or strides; a position outside the table (CPU); an
            input requires grad.

    Reference: Su et al., "RoFormer: Enhanced Transformer with Rotary Position Embedding", 2021.
    """
    _lib.require_tensors(
        "apply_rotary",
        q=q,
        cos=cos,
        sin=sin,
    )
    _lib.refuse_grad("apply_rotary", q, k, cos, sin)
    if inplace:
        _apply_rotary_inplace(q, k, cos, sin, positions, interleaved)
        return q, k
    q_out = torch.empty_like(q, memory_format=torch.contiguous_format)
    k_out = None if k is None else torch.empty_like(k, memory_format=torch.contiguous_format)
    _apply_rotary(q, k, cos, sin, positions, interleaved, q_out, k_out)
    return q_out, k_out


def apply_rotary_and_cache(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cos: Tensor,
    sin: Tensor,
    positions: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    slot_mapping: Tensor,
    *,
    interleaved: bool = False,
    k_scale: Tensor | None = None,
    v_scale: Tensor | None = None,
) -> None:
    """Rotate q and k in place and write k and v into the paged cache, in one pass.

    Same bits as apply_rotary(..., inplace=True) followed by reshape_and_cache.

    Args:
        q: [T, Hq, D], fp32, fp16 or bf16, any outer strides; rotated in place.
        k: [T, Hkv, D], like q; rotated in place.
        v: [T, Hkv, D], like q; not changed.
        cos, sin: [max_pos, rotary_dim / 2], fp32 or q's dtype.
        positions: [T], int32 or int64.
        key_cache, value_cache: [num_blocks, P, Hkv, D], any outer strides; k's dtype,
            float8_e4m3fn or int8.
        slot_mapping: [T], int32 or int64, block * P + offset; -1: the token is rotated but not
            written.
        interleaved: rotary style, see apply_rotary.
        k_scale, v_scale: scales of an 8-bit cache, see reshape_and_cache.

    Raises:
        RuntimeError: wrong dtype, shape, device or strides; a position or slot out of range (CPU;
            nothing has been changed then); an input requires grad.

    References: Su et al. 2021 (rotary embedding); Kwon et al., "Efficient Memory Management for
    Large Language Model Serving with PagedAttention", 2023 (paged cache).
    """
    try:
        if torch.is_grad_enabled():
            _lib.refuse_grad("apply_rotary_and_cache", q, k, v, cos, sin, key_cache, value_cache)
        call = _apply_rotary_and_cache_entry
        if torch.compiler.is_compiling():
            call = _apply_rotary_and_cache
        call(
            q,
            k,
            v,
            cos,
            sin,
            positions,
            key_cache,
            value_cache,
            slot_mapping,
            interleaved,
            k_scale,
            v_scale,
        )
    except Exception:  # nine tensors: looked at only when something was wrong
        _lib.require_tensors(
            "apply_rotary_and_cache",
            q=q,
            k=k,
            v=v,
            cos=cos,
            sin=sin,
            positions=positions,
            key_cache=key_cache,
            value_cache=value_cache,
            slot_mapping=slot_mapping,
        )
        raise


def rotary_reference(
    x: Tensor,
    cos: Tensor,
    sin: Tensor,
    positions: Tensor | None = None,
    *,
    interleaved: bool = False,
) -> Tensor:
    """Rotation of one tensor x [T, H, D] or [B, S, H, D] in plain torch (fp64 inside)."""
    if positions is None:
        positions = torch.arange(x.shape[-3], device=x.device).expand(x.shape[:-2])
    c, s = (table.double()[positions.long()].unsqueeze(-2) for table in (cos, sin))
    rotary_dim = 2 * cos.shape[1]
    head, rest = x.double()[..., :rotary_dim], x[..., rotary_dim:]
    a, b = (head[..., 0::2], head[..., 1::2]) if interleaved else head.chunk(2, -1)
    pair = (a * c - b * s, b * c + a * s)
    rotated = torch.stack(pair, -1).flatten(-2) if interleaved else torch.cat(pair, -1)
    return torch.cat((rotated.to(x.dtype), rest), -1)


def apply_rotary_reference(
    q: Tensor,
    k: Tensor | None,
    cos: Tensor,
    sin: Tensor,
    positions: Tensor | None = None,
    *,
    interleaved: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """apply_rotary in plain torch."""
    out = [
        None if x is None else rotary_reference(x, cos, sin, positions, interleaved=interleaved)
        for x in (q, k)
    ]
    return out[0], out[1]


def apply_rotary_and_cache_reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cos: Tensor,
    sin: Tensor,
    positions: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    slot_mapping: Tensor,
    *,
    interleaved: bool = False,
    k_scale: Tensor | None = None,
    v_scale: Tensor | None = None,
) -> None:
    """apply_rotary_and_cache in plain torch."""
    for x in (q, k):
        x.copy_(rotary_reference(x, cos, sin, positions, interleaved=interleaved))
    reshape_and_cache_reference(
        k, v, key_cache, value_cache, slot_mapping, k_scale=k_scale, v_scale=v_scale
    )


def _check(
    name: str,
    q: Tensor,
    k: Tensor | None,
    cos: Tensor,
    sin: Tensor,
    positions: Tensor | None,
) -> None:
    _lib.check_dtype(name, "q", q, _lib.FLOATS)
    _lib.check(
        q.dim() in (3, 4),
        f"{name}: q must have shape [T, Hq, D] or [B, S, Hq, D], got {_lib.describe(q)}",
    )
    if k is not None:
        _lib.check(
            k.dtype == q.dtype
            and k.dim() == q.dim()
            and k.shape[:-2] == q.shape[:-2]
            and k.shape[-1] == q.shape[-1],
            f"{name}: k must be like q ({_lib.describe(q)}) but for its heads, "
            f"got {_lib.describe(k)}",
        )
    _lib.check_dtype(name, "cos", cos, (torch.float32, q.dtype))
    _lib.check(
        cos.dim() == 2 and 2 * cos.shape[1] <= q.shape[-1],
        f"{name}: cos must have shape [max_pos, rotary_dim / 2] with rotary_dim <= {q.shape[-1]} "
        f"(the head dimension), got {_lib.describe(cos)}",
    )
    _lib.check(
        sin.dtype == cos.dtype and sin.shape == cos.shape,
        f"{name}: sin must be like cos ({_lib.describe(cos)}), got {_lib.describe(sin)}",
    )
    if positions is not None:
        _lib.check_dtype(name, "positions", positions, (torch.int32, torch.int64))
        _lib.check(
            positions.shape == q.shape[:-2],
            f"{name}: positions must have shape {list(q.shape[:-2])}, "
            f"got {_lib.describe(positions)}",
        )


@_lib.register_fake("apply_rotary")
def _(
    q: Tensor,
    k: Tensor | None,
    cos: Tensor,
    sin: Tensor,
    positions: Tensor | None,
    interleaved: bool,
    q_out: Tensor,
    k_out: Tensor | None,
) -> None:
    _check("apply_rotary", q, k, cos, sin, positions)
    for x, out in ((q, q_out), (k, k_out)):
        if x is not None and out is not None:
            _lib.check(
                out.dtype == x.dtype and out.shape == x.shape,
                f"apply_rotary: the output must be like its input ({_lib.describe(x)}), "
                f"got {_lib.describe(out)}",
            )


@_lib.register_fake("apply_rotary_inplace")
def _(
    q: Tensor,
    k: Tensor | None,
    cos: Tensor,
    sin: Tensor,
    positions: Tensor | None,
    interleaved: bool,
) -> None:
    _check("apply_rotary", q, k, cos, sin, positions)


@_lib.register_fake("apply_rotary_and_cache")
def _(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cos: Tensor,
    sin: Tensor,
    positions: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    slot_mapping: Tensor,
    interleaved: bool,
    k_scale: Tensor | None,
    v_scale: Tensor | None,
) -> None:
    name = "apply_rotary_and_cache"
    _check(name, q, k, cos, sin, positions)
    check_cache_write(name, k, v, key_cache, value_cache, slot_mapping, k_scale, v_scale)
