"""Tiny random checkpoints of every family, and a driver that feeds a model over a paged cache."""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
import transformers
from safetensors.torch import load_file, save_file

from fastinfer.models import AttentionMetadata, CausalLM, LayerCache

VOCAB = 131
MAX_LEN = 64

_COMMON = {
    "vocab_size": VOCAB,
    "hidden_size": 64,
    "intermediate_size": 88,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": MAX_LEN,
    "initializer_range": 0.15,
    "eos_token_id": None,
    "bos_token_id": None,
    "pad_token_id": 0,
}


def _rope(rope_type: str, **numbers: object) -> dict[str, object]:
    return {"rope_parameters": {"rope_type": rope_type, "rope_theta": 500.0, **numbers}}


_YARN = {"factor": 4.0, "original_max_position_embeddings": 16}

# name -> (family, what differs from _COMMON). Windows are shorter than every tested sequence.
TINY: dict[str, tuple[str, dict[str, object]]] = {
    "llama": ("Llama", {}),
    "llama_biases": (
        "Llama",
        {"head_dim": 24, "attention_bias": True, "mlp_bias": True, "tie_word_embeddings": True},
    ),
    "llama_mqa": ("Llama", {"num_key_value_heads": 1, "num_hidden_layers": 2}),
    "llama_linear": ("Llama", _rope("linear", factor=4.0)),
    "llama_dynamic": ("Llama", _rope("dynamic", factor=2.0)),
    "llama_llama3": (
        "Llama",
        _rope(
            "llama3",
            factor=8.0,
            low_freq_factor=1.0,
            high_freq_factor=4.0,
            original_max_position_embeddings=32,
        ),
    ),
    "llama_yarn": ("Llama", _rope("yarn", **_YARN)),
    "llama_yarn_full": (
        "Llama",
        _rope(
            "yarn",
            **_YARN,
            beta_fast=8.0,
            beta_slow=0.5,
            mscale=0.707,
            mscale_all_dim=1.3,
            truncate=False,
        ),
    ),
    "mistral": ("Mistral", {"sliding_window": None, "head_dim": 32}),
    "mistral_window": ("Mistral", {"sliding_window": 7}),
    "qwen2": ("Qwen2", {"num_attention_heads": 2, "num_key_value_heads": 1}),
    "qwen2_window": (
        "Qwen2",
        {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 1},
    ),
    "qwen3": ("Qwen3", {"head_dim": 32, "tie_word_embeddings": True}),
    "qwen3_window": (
        "Qwen3",
        {
            "head_dim": 16,
            "attention_bias": True,
            "use_sliding_window": True,
            "sliding_window": 6,
            "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
        },
    ),
    "baichuan": ("Baichuan", {"num_key_value_heads": 4}),
}


def build_reference(
    name: str, *, dtype: torch.dtype = torch.float32, seed: int = 0, **changes: object
) -> transformers.PreTrainedModel:
    """A transformers model with all parameters random: norms and biases are not left at 1 and 0.

    Baichuan2, which transformers does not have, is a Llama whose head rows have length 1.
    """
    family, differences = TINY[name]
    normalized, family = family == "Baichuan", family.replace("Baichuan", "Llama")
    config_class = getattr(transformers, f"{family}Config")
    config = config_class(**{**_COMMON, **differences, **changes})
    config._attn_implementation = "eager"
    torch.manual_seed(seed)
    model = getattr(transformers, f"{family}ForCausalLM")(config)
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if key.endswith("bias"):
                parameter.normal_(std=0.3)
            elif "norm" in key:
                parameter.normal_(mean=1.0, std=0.3)
        if normalized:
            model.lm_head.weight.copy_(torch.nn.functional.normalize(model.lm_head.weight))
    return model.to(dtype).eval()


def save(name: str, reference: transformers.PreTrainedModel, folder: Path) -> None:
    """Write the checkpoint that `reference` computes, under the names of its own family."""
    reference.save_pretrained(folder)
    if TINY[name][0] != "Baichuan":
        return
    tensors = load_file(folder / "model.safetensors")
    for i in range(reference.config.num_hidden_layers):
        prefix = f"model.layers.{i}.self_attn."
        parts = [tensors.pop(f"{prefix}{part}_proj.weight") for part in "qkv"]
        tensors[prefix + "W_pack.weight"] = torch.cat(parts)
        tensors[prefix + "rotary_emb.inv_freq"] = torch.ones(8)  # the published files have these
    scales = torch.rand(VOCAB, 1) * 3 + 0.1  # undone by normalising
    tensors["lm_head.weight"] *= scales
    save_file(tensors, folder / "model.safetensors")
    config = json.loads((folder / "config.json").read_text())
    config |= {"architectures": ["BaichuanForCausalLM"], "model_type": "baichuan"}
    del config["num_key_value_heads"]
    (folder / "config.json").write_text(json.dumps(config))


@dataclass
class Tiny:
    """One checkpoint on disk with both models that read it."""

    folder: Path
    reference: transformers.PreTrainedModel
    model: CausalLM
    _logits: dict[tuple[int, ...], torch.Tensor] = field(default_factory=dict)

    def reference_logits(self, ids: Sequence[int]) -> torch.Tensor:
        """[len(ids), vocab] of one pass without a cache."""
        key = tuple(ids)
        if key not in self._logits:
            with torch.no_grad():
                self._logits[key] = self.reference(torch.tensor([key])).logits[0]
        return self._logits[key]


def random_ids(length: int, seed: int, vocab: int = VOCAB) -> list[int]:
    """Seeded token ids."""
    return random.Random(seed).choices(range(vocab), k=length)


class PagedRun:
    """Feeds token chunks of several sequences into a model, over scattered blocks full of NaN.

    Args:
        model: what to run.
        num_sequences: sequences that may take part.
        block_size: P.
        max_len: tokens that a sequence may reach.
        seed: decides which physical blocks a sequence gets.
    """

    def __init__(
        self,
        model: CausalLM,
        num_sequences: int,
        *,
        block_size: int,
        max_len: int = MAX_LEN,
        seed: int = 0,
    ) -> None:
        config = model.config
        self.model = model
        self.block_size = block_size
        per_sequence = -(-max_len // block_size)
        count = per_sequence * num_sequences + 3  # spare blocks stay NaN
        order = list(range(count))
        random.Random(seed).shuffle(order)
        self.tables = [
            order[i * per_sequence : (i + 1) * per_sequence] for i in range(num_sequences)
        ]
        self.lengths = [0] * num_sequences
        shape = (count, block_size, config.num_kv_heads, config.head_dim)

        def empty() -> torch.Tensor:
            return torch.full(shape, float("nan"), dtype=model.dtype)

        self.caches = [LayerCache(empty(), empty()) for _ in range(config.num_layers)]

    def step(self, chunks: Sequence[tuple[int, Sequence[int]]]) -> list[torch.Tensor]:
        """Run one step; chunks are (sequence, new token ids). Returns the logits of each chunk."""
        ids, positions, slots, starts, lengths = [], [], [], [0], []
        width = max(len(table) for table in self.tables)
        table = torch.full((len(chunks), width), -1, dtype=torch.int32)  # unused entries are bad
        for row, (sequence, tokens) in enumerate(chunks):
            begin = self.lengths[sequence]
            self.lengths[sequence] = begin + len(tokens)
            blocks = self.tables[sequence]
            for position, token in enumerate(tokens, begin):
                ids.append(token)
                positions.append(position)
                block = blocks[position // self.block_size]
                slots.append(block * self.block_size + position % self.block_size)
            starts.append(len(ids))
            lengths.append(self.lengths[sequence])
            used = -(-lengths[-1] // self.block_size)
            table[row, :used] = torch.tensor(blocks[:used], dtype=torch.int32)
        meta = AttentionMetadata(
            positions=torch.tensor(positions),
            slot_mapping=torch.tensor(slots),
            cu_seqlens_q=torch.tensor(starts, dtype=torch.int32),
            seq_lens=torch.tensor(lengths, dtype=torch.int32),
            block_table=table,
            max_seqlen_q=max(len(tokens) for _, tokens in chunks),
            max_seqlen_k=max(lengths),
        )
        with torch.inference_mode():
            hidden = self.model(torch.tensor(ids), meta, self.caches)
            logits = self.model.compute_logits(hidden)
        return list(logits.split([len(tokens) for _, tokens in chunks]))


def run_schedule(
    model: CausalLM,
    sequences: Sequence[Sequence[int]],
    schedule: Sequence[Sequence[tuple[int, int]]],
    *,
    block_size: int,
) -> list[torch.Tensor]:
    """Logits of all tokens of all sequences; a schedule lists, per step, (sequence, how many)."""
    run = PagedRun(model, len(sequences), block_size=block_size)
    results: list[list[torch.Tensor]] = [[] for _ in sequences]
    for step in schedule:
        chunks = [(s, sequences[s][run.lengths[s] : run.lengths[s] + n]) for s, n in step]
        for (s, _), logits in zip(step, run.step(chunks), strict=True):
            results[s].append(logits)
    assert run.lengths == [len(ids) for ids in sequences]
    return [torch.cat(parts) for parts in results]


def greedy(
    model: CausalLM, prompts: Sequence[Sequence[int]], new_tokens: int, *, block_size: int
) -> list[list[int]]:
    """Greedy continuation of all prompts in one batch, stopping nowhere."""
    run = PagedRun(model, len(prompts), block_size=block_size)
    chunks: list[tuple[int, Sequence[int]]] = list(enumerate(prompts))
    outputs: list[list[int]] = [[] for _ in prompts]
    for _ in range(new_tokens):
        nexts = [int(logits[-1].argmax()) for logits in run.step(chunks)]
        for output, token in zip(outputs, nexts, strict=True):
            output.append(token)
        chunks = [(s, [token]) for s, token in enumerate(nexts)]
    return outputs
