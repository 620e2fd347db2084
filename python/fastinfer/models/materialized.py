"""Attention as plain torch does it: every score of a query with a key is written to memory.

    scores [B, Hq, Sq, Sk] = q k^T * D^-0.5;  p = softmax(scores), fp32;  out = p v

Sequences are padded to the longest of the step, keys and values are gathered out of the cache and
repeated to one head per query head. What the attention operators do without any of these copies;
here to be compared with (`EngineConfig.fused_attention`).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from .attention import AttentionMetadata, LayerCache


def attend(q: Tensor, meta: AttentionMetadata, cache: LayerCache, window: int) -> Tensor:
    """q [T, Hq, D], already rotated and its keys in the cache -> [T, Hq, D].

    Args:
        q: the packed tokens of all sequences of a step.
        meta: where they are.
        cache: of the layer.
        window: keys to the left of a query that it sees; -1: all.
    """
    tokens, heads = q.shape[0], q.shape[1]
    ends = meta.cu_seqlens_q[1:].long()
    lengths = ends - meta.cu_seqlens_q[:-1]
    sequence = torch.searchsorted(ends, torch.arange(tokens, device=q.device), right=True)
    sequence.clamp_(max=ends.numel() - 1)
    at = torch.arange(tokens, device=q.device) - (ends - lengths)[sequence]
    padded = q.new_zeros(ends.numel(), meta.max_seqlen_q, *q.shape[1:])
    padded[sequence, at] = q

    table = meta.block_table.long().clamp(0, cache.k.shape[0] - 1)
    longest = min(meta.max_seqlen_k, table.shape[1] * cache.k.shape[1])
    keys = _gather(cache.k, cache.k_scale, table, longest, q.dtype)
    values = _gather(cache.v, cache.v_scale, table, longest, q.dtype)
    place = torch.arange(longest, device=q.device)
    known = place < meta.seq_lens[:, None]  # beyond it the cache may hold anything
    keys, values = (x.masked_fill(~known[:, :, None, None], 0.0) for x in (keys, values))
    repeats = heads // keys.shape[2]
    keys, values = (x.repeat_interleave(repeats, dim=2) for x in (keys, values))

    scores = padded.transpose(1, 2) @ keys.permute(0, 2, 3, 1) * q.shape[2] ** -0.5
    positions = (meta.seq_lens - lengths)[:, None] + torch.arange(
        meta.max_seqlen_q, device=q.device
    )
    seen = known[:, None] & (place <= positions[:, :, None])
    if window >= 0:
        seen &= place >= positions[:, :, None] - window
    scores = scores.masked_fill(~seen[:, None], -torch.inf)
    weights = torch.softmax(scores, dim=-1, dtype=torch.float32).nan_to_num(0.0).to(q.dtype)
    out = (weights @ values.transpose(1, 2)).transpose(1, 2)
    return out[sequence, at]


def _gather(
    pages: Tensor, scale: Tensor | None, table: Tensor, longest: int, dtype: torch.dtype
) -> Tensor:
    """The first `longest` tokens of each sequence, [B, longest, Hkv, D]."""
    size = pages.shape[1]
    place = torch.arange(longest, device=pages.device)
    block, offset = table[:, place // size], place % size
    if scale is None:
        return pages[block, offset].to(dtype)
    found = pages.view(torch.uint8)[block, offset].view(pages.dtype).float()
    factor = scale[block, offset][..., None] if scale.dim() == 3 else scale.view(-1, 1)
    return (found * factor).to(dtype)
