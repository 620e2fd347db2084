"""Models that take no attention function, that work on the masks they ask for, that cut them, and
that choose keys for every query.
"""

from __future__ import annotations

import inspect
import sys

import pytest
import torch
import transformers

from fastinfer.integrations import _masks
from fastinfer.integrations._attention import fastinfer_attention
from fastinfer.integrations._fallback import only_chosen
from fastinfer.integrations._masks import encode
from fastinfer.integrations._own_attention import asks_for_attention
from integrations.hf_models import VOCAB, generate, logits, prompts

SIZES = {
    "vocab_size": VOCAB,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "initializer_range": 0.15,
    "eos_token_id": None,
    "bos_token_id": None,
    "pad_token_id": 0,
}
OWN = {
    "BloomForCausalLM": {"n_layer": 2, "n_head": 4},
    "FalconForCausalLM": {"new_decoder_architecture": False},
    "MPNetForMaskedLM": {"pad_token_id": 1},
}


def pair(name: str, **changes: object) -> list[transformers.PreTrainedModel]:
    """The same random model by eager attention and by ours, asked for as `from_pretrained` does."""
    architecture = getattr(transformers, name)
    made = []
    for attention in ("eager", "fastinfer"):
        torch.manual_seed(0)
        config = architecture.config_class(**SIZES | changes)
        made.append(architecture._from_config(config, attn_implementation=attention).eval())
    made[1].load_state_dict(made[0].state_dict())
    return made


@pytest.mark.parametrize("name", OWN)
def test_attention_of_their_own(name: str, lenient: None) -> None:
    """transformers checks no such name: the masks made for it would be read by other code."""
    with pytest.warns(UserWarning, match=f"{name} has attention of its own"):
        plain, model = pair(name, **OWN[name])
    assert model.config._attn_implementation in ("sdpa", "eager")
    for side in ("left", "right"):
        ids, mask = prompts(3, 15, [6, 0, 2], side)
        real = mask.bool()
        want, got = (logits(m, ids, mask)[real] for m in (plain, model))
        torch.testing.assert_close(got, want, atol=2e-4, rtol=1e-4)


def test_attention_of_their_own_is_refused_when_strict() -> None:
    with pytest.raises(RuntimeError, match="BloomForCausalLM has attention of its own"):
        pair("BloomForCausalLM", **OWN["BloomForCausalLM"])


def test_who_asks() -> None:
    assert asks_for_attention(transformers.LlamaForCausalLM)
    assert asks_for_attention(transformers.PaliGemmaForConditionalGeneration)  # others' attention
    assert not asks_for_attention(transformers.FalconForCausalLM)

    class MadeHere(transformers.LlamaForCausalLM):
        pass

    assert asks_for_attention(MadeHere)


def check(plain: transformers.PreTrainedModel, model: transformers.PreTrainedModel) -> None:
    for padding in ([5, 0, 2], [0, 0, 0]):
        ids, mask = prompts(3, 15, padding)
        want, got = (logits(m, ids, mask)[mask.bool()] for m in (plain, model))
        torch.testing.assert_close(got, want, atol=2e-4, rtol=1e-4)
        for options in ({}, {"cache_implementation": "static", "disable_compile": True}):
            want, got = (generate(m, ids, mask, **options) for m in (plain, model))
            assert torch.equal(got, want)


def test_masks_that_a_model_works_on(lenient: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Doge adds its own terms to the mask it has asked for."""
    module = sys.modules[transformers.DogeForCausalLM.__module__]
    if "allow_is_causal_skip" not in inspect.getsource(module):
        pytest.skip("before 5.20 or so Doge does not say so, and fails with sdpa, too")
    monkeypatch.setattr(_masks, "_workers", set())
    check(*pair("DogeForCausalLM", keep_window_size=4))


def test_masks_that_a_model_cuts() -> None:
    """Layers of Gemma 4 that share keys compute the last query of a prompt only."""
    models = pair(
        "Gemma4ForCausalLM",
        num_hidden_layers=4,
        layer_types=["sliding_attention", "full_attention"] * 2,
        num_kv_shared_layers=2,
        sliding_window=6,
        head_dim=16,
        global_head_dim=16,
        hidden_size_per_layer_input=16,
        vocab_size_per_layer_input=VOCAB,
    )
    check(*models)
    for padding in ([5, 0, 2], [0, 0, 0]):
        ids, mask = prompts(3, 15, padding)
        for make in (
            lambda m: transformers.DynamicCache(config=m.config),
            lambda m: transformers.StaticCache(config=m.config, max_cache_len=20),
        ):
            want, got = (logits(m, ids, mask, cache=make(m), logits_to_keep=1) for m in models)
            torch.testing.assert_close(got, want, atol=2e-4, rtol=1e-4)


def test_keys_chosen_for_every_query(lenient: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """DeepSeek's sparse attention tells any other name than eager and sdpa by an argument."""
    monkeypatch.setattr(_masks, "_workers", set())
    sizes = {"q_lora_rank": 32, "kv_lora_rank": 32, "qk_rope_head_dim": 16, "v_head_dim": 32}
    sizes |= {"qk_nope_head_dim": 16, "num_key_value_heads": 4, "moe_intermediate_size": 32}
    sizes |= {"n_routed_experts": 4, "num_experts_per_tok": 2, "n_group": 1, "topk_group": 1}
    sizes |= {"first_k_dense_replace": 1, "index_n_heads": 2, "index_head_dim": 32, "index_topk": 6}
    with pytest.warns(UserWarning, match="keys chosen for every query"):
        check(*pair("DeepseekV32ForCausalLM", **sizes))


def test_chosen_keys_and_masks() -> None:
    query, key = torch.empty(1, 2, 3, 16), torch.empty(1, 1, 5, 16)
    indices = torch.tensor([[[0, 4], [1, -1], [3, 2]]], dtype=torch.int32)
    every = torch.zeros(3, 5, dtype=torch.bool)
    every[[0, 0, 1, 2, 2], [0, 4, 1, 3, 2]] = True
    causal = every & torch.ones(3, 5).tril().bool()
    assert torch.equal(only_chosen(indices, None, query, key, False)[0, 0], every)
    assert torch.equal(only_chosen(indices, None, query, key, True)[0, 0], causal)
    ranges = encode(torch.tensor([1]), torch.tensor([4]), causal=False, window=None)
    ends = torch.tensor([False, True, True, True, False])
    assert torch.equal(only_chosen(indices, ranges, query, key, True)[0, 0], every & ends)
    added = torch.zeros(1, 1, 3, 5)
    assert torch.equal(only_chosen(indices, added, query, key, True)[0, 0] == 0, every)


@pytest.mark.parametrize("name", ["block_indices", "sinks"])
def test_arguments_of_other_models_are_not_dropped(name: str, lenient: None) -> None:
    x = torch.randn(1, 2, 3, 16)
    with pytest.raises(RuntimeError, match=f"{name} of Identity has no kernel"):
        fastinfer_attention(torch.nn.Identity(), x, x, x, None, **{name: x})
