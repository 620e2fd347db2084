"""Decoding of sequences that begin with the same cached blocks (cascade attention): the common part
is read once for all of them, the rest per sequence, and the two results are merged by their LSE.
"""

from __future__ import annotations

from torch import Tensor

from .. import _lib
from .paged_attention import flash_attn_with_kvcache, merge_attn_states

__all__ = ["flash_attn_with_shared_prefix", "shared_prefix_saves"]


def flash_attn_with_shared_prefix(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    prefix_len: int,
    cache_seqlens: Tensor,
    block_table: Tensor,
    *,
    softmax_scale: float | None = None,
    softcap: float = 0.0,
    sinks: Tensor | None = None,
    k_scale: Tensor | None = None,
    v_scale: Tensor | None = None,
    out: Tensor | None = None,
    return_softmax_lse: bool = False,
    workspace: Tensor | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """flash_attn_with_kvcache(causal=True) of sequences whose first prefix_len keys are the same.

    All queries attend to the prefix as one sequence, so its keys are read once instead of once per
    sequence; then each sequence attends to its own keys. Both results are rounded to the dtype of q
    before they are merged.

    Args:
        q: [B, Sq, Hq, D], B and Sq mergeable into one dimension (contiguous is fine).
        k_cache: [num_blocks, P, Hkv, D], the new keys already in it; v_cache likewise.
        prefix_len: keys in common, a multiple of P. The first row of block_table says where.
        cache_seqlens: int32 [B], at least prefix_len + Sq each: no query lies within the prefix.
        block_table: int32 [B, max_blocks]; the first prefix_len / P entries of a row are taken from
            the first row.
        softmax_scale, softcap, sinks, k_scale, v_scale, workspace: as in `flash_attn_with_kvcache`.
        out: tensor like q to write to.
        return_softmax_lse: also return the LSE.

    Returns:
        out [B, Sq, Hq, D], or (out, lse) with lse fp32 [B, Hq, Sq].

    Raises:
        RuntimeError: as `flash_attn_with_kvcache`; prefix_len is not a multiple of the block size.

    Reference: Ye et al., "Cascade Inference" (FlashInfer), 2024.
    """
    name = "flash_attn_with_shared_prefix"
    _lib.require_tensors(
        name, q=q, k_cache=k_cache, cache_seqlens=cache_seqlens, block_table=block_table
    )
    _lib.check(q.dim() == 4, f"{name}: q must have 4 dimensions, got {_lib.describe(q)}")
    block_size = k_cache.shape[1]
    _lib.check(
        prefix_len >= 0 and prefix_len % block_size == 0,
        f"{name}: prefix_len must be a multiple of the block size ({block_size}), got {prefix_len}",
    )
    batch, len_q, heads, dim = q.shape
    common = {"softmax_scale": softmax_scale, "softcap": softcap, "workspace": workspace}
    common |= {"k_scale": k_scale, "v_scale": v_scale, "return_softmax_lse": True}
    blocks = prefix_len // block_size
    # Lengths are made right in front of the kernel that reads them before its wait: no PDL here.
    with _lib.programmatic_launch(False):
        prefix, prefix_lse = flash_attn_with_kvcache(
            q.reshape(1, batch * len_q, heads, dim),
            k_cache,
            v_cache,
            cache_seqlens=prefix_len,
            block_table=block_table[:1, :blocks],
            **common,
        )
        # A sink is one more term of the sum and must come in once.
        suffix, suffix_lse = flash_attn_with_kvcache(
            q,
            k_cache,
            v_cache,
            cache_seqlens=cache_seqlens - prefix_len,
            block_table=block_table[:, blocks:],
            causal=True,
            sinks=sinks,
            **common,
        )
    return merge_attn_states(
        prefix.view(batch, len_q, heads, dim),
        prefix_lse.view(heads, batch, len_q).transpose(0, 1),
        suffix,
        suffix_lse,
        out=out,
        return_lse=return_softmax_lse,
    )


def shared_prefix_saves(
    batch: int,
    prefix_len: int,
    key_bytes: int,
    *,
    bandwidth: float = 4.5e12,
    overhead: float = 1.5e-5,
    per_sequence: float = 1.5e-6,
) -> bool:
    """Whether reading the prefix once is estimated to save more time than it costs.

    The defaults are fitted to an H100 (docs/kernels/paged_attention.md).

    Args:
        batch: sequences that share it.
        prefix_len: its keys.
        key_bytes: bytes of K and V of one key in all heads, 2 * Hkv * D * element size.
        bandwidth: bytes per second at which a prefix is read again, in part from the L2 cache.
        overhead: seconds for the second attention call and the merge.
        per_sequence: seconds that the queries of one sequence take in the call for the prefix.
    """
    saved = (batch - 1) * prefix_len * key_bytes / bandwidth
    return saved > overhead + batch * per_sequence
