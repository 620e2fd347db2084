"""transformers on the GPU: logits, tokens with both caches, generate_batch over block tables."""

from __future__ import annotations

import pytest
import torch

from helpers import devices
from integrations.hf_models import generate, logits, prompts, tiny

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        any(
            "cuda" not in devices(op)
            for op in ("flash_attn_fwd", "flash_attn_varlen_fwd", "flash_attn_kvcache")
        ),
        reason="there is no GPU",
    ),
]
FAMILIES = ("llama", "llama_mqa", "mistral_window", "qwen3_window", "gemma2", "gpt_oss")


@pytest.fixture(autouse=True)
def _strict(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FASTINFER_STRICT", "1")


def on_gpu(name: str, dtype: torch.dtype, attention: str):
    model = tiny(name, dtype).cuda()
    model.set_attn_implementation(attention)
    return model


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", FAMILIES)
def test_logits(name: str, dtype: torch.dtype) -> None:
    """Against eager fp32, with at most twice the error of eager at the same dtype."""
    ids, mask = (t.cuda() for t in prompts(3, 21, [8, 0, 3]))
    real = mask.bool()
    exact = logits(on_gpu(name, torch.float32, "eager"), ids, mask)[real]
    plain = logits(on_gpu(name, dtype, "eager"), ids, mask)[real].float()
    ours = logits(on_gpu(name, dtype, "fastinfer"), ids, mask)[real].float()
    errors = (ours - exact).norm(dim=1)
    assert errors.norm() <= 2 * (plain - exact).norm() + 1e-3 * exact.norm(), errors


@pytest.mark.parametrize("cache", ["dynamic", "static", "static compiled"])
@pytest.mark.parametrize("name", ["llama", "qwen3_window"])
def test_tokens(name: str, cache: str) -> None:
    options = {"dynamic": {}, "static": {"disable_compile": True}, "static compiled": {}}[cache]
    if cache != "dynamic":
        options = {**options, "cache_implementation": "static"}
    ids, mask = (t.cuda() for t in prompts(2, 17, [6, 0]))
    model = on_gpu(name, torch.float16, "fastinfer")
    out = generate(model, ids, mask, **options)
    assert out.shape[1] == 17 + 14
    assert_greedy(model, out, torch.cat([mask, torch.ones_like(out[:, 17:])], 1), 17)


def assert_greedy(model, ids: torch.Tensor, mask: torch.Tensor, begin: int) -> None:
    """Every token from `begin` on is the likeliest one of a run over the whole sequence, or within
    0.05 of it: fp16 logits of different kernels differ by less.
    """
    scores = logits(model, ids, mask)[:, begin - 1 : -1].float()
    chosen = scores.gather(2, ids[:, begin:, None])[..., 0]
    assert (scores.amax(2) - chosen).max() <= 0.05


@pytest.mark.parametrize("name", ["llama", "mistral_window"])
def test_generate_batch(name: str) -> None:
    from integrations.test_continuous_batching import NEW, batch, new_prompts

    model = on_gpu(name, torch.float16, "fastinfer")
    waiting = new_prompts()
    for prompt, tokens in zip(waiting, batch(model, waiting, page_size=16), strict=True):
        assert len(tokens) == NEW
        ids = torch.tensor([prompt + tokens], device="cuda")
        assert_greedy(model, ids, torch.ones_like(ids), len(prompt))
