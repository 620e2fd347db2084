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
    seen = visible.any(0)[:, None, None] if len_q else torch.zeros(len_k, 1, 1, dtype=torch.bool)
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
