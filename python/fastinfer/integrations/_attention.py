"""The attention function of `attn_implementation="fastinfer"`: one kernel call per layer.

mask                    operator
None, few queries       flash_attn_with_kvcache over all keys
None                    flash_attn_func (of the first Nq keys when causal)
int32 (see _masks.py)   flash_attn_with_kvcache with cache_seqlens and cache_leftpad
packed sequences        flash_attn_varlen_func
paged cache             flash_attn_with_kvcache with block_table, appending (decode steps of
                        continuous batching)
anything else           torch (_fallback.py)
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from .. import ops
from ._fallback import fallback, only_chosen, refuse_or_warn
from ._masks import decode, is_key_range, window_sides

_FEW_QUERIES = 16
# Arguments that change the result in a way only their models know.
_OF_OTHER_MODELS = ("block_indices", "sinks")


def fastinfer_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    is_causal: bool | None = None,
    s_aux: Tensor | None = None,
    position_bias: Tensor | None = None,
    output_attentions: bool = False,
    indices: Tensor | None = None,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """Attention of one layer of a transformers model, with transformers' calling convention.

    Args:
        module: the attention module; `is_causal` is read from it when not given.
        query: [B, Hq, Nq, D].
        key, value: [B, Hkv, Nk, D], heads not repeated.
        attention_mask: from `fastinfer_mask`, or a mask of the user [B, 1, Nq, Nk].
        dropout, position_bias, output_attentions, indices: not served by the kernels.
        scaling: factor of q . k; None: D ** -0.5.
        sliding_window: keys a query sees in causal attention, its own position included.
        softcap: scores become softcap * tanh(score / softcap).
        s_aux: [Hq], sinks.
        indices: [B, Nq, n], the keys that each query sees, of those that the mask leaves it.
        kwargs: `cu_seq_lens_q`, `cu_seq_lens_k`, `max_length_q`, `max_length_k` of packed inputs
            and `block_table`, `k_cache`, `v_cache` of continuous batching; the rest is ignored.

    Returns:
        ([B, Nq, Hq, D], None).

    Raises:
        RuntimeError: with FASTINFER_STRICT=1, instead of computing in torch what has no kernel;
            without, where torch would need to know the model.
    """
    for name in _OF_OTHER_MODELS:
        if kwargs.get(name) is not None:
            raise RuntimeError(
                f"fastinfer attention: {name} of {type(module).__name__} has no kernel; load the "
                'model with attn_implementation="sdpa" or "eager"'
            )
    causal = bool(getattr(module, "is_causal", True)) if is_causal is None else is_causal
    packed = kwargs.get("cu_seq_lens_q") is not None and kwargs.get("cu_seq_lens_k") is not None
    reason = _why_not(
        query, key, value, dropout if module.training else 0.0, position_bias, output_attentions
    )
    if indices is not None:
        reason = reason or "keys chosen for every query have no kernel"
        attention_mask = only_chosen(indices, attention_mask, query, key, causal)
    elif attention_mask is not None and not packed and not is_key_range(attention_mask):
        reason = reason or "masks other than causal, windowed and one-sided padding have no kernel"
    if reason is not None:
        if kwargs.get("block_table") is not None:
            raise RuntimeError(f"fastinfer attention: {reason}, which a paged cache needs")
        refuse_or_warn(reason)
        if packed and attention_mask is None:
            attention_mask = _packed_mask(query, key, causal, sliding_window, kwargs)
        return fallback(
            module,
            query,
            key,
            value,
            attention_mask,
            sliding_window=sliding_window,
            softcap=softcap,
            s_aux=s_aux,
            is_causal=causal,
            dropout=dropout,
            scaling=scaling,
            position_bias=position_bias,
            output_attentions=output_attentions,
        )

    # [B, N, H, D], as the operators take them: views.
    q, k, v = query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2)
    options: dict[str, Any] = {
        "softmax_scale": scaling,
        "softcap": softcap or 0.0,
        "sinks": None if s_aux is None else s_aux.to(q.dtype),
    }
    sides = window_sides(sliding_window, causal)
    if kwargs.get("block_table") is not None:
        return _paged(q, k, v, sides, options, kwargs), None
    if packed:
        return _packed(q, k, v, causal, sides, options, kwargs), None
    if attention_mask is not None:
        keys = decode(attention_mask)
        out = ops.flash_attn_with_kvcache(
            q,
            k,
            v,
            cache_seqlens=keys.count,
            cache_leftpad=keys.first,
            causal=keys.causal,
            window_size=keys.sides,
            **options,
        )
        return out, None
    if causal and q.shape[1] > 1 and k.shape[1] > q.shape[1]:
        k, v = k[:, : q.shape[1]], v[:, : q.shape[1]]  # the rest of a static cache is empty
    if q.shape[1] <= _FEW_QUERIES:
        return ops.flash_attn_with_kvcache(
            q, k, v, causal=causal, window_size=sides, **options
        ), None
    return ops.flash_attn_func(q, k, v, causal=causal, window_size=sides, **options), None


def _why_not(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    dropout: float,
    position_bias: Tensor | None,
    output_attentions: bool,
) -> str | None:
    """Why the kernels cannot take this call; None: they can."""
    if torch.is_grad_enabled() and (
        query.requires_grad or key.requires_grad or value.requires_grad
    ):
        return "gradients are not computed by inference kernels"
    if dropout:
        return "dropout has no kernel"
    if position_bias is not None:
        return "position biases have no kernel"
    if output_attentions:
        return "attention weights are not kept by the kernels"
    if query.dtype != key.dtype or query.dtype != value.dtype:
        return f"query, key and value differ in dtype ({query.dtype}, {key.dtype}, {value.dtype})"
    if query.dtype not in (torch.float16, torch.bfloat16) and (
        query.dtype != torch.float32 or query.device.type != "cpu"
    ):
        return f"{query.dtype} on {query.device.type} has no kernel"
    dim = query.shape[-1]
    if dim % 8 or not 16 <= dim <= 256 or value.shape[-1] != dim:
        return f"head_dim {dim} (values {value.shape[-1]}) has no kernel"
    if query.shape[1] % key.shape[1]:
        return f"{query.shape[1]} query heads over {key.shape[1]} key heads have no kernel"
    return None


def _paged(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    sides: tuple[int, int],
    options: dict[str, Any],
    kwargs: dict[str, Any],
) -> Tensor:
    """A decode step of continuous batching: one new token per sequence, [1, n, H, D], which the
    kernel also writes into the cache.
    """
    q, k, v = (t[0].unsqueeze(1) for t in (q, k, v))
    n = q.shape[0]
    starts = kwargs["cu_seq_lens_k"]
    cached = (starts[1 : n + 1] - starts[:n] - 1).to(torch.int32)
    out = ops.flash_attn_with_kvcache(
        q,
        kwargs["k_cache"],
        kwargs["v_cache"],
        k,
        v,
        cache_seqlens=cached,
        block_table=kwargs["block_table"],
        causal=True,
        window_size=sides,
        **options,
    )
    return out.transpose(0, 1)


def _packed(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    causal: bool,
    sides: tuple[int, int],
    options: dict[str, Any],
    kwargs: dict[str, Any],
) -> Tensor:
    """Sequences one after the other; the batch dimension is folded into them."""
    starts_q, starts_k = (kwargs[f"cu_seq_lens_{side}"].to(torch.int32) for side in "qk")
    longest = [kwargs.get(f"max_length_{side}") for side in "qk"]
    out = ops.flash_attn_varlen_func(
        q.flatten(0, 1),
        k.flatten(0, 1),
        v.flatten(0, 1),
        starts_q,
        starts_k,
        q.shape[0] * q.shape[1] if longest[0] is None else int(longest[0]),
        k.shape[0] * k.shape[1] if longest[1] is None else int(longest[1]),
        causal=causal,
        window_size=sides,
        **options,
    )
    return out.view(q.shape)


def _packed_mask(
    query: Tensor, key: Tensor, causal: bool, window: int | None, kwargs: dict[str, Any]
) -> Tensor:
    """Packed sequences as a mask, bool [1, 1, Nq, Nk], for calls that the kernels cannot take."""
    place = []
    for side, t in (("q", query), ("k", key)):
        starts = kwargs[f"cu_seq_lens_{side}"]
        at = torch.arange(t.shape[2], device=t.device)
        sequence = torch.searchsorted(starts[1:].contiguous(), at, right=True)
        left = starts[1:][sequence.clamp(max=starts.numel() - 2)] - at  # counted from the end
        place.append((sequence, -left))
    (a, i), (b, j) = place
    seen = a[:, None] == b[None]
    if causal:
        seen &= j[None] <= i[:, None]
        if window:
            seen &= j[None] > i[:, None] - window
    return seen[None, None]
