"""What happens to attention calls that the kernels do not serve: SDPA or plain torch, said once."""

from __future__ import annotations

import os
import warnings
from typing import Any

import torch
from torch import Tensor, nn
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from ._masks import as_bool, is_key_range, window_sides

_said: set[str] = set()


def refuse_or_warn(reason: str) -> None:
    """One warning per reason; RuntimeError with FASTINFER_STRICT=1. In compiled code both happen
    while it is traced.
    """
    if _announce(reason):
        raise RuntimeError(
            f"fastinfer attention: {reason}; unset FASTINFER_STRICT to let torch compute it"
        )


@torch.compiler.assume_constant_result
def _announce(reason: str) -> bool:
    """Whether to raise; warns when that is not wanted."""
    if os.environ.get("FASTINFER_STRICT") == "1":
        return True
    if reason not in _said:
        _said.add(reason)
        warnings.warn(
            f"fastinfer attention: {reason}: torch computes it instead (this is said once)",
            stacklevel=4,
        )
    return False


def fallback(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    sliding_window: int | None,
    softcap: float | None,
    s_aux: Tensor | None,
    is_causal: bool,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """The same attention in torch, differentiable. Arguments as in `fastinfer_attention`."""
    q_length, kv_length = query.shape[2], key.shape[2]
    if attention_mask is not None and is_key_range(attention_mask):
        attention_mask = as_bool(attention_mask, q_length, kv_length)
    elif attention_mask is None and is_causal and q_length > 1:
        # The mask function returns None only for queries that start at the first key.
        key, value = key[:, :, :q_length], value[:, :, :q_length]
        kv_length = key.shape[2]
        left, _ = window_sides(sliding_window, True)
        i = torch.arange(q_length, device=query.device)[:, None]
        j = torch.arange(kv_length, device=query.device)[None]
        if 0 <= left < kv_length - 1:
            attention_mask = ((j <= i) & (j >= i - left))[None, None]
        elif softcap or s_aux is not None:
            attention_mask = (j <= i)[None, None]
    if not softcap and s_aux is None and not kwargs.get("output_attentions"):
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, is_causal=is_causal, **kwargs
        )
    return plain_attention(
        module, query, key, value, attention_mask, softcap=softcap, s_aux=s_aux, **kwargs
    )


def only_chosen(
    indices: Tensor, attention_mask: Tensor | None, query: Tensor, key: Tensor, causal: bool
) -> Tensor:
    """The mask, without the keys that are not among a query's `indices`; negative ones are none."""
    q_length, kv_length = query.shape[2], key.shape[2]
    chosen = indices.new_zeros((*indices.shape[:2], kv_length + 1), dtype=torch.bool)
    indices = indices.long()
    chosen.scatter_(2, torch.where(indices < 0, kv_length, indices), True)
    seen = chosen[:, None, :, :kv_length]
    if attention_mask is None:
        if causal and q_length > 1:
            seen = seen & torch.ones_like(seen[:1]).tril()
        return seen
    if is_key_range(attention_mask):
        attention_mask = as_bool(attention_mask, q_length, kv_length)
    if attention_mask.dtype == torch.bool:
        return attention_mask & seen
    return attention_mask.masked_fill(~seen, torch.finfo(attention_mask.dtype).min)


def plain_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    scaling: float | None = None,
    dropout: float = 0.0,
    position_bias: Tensor | None = None,
    **kwargs: Any,
) -> tuple[Tensor, Tensor]:
    """Attention with every score in memory: softcap, sinks and weights, which SDPA lacks."""
    groups = query.shape[1] // key.shape[1]
    key, value = (t.repeat_interleave(groups, dim=1) for t in (key, value))
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    scores = (query @ key.transpose(2, 3)).float() * scale
    if softcap:
        scores = softcap * torch.tanh(scores / softcap)
    if position_bias is not None:
        scores = scores + position_bias
    if attention_mask is not None:
        if attention_mask.dtype == torch.bool:
            scores = scores.masked_fill(~attention_mask, torch.finfo(torch.float32).min)
        else:
            scores = scores + attention_mask
    if s_aux is not None:
        sink = s_aux.float().reshape(1, -1, 1, 1).expand(*scores.shape[:3], 1)
        scores = torch.cat([scores, sink], dim=-1)
    weights = torch.softmax(scores, dim=-1)[..., : key.shape[2]].to(query.dtype)
    dropped = nn.functional.dropout(weights, p=dropout, training=module.training)
    return (dropped @ value).transpose(1, 2).contiguous(), weights
