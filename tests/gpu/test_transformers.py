"""transformers on the GPU: logits, tokens with both caches, generate_batch over block tables."""

from __future__ import annotations

import pytest
import torch

from fastinfer.quant import quantize_model
from helpers import devices
from integrations.hf_models import FAMILIES, generate, logits, prompts, tiny

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


@pytest.fixture(autouse=True)
def _strict(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FASTINFER_STRICT", "1")


def on_gpu(name: str, dtype: torch.dtype, attention: str):
    model = tiny(name, dtype).cuda()
    model.set_attn_implementation(attention)
    return model


class Routes:
    """Which experts the routers of one run chose; runs that follow take the same ones.

    One token of the tiny gpt_oss is 0.002 from a tie in fp32. In 16 bits either expert may win,
    with any attention (in bf16 eager itself takes the other one), and the whole answer is another.
    """

    def __init__(self) -> None:
        self._chosen: list[torch.Tensor] = []
        self._known = False

    def follow(self, model: torch.nn.Module) -> torch.nn.Module:
        self._known, self._at = bool(self._chosen), 0
        for module in model.modules():
            if type(module).__name__ == "GptOssTopKRouter":
                assert module.top_k == 1  # so that a router's weight is 1 whatever it chooses
                module.register_forward_hook(self._route)
        return model

    def _route(self, router: torch.nn.Module, args: object, out: tuple[torch.Tensor, ...]):
        if not self._known:
            self._chosen += [t for t in out if not t.is_floating_point()]
            return out
        chosen = self._chosen[self._at]
        self._at += 1
        return tuple(t if t.is_floating_point() else chosen for t in out)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", FAMILIES)
def test_logits(name: str, dtype: torch.dtype) -> None:
    """Against eager fp32, with at most twice the error of eager at the same dtype."""
    ids, mask = (t.cuda() for t in prompts(3, 21, [8, 0, 3]))
    real = mask.bool()
    routes = Routes()
    exact = logits(routes.follow(on_gpu(name, torch.float32, "eager")), ids, mask)[real]
    plain = logits(routes.follow(on_gpu(name, dtype, "eager")), ids, mask)[real].float()
    ours = logits(routes.follow(on_gpu(name, dtype, "fastinfer")), ids, mask)[real].float()
    errors = (ours - exact).norm(dim=1)
    assert errors.norm() <= 2 * (plain - exact).norm() + 1e-3 * exact.norm(), errors


def test_right_padding() -> None:
    ids, mask = (t.cuda() for t in prompts(3, 21, [8, 0, 3], "right"))
    real = mask.bool()
    exact = logits(on_gpu("mistral_window", torch.float32, "eager"), ids, mask)[real]
    plain, ours = (
        logits(on_gpu("mistral_window", torch.float16, attention), ids, mask)[real].float()
        for attention in ("eager", "fastinfer")
    )
    assert (ours - exact).norm() <= 2 * (plain - exact).norm() + 1e-3 * exact.norm()


@pytest.mark.parametrize("cache", ["dynamic", "static"])
@pytest.mark.parametrize("name", FAMILIES)
def test_tokens(name: str, cache: str) -> None:
    options = {"cache_implementation": "static", "disable_compile": True}
    check_tokens(on_gpu(name, torch.float16, "fastinfer"), options if cache == "static" else {})


@pytest.mark.parametrize("name", ["llama", "qwen3_window"])
def test_tokens_of_a_compiled_step(name: str) -> None:
    """transformers compiles the step by itself: CUDA graphs of inductor, linears in 4 bits."""
    model = quantize_model(on_gpu(name, torch.float16, "fastinfer"), 4, 32)
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    for _ in range(2):
        check_tokens(model, {"cache_implementation": "static"})
    counters = torch._dynamo.utils.counters
    assert counters["stats"]["unique_graphs"] == 1 and not counters["graph_break"]
    assert counters["inductor"]["cudagraph_skips"] == 0


def check_tokens(model, options: dict) -> None:
    ids, mask = (t.cuda() for t in prompts(2, 17, [6, 0]))
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
    # With transformers 5.24 on a GPU that others use, asynchronous batching returns zeros at times,
    # with its own sdpa too.
    made = batch(model, waiting, page_size=16, use_async_batching=False)
    for prompt, tokens in zip(waiting, made, strict=True):
        assert len(tokens) == NEW
        ids = torch.tensor([prompt + tokens], device="cuda")
        assert_greedy(model, ids, torch.ones_like(ids), len(prompt))
