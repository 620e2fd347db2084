"""attn_implementation="fastinfer" against eager attention: every family, padding, both caches."""

from __future__ import annotations

import pytest
import torch
import transformers

from fastinfer import ops
from fastinfer.integrations import _attention
from integrations.hf_models import FAMILIES, generate, logits, prompts, tiny

CACHES = {"dynamic": {}, "static": {"cache_implementation": "static", "disable_compile": True}}


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> dict[str, int]:
    """Calls per operator."""
    counts: dict[str, int] = {}

    class Counting:
        def __getattr__(self, name: str):
            counts[name] = counts.get(name, 0) + 1
            return getattr(ops, name)

    monkeypatch.setattr(_attention, "ops", Counting())
    return counts


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("name", FAMILIES)
def test_logits(name: str, side: str) -> None:
    model = tiny(name)
    ids, mask = prompts(3, 21, [8, 0, 3], side)
    want = logits(model, ids, mask)
    model.set_attn_implementation("fastinfer")
    got = logits(model, ids, mask)
    real = mask.bool()
    torch.testing.assert_close(got[real], want[real], atol=2e-4, rtol=1e-4)


@pytest.mark.parametrize("cache", CACHES)
@pytest.mark.parametrize("name", FAMILIES)
def test_tokens(name: str, cache: str, calls: dict[str, int]) -> None:
    model = tiny(name)
    for padding in ([6, 0, 11], [0, 0, 0]):
        ids, mask = prompts(3, 17, padding)
        want = generate(model, ids, mask, **CACHES[cache])
        model.set_attn_implementation("fastinfer")
        calls.clear()
        assert torch.equal(generate(model, ids, mask, **CACHES[cache]), want)
        # 14 steps, every layer served by an operator.
        assert sum(calls.values()) == 14 * model.config.num_hidden_layers
        model.set_attn_implementation("eager")


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_half_precision(dtype: torch.dtype) -> None:
    model = tiny("llama", dtype)
    ids, mask = prompts(2, 19, [5, 0])
    exact = logits(tiny("llama"), ids, mask)[mask.bool()]
    want = logits(model, ids, mask)[mask.bool()]
    model.set_attn_implementation("fastinfer")
    got = logits(model, ids, mask)[mask.bool()]
    assert (got - exact).abs().max() <= 2 * (want - exact).abs().max()
    assert torch.nn.functional.cosine_similarity(got.float(), exact).min() > 0.999


def test_from_pretrained_and_from_config(tmp_path) -> None:
    model = tiny("qwen3")
    ids, mask = prompts(2, 9, [2, 0])
    model.save_pretrained(tmp_path)
    loaded = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path, attn_implementation="fastinfer"
    )
    assert loaded.config._attn_implementation == "fastinfer"
    real = mask.bool()
    torch.testing.assert_close(
        logits(loaded, ids, mask)[real], logits(model, ids, mask)[real], atol=2e-4, rtol=1e-4
    )
    config = transformers.AutoConfig.from_pretrained(tmp_path)
    made = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="fastinfer")
    assert made.config._attn_implementation == "fastinfer"


def test_left_padding_is_not_dropped() -> None:
    """Trap 1: without a mask function of that name transformers drops the mask in silence."""
    model = tiny("llama")
    model.set_attn_implementation("fastinfer")
    ids, mask = prompts(2, 15, [6, 0])
    alone = logits(model, ids[:1, 6:], mask[:1, 6:])
    together = logits(model, ids, mask, position_ids=(mask.cumsum(1) - 1).clamp_min(0))
    torch.testing.assert_close(together[:1, 6:], alone, atol=1e-4, rtol=1e-4)


def test_no_mask_means_causal(calls: dict[str, int]) -> None:
    """Trap 2."""
    model = tiny("llama")
    ids, mask = prompts(2, 33, [0, 0])
    want = logits(model, ids, mask)
    model.set_attn_implementation("fastinfer")
    got = logits(model, ids, mask)
    torch.testing.assert_close(got, want, atol=1e-4, rtol=1e-4)
    assert calls == {"flash_attn_func": model.config.num_hidden_layers}


@pytest.mark.parametrize("padding", [[0, 0], [4, 0]])
def test_static_prefill_ignores_the_rest_of_the_cache(padding: list[int]) -> None:
    """Trap 3: Nk > Nq in the prefill of a static cache, whose tail may hold anything."""
    model = tiny("qwen3")
    ids, mask = prompts(2, 11, padding)
    want = logits(model, ids, mask)
    model.set_attn_implementation("fastinfer")
    cache = transformers.StaticCache(config=model.config, max_cache_len=40)
    logits(model, ids, mask, cache=cache)
    for layer in cache.layers:
        layer.reset()
        layer.keys.fill_(float("nan"))
        layer.values.fill_(float("nan"))
    got = logits(model, ids, mask, cache=cache)
    real = mask.bool()
    torch.testing.assert_close(got[real], want[real], atol=2e-4, rtol=1e-4)
    # Trap 4: decoding sees the tail no more than the prefill did.
    more = torch.cat([mask, torch.ones(2, 1, dtype=mask.dtype)], 1)
    step = logits(model, ids[:, -1:], more, cache=cache)
    assert torch.isfinite(step).all()


@pytest.mark.parametrize("name", ["llama", "mistral_window", "gemma2"])
def test_chunked_prefill_with_a_dynamic_cache(name: str) -> None:
    """Trap 3, the other way round: queries at the end of the keys."""
    model = tiny(name)
    ids, mask = prompts(2, 23, [3, 0])
    positions = (mask.cumsum(1) - 1).clamp_min(0)
    want = logits(model, ids, mask, position_ids=positions)
    model.set_attn_implementation("fastinfer")
    cache = transformers.DynamicCache(config=model.config)
    parts = []
    for begin, end in ((0, 10), (10, 11), (11, 23)):
        parts.append(
            logits(
                model,
                ids[:, begin:end],
                mask[:, :end],
                cache=cache,
                position_ids=positions[:, begin:end],
            )
        )
    real = mask.bool()
    torch.testing.assert_close(torch.cat(parts, 1)[real], want[real], atol=2e-4, rtol=1e-4)


@pytest.mark.parametrize("window", [1, 5, 6])
def test_windows_count_the_current_token(window: int) -> None:
    """Trap 5."""
    model = tiny("mistral_window")
    model.config.sliding_window = window
    for layer in model.model.layers:
        layer.self_attn.sliding_window = window
    ids, mask = prompts(1, 18, [0])
    want = logits(model, ids, mask)
    model.set_attn_implementation("fastinfer")
    torch.testing.assert_close(logits(model, ids, mask), want, atol=1e-4, rtol=1e-4)


def test_window_of_the_mask_is_used_by_models_that_do_not_pass_it() -> None:
    model = tiny("mistral_window")
    ids, mask = prompts(1, 18, [0])
    want = logits(model, ids, mask)
    model.set_attn_implementation("fastinfer")
    for layer in model.model.layers:
        layer.self_attn.config = model.config
        forward = layer.self_attn.forward

        def without(*args, _forward=forward, **kwargs):
            kwargs.pop("sliding_window", None)
            return _forward(*args, **kwargs)

        layer.self_attn.forward = without
    torch.testing.assert_close(logits(model, ids, mask), want, atol=1e-4, rtol=1e-4)


def test_packed_sequences(calls: dict[str, int]) -> None:
    model = tiny("llama")
    lengths = [5, 9, 1]
    ids, _ = prompts(1, sum(lengths), [0])
    parts = ids.split(lengths, 1)
    want = torch.cat([logits(model, p, torch.ones_like(p)) for p in parts], 1)
    model.set_attn_implementation("fastinfer")
    starts = torch.tensor([0, 5, 14, 15], dtype=torch.int32)
    got = _packed(model, ids, lengths, starts)
    torch.testing.assert_close(got, want, atol=1e-4, rtol=1e-4)
    assert calls == {"flash_attn_varlen_func": model.config.num_hidden_layers}


@torch.no_grad()
def _packed(model, ids, lengths, starts):
    return model(
        ids,
        position_ids=torch.cat([torch.arange(n) for n in lengths])[None],
        cu_seq_lens_q=starts,
        cu_seq_lens_k=starts,
        max_length_q=max(lengths),
        max_length_k=max(lengths),
    ).logits


@pytest.mark.parametrize("side", ["left", "right"])
def test_encoders(side: str) -> None:
    config = transformers.BertConfig(
        vocab_size=131,
        hidden_size=64,
        intermediate_size=88,
        num_hidden_layers=2,
        num_attention_heads=4,
        attn_implementation="eager",
    )
    torch.manual_seed(0)
    model = transformers.BertModel(config).eval()
    for padding in ([4, 0], [0, 0]):
        ids, mask = prompts(2, 13, padding, side)
        real = mask.bool()
        with torch.no_grad():
            model.set_attn_implementation("eager")
            want = model(ids, attention_mask=mask).last_hidden_state[real]
            model.set_attn_implementation("fastinfer")
            got = model(ids, attention_mask=mask).last_hidden_state[real]
        torch.testing.assert_close(got, want, atol=1e-4, rtol=1e-4)


def test_beams_and_assisted_decoding() -> None:
    model = tiny("llama")
    ids, mask = prompts(2, 9, [3, 0])
    one, all_ = ids[1:], mask[1:]
    want = generate(model, ids, mask, num_beams=3)
    looked = generate(model, one, all_, prompt_lookup_num_tokens=3)
    model.set_attn_implementation("fastinfer")
    assert torch.equal(generate(model, ids, mask, num_beams=3), want)
    assert torch.equal(generate(model, one, all_, prompt_lookup_num_tokens=3), looked)
