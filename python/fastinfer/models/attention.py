"""Self-attention over a paged key/value cache, and the two records that describe a step to it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from fastinfer import ops

from . import materialized
from .config import ModelConfig
from .layers import Linear, RMSNorm
from .rotary import RotaryTable
from .shard import WHOLE, Shard


@dataclass(slots=True)
class AttentionMetadata:
    """One step: T packed tokens of B sequences, prefill chunks and decodes mixed in any order.

    All tensors are on the model's device. Padding rows (for CUDA graphs) have slot -1 and sequence
    length 0.
    """

    positions: Tensor  # int64 [T], position of each token in its sequence
    slot_mapping: Tensor  # int64 [T], block * P + offset; -1: do not write
    cu_seqlens_q: Tensor  # int32 [B+1], where the tokens of each sequence begin
    seq_lens: Tensor  # int32 [B], keys visible after this step's write
    block_table: Tensor  # int32 [B, max_blocks]; entries past a sequence's length may hold anything
    max_seqlen_q: int
    max_seqlen_k: int
    # Sequences of `decode_len` tokens at the beginning; None: all, if max_seqlen_q is 1, else not
    # known (0).
    num_decodes: int | None = None
    cu_seqlens_rest: Tensor | None = None  # int32, of the other ones, from 0; None: there are none
    plans: Mapping[tuple[int, int], Tensor] | None = None  # of `plan_decode`, by window of a layer
    decode_len: int = 1  # tokens of each of these sequences
    workspace: Tensor | None = None  # of `flash_attn_with_kvcache`: zeroed once, one per stream


@dataclass(slots=True)
class LayerCache:
    """Keys and values of one layer, each [num_blocks, P, Hkv, D]; scales only for 8-bit caches."""

    k: Tensor
    v: Tensor
    k_scale: Tensor | None = None  # fp32 scalar, [Hkv] or [num_blocks, P, Hkv]
    v_scale: Tensor | None = None


class SelfAttention(nn.Module):
    """Projections, per-head norms, rotary positions, cache write, attention.

    Args:
        config: of the whole model.
        layer: index of the layer in it; decides its window.
        dtype: of the parameters.
        shard: which heads are here.
    """

    batch_invariant = False
    fused = True  # see `CausalLM.set_attention`
    share_heads = True

    def __init__(
        self, config: ModelConfig, layer: int, *, dtype: torch.dtype, shard: Shard = WHOLE
    ) -> None:
        super().__init__()
        self.head_dim = config.head_dim
        self.window = config.window_of(layer)
        q = shard.heads(config.num_heads, config.head_dim)
        kv = shard.heads(config.num_kv_heads, config.head_dim)
        self.num_heads = q.size // config.head_dim
        self.num_kv_heads = kv.size // config.head_dim
        self.qkv_proj = Linear(
            config.hidden_size,
            {"q": q, "k": kv, "v": kv},
            bias=config.qkv_bias,
            dtype=dtype,
        )
        self.o_proj = Linear(q, {"o": config.hidden_size}, bias=config.o_bias, dtype=dtype)
        norms = config.qk_norm
        self.q_norm = RMSNorm(config.head_dim, config.rms_norm_eps, dtype=dtype) if norms else None
        self.k_norm = RMSNorm(config.head_dim, config.rms_norm_eps, dtype=dtype) if norms else None

    def forward(
        self, x: Tensor, meta: AttentionMetadata, cache: LayerCache, rotary: RotaryTable
    ) -> Tensor:
        """x [T, hidden] -> [T, hidden]; writes these tokens' keys and values into the cache."""
        heads = self.qkv_proj(x).view(x.shape[0], -1, self.head_dim)
        q, k, v = heads.split((self.num_heads, self.num_kv_heads, self.num_kv_heads), dim=1)
        if self.q_norm is not None and self.k_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        if not self.share_heads:
            repeats = self.num_heads // self.num_kv_heads
            k, v = ops.repeat_kv(k, repeats), ops.repeat_kv(v, repeats)
        ops.apply_rotary_and_cache(
            q,
            k,
            v,
            rotary.cos,
            rotary.sin,
            meta.positions,
            cache.k,
            cache.v,
            meta.slot_mapping,
            k_scale=cache.k_scale,
            v_scale=cache.v_scale,
        )
        return self.o_proj(self._attend(q, meta, cache).flatten(1))

    def _attend(self, q: Tensor, meta: AttentionMetadata, cache: LayerCache) -> Tensor:
        """q [T, Hq, D], already rotated -> [T, Hq, D]."""
        if not self.fused:
            return materialized.attend(q, meta, cache, self.window[0])
        tokens, sequences = q.shape[0], meta.seq_lens.shape[0]
        decodes = meta.num_decodes
        if decodes is None:
            decodes = sequences if meta.max_seqlen_q == 1 and tokens == sequences else 0
        if decodes == 0 or self.batch_invariant:
            # A batch-invariant row goes through the same operator whatever shares its step.
            return self._prefill(q, meta, cache, 0, meta.cu_seqlens_q, None)
        if decodes * meta.decode_len == tokens:
            return self._decode(q, meta, cache, decodes, None)
        out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
        self._decode(q[:decodes], meta, cache, decodes, out[:decodes])
        assert meta.cu_seqlens_rest is not None
        self._prefill(q[decodes:], meta, cache, decodes, meta.cu_seqlens_rest, out[decodes:])
        return out

    def _decode(
        self,
        q: Tensor,
        meta: AttentionMetadata,
        cache: LayerCache,
        count: int,
        out: Tensor | None,
    ) -> Tensor:
        """The first `count` sequences, of equally many tokens."""
        return ops.flash_attn_with_kvcache(
            q.unflatten(0, (count, -1)),
            cache.k,
            cache.v,
            cache_seqlens=meta.seq_lens[:count],
            block_table=meta.block_table[:count],
            causal=True,
            window_size=self.window,
            k_scale=cache.k_scale,
            v_scale=cache.v_scale,
            plan=None if meta.plans is None else meta.plans[self.window],
            workspace=meta.workspace,
            out=None if out is None else out.unflatten(0, (count, -1)),
        ).flatten(0, 1)

    def _prefill(
        self,
        q: Tensor,
        meta: AttentionMetadata,
        cache: LayerCache,
        first: int,
        cu_seqlens: Tensor,
        out: Tensor | None,
    ) -> Tensor:
        """The sequences from `first` on."""
        return ops.flash_attn_varlen_func(
            q,
            cache.k,
            cache.v,
            cu_seqlens,
            None,
            meta.max_seqlen_q,
            meta.max_seqlen_k,
            causal=True,
            window_size=self.window,
            block_table=meta.block_table[first:],
            seqused_k=meta.seq_lens[first:],
            k_scale=cache.k_scale,
            v_scale=cache.v_scale,
            batch_invariant=self.batch_invariant,
            out=out,
        )
