"""What the kernels do not serve: torch computes it and says so once, or raises when strict."""

from __future__ import annotations

import warnings

import pytest
import torch

from fastinfer.integrations import _attention, _fallback
from fastinfer.integrations._masks import encode
from integrations.hf_models import logits, prompts, tiny

FAMILIES = ("llama", "mistral_window", "gemma2", "gpt_oss")


def train_step(model, ids, mask):
    model.zero_grad()
    model(ids, attention_mask=mask, labels=ids).loss.backward()
    return {k: p.grad.clone() for k, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("name", FAMILIES)
def test_training(name: str, lenient: None) -> None:
    model = tiny(name)
    # (rows of padding see no key: eager spreads them over all keys, which reaches the gradients)
    for padding in ([0, 0], [3, 0]):
        ids, mask = prompts(2, 12, padding, side="right")
        model.set_attn_implementation("eager")
        want = train_step(model, ids, mask) if padding == [0, 0] else None
        model.set_attn_implementation("fastinfer")
        got = train_step(model, ids, mask)
        assert all(torch.isfinite(g).all() for g in got.values())
        if want is not None:
            assert got.keys() == want.keys()
            for key, gradient in got.items():
                torch.testing.assert_close(gradient, want[key], atol=2e-4, rtol=1e-3)


def test_training_is_refused_when_strict() -> None:
    model = tiny("llama")
    model.set_attn_implementation("fastinfer")
    ids, mask = prompts(1, 5, [0])
    with pytest.raises(RuntimeError, match="gradients are not computed"):
        model(ids, attention_mask=mask)


@pytest.mark.parametrize("name", FAMILIES)
def test_masks_of_the_user(name: str, lenient: None) -> None:
    """4-D masks, boolean and additive, that no kernel has."""
    model = tiny(name)
    ids, _ = prompts(2, 10, [0, 0])
    tree = torch.ones(2, 1, 10, 10, dtype=torch.bool).tril()
    tree[:, :, 6:, 3:6] = False
    added = torch.where(tree, 0.0, torch.finfo(torch.float32).min)
    want = logits(model, ids, added)
    model.set_attn_implementation("fastinfer")
    with pytest.warns(UserWarning, match="one-sided padding"):
        got = logits(model, ids, tree)
    torch.testing.assert_close(got, want, atol=2e-4, rtol=1e-4)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # said once
        torch.testing.assert_close(logits(model, ids, added), want, atol=2e-4, rtol=1e-4)


def test_holes_in_the_mask(lenient: None) -> None:
    model = tiny("llama")
    ids, mask = prompts(1, 12, [0])
    mask[0, 4:6] = 0
    want = logits(model, ids, mask)
    model.set_attn_implementation("fastinfer")
    with pytest.warns(UserWarning, match="fastinfer attention"):
        got = logits(model, ids, mask)
    real = mask.bool()
    torch.testing.assert_close(got[real], want[real], atol=2e-4, rtol=1e-4)


def test_packed_positions_without_lengths(lenient: None) -> None:
    model = tiny("llama")
    ids, _ = prompts(1, 9, [0])
    positions = torch.cat([torch.arange(4), torch.arange(5)])[None]
    with torch.no_grad():
        want = model(ids, position_ids=positions).logits
        model.set_attn_implementation("fastinfer")
        got = model(ids, position_ids=positions).logits
    torch.testing.assert_close(got, want, atol=1e-4, rtol=1e-4)


class Layer(torch.nn.Module):
    is_causal = True
    num_key_value_groups = 2


def call(query, key, mask=None, training=False, **kwargs):
    layer = Layer().train(training)
    with torch.no_grad():
        return _attention.fastinfer_attention(layer, query, key, key, mask, **kwargs)


def tensors(dim: int = 32, dtype: torch.dtype = torch.float32):
    generator = torch.Generator().manual_seed(3)
    q = torch.randn(2, 4, 6, dim, generator=generator, dtype=dtype)
    return q, torch.randn(2, 2, 6, dim, generator=generator, dtype=dtype)


@pytest.mark.parametrize(
    "options, words",
    [
        ({"dropout": 0.3, "training": True}, "dropout has no kernel"),
        ({"position_bias": torch.zeros(1, 4, 6, 6)}, "position biases"),
        ({"output_attentions": True}, "attention weights"),
        ({"mask": torch.ones(2, 1, 6, 6, dtype=torch.bool)}, "masks other than"),
    ],
)
def test_reasons(options, words: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(RuntimeError, match=words):
        call(*tensors(), **options)
    monkeypatch.delenv("FASTINFER_STRICT")
    monkeypatch.setattr(_fallback, "_said", set())
    with pytest.warns(UserWarning, match=words):
        out, _ = call(*tensors(), **options)
    assert out.shape == (2, 6, 4, 32)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        call(*tensors(), **options)


def test_dtypes_and_head_sizes(lenient: None) -> None:
    for dim, dtype, words in ((20, torch.float32, "head_dim 20"), (32, torch.float64, "float64")):
        q, k = tensors(dim, dtype)
        with pytest.warns(UserWarning, match=words):
            out, _ = call(q, k)
        want = torch.nn.functional.scaled_dot_product_attention(
            q, k, k, is_causal=True, enable_gqa=True
        )
        torch.testing.assert_close(out, want.transpose(1, 2))


def test_dropout_outside_of_training_is_none() -> None:
    q, k = tensors()
    assert torch.equal(call(q, k, dropout=0.5)[0], call(q, k)[0])


def test_fp32_on_a_gpu_has_no_kernel() -> None:
    q, k = (t.to("meta") for t in tensors())
    with pytest.raises(RuntimeError, match=r"torch\.float32 on meta has no kernel"):
        call(q, k)


@pytest.mark.parametrize("window", [None, 3])
@pytest.mark.parametrize("softcap", [None, 2.0])
@pytest.mark.parametrize("sinks", [False, True])
@pytest.mark.parametrize("masked", [False, True])
def test_torch_computes_the_same(window, softcap, sinks: bool, masked: bool) -> None:
    """The fallback against the kernels, for everything that both can do."""
    q, k = tensors()
    mask = None
    if masked:
        first, count = torch.tensor([0, 2]), torch.tensor([6, 6])
        mask = encode(first, count, causal=True, window=window)
    options = {
        "sliding_window": window,
        "softcap": softcap,
        "s_aux": torch.tensor([0.5, -1.0, 2.0, 0.0]) if sinks else None,
    }
    want, _ = call(q, k, mask, scaling=0.3, **options)
    got, _ = _fallback.fallback(Layer(), q, k, k, mask, is_causal=True, scaling=0.3, **options)
    if masked:
        got, want = got[:, 2:], want[:, 2:]  # rows before the first key are padding
    torch.testing.assert_close(got, want, atol=2e-6, rtol=1e-5)


def test_packed_fallback(lenient: None) -> None:
    q, k = (t[:1] for t in tensors())
    starts = torch.tensor([0, 2, 6], dtype=torch.int32)
    packed = {"cu_seq_lens_q": starts, "cu_seq_lens_k": starts}
    for window in (None, 2):
        want, _ = call(q, k, sliding_window=window, **packed)
        got, _ = call(q, k, sliding_window=window, output_attentions=True, **packed)
        torch.testing.assert_close(got, want, atol=2e-6, rtol=1e-5)


def test_paged_caches_have_no_fallback() -> None:
    q, k = tensors()
    with pytest.raises(RuntimeError, match="which a paged cache needs"):
        call(q.double(), k.double(), block_table=torch.zeros(1, 1, dtype=torch.int32))
