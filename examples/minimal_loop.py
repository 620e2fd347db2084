"""LLM inference on one page: prefill, decode, paged cache and sampling, straight on the operators.

    python examples/minimal_loop.py --model examples/tiny/model --prompt "Once upon a time"

Reads a Llama checkpoint in Hugging Face layout. Many sequences run at once; in every step each of
them contributes the tokens it has not run yet: its whole prompt in the first step (prefill), its
newest token afterwards (decode). The cache holds keys and values in blocks of P tokens, and a
sequence owns whichever blocks it was given. Activations are packed: [T, hidden], T new tokens.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import time
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors.torch import load_file
from tokenizers import Tokenizer
from torch import Tensor

from fastinfer import ops


@dataclass(eq=False)
class Sequence:
    tokens: list[int]  # prompt, then what was generated
    limit: int  # length at which to stop
    seed: int
    cached: int = 0  # tokens whose keys and values are in the cache
    blocks: list[int] = field(default_factory=list)  # where they are, in order


class PagedCache:
    """Keys and values of all layers in blocks of P tokens, and the list of blocks nobody uses."""

    def __init__(self, model: Llama, num_blocks: int, block_size: int) -> None:
        shape = (2, len(model.layers), num_blocks, block_size, model.kv_heads, model.head_dim)
        self.k, self.v = torch.empty(shape, dtype=model.dtype, device=model.device)
        self.block_size = block_size
        self.free = list(range(num_blocks))

    def reserve(self, seq: Sequence) -> None:
        """Give the sequence blocks for all its tokens."""
        while len(seq.blocks) * self.block_size < len(seq.tokens):
            seq.blocks.append(self.free.pop())

    def slot(self, seq: Sequence, position: int) -> int:
        """Row of the cache in which a token of the sequence lives."""
        block = seq.blocks[position // self.block_size]
        return block * self.block_size + position % self.block_size


class Llama:
    """The weights of a Llama checkpoint and its forward pass."""

    def __init__(self, folder: Path, device: str) -> None:
        c = json.loads((folder / "config.json").read_text())
        w: dict[str, Tensor] = {}
        for file in sorted(folder.glob("model*.safetensors")):
            w |= load_file(file, device=device)
        if c["architectures"] != ["LlamaForCausalLM"] or any(k.endswith("bias") for k in w):
            raise SystemExit("this example runs plain Llama; `fastinfer generate` runs the others")
        self.heads = c["num_attention_heads"]
        self.kv_heads = c.get("num_key_value_heads") or self.heads
        self.head_dim = c.get("head_dim") or c["hidden_size"] // self.heads
        eos = c.get("eos_token_id")
        self.eos = set(eos if isinstance(eos, list) else [eos])
        self.embed = w["model.embed_tokens.weight"]
        self.head = self.embed if c.get("tie_word_embeddings") else w["lm_head.weight"]
        self.norm, self.eps = w["model.norm.weight"], c["rms_norm_eps"]
        self.dtype, self.device = self.embed.dtype, self.embed.device
        self.layers = []
        for i in range(c["num_hidden_layers"]):
            layer = {k.split(f"layers.{i}.")[1]: t for k, t in w.items() if f".layers.{i}." in k}
            qkv = [layer[f"self_attn.{part}_proj.weight"] for part in "qkv"]
            gate_up = [layer[f"mlp.{part}_proj.weight"] for part in ("gate", "up")]
            layer["qkv"], layer["gate_up"] = torch.cat(qkv), torch.cat(gate_up)
            self.layers.append(layer)
        self.cos, self.sin = self.rotary_tables(c)

    def rotary_tables(self, c: dict) -> tuple[Tensor, Tensor]:
        """cos and sin of position * frequency, [positions, D/2]; new and old config spellings."""
        rope = c.get("rope_parameters") or c.get("rope_scaling") or {}
        theta = rope.get("rope_theta") or c.get("rope_theta", 10000.0)
        kind = rope.get("rope_type", rope.get("type", "default"))
        freq = 1.0 / theta ** (torch.arange(0, self.head_dim, 2) / self.head_dim)
        if kind == "llama3":  # stretch slow frequencies, keep fast ones, blend in between
            low, high = rope["low_freq_factor"], rope["high_freq_factor"]
            turns = rope["original_max_position_embeddings"] * freq / (2 * math.pi)
            keep = ((turns - low) / (high - low)).clamp(0, 1)
            freq = freq * keep + freq / rope["factor"] * (1 - keep)
        elif kind != "default":
            raise SystemExit(f"rope type {kind} needs `fastinfer generate`")
        angles = torch.arange(c["max_position_embeddings"])[:, None] * freq
        return angles.cos().to(self.device), angles.sin().to(self.device)

    def step(self, batch: list[Sequence], cache: PagedCache) -> Tensor:
        """Run the tokens that are not cached yet. Returns [B, vocab], logits of the newest ones."""
        for seq in batch:
            cache.reserve(seq)
        new = [(seq, i) for seq in batch for i in range(seq.cached, len(seq.tokens))]
        counts = [len(seq.tokens) - seq.cached for seq in batch]
        width = max(len(seq.blocks) for seq in batch)
        padded = [seq.blocks + [-1] * (width - len(seq.blocks)) for seq in batch]
        ids = self.tensor([seq.tokens[i] for seq, i in new], torch.int64)
        positions = self.tensor([i for _, i in new], torch.int64)
        slots = self.tensor([cache.slot(seq, i) for seq, i in new], torch.int64)
        starts = self.tensor([0, *itertools.accumulate(counts)], torch.int32)
        lengths = self.tensor([len(seq.tokens) for seq in batch], torch.int32)
        paged = {"block_table": self.tensor(padded, torch.int32), "causal": True}
        longest = max(counts), max(len(seq.tokens) for seq in batch)

        residual = self.embed[ids]
        x = ops.rms_norm(residual, self.layers[0]["input_layernorm.weight"], self.eps)
        for i, w in enumerate(self.layers):
            if i > 0:
                ops.fused_add_rms_norm(x, residual, w["input_layernorm.weight"], self.eps)
            heads = ops.linear(x, w["qkv"]).view(len(ids), -1, self.head_dim)
            q, k, v = heads.split([self.heads, self.kv_heads, self.kv_heads], dim=1)
            kc, vc = cache.k[i], cache.v[i]
            ops.apply_rotary_and_cache(q, k, v, self.cos, self.sin, positions, kc, vc, slots)
            if longest[0] == 1:  # decode: one query per sequence
                x = ops.flash_attn_with_kvcache(q[:, None], kc, vc, cache_seqlens=lengths, **paged)
            else:  # prefill: packed queries, as many as each prompt has tokens
                sizes = (starts, None, *longest)
                x = ops.flash_attn_varlen_func(q, kc, vc, *sizes, seqused_k=lengths, **paged)
            x = ops.linear(x.reshape(len(ids), -1), w["self_attn.o_proj.weight"])
            ops.fused_add_rms_norm(x, residual, w["post_attention_layernorm.weight"], self.eps)
            x = ops.linear(ops.silu_and_mul(ops.linear(x, w["gate_up"])), w["mlp.down_proj.weight"])
        ops.fused_add_rms_norm(x, residual, self.norm, self.eps)
        for seq in batch:
            seq.cached = len(seq.tokens)
        return ops.linear(x[starts[1:] - 1], self.head)

    def tensor(self, values: list, dtype: torch.dtype) -> Tensor:
        return torch.tensor(values, dtype=dtype, device=self.device)


@torch.inference_mode()
def generate(
    model: Llama,
    prompts: list[list[int]],
    max_tokens: int,
    temperature: float = 0.0,
    top_p: float = 1.0,
    seed: int = 0,
    block_size: int = 16,
) -> list[list[int]]:
    """Continue all prompts together; a temperature of 0 takes the most likely token."""
    if not all(0 < len(prompt) < len(model.cos) for prompt in prompts):
        raise SystemExit(f"prompts must have 1 to {len(model.cos) - 1} tokens")
    limits = [min(len(prompt) + max_tokens, len(model.cos)) for prompt in prompts]
    seeds = range(seed, seed + len(prompts))
    sequences = list(map(Sequence, map(list, prompts), limits, seeds))
    cache = PagedCache(model, sum(-(-limit // block_size) for limit in limits), block_size)
    running = [seq for seq in sequences if len(seq.tokens) < seq.limit]
    while running:
        drawn = ops.sample(
            model.step(running, cache),
            temperature=model.tensor([temperature for _ in running], torch.float32),
            top_p=model.tensor([top_p for _ in running], torch.float32),
            seeds=model.tensor([seq.seed for seq in running], torch.int64),
            steps=model.tensor([len(seq.tokens) for seq in running], torch.int64),
        )
        for seq, token in zip(list(running), drawn.token_ids.tolist(), strict=True):
            seq.tokens.append(token)
            if token in model.eos or len(seq.tokens) >= seq.limit:
                cache.free += seq.blocks
                running.remove(seq)
    return [seq.tokens[len(p) :] for seq, p in zip(sequences, prompts, strict=True)]


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--model", type=Path, default=Path(__file__).parent / "tiny" / "model")
    parser.add_argument("--prompt", nargs="+", default=["Once upon a time"])
    parser.add_argument("--device", default="cpu")
    numbers = {"max-tokens": 64, "temperature": 0.0, "top-p": 1.0, "seed": 0, "block-size": 16}
    for name, default in numbers.items():
        parser.add_argument(f"--{name}", type=type(default), default=default)
    args = parser.parse_args()

    tokenizer = Tokenizer.from_file(str(args.model / "tokenizer.json"))
    model = Llama(args.model, args.device)
    prompts = [tokenizer.encode(text).ids for text in args.prompt]
    sampling = (args.max_tokens, args.temperature, args.top_p, args.seed)
    start = time.perf_counter()
    outputs = generate(model, prompts, *sampling, args.block_size)
    print(f"{sum(map(len, outputs)) / (time.perf_counter() - start):.1f} tokens/s\n")
    for prompt, output in zip(prompts, outputs, strict=True):
        print(tokenizer.decode(prompt + output), end="\n\n")


if __name__ == "__main__":
    main()
