"""The architecture of the tiny checkpoint: a plain torch Llama, small enough to train on one core.

    h = h + Wo attention(rope(Wq n(h)), rope(Wk n(h)), Wv n(h))     n = RMSNorm, causal, GQA
    h = h + Wdown (silu(Wgate n(h)) * (Wup n(h)))
    logits = n(h) E^T                                               E = the token embedding (tied)

Module names are those of Hugging Face's LlamaForCausalLM, so `state_dict()` is the checkpoint.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


@dataclass(slots=True, frozen=True)
class Shape:
    """Sizes of one model. Every matrix side is a multiple of 64, so 32/64-wide groups fit."""

    hidden: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    intermediate: int
    vocab: int = 1024
    max_position: int = 1024
    rope_theta: float = 10000.0
    eps: float = 1e-5

    def config(self, special_ids: dict[str, int]) -> dict[str, Any]:
        """config.json; the rotary base is written in the new place and in the old one."""
        return {
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            "attention_bias": False,
            "attention_dropout": 0.0,
            "bos_token_id": special_ids["bos"],
            "dtype": "bfloat16",
            "eos_token_id": special_ids["eos"],
            "head_dim": self.head_dim,
            "hidden_act": "silu",
            "hidden_size": self.hidden,
            "initializer_range": 0.02,
            "intermediate_size": self.intermediate,
            "max_position_embeddings": self.max_position,
            "mlp_bias": False,
            "num_attention_heads": self.heads,
            "num_hidden_layers": self.layers,
            "num_key_value_heads": self.kv_heads,
            "pad_token_id": special_ids["pad"],
            "rms_norm_eps": self.eps,
            "rope_parameters": {"rope_theta": self.rope_theta, "rope_type": "default"},
            "rope_theta": self.rope_theta,
            "tie_word_embeddings": True,
            "torch_dtype": "bfloat16",
            "use_cache": True,
            "vocab_size": self.vocab,
        }


SHAPES = {
    "main": Shape(hidden=192, layers=5, heads=6, kv_heads=2, head_dim=32, intermediate=384),
    "draft": Shape(hidden=128, layers=2, heads=4, kv_heads=2, head_dim=32, intermediate=256),
}


class RMSNorm(nn.Module):
    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, self.weight.shape, self.weight, self.eps)


class Attention(nn.Module):
    def __init__(self, s: Shape) -> None:
        super().__init__()
        self.s = s
        self.q_proj = nn.Linear(s.hidden, s.heads * s.head_dim, bias=False)
        self.k_proj = nn.Linear(s.hidden, s.kv_heads * s.head_dim, bias=False)
        self.v_proj = nn.Linear(s.hidden, s.kv_heads * s.head_dim, bias=False)
        self.o_proj = nn.Linear(s.heads * s.head_dim, s.hidden, bias=False)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        b, t, _ = x.shape
        q = self.q_proj(x).view(b, t, -1, self.s.head_dim).transpose(1, 2)
        k = self.k_proj(x).view(b, t, -1, self.s.head_dim).transpose(1, 2)
        v = self.v_proj(x).view(b, t, -1, self.s.head_dim).transpose(1, 2)
        q, k = rotate(q, cos, sin), rotate(k, cos, sin)
        repeat = self.s.heads // self.s.kv_heads
        k, v = k.repeat_interleave(repeat, dim=1), v.repeat_interleave(repeat, dim=1)
        # fp32 here even under autocast: on a CPU it is faster than bf16 in the backward pass
        with torch.autocast("cpu", enabled=False):
            out = F.scaled_dot_product_attention(q, k, v.float(), is_causal=True).to(x.dtype)
        return self.o_proj(out.transpose(1, 2).reshape(b, t, -1))


class MLP(nn.Module):
    def __init__(self, s: Shape) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(s.hidden, s.intermediate, bias=False)
        self.up_proj = nn.Linear(s.hidden, s.intermediate, bias=False)
        self.down_proj = nn.Linear(s.intermediate, s.hidden, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Layer(nn.Module):
    def __init__(self, s: Shape) -> None:
        super().__init__()
        self.self_attn = Attention(s)
        self.mlp = MLP(s)
        self.input_layernorm = RMSNorm(s.hidden, s.eps)
        self.post_attention_layernorm = RMSNorm(s.hidden, s.eps)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        x = x + self.self_attn(self.input_layernorm(x), cos, sin)
        return x + self.mlp(self.post_attention_layernorm(x))


class Decoder(nn.Module):
    def __init__(self, s: Shape) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(s.vocab, s.hidden)
        self.layers = nn.ModuleList(Layer(s) for _ in range(s.layers))
        self.norm = RMSNorm(s.hidden, s.eps)


class Llama(nn.Module):
    """`model(ids [B, T]) -> logits [B, T, vocab]`."""

    def __init__(self, s: Shape) -> None:
        super().__init__()
        self.s = s
        self.model = Decoder(s)
        for name, p in self.named_parameters():
            if p.dim() == 2:
                residual = name.endswith(("o_proj.weight", "down_proj.weight"))
                nn.init.normal_(p, std=0.02 / (2 * s.layers) ** 0.5 if residual else 0.02)

    def forward(self, ids: Tensor) -> Tensor:
        cos, sin = rope_table(self.s, ids.shape[1])
        x = self.model.embed_tokens(ids)
        for layer in self.model.layers:
            x = layer(x, cos, sin)
        return F.linear(self.model.norm(x), self.model.embed_tokens.weight)


def rope_table(s: Shape, length: int) -> tuple[Tensor, Tensor]:
    """cos and sin [length, head_dim / 2] of position * theta^(-2i / head_dim)."""
    inverse = s.rope_theta ** (-torch.arange(0, s.head_dim, 2).float() / s.head_dim)
    angles = torch.outer(torch.arange(length).float(), inverse)
    return angles.cos(), angles.sin()


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Half-split rotary embedding of x [B, heads, T, D], in fp32."""
    a, b = x.float().chunk(2, dim=-1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1)
