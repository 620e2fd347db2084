"""Attention in plain torch: what the kernels are tested against, and a readable statement of the
semantics. Slow (a Python loop over sequences, the whole score matrix in memory), any device.

Every function takes `compute_dtype`: float64 gives the reference; the dtype of q gives "the same
maths in torch at that dtype", the baseline of the error rule.
"""

from __future__ import annotations

import torch
from torch import Tensor


def visible_mask(
    len_q: int,
    len_k: int,
    causal: bool,
    window: tuple[int, int],
    first_key: int = 0,
    device: torch.device | None = None,
) -> Tensor:
    """bool [len_q, len_k]: query i sees key j. Masks align the last query with the last key."""
    at = torch.arange(len_q, device=device)[:, None] + len_k - len_q
    j = torch.arange(len_k, device=device)[None, :]
    left, right = window
    right = 0 if causal else right
    visible = (j >= first_key).expand(len_q, len_k)
    if left >= 0:
        visible = visible & (j >= at - left)
    if right >= 0:
        visible = visible & (j <= at + right)
    return visible


def attend_reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    sinks: Tensor | None = None,
    first_key: int = 0,
    compute_dtype: torch.dtype = torch.float64,
) -> tuple[Tensor, Tensor]:
    """One sequence: q [Sq, Hq, D], k and v [Sk, Hkv, D] -> (out [Sq, Hq, D], lse [Hq, Sq]).

    A query without visible keys gives 0 and -inf. Invisible keys and values are not looked at.
    """
    len_q, heads, dim = q.shape
    len_k, heads_kv, _ = k.shape
    group = heads // heads_kv
    scale = dim**-0.5 if softmax_scale is None else softmax_scale
    visible = visible_mask(len_q, len_k, causal, window_size, first_key, q.device)
    # A value times a zero probability must not turn a NaN in an unseen row into a NaN result.
    seen = visible.any(0)[:, None, None]
    k, v = (torch.where(seen, t.to(compute_dtype), 0) for t in (k, v))
    k, v = (t.repeat_interleave(group, dim=1).transpose(0, 1) for t in (k, v))
    scores = q.to(compute_dtype).transpose(0, 1) @ (k * scale).transpose(1, 2)
    if softcap > 0:
        scores = softcap * torch.tanh(scores / softcap)
    if alibi_slopes is not None:
        at = torch.arange(len_q, device=q.device)[:, None] + len_k - len_q
        distance = (at - torch.arange(len_k, device=q.device)[None, :]).abs()
        scores = scores - (alibi_slopes.to(torch.float64)[:, None, None] * distance).to(scores)
    scores = scores.masked_fill(~visible, float("-inf"))
    lse = torch.logsumexp(scores.to(max_precision(compute_dtype)), dim=-1)
    empty = torch.isneginf(lse)
    total = lse
    if sinks is not None:
        total = torch.logaddexp(lse, sinks.to(lse)[:, None].expand_as(lse))
        total = total.masked_fill(empty, float("-inf"))
    origin = total.masked_fill(empty, 0.0)
    probabilities = torch.exp(scores.to(origin.dtype) - origin[..., None]).to(compute_dtype)
    return (probabilities @ v).transpose(0, 1), total


def max_precision(dtype: torch.dtype) -> torch.dtype:
    """fp32 for the softmax of 16-bit baselines, else the dtype itself."""
    return torch.promote_types(dtype, torch.float32)


def dequantize_cache(codes: Tensor, scale: Tensor | None, dtype: torch.dtype) -> Tensor:
    """Keys or values [..., Hkv, D] in `dtype`; 8-bit codes times their scale."""
    values = codes.to(dtype)
    if scale is None:
        return values
    if scale.dim() == codes.dim() - 1:
        scale = scale[..., None]
    elif scale.numel() > 1:
        scale = scale[:, None]
    return (values.to(max_precision(dtype)) * scale.to(max_precision(dtype))).to(dtype)


def quantize_rows(x: Tensor, dtype: torch.dtype, scale: Tensor | None) -> tuple[Tensor, Tensor]:
    """Codes of x [..., Hkv, D] and the scales [..., Hkv] used; scale=None computes them per row."""
    largest = 127.0 if dtype == torch.int8 else 448.0
    x = x.float()
    if scale is None:
        scale = x.abs().amax(-1) / largest
        scale = torch.where(scale > 0, scale, 1.0)
    scale = scale.expand(x.shape[:-1])
    codes = (x / scale[..., None]).clamp(-largest, largest)
    return (codes.round() if dtype == torch.int8 else codes).to(dtype), scale


def rotate_reference(
    x: Tensor, cos: Tensor, sin: Tensor, positions: Tensor, interleaved: bool
) -> Tensor:
    """Rotary embedding of x [S, H, D] at positions [S]; cos, sin [max_pos, rotary_dim / 2]."""
    half = cos.shape[1]
    c, s = cos.float()[positions][:, None], sin.float()[positions][:, None]
    y = x.float().clone()
    if interleaved:
        a, b = slice(0, 2 * half, 2), slice(1, 2 * half, 2)
    else:
        a, b = slice(0, half), slice(half, 2 * half)
    first, second = x.float()[..., a], x.float()[..., b]
    y[..., a] = first * c - second * s
    y[..., b] = second * c + first * s
    return y.to(x.dtype)


def paged_rows(cache: Tensor, block_row: Tensor, length: int) -> Tensor:
    """The first `length` rows that one row of a block table addresses."""
    size = cache.shape[1]
    blocks = [cache[int(block_row[i])] for i in range(-(-length // size))]
    return torch.cat(blocks)[:length] if blocks else cache[:0].flatten(0, 1)


def slopes_of(alibi_slopes: Tensor | None, b: int) -> Tensor | None:
    """ALiBi slopes [Hq] of sequence b."""
    return alibi_slopes if alibi_slopes is None or alibi_slopes.dim() == 1 else alibi_slopes[b]


def flash_attn_func_reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    alibi_slopes: Tensor | None = None,
    k_scale: Tensor | None = None,
    v_scale: Tensor | None = None,
    compute_dtype: torch.dtype = torch.float64,
    **features: object,
) -> tuple[Tensor, Tensor]:
    """flash_attn_func in plain torch: (out, lse) in compute_dtype. `features`: softmax_scale,
    causal, window_size, softcap, sinks."""
    k = dequantize_cache(k, k_scale, compute_dtype)
    v = dequantize_cache(v, v_scale, compute_dtype)
    out = torch.zeros(q.shape, dtype=compute_dtype, device=q.device)
    lse = torch.zeros(q.shape[0], q.shape[2], q.shape[1], dtype=torch.float64, device=q.device)
    for b in range(q.shape[0]):
        slopes = slopes_of(alibi_slopes, b)
        out[b], lse[b] = attend_reference(
            q[b], k[b], v[b], alibi_slopes=slopes, compute_dtype=compute_dtype, **features
        )
    return out, lse


def flash_attn_varlen_func_reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor | None,
    *,
    block_table: Tensor | None = None,
    seqused_k: Tensor | None = None,
    alibi_slopes: Tensor | None = None,
    k_scale: Tensor | None = None,
    v_scale: Tensor | None = None,
    compute_dtype: torch.dtype = torch.float64,
    **features: object,
) -> tuple[Tensor, Tensor]:
    """flash_attn_varlen_func in plain torch: (out, lse) in compute_dtype; rows of no sequence are
    0."""
    k = dequantize_cache(k, k_scale, compute_dtype)
    v = dequantize_cache(v, v_scale, compute_dtype)
    out = torch.zeros(q.shape, dtype=compute_dtype, device=q.device)
    lse = torch.zeros(q.shape[1], q.shape[0], dtype=torch.float64, device=q.device)
    for b in range(cu_seqlens_q.numel() - 1):
        rows = slice(int(cu_seqlens_q[b]), int(cu_seqlens_q[b + 1]))
        start = 0 if cu_seqlens_k is None else int(cu_seqlens_k[b])
        length = int(cu_seqlens_k[b + 1]) - start if cu_seqlens_k is not None else 0
        length = length if seqused_k is None else int(seqused_k[b])
        if block_table is None:
            keys, values = k[start : start + length], v[start : start + length]
        else:
            keys, values = (paged_rows(t, block_table[b], length) for t in (k, v))
        slopes = slopes_of(alibi_slopes, b)
        out[rows], lse[:, rows] = attend_reference(
            q[rows], keys, values, alibi_slopes=slopes, compute_dtype=compute_dtype, **features
        )
    return out, lse


def flash_attn_with_kvcache_reference(
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
    *,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    rotary_interleaved: bool = True,
    alibi_slopes: Tensor | None = None,
    k_scale: Tensor | None = None,
    v_scale: Tensor | None = None,
    compute_dtype: torch.dtype = torch.float64,
    **features: object,
) -> tuple[Tensor, Tensor]:
    """flash_attn_with_kvcache in plain torch: (out, lse) in compute_dtype; appends in place too.
    `features`: softmax_scale, softcap, sinks."""
    batch, len_q = q.shape[:2]
    capacity = k_cache.shape[1] * (1 if block_table is None else block_table.shape[1])
    out = torch.zeros(q.shape, dtype=compute_dtype, device=q.device)
    lse = torch.zeros(batch, q.shape[2], len_q, dtype=torch.float64, device=q.device)
    for b in range(batch):
        length = capacity if cache_seqlens is None else cache_seqlens
        length = int(length[b]) if isinstance(length, Tensor) else length
        row = b if cache_batch_idx is None else int(cache_batch_idx[b])
        query = q[b]
        if k is not None and v is not None:
            new = torch.arange(length, length + k.shape[1], device=q.device)
            key = k[b]
            if rotary_cos is not None and rotary_sin is not None:
                table = (rotary_cos, rotary_sin)
                key = rotate_reference(key, *table, new, rotary_interleaved)
                per_token = causal or max(window_size) >= 0
                at = length + torch.arange(len_q, device=q.device) * int(per_token)
                query = rotate_reference(query, *table, at, rotary_interleaved)
            if block_table is None:
                where = (torch.full_like(new, row), new)
            else:
                where = (block_table[b].long()[new // k_cache.shape[1]], new % k_cache.shape[1])
            append_rows(k_cache, k_scale, where, key)
            append_rows(v_cache, v_scale, where, v[b])
            length += k.shape[1]
        keys, values = (
            cached_rows(t, s, row, block_table, b, length, compute_dtype)
            for t, s in ((k_cache, k_scale), (v_cache, v_scale))
        )
        slopes = slopes_of(alibi_slopes, b)
        out[b], lse[b] = attend_reference(
            query,
            keys,
            values,
            causal=causal,
            window_size=window_size,
            alibi_slopes=slopes,
            first_key=0 if cache_leftpad is None else int(cache_leftpad[b]),
            compute_dtype=compute_dtype,
            **features,
        )
    return out, lse


def append_rows(
    cache: Tensor, scale: Tensor | None, where: tuple[Tensor, Tensor], x: Tensor
) -> None:
    """Write x [Snew, Hkv, D] to (rows, slots) of a cache, quantising when it is 8-bit."""
    if cache.dtype == x.dtype:
        cache[where] = x
        return
    per_token = scale is not None and scale.dim() == 3
    static = torch.ones(1, device=x.device) if scale is None else scale
    codes, used = quantize_rows(x, cache.dtype, None if per_token else static)
    cache.view(torch.uint8)[where] = codes.view(torch.uint8)
    if per_token:
        scale[where] = used


def cached_rows(
    cache: Tensor,
    scale: Tensor | None,
    row: int,
    block_table: Tensor | None,
    b: int,
    length: int,
    dtype: torch.dtype,
) -> Tensor:
    """Keys or values [length, Hkv, D] of one sequence."""
    per_token = scale is not None and scale.dim() == 3
    if block_table is None:
        codes, scale = cache[row, :length], scale[row, :length] if per_token else scale
    else:
        codes = paged_rows(cache, block_table[b], length)
        scale = paged_rows(scale, block_table[b], length) if per_token else scale
    return dequantize_cache(codes, scale, dtype)


def plan_decode_reference(
    cache_seqlens: Tensor,
    num_heads_kv: int,
    *,
    q_len: int = 1,
    append: int = 0,
    window_size: tuple[int, int] = (-1, -1),
    num_slots: int,
    batch_invariant: bool = False,
) -> Tensor:
    """plan_decode in plain Python."""
    sums = [0]
    for cached in cache_seqlens.tolist():
        length = cached + append
        first = 0 if window_size[0] < 0 else max(0, length - q_len - window_size[0])
        sums.append(sums[-1] + max(1, -(-length // 64) - min(first, length) // 64))
    share = 0 if batch_invariant else max(1, -(-num_heads_kv * sums[-1] // num_slots))
    header = [1, len(sums) - 1, num_heads_kv, q_len, append, 64, num_slots, share]
    return torch.tensor(header + sums, dtype=torch.int32, device=cache_seqlens.device)


def merge_attn_states_reference(
    prefix_output: Tensor, prefix_lse: Tensor, suffix_output: Tensor, suffix_lse: Tensor
) -> tuple[Tensor, Tensor]:
    """merge_attn_states in plain torch, fp64: (out, lse)."""
    a, b = prefix_lse.double(), suffix_lse.double()
    a, b = (torch.where(x == float("inf"), float("-inf"), x) for x in (a, b))
    lse = torch.logaddexp(a, b)
    origin = torch.where(torch.isneginf(lse), 0.0, lse)
    out = torch.zeros(prefix_output.shape, dtype=torch.float64, device=prefix_output.device)
    for x, part in ((a, prefix_output), (b, suffix_output)):
        weight = torch.exp(x - origin).transpose(-1, -2)[..., None]
        out = out + torch.where(weight > 0, part.double() * weight, 0.0)
    return out, lse
