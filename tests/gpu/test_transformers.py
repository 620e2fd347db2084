"""transformers on the GPU: logits, tokens with both caches, generate_batch over block tables."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest
import torch
import transformers
from transformers.generation.continuous_batching.input_outputs import ContinuousBatchingAsyncIOs

from fastinfer.integrations import _fallback
from fastinfer.quant import QuantLinear, load_quantized, quantize_model
from helpers import devices
from integrations.hf_models import FAMILIES, generate, logits, prompts, tiny
from integrations.test_continuous_batching import NEW, batch, new_prompts
from integrations.test_transformers_checkpoints import (
    CASES,
    FORMATS,
    dequantised,
    write_checkpoint,
)
from integrations.test_transformers_quantizer import CONFIGS, load

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

    def split(self, batch: int, sizes: list[int]) -> None:
        """The same run in several calls, of so many tokens per row each."""
        parts = [t.unflatten(0, (batch, -1)).split(sizes, 1) for t in self._chosen]
        self._chosen = [part[call].flatten(0, 1) for call in range(len(sizes)) for part in parts]

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


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("cache", ["dynamic", "static"])
@pytest.mark.parametrize("name", FAMILIES)
def test_padding(name: str, cache: str, side: str) -> None:
    """A padded prompt into both caches, then a step after those that end in a token."""
    ids, mask = (t.cuda() for t in prompts(3, 22, [8, 0, 3], side))
    sizes, real = [21, 1] if side == "left" else [22], mask.bool()
    positions = (mask.cumsum(1) - 1).clamp_min(0)
    routes = Routes()

    def whole(dtype: torch.dtype) -> torch.Tensor:
        model = routes.follow(on_gpu(name, dtype, "eager"))
        return logits(model, ids, mask, position_ids=positions)[real].float()

    exact, plain = whole(torch.float32), whole(torch.float16)
    routes.split(3, sizes)
    model = routes.follow(on_gpu(name, torch.float16, "fastinfer"))
    made = (
        transformers.DynamicCache(config=model.config)
        if cache == "dynamic"
        else transformers.StaticCache(config=model.config, max_cache_len=40)
    )
    parts, end = [], 0
    for size in sizes:
        begin, end = end, end + size
        at = positions[:, begin:end]
        parts.append(logits(model, ids[:, begin:end], mask[:, :end], cache=made, position_ids=at))
    ours = torch.cat(parts, 1)[real].float()
    assert (ours - exact).norm() <= 2 * (plain - exact).norm() + 1e-3 * exact.norm()


@pytest.mark.parametrize("cache", ["dynamic", "static"])
@pytest.mark.parametrize("name", FAMILIES)
def test_tokens(name: str, cache: str) -> None:
    options = {"cache_implementation": "static", "disable_compile": True}
    check_tokens(on_gpu(name, torch.float16, "fastinfer"), options if cache == "static" else {})


# transformers' sliding cache counts tokens in Python and compares the count with the window: one
# more graph, whatever the attention.
@pytest.mark.parametrize(("name", "graphs"), [("llama", 1), ("qwen3_window", 2)])
def test_tokens_of_a_compiled_step(name: str, graphs: int) -> None:
    """transformers compiles the step by itself: CUDA graphs of inductor, linears in 4 bits."""
    model = quantize_model(on_gpu(name, torch.float16, "fastinfer"), 4, 32)
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    for _ in range(2):
        check_tokens(model, {"cache_implementation": "static"})
    counters = torch._dynamo.utils.counters
    assert counters["stats"]["unique_graphs"] == graphs and not counters["graph_break"]
    assert counters["inductor"]["cudagraph_skips"] == 0


def test_fp32_is_left_to_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    ids, mask = (t.cuda() for t in prompts(2, 13, [4, 0]))
    model = on_gpu("llama", torch.float32, "fastinfer")
    with pytest.raises(RuntimeError, match=r"float32 on cuda has no kernel"):
        logits(model, ids, mask)
    monkeypatch.delenv("FASTINFER_STRICT")
    monkeypatch.setattr(_fallback, "_said", set())
    with pytest.warns(UserWarning, match=r"float32 on cuda has no kernel"):
        got = logits(model, ids, mask)[mask.bool()]
    model.set_attn_implementation("sdpa")
    torch.testing.assert_close(got, logits(model, ids, mask)[mask.bool()], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("name", FORMATS)
def test_checkpoints_of_others(name: str, tmp_path: Path) -> None:
    """GPTQ and AWQ inside of a transformers model: the tokens of the same weights in nn.Linear."""
    write_checkpoint(CASES[name], tmp_path)
    config = transformers.AutoConfig.from_pretrained(tmp_path)
    del config.quantization_config
    ours, twin = (
        load_quantized(
            transformers.AutoModelForCausalLM.from_config(config, attn_implementation=attention),
            tmp_path,
            progress=False,
        )
        for attention in ("fastinfer", "eager")
    )
    # The layers keep the scales of the file, whatever the dtype of the rest.
    ours, twin = ours.half().cuda(), dequantised(twin).float().cuda()
    ids, mask = (t.cuda() for t in prompts(2, 11, [3, 0]))
    real = mask.bool()
    got, want = logits(ours, ids, mask)[real].float(), logits(twin, ids, mask)[real]
    assert (got - want).norm() <= 0.01 * want.norm()
    check_tokens(ours, {})
    check_tokens(ours, {"cache_implementation": "static", "disable_compile": True})


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("config", CONFIGS)
def test_quantising_while_loading(config: str, dtype: torch.dtype, tmp_path) -> None:
    """The CPU's codes and scales; the CPU's logits but for rounding; saved and loaded bit-equal."""
    tiny("llama_biases", dtype).save_pretrained(tmp_path / "plain")
    options = {"quantization_config": CONFIGS[config](), "dtype": dtype}
    host = load(tmp_path / "plain", **options)
    model = load(tmp_path / "plain", **options).cuda()
    layers = [m for m in model.modules() if isinstance(m, QuantLinear)]
    assert len(layers) == 7 * model.config.num_hidden_layers
    before = {key: value.cpu() for key, value in model.state_dict().items()}
    assert all(torch.equal(value, before[key]) for key, value in host.state_dict().items())

    ids, mask = prompts(2, 13, [4, 0])
    real = mask.bool()
    plain = logits(host, ids, mask)[real].float()
    exact = logits(torch.nn.Module.float(host), ids, mask)[real]
    ids, mask = ids.cuda(), mask.cuda()
    got = logits(model, ids, mask)
    ours = got.cpu()[real].float()
    assert (ours - exact).norm() <= 2 * (plain - exact).norm() + 1e-3 * exact.norm()
    check_tokens(model, {})

    model.save_pretrained(tmp_path / "quantised")
    again = load(tmp_path / "quantised", dtype=dtype).cuda()
    assert torch.equal(logits(again, ids, mask), got)
    if importlib.util.find_spec("accelerate"):  # transformers asks for it to load onto a device
        there = load(tmp_path / "plain", **options, device_map="cuda")
        assert all(
            torch.equal(value.cpu(), before[key]) for key, value in there.state_dict().items()
        )
        assert torch.equal(logits(there, ids, mask), got)


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


@pytest.mark.parametrize("asynchronous", [False, True])
@pytest.mark.parametrize("name", ["llama", "mistral_window", "qwen3", "gemma2"])
def test_generate_batch(name: str, asynchronous: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where the stream of the caller is so busy that what transformers puts there comes late:
    without `order_streams` its own attention then returns other tokens, too.
    """
    reset = ContinuousBatchingAsyncIOs.reset

    def late(self: ContinuousBatchingAsyncIOs) -> None:
        torch.cuda._sleep(200_000_000)  # cycles, about 0.1 s
        reset(self)

    monkeypatch.setattr(ContinuousBatchingAsyncIOs, "reset", late)
    model = on_gpu(name, torch.float16, "fastinfer")
    waiting = new_prompts()
    made = batch(model, waiting, page_size=16, use_async_batching=asynchronous)
    for prompt, tokens in zip(waiting, made, strict=True):
        assert len(tokens) == NEW
        ids = torch.tensor([prompt + tokens], device="cuda")
        assert_greedy(model, ids, torch.ones_like(ids), len(prompt))
