"""Models that take no attention function, and models that work on the masks they ask for."""

from __future__ import annotations

import pytest
import torch
import transformers

from fastinfer.integrations import _masks
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


def test_masks_that_a_model_works_on(lenient: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Doge adds its own terms to the mask it has asked for."""
    monkeypatch.setattr(_masks, "_workers", set())
    plain, model = pair("DogeForCausalLM", keep_window_size=4)
    for padding in ([5, 0, 2], [0, 0, 0]):
        ids, mask = prompts(3, 15, padding)
        want, got = (logits(m, ids, mask)[mask.bool()] for m in (plain, model))
        torch.testing.assert_close(got, want, atol=2e-4, rtol=1e-4)
        for options in ({}, {"cache_implementation": "static", "disable_compile": True}):
            want, got = (generate(m, ids, mask, **options) for m in (plain, model))
            assert torch.equal(got, want)
