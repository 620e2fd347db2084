"""Continuous batching of transformers before 5.20, where attention itself uses the cache.

Newer releases read and write the cache before they call attention, and give it `k_cache`, `v_cache`
and the block table of the layer in a decode step; older ones call an implementation named
"paged|<name>" with the cache object. This function turns one into the other.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from ._attention import fastinfer_attention

PREFIX = "paged|"


def fastinfer_paged_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    cache: Any,
    cu_seq_lens_q: Tensor,
    cu_seq_lens_k: Tensor | dict[str, Tensor],
    max_seqlen_q: int,
    max_seqlen_k: int | dict[str, int],
    block_table: Tensor | None = None,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """Attention of one layer over transformers' paged cache.

    Args:
        module, attention_mask: as in `fastinfer_attention`.
        query, key, value: [1, H, T, D], the new tokens of all sequences.
        cache: transformers' PagedAttentionCache.
        cu_seq_lens_q, cu_seq_lens_k, max_seqlen_q, max_seqlen_k: of the packed sequences; those of
            keys by kind of layer where a model has several.
        block_table: [groups, B, blocks], in steps with one new token per sequence; None: others.
        kwargs: `read_index` and `write_index` of the cache; the rest as in `fastinfer_attention`.

    Returns:
        ([1, T, Hq, D], None).
    """
    if isinstance(cu_seq_lens_k, dict):
        window = getattr(module, "sliding_window", None)
        kind = "sliding_attention" if window else "full_attention"
        cu_seq_lens_k, max_seqlen_k = cu_seq_lens_k[kind], max_seqlen_k[kind]
    if block_table is None:
        key, value = cache.update(
            key_states=key,
            value_states=value,
            layer_idx=module.layer_idx,
            read_index=kwargs.pop("read_index"),
            write_index=kwargs.pop("write_index"),
        )
        key, value = (t.transpose(0, 1)[None] for t in (key, value))  # [1, H, T, D], as `query`
    else:
        group, layer = cache.layer_index_to_group_indices[module.layer_idx]
        block_table = block_table[group]
        pages = (-1, cache.block_size, cache.num_key_value_heads, cache.head_dim)
        kwargs["k_cache"] = cache.key_cache[layer].view(pages)
        kwargs["v_cache"] = cache.value_cache[layer].view(pages)
    return fastinfer_attention(
        module,
        query,
        key,
        value,
        None,
        cu_seq_lens_q=cu_seq_lens_q,
        cu_seq_lens_k=cu_seq_lens_k,
        max_length_q=max_seqlen_q,
        max_length_k=max_seqlen_k,
        block_table=block_table,
        **kwargs,
    )


def no_mask(*args: Any, **kwargs: Any) -> None:
    """Packed sequences are described by their lengths."""
