"""The decoder-only transformer of every supported family: one class, flags from `ModelConfig`.

Per layer, with the residual stream r kept separately so that each addition fuses with the norm
after it:

    r += x;  x = attention(norm1(r))        r += x;  x = W_down (silu(W_gate norm2(r)) * W_up
    norm2(r))

Every operator between the embedding lookup and the logits is one of `fastinfer.ops`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor, nn

from fastinfer import ops

from .attention import AttentionMetadata, LayerCache, SelfAttention
from .config import ModelConfig
from .layers import Embedding, Linear, ParallelEmbedding, ParallelRMSNorm, RMSNorm
from .rotary import RotaryTable
from .shard import WHOLE, Shard


class MLP(nn.Module):
    """Gated feed-forward: down(silu(gate(x)) * up(x)), gate and up multiplied as one matrix."""

    def __init__(self, config: ModelConfig, *, dtype: torch.dtype, shard: Shard = WHOLE) -> None:
        super().__init__()
        hidden, inner = config.hidden_size, shard.inner(config.intermediate_size)
        bias = config.mlp_bias
        self.gate_up_proj = Linear(hidden, {"gate": inner, "up": inner}, bias=bias, dtype=dtype)
        self.down_proj = Linear(inner, {"down": hidden}, bias=bias, dtype=dtype)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(ops.silu_and_mul(self.gate_up_proj(x)))


class DecoderLayer(nn.Module):
    """One attention block and one feed-forward block: both leave a sum over the ranks to be taken,
    which the norm after them does.
    """

    def __init__(
        self, config: ModelConfig, layer: int, *, dtype: torch.dtype, shard: Shard = WHOLE
    ) -> None:
        super().__init__()
        self.input_norm = _norm(config, dtype, shard)
        self.attn = SelfAttention(config, layer, dtype=dtype, shard=shard)
        self.post_norm = _norm(config, dtype, shard)
        self.mlp = MLP(config, dtype=dtype, shard=shard)

    def forward(
        self,
        x: Tensor,
        residual: Tensor | None,
        meta: AttentionMetadata,
        cache: LayerCache,
        rotary: RotaryTable,
    ) -> tuple[Tensor, Tensor]:
        """(x, residual), both [T, hidden] -> the same pair, not yet added together."""
        if residual is None:
            residual, x = x, self.input_norm(x)
        else:
            x = self.input_norm.add(x, residual)
        x = self.attn(x, meta, cache, rotary)
        x = self.post_norm.add(x, residual)
        return self.mlp(x), residual


class CausalLM(nn.Module):
    """A decoder with its output head, or the part of it that a shard says.

    Args:
        config: of the checkpoint.
        dtype: of the parameters; `config.dtype` of the model says the same.
        max_model_len: positions the rotary tables cover, in tokens; None: `config.max_position`.
        shard: which part.

    Attributes:
        config: `ModelConfig` of this part: its layers, its heads.
        whole: `ModelConfig` of the checkpoint.
        shard: which part.
        max_model_len: longest sequence (prompt + output) the model can run, in tokens.
    """

    def __init__(
        self,
        config: ModelConfig,
        *,
        dtype: torch.dtype,
        max_model_len: int | None = None,
        shard: Shard = WHOLE,
    ) -> None:
        super().__init__()
        self.whole, self.shard = config, shard
        self.config = part = config if shard == WHOLE else shard.config(config)
        self.max_model_len = max_model_len or config.max_position
        self.dtype = dtype  # of the parameters and of the hidden states
        self.embed_tokens: Embedding | ParallelEmbedding | None = None
        if shard.is_first or (shard.is_last and config.tie_word_embeddings):
            self.embed_tokens = _embedding(config, dtype, shard)
        self.layers = nn.ModuleList(
            DecoderLayer(config, shard.first_layer + i, dtype=dtype, shard=shard)
            for i in range(part.num_layers)
        )
        self.norm: RMSNorm | None = None
        self.lm_head: Linear | None = None
        if shard.is_last:
            self.norm = _norm(config, dtype, shard)
            if not config.tie_word_embeddings:
                rows = shard.vocabulary(config.vocab_size)
                self.lm_head = Linear(config.hidden_size, {"head": rows}, bias=False, dtype=dtype)
        # One table per distinct embedding: layer types often share theirs.
        distinct = list(dict.fromkeys(config.rope.values()))
        self.rotary = nn.ModuleList(
            RotaryTable(
                rope,
                config.head_dim,
                length=self.max_model_len,
                max_position=config.max_position,
            )
            for rope in distinct
        )
        self._rotary_of_layer = [distinct.index(config.rope[t]) for t in part.layer_types]

    @property
    def device(self) -> torch.device:
        """Where the parameters are."""
        return next(self.parameters()).device

    def forward(
        self, inputs: Tensor, meta: AttentionMetadata, caches: Sequence[LayerCache]
    ) -> Tensor:
        """Run one step.

        Args:
            inputs: int64 [T], the packed tokens of all sequences in the step; for a part that does
                not begin the model, what the part before it returned.
            meta: where they sit in their sequences and in the cache.
            caches: one per layer; keys and values of these tokens are written into them.

        Returns:
            [T, hidden]: after the final norm, or for a part that does not end the model what the
            next one takes, the same on all its ranks.

        Raises:
            ValueError: the tokens are not one-dimensional, or there is not one cache per layer.
        """
        if self.shard.is_first and inputs.dim() != 1:
            raise ValueError(
                f"CausalLM: input_ids must be packed [T], got {list(inputs.shape)}; flatten the "
                "batch and describe it in AttentionMetadata"
            )
        if len(caches) != len(self.layers):
            raise ValueError(
                f"CausalLM: caches must hold one LayerCache per layer ({len(self.layers)}), got "
                f"{len(caches)}; allocate config.num_layers of them"
            )
        x, residual = inputs, None
        if self.shard.is_first:
            assert self.embed_tokens is not None
            x = self.embed_tokens(inputs)
        tables = list(self.rotary)
        for layer, cache, table in zip(self.layers, caches, self._rotary_of_layer, strict=True):
            x, residual = layer(x, residual, meta, cache, tables[table])
        if self.norm is not None:
            return self.norm.add(x, residual)
        assert residual is not None
        if self.shard.group is not None:
            self.shard.group.all_reduce_(x)
        return residual.add_(x)

    def compute_logits(self, hidden: Tensor) -> Tensor:
        """Logits of the next token.

        Args:
            hidden: [n, hidden], rows of what `forward` returned (usually the last token of each
                sequence).

        Returns:
            [n, vocab_size], in the dtype of the model; where ranks share the vocabulary, those of
            this rank's piece (`Shard.vocabulary`), and zero behind its end.
        """
        if self.lm_head is not None:
            return self.lm_head(hidden)
        assert self.embed_tokens is not None
        invariant = self.embed_tokens.batch_invariant
        return ops.linear(hidden, self.embed_tokens.rows, batch_invariant=invariant)

    def set_batch_invariant(self, on: bool) -> None:
        """Whether the bits of a token must not depend on the other tokens of a step.

        Then every linear layer uses one tile and one order of summation for any number of rows,
        and attention one kernel family and pieces of fixed length.
        """
        for module in self.modules():
            if hasattr(module, "batch_invariant"):
                module.batch_invariant = on
        if self.shard.group is not None:
            self.shard.group.batch_invariant = on

    def set_attention(self, *, fused: bool = True, share_heads: bool = True) -> None:
        """How attention works, for comparisons; the tokens are the same up to rounding.

        Args:
            fused: False writes all scores to memory (`materialized.py`).
            share_heads: False stores keys and values once per query head.
        """
        for layer in self.layers:
            layer.attn.fused, layer.attn.share_heads = fused, share_heads

    @property
    def cache_config(self) -> ModelConfig:
        """`config` with the key/value heads that the cache stores."""
        if self.layers[0].attn.share_heads:
            return self.config
        return dataclasses.replace(self.config, num_kv_heads=self.config.num_heads)

    def fill_tables(self) -> None:
        """Compute the rotary tables, and that of a divided embedding."""
        for table in self.rotary:
            table.fill()
        if isinstance(self.embed_tokens, ParallelEmbedding):
            self.embed_tokens.fill_table()

    @torch.no_grad()
    def finish_loading(self) -> None:
        """What remains when all weights are in: Baichuan2's normalised head."""
        if self.config.normalized_head and self.lm_head is not None:
            # In slices, so that the fp32 copy stays small.
            for rows in self.lm_head.weight.split(4096):
                rows.copy_(torch.nn.functional.normalize(rows.float()))


def _norm(config: ModelConfig, dtype: torch.dtype, shard: Shard) -> RMSNorm:
    """One that takes the sum over ranks first where the layers in front leave that to do."""
    kind = RMSNorm if shard.group is None else partial(ParallelRMSNorm, group=shard.group)
    return kind(config.hidden_size, config.rms_norm_eps, dtype=dtype)


def _embedding(
    config: ModelConfig, dtype: torch.dtype, shard: Shard
) -> Embedding | ParallelEmbedding:
    if shard.group is None:
        return Embedding(config.vocab_size, config.hidden_size, dtype=dtype)
    rows = shard.vocabulary(config.vocab_size, padding=1)
    return ParallelEmbedding(rows, config.hidden_size, dtype=dtype, group=shard.group)
