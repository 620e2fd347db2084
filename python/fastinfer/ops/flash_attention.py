"""Attention forward over dense, packed or paged keys, with flash-attn 2.8's calling convention.

    out_i = sum_j softmax_j(scale * q_i . k_j) v_j

Shapes: B batch, T packed tokens, Sq / Sk queries / keys of a sequence, Hq / Hkv query / key heads,
D head dimension, P block size.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .. import _lib
from ._reference_attention import flash_attn_func_reference, flash_attn_varlen_func_reference

__all__ = [
    "flash_attn_func",
    "flash_attn_func_reference",
    "flash_attn_varlen_func",
    "flash_attn_varlen_func_reference",
]

_flash_attn_fwd = _lib.op("flash_attn_fwd")
_flash_attn_varlen_fwd = _lib.op("flash_attn_varlen_fwd")


def check_call(name: str, window_size: tuple[int, int], q: Tensor, k: Tensor, v: Tensor) -> None:
    """What must hold before an output can be allocated; the operator checks the rest. On the path
    of every call: messages are put together on failure only.
    """
    _lib.require_tensors(name, q=q, k=k, v=v)
    if q.dim() == 0 or q.shape[-1] == 0:
        raise RuntimeError(f"{name}: q must have dimensions [..., Hq, D], got {_lib.describe(q)}")
    if type(window_size) is tuple and len(window_size) == 2:
        left, right = window_size
        if type(left) is int and type(right) is int:
            return
    if not (
        isinstance(window_size, (tuple, list))
        and len(window_size) == 2
        and all(isinstance(side, (int, torch.SymInt)) for side in window_size)
    ):
        raise RuntimeError(
            f"{name}: window_size must be two integers (left, right), got {window_size}"
        )


def refuse_training(name: str, dropout_p: float, deterministic: bool) -> None:
    """Refuse what only the training side of flash-attn knows."""
    if dropout_p != 0.0:
        raise ValueError(
            f"{name}: dropout_p must be 0.0, got {dropout_p}; fastinfer is inference only"
        )
    if deterministic:
        raise ValueError(
            f"{name}: deterministic must be False, got True; it chooses a backward pass, and the "
            "forward pass here is always deterministic"
        )


def flash_attn_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
    *,
    sinks: Tensor | None = None,
    k_scale: Tensor | None = None,
    v_scale: Tensor | None = None,
    plan: Tensor | None = None,
    batch_invariant: bool = False,
    out: Tensor | None = None,
    workspace: Tensor | None = None,
) -> Tensor | tuple[Tensor, Tensor, None]:
    """Softmax attention of q over k and v, dense batch; forward pass of flash-attn's function.

    Query i sees keys up to i + Sk - Sq when causal (the last query is aligned with the last key),
    and keys i + Sk - Sq - left .. i + Sk - Sq + right with a window. A query that sees no key gives
    0, with LSE -inf. Query head h reads key head h // (Hq / Hkv).

    Args:
        q: [B, Sq, Hq, D], fp16 or bf16 (on CPU also fp32); any strides, last dimension contiguous.
            D from 16 to 256 in steps of 8.
        k: [B, Sk, Hkv, D], dtype of q, or 8-bit codes (float8_e4m3fn, int8). Hkv divides Hq.
        v: like k.
        dropout_p: must be 0.0.
        softmax_scale: factor of q . k; None: D ** -0.5.
        causal: hide later keys (a right window of 0).
        window_size: (left, right) keys visible on either side, both ends included; -1: unlimited.
        softcap: > 0: scores become softcap * tanh(score / softcap) before masks.
        alibi_slopes: fp32 [Hq] or [B, Hq]; adds -slope * |i + Sk - Sq - j| to the score.
        deterministic: must be False (a choice of backward pass; the forward pass always is).
        return_attn_probs: also return the LSE; the third value is None, as nothing is dropped.
        sinks: [Hq], a logit per head that only adds to the softmax denominator (and to the LSE).
        k_scale: fp32 scale of 8-bit k, value = code * scale: one number, [Hkv], or [B, Sk, Hkv].
        v_scale: likewise for v.
        plan: from `plan_decode`, made for this batch and Sq; optional.
        batch_invariant: a row's bits must not depend on its batch or on chunking. On CPU they
            never do, so this changes nothing there.
        out: tensor like q to write to, any strides with the last dimension contiguous; may be q.
        workspace: scratch for CUDA kernels; ignored on CPU.

    Returns:
        out, or (out, lse, None) with lse fp32 [B, Hq, Sq], natural logarithm.

    Raises:
        RuntimeError, ValueError: wrong dtype, shape, device or strides; an input requires grad;
            training-only arguments.

    Reference: Dao, "FlashAttention-2", 2023 (online softmax, tiles); flash-attn 2.8 (interface).
    """
    name = "flash_attn_func"
    refuse_training(name, dropout_p, deterministic)
    check_call(name, window_size, q, k, v)
    _lib.refuse_grad(name, q, k, v, sinks, alibi_slopes)
    if softmax_scale is None:
        softmax_scale = q.shape[-1] ** -0.5
    if out is None:
        out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    lse = None
    if return_attn_probs:
        _lib.check(q.dim() == 4, f"{name}: q must have 4 dimensions, got {_lib.describe(q)}")
        lse = q.new_empty((q.shape[0], q.shape[2], q.shape[1]), dtype=torch.float32)
    _flash_attn_fwd(
        q,
        k,
        v,
        out,
        lse,
        softmax_scale=softmax_scale,
        causal=causal,
        window_left=window_size[0],
        window_right=window_size[1],
        softcap=softcap,
        alibi_slopes=alibi_slopes,
        sinks=sinks,
        k_scale=k_scale,
        v_scale=v_scale,
        plan=plan,
        batch_invariant=batch_invariant,
        workspace=workspace,
    )
    return out if lse is None else (out, lse, None)


def flash_attn_varlen_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor | None,
    max_seqlen_q: int,
    max_seqlen_k: int,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
    block_table: Tensor | None = None,
    *,
    seqused_k: Tensor | None = None,
    sinks: Tensor | None = None,
    k_scale: Tensor | None = None,
    v_scale: Tensor | None = None,
    plan: Tensor | None = None,
    batch_invariant: bool = False,
    out: Tensor | None = None,
    workspace: Tensor | None = None,
) -> Tensor | tuple[Tensor, Tensor, None]:
    """Softmax attention of packed sequences; keys packed too, or paged (chunked prefill).

    Masks, softcap, ALiBi, sinks, scales and empty rows as in `flash_attn_func`, per sequence. Rows
    of q that belong to no sequence are not written.

    Args:
        q: [T, Hq, D], sequences one after the other.
        k: [Tk, Hkv, D], or with block_table the cache [num_blocks, P, Hkv, D], any block size.
        v: like k.
        cu_seqlens_q: int32 [B + 1], sequence b is rows cu_seqlens_q[b] .. cu_seqlens_q[b + 1] - 1.
        cu_seqlens_k: int32 [B + 1], likewise for keys; with block_table only the differences
            matter, and it may be None when seqused_k is given.
        max_seqlen_q: upper bound of the sequence lengths in q.
        max_seqlen_k: upper bound of the key lengths.
        dropout_p: must be 0.0.
        softmax_scale: factor of q . k; None: D ** -0.5.
        causal, window_size, softcap, alibi_slopes: as in `flash_attn_func`.
        deterministic: must be False.
        return_attn_probs: also return the LSE and None.
        block_table: int32 [B, max_blocks]; key j of sequence b lies in block
            block_table[b, j // P], row j % P. Entries past the length may hold anything.
        seqused_k: int32 [B], keys of each sequence that exist, instead of the differences of
            cu_seqlens_k.
        sinks: [Hq], as in `flash_attn_func`.
        k_scale: fp32 scale of 8-bit k: one number, [Hkv], or the shape of k without D.
        v_scale: likewise for v.
        plan: from `plan_decode`, made for B sequences and q_len = max_seqlen_q; optional.
        batch_invariant: as in `flash_attn_func`; free on CPU.
        out: tensor like q to write to; may be q.
        workspace: scratch for CUDA kernels; ignored on CPU.

    Returns:
        out [T, Hq, D], or (out, lse, None) with lse fp32 [Hq, T].

    Raises:
        RuntimeError, ValueError: wrong dtype, shape, device, strides, lengths or block ids (data is
            checked on CPU always, on CUDA with FASTINFER_VALIDATE=1); an input requires grad;
            training-only arguments.

    Reference: Dao, "FlashAttention-2", 2023; Kwon et al., "PagedAttention", 2023 (block tables).
    """
    name = "flash_attn_varlen_func"
    refuse_training(name, dropout_p, deterministic)
    _lib.require_tensors(name, cu_seqlens_q=cu_seqlens_q)
    check_call(name, window_size, q, k, v)
    _lib.refuse_grad(name, q, k, v, sinks, alibi_slopes)
    if softmax_scale is None:
        softmax_scale = q.shape[-1] ** -0.5
    if out is None:
        out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    lse = None
    if return_attn_probs:
        _lib.check(q.dim() == 3, f"{name}: q must have 3 dimensions, got {_lib.describe(q)}")
        lse = q.new_empty((q.shape[1], q.shape[0]), dtype=torch.float32)
    _flash_attn_varlen_fwd(
        q,
        k,
        v,
        out,
        lse,
        cu_seqlens_q=cu_seqlens_q,
        cu_seqlens_k=cu_seqlens_k,
        max_seqlen_q=max_seqlen_q,
        max_seqlen_k=max_seqlen_k,
        seqused_k=seqused_k,
        block_table=block_table,
        softmax_scale=softmax_scale,
        causal=causal,
        window_left=window_size[0],
        window_right=window_size[1],
        softcap=softcap,
        alibi_slopes=alibi_slopes,
        sinks=sinks,
        k_scale=k_scale,
        v_scale=v_scale,
        plan=plan,
        batch_invariant=batch_invariant,
        workspace=workspace,
    )
    return out if lse is None else (out, lse, None)


def check_devices(name: str, first: Tensor, **others: object) -> None:
    """Every tensor on the device of the first one (fake kernels)."""
    for arg, t in others.items():
        if isinstance(t, Tensor) and t.device != first.device:
            raise RuntimeError(
                f"{name}: {arg} must be on the same device as the first tensor "
                f"({first.device}), got {_lib.describe(t)}; move it with .to(device)"
            )


def check_attention(
    name: str,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor | None,
    names: tuple[str, str] = ("k", "v"),
    *,
    k_scale: Tensor | None,
    v_scale: Tensor | None,
    **features: object,
) -> None:
    """The shape and dtype checks of the C++ side, on metadata only (fake kernels)."""
    check, describe = _lib.check, _lib.describe
    _lib.check_dtype(name, "q", q, _lib.FLOATS)
    head_dim, heads, heads_kv = q.shape[-1], q.shape[-2], k.shape[-2]
    check(
        head_dim >= 16 and head_dim <= 256 and head_dim % 8 == 0,
        f"{name}: head_dim must be a multiple of 8 from 16 to 256, got {describe(q)}",
    )
    check(
        heads_kv > 0 and heads % heads_kv == 0,
        f"{name}: the number of heads of q must be a multiple of that of {names[0]}, "
        f"got {heads} and {heads_kv}",
    )
    check(
        k.shape[-1] == head_dim,
        f"{name}: {names[0]} must have the head_dim of q ({head_dim}), got {describe(k)}",
    )
    check(
        v.shape == k.shape and v.dtype == k.dtype,
        f"{name}: {names[1]} must be like {names[0]} ({describe(k)}), got {describe(v)}",
    )
    _lib.check_dtype(name, names[0], k, (q.dtype, *_lib.EIGHT_BIT))
    if k.dtype in _lib.EIGHT_BIT:
        for arg, scale in (("k_scale", k_scale), ("v_scale", v_scale)):
            check(scale is not None, f"{name}: {arg} must be given for {k.dtype}, got None")
    check(
        out.shape == q.shape and out.dtype == q.dtype,
        f"{name}: out must be like q ({describe(q)}), got {describe(out)}",
    )
    check(
        lse is None or lse.dtype == torch.float32,
        f"{name}: lse must be torch.float32",
    )


@_lib.register_fake("flash_attn_fwd")
def _(q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor | None, **features: object) -> None:
    name = "flash_attn_func"
    for arg, t in (("q", q), ("k", k)):
        _lib.check(t.dim() == 4, f"{name}: {arg} must have 4 dimensions, got {_lib.describe(t)}")
    _lib.check(
        k.shape[0] == q.shape[0],
        f"{name}: k must have the batch size of q ({q.shape[0]}), got {_lib.describe(k)}",
    )
    check_attention(name, q, k, v, out, lse, **features)
    check_devices(name, q, k=k, v=v, out=out, lse=lse, **features)


@_lib.register_fake("flash_attn_varlen_fwd")
def _(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor | None,
    *,
    block_table: Tensor | None,
    **features: object,
) -> None:
    name = "flash_attn_varlen_func"
    check_devices(name, q, block_table=block_table)
    for arg, t, dim in (("q", q, 3), ("k", k, 3 if block_table is None else 4)):
        _lib.check(
            t.dim() == dim, f"{name}: {arg} must have {dim} dimensions, got {_lib.describe(t)}"
        )
    check_attention(name, q, k, v, out, lse, **features)
    check_devices(name, q, k=k, v=v, out=out, lse=lse, **features)
