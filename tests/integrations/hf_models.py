"""Tiny transformers models of many families, and what the tests ask of them."""

from __future__ import annotations

import inspect

import torch
import transformers
from torch import Tensor

from fastinfer.integrations.transformers import enable
from models._model_harness import TINY, VOCAB, build_reference

enable()

_GEMMA = {"head_dim": 32, "query_pre_attn_scalar": 24, "sliding_window": 6}
_SMALL = {
    "vocab_size": VOCAB,
    "hidden_size": 64,
    "intermediate_size": 88,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "initializer_range": 0.15,
    "eos_token_id": None,
    "bos_token_id": None,
    "pad_token_id": 0,
}
# Families that fastinfer's own engine does not have: softcap, sinks, other scales.
MORE: dict[str, tuple[str, dict[str, object]]] = {
    "gemma2": ("Gemma2ForCausalLM", _GEMMA | {"attn_logit_softcapping": 2.0}),
    "gemma3": (
        "Gemma3ForCausalLM",
        _GEMMA | {"layer_types": ["sliding_attention", "full_attention"] * 2},
    ),
    "granite": ("GraniteForCausalLM", {"attention_multiplier": 0.07}),
    "phi3": ("Phi3ForCausalLM", {"sliding_window": 9}),
    "smollm3": ("SmolLM3ForCausalLM", {}),
    "gpt_oss": (
        "GptOssForCausalLM",
        {
            "head_dim": 16,
            "sliding_window": 5,
            "num_local_experts": 2,
            "num_experts_per_tok": 1,
            "layer_types": ["sliding_attention", "full_attention"] * 2,
        },
    ),
}
OURS = ("llama", "llama_biases", "llama_mqa", "mistral", "mistral_window", "qwen2_window")
OURS += ("qwen3", "qwen3_window")
FAMILIES = (*OURS, *MORE)
# `cache` had another name before transformers 5.20.
CACHE = "cache"
if "cache" not in inspect.signature(transformers.LlamaModel.forward).parameters:
    CACHE = "past_key_values"


def tiny(name: str, dtype: torch.dtype = torch.float32) -> transformers.PreTrainedModel:
    """A random model with attn_implementation="eager"."""
    if name in TINY:
        return build_reference(name, dtype=dtype)
    family, changes = MORE[name]
    architecture = getattr(transformers, family)
    config = architecture.config_class(**{**_SMALL, **changes})
    config._attn_implementation = "eager"
    torch.manual_seed(0)
    model = architecture(config)
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if "sinks" in key:
                parameter.normal_(std=2.0)
            elif "norm" in key or key.endswith("bias"):
                parameter.normal_(std=0.2).add_(0.0 if "gemma" in name else 1.0)
    return model.to(dtype).eval()


def prompts(batch: int, length: int, padding: list[int], side: str = "left"):
    """Token ids and the attention mask, padded on one side."""
    ids = torch.randint(3, VOCAB, (batch, length), generator=torch.Generator().manual_seed(7))
    mask = torch.ones_like(ids)
    for row, n in enumerate(padding):
        mask[row, slice(0, n) if side == "left" else slice(length - n, length)] = 0
    ids[mask == 0] = 0
    return ids, mask


def generate(model: transformers.PreTrainedModel, ids: Tensor, mask: Tensor, **kwargs) -> Tensor:
    return model.generate(ids, attention_mask=mask, max_new_tokens=14, do_sample=False, **kwargs)


@torch.no_grad()
def logits(model: transformers.PreTrainedModel, ids: Tensor, mask: Tensor, **kwargs) -> Tensor:
    if "cache" in kwargs:
        kwargs[CACHE] = kwargs.pop("cache")
    return model(ids, attention_mask=mask, **kwargs).logits
