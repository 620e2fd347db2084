"""Decoding over a dense or paged cache, its split plan, and the merge of partial attention results.

Shapes: B batch, Sq queries per sequence, Snew appended tokens, Hq / Hkv query / key heads, D head
dimension, P block size.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .. import _lib
from ._reference_attention import (
    flash_attn_with_kvcache_reference,
    merge_attn_states_reference,
    plan_decode_reference,
)
from .flash_attention import check_attention, check_call, check_devices

__all__ = [
    "flash_attn_with_kvcache",
    "flash_attn_with_kvcache_reference",
    "merge_attn_states",
    "merge_attn_states_reference",
    "plan_decode",
    "plan_decode_reference",
]

_flash_attn_kvcache = _lib.op("flash_attn_kvcache")
_plan_decode = _lib.op("plan_decode")
_merge_attn_states = _lib.op("merge_attn_states")

PLAN_HEADER = 8


def flash_attn_with_kvcache(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    k: Tensor | None = None,
    v: Tensor | None = None,
    rotary_cos: Tensor | None = None,
    rotary_sin: Tensor | None = None,
    cache_seqlens: int | Tensor | None = None,
    cache_batch_idx: Tensor | None = None,
    cache_leftpad: Tensor | None = None,
    block_table: Tensor | None = None,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    rotary_interleaved: bool = True,
    alibi_slopes: Tensor | None = None,
    num_splits: int = 0,
    return_softmax_lse: bool = False,
    *,
    sinks: Tensor | None = None,
    k_scale: Tensor | None = None,
    v_scale: Tensor | None = None,
    plan: Tensor | None = None,
    batch_invariant: bool = False,
    out: Tensor | None = None,
    workspace: Tensor | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Attention of a few new queries per sequence over a cache; appends k and v to it first.

    With k and v: rows cache_seqlens[b] .. cache_seqlens[b] + Snew - 1 of sequence b are written
    (rotated and quantised on the way), then its length is cache_seqlens[b] + Snew. Masks align the
    last query with the last key. With rotary tables, k token i is rotated at position
    cache_seqlens[b] + i; query i too when causal or windowed, otherwise every query at
    cache_seqlens[b], as flash-attn does. cache_seqlens itself is not changed.

    Args:
        q: [B, Sq, Hq, D], fp16 or bf16 (on CPU also fp32), last dimension contiguous. On CUDA an
            8-bit cache needs D % 16 == 0.
        k_cache: [B_cache, S, Hkv, D], or with block_table [num_blocks, P, Hkv, D]; dtype of q, or
            8-bit codes (float8_e4m3fn, int8). Written in place when k is given.
        v_cache: like k_cache.
        k: [B, Snew, Hkv, D], dtype of q: new keys to append; needs cache_seqlens.
        v: like k.
        rotary_cos: [positions, rotary_dim / 2], fp32 or the dtype of q; needs k.
        rotary_sin: like rotary_cos.
        cache_seqlens: int or int32 [B]: keys in the cache before this call. None: all of it.
        cache_batch_idx: int32 [B], the row of a dense cache each sequence uses; None: 0 .. B - 1.
        cache_leftpad: int32 [B], first key of each sequence; earlier ones are not looked at.
        block_table: int32 [B, max_blocks]; entries past a sequence's length may hold anything.
        softmax_scale: factor of q . k; None: D ** -0.5.
        causal, window_size, softcap, alibi_slopes: as in `flash_attn_func`.
        rotary_interleaved: pairs (2i, 2i + 1) are rotated; False: (i, i + rotary_dim / 2).
        num_splits: accepted for flash-attn's sake: the split over keys is chosen here.
        return_softmax_lse: also return the LSE.
        sinks: [Hq], as in `flash_attn_func`.
        k_scale: fp32 scale of an 8-bit k_cache, value = code * scale: one number, [Hkv], or the
            shape of k_cache without D. The first two are static: appending rounds k / scale. With
            one scale per token and head appending stores largest |k| / largest code there.
        v_scale: likewise for v_cache.
        plan: from `plan_decode` for this batch, Sq and Snew; optional, reusable in every layer.
        batch_invariant: a row's bits must not depend on its batch, on the split or on chunking. On
            CPU they never do, so this changes nothing there. On CUDA keys are then added up in
            pieces of 1024 at absolute positions, 16 packed rows at a time; partial results are
            kept for every piece that the cache has room for.
        out: tensor like q to write to; may be q.
        workspace: scratch for CUDA kernels; ignored on CPU. A contiguous tensor of any dtype,
            zeroed once, one per stream: every call leaves its first 64 KiB zero. The call says how
            many bytes it needs if these are too few; 16 MiB do for up to 32 packed rows (Hq / Hkv
            * Sq) of D <= 128. None: one is allocated and cleared, which costs a launch.

    Returns:
        out [B, Sq, Hq, D], or (out, lse) with lse fp32 [B, Hq, Sq], natural logarithm.

    Raises:
        RuntimeError: wrong dtype, shape, device, strides, lengths or block ids (data is checked on
            CPU always, on CUDA with FASTINFER_VALIDATE=1); an input requires grad. The cache is
            unchanged then.

    Reference: Dao et al., "Flash-Decoding", 2023; Kwon et al., "PagedAttention", 2023; flash-attn
    2.8 (interface).
    """
    name = "flash_attn_with_kvcache"
    check_call(name, window_size, q, k_cache, v_cache)
    _lib.refuse_grad(name, q, k_cache, v_cache, k, v, sinks, alibi_slopes)
    if softmax_scale is None:
        softmax_scale = q.shape[-1] ** -0.5
    if cache_seqlens is not None and not isinstance(cache_seqlens, Tensor):
        if not isinstance(cache_seqlens, (int, torch.SymInt)):
            raise TypeError(
                f"{name}: cache_seqlens must be an integer or an int32 tensor, got {cache_seqlens}"
            )
        if not -(2**31) <= cache_seqlens < 2**31:  # (a message put together only then: tracing)
            raise ValueError(f"{name}: cache_seqlens must fit in int32, got {cache_seqlens}")
        cache_seqlens = torch.full((q.shape[0],), cache_seqlens, dtype=torch.int32, device=q.device)
    if out is None:
        out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    lse = None
    if return_softmax_lse:
        _lib.check(q.dim() == 4, f"{name}: q must have 4 dimensions, got {_lib.describe(q)}")
        lse = q.new_empty((q.shape[0], q.shape[2], q.shape[1]), dtype=torch.float32)
    _flash_attn_kvcache(
        q,
        k_cache,
        v_cache,
        k,
        v,
        out,
        lse,
        rotary_cos=rotary_cos,
        rotary_sin=rotary_sin,
        cache_seqlens=cache_seqlens,
        cache_batch_idx=cache_batch_idx,
        cache_leftpad=cache_leftpad,
        block_table=block_table,
        softmax_scale=softmax_scale,
        causal=causal,
        window_left=window_size[0],
        window_right=window_size[1],
        softcap=softcap,
        rotary_interleaved=rotary_interleaved,
        alibi_slopes=alibi_slopes,
        num_splits=num_splits,
        sinks=sinks,
        k_scale=k_scale,
        v_scale=v_scale,
        plan=plan,
        batch_invariant=batch_invariant,
        workspace=workspace,
    )
    return out if lse is None else (out, lse)


def _default_slots() -> int:
    """CPU threads; torch.compile cannot trace the question and takes the answer as a constant."""
    return torch.get_num_threads()


# torch.compiler.assume_constant_result, without the seconds that importing torch._dynamo takes
_default_slots._dynamo_marked_constant = True  # type: ignore[attr-defined]


def plan_decode(
    cache_seqlens: Tensor,
    num_heads_q: int,
    num_heads_kv: int,
    head_dim: int,
    *,
    q_len: int = 1,
    append: int = 0,
    window_size: tuple[int, int] = (-1, -1),
    num_slots: int | None = None,
    batch_invariant: bool = False,
    out: Tensor | None = None,
) -> Tensor:
    """Divide one decoding step among the processors: a plan on the device, made once per step.

    Every layer of the step passes it as `plan=`; with `out` it is rewritten in place, so that a
    captured graph follows the lengths. The CPU kernels check that it fits and divide the work by
    themselves.

    Args:
        cache_seqlens: int32 [B], keys in the cache before the step.
        num_heads_q: Hq.
        num_heads_kv: Hkv.
        head_dim: D.
        q_len: queries per sequence, Sq.
        append: tokens that the attention call itself appends, Snew.
        window_size: (left, right) of the attention call; only visible keys are counted.
        num_slots: shares of work; None: CPU threads, on CUDA twice the multiprocessors. The CUDA
            kernel takes the running costs only and divides them among the CTAs it starts.
        batch_invariant: plan pieces of fixed length, so that no row depends on its batch.
        out: int32 [8 + B + 1] to write to.

    Returns:
        int32 [8 + B + 1]: version (1), B, Hkv, q_len, append, tokens per tile (64), num_slots,
        share (0: fixed pieces); then the running cost of the sequences, max(1, visible tiles)
        each, from 0.

    Raises:
        RuntimeError: wrong dtype or shape, numbers out of range.

    Reference: Osama et al., "Stream-K", 2023 (equal shares of one work list).
    """
    _lib.require_tensors("plan_decode", cache_seqlens=cache_seqlens)
    if num_slots is None:
        if cache_seqlens.is_cuda:
            properties = torch.cuda.get_device_properties(cache_seqlens.device)
            num_slots = 2 * properties.multi_processor_count
        else:
            num_slots = _default_slots()
    if out is None:
        out = cache_seqlens.new_empty((PLAN_HEADER + cache_seqlens.numel() + 1,), dtype=torch.int32)
    _plan_decode(
        cache_seqlens,
        num_heads_q,
        num_heads_kv,
        head_dim,
        q_len=q_len,
        append=append,
        window_left=window_size[0],
        window_right=window_size[1],
        num_slots=num_slots,
        batch_invariant=batch_invariant,
        plan=out,
    )
    return out


def merge_attn_states(
    prefix_output: Tensor,
    prefix_lse: Tensor,
    suffix_output: Tensor,
    suffix_lse: Tensor,
    *,
    out: Tensor | None = None,
    out_lse: Tensor | None = None,
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Attention over two disjoint sets of keys from the results over each of them.

        out = (e^lse_a * a + e^lse_b * b) / (e^lse_a + e^lse_b),   lse = ln(e^lse_a + e^lse_b)

    Args:
        prefix_output: [T, H, D] or [B, S, H, D], fp32, fp16 or bf16, last dimension contiguous.
        prefix_lse: fp32 [H, T] or [B, H, S], natural logarithm. -inf (or +inf, which some kernels
            write for it) means no keys: that side's output is not read.
        suffix_output: like prefix_output.
        suffix_lse: like prefix_lse.
        out: tensor like prefix_output to write to; may be one of the inputs.
        out_lse: tensor like prefix_lse to write to.
        return_lse: also return the merged LSE.

    Returns:
        out, or (out, lse). Without keys on both sides: 0 and -inf.

    Raises:
        RuntimeError: wrong dtype, shape, device or strides; an input requires grad.

    Reference: Ye et al., "Cascade Inference" (FlashInfer), 2024.
    """
    _lib.require_tensors(
        "merge_attn_states",
        prefix_output=prefix_output,
        prefix_lse=prefix_lse,
        suffix_output=suffix_output,
        suffix_lse=suffix_lse,
    )
    _lib.refuse_grad("merge_attn_states", prefix_output, prefix_lse, suffix_output, suffix_lse)
    if out is None:
        out = torch.empty(
            prefix_output.shape, dtype=prefix_output.dtype, device=prefix_output.device
        )
    if out_lse is None and return_lse:
        out_lse = torch.empty(prefix_lse.shape, dtype=torch.float32, device=prefix_lse.device)
    _merge_attn_states(
        prefix_output, prefix_lse, suffix_output, suffix_lse, out=out, out_lse=out_lse
    )
    return (out, out_lse) if return_lse else out


@_lib.register_fake("flash_attn_kvcache")
def _(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    k: Tensor | None,
    v: Tensor | None,
    out: Tensor,
    lse: Tensor | None,
    **features: object,
) -> None:
    name = "flash_attn_with_kvcache"
    for arg, t in (("q", q), ("k_cache", k_cache)):
        _lib.check(t.dim() == 4, f"{name}: {arg} must have 4 dimensions, got {_lib.describe(t)}")
    check_attention(name, q, k_cache, v_cache, out, lse, ("k_cache", "v_cache"), **features)
    _lib.check((k is None) == (v is None), f"{name}: k and v must be given together")
    check_devices(name, q, k_cache=k_cache, v_cache=v_cache, k=k, v=v, out=out, lse=lse, **features)


@_lib.register_fake("plan_decode")
def _(
    cache_seqlens: Tensor,
    num_heads_q: int,
    num_heads_kv: int,
    head_dim: int,
    *,
    plan: Tensor,
    **options: object,
) -> None:
    _lib.check_dtype("plan_decode", "cache_seqlens", cache_seqlens, (torch.int32,))
    _lib.check_dtype("plan_decode", "out", plan, (torch.int32,))
    check_devices("plan_decode", cache_seqlens, out=plan)


@_lib.register_fake("merge_attn_states")
def _(
    prefix_output: Tensor,
    prefix_lse: Tensor,
    suffix_output: Tensor,
    suffix_lse: Tensor,
    *,
    out: Tensor,
    out_lse: Tensor | None,
) -> None:
    name = "merge_attn_states"
    _lib.check_dtype(name, "prefix_output", prefix_output, _lib.FLOATS)
    for arg, t in (("suffix_output", suffix_output), ("out", out)):
        _lib.check(
            t.shape == prefix_output.shape and t.dtype == prefix_output.dtype,
            f"{name}: {arg} must be like prefix_output, got {_lib.describe(t)}",
        )
    check_devices(
        name,
        prefix_output,
        prefix_lse=prefix_lse,
        suffix_output=suffix_output,
        suffix_lse=suffix_lse,
        out=out,
        out_lse=out_lse,
    )
