"""generate_batch and the manager on fastinfer's attention: the tokens of `generate`."""

from __future__ import annotations

import importlib.util
import inspect
import json
import os
from pathlib import Path

import pytest
import torch
from transformers import GenerationConfig
from transformers.generation.configuration_utils import ContinuousBatchingConfig
from transformers.generation.continuous_batching import initialization

import fastinfer
from fastinfer.integrations import _loader
from integrations.hf_models import tiny
from integrations.test_transformers_attention import calls  # noqa: F401  (a fixture)

NEW = 12


def new_prompts(lengths=(5, 17, 3, 9, 26)) -> list[list[int]]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(3, 131, (n,), generator=generator).tolist() for n in lengths]


def one_by_one(model, prompts: list[list[int]]) -> list[list[int]]:
    tokens = []
    for prompt in prompts:
        ids = torch.tensor([prompt], device=model.device)
        out = model.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=NEW, do_sample=False
        )
        tokens.append(out[0, len(prompt) :].tolist())
    return tokens


def continuous_config(**options) -> ContinuousBatchingConfig:
    """The page size had another name before transformers 5.20 or so."""
    if "page_size" not in inspect.signature(ContinuousBatchingConfig).parameters:
        options["block_size"] = options.pop("page_size")
    return ContinuousBatchingConfig(**options)


def batch(model, prompts: list[list[int]], **options) -> list[list[int]]:
    config = GenerationConfig(max_new_tokens=NEW, do_sample=False, eos_token_id=-1, pad_token_id=0)
    sizes = {"page_size": 16, "num_blocks": 48, "max_batch_tokens": 24} | options
    out = model.generate_batch(
        prompts,
        generation_config=config,
        continuous_batching_config=continuous_config(**sizes),
        progress_bar=False,
    )
    assert all(o.error is None for o in out.values())
    return [out[key].generated_tokens for key in sorted(out, key=lambda k: int(k.split("_")[-1]))]


@pytest.mark.parametrize("name", ["llama", "llama_mqa", "mistral_window", "qwen3_window", "gemma2"])
def test_tokens_of_generate(name: str, calls: dict[str, int]) -> None:  # noqa: F811
    """Prompts longer than the token budget are prefilled in chunks, beside decoding requests."""
    model = tiny(name)
    prompts = new_prompts()
    want = one_by_one(model, prompts)
    model.set_attn_implementation("fastinfer")
    assert batch(model, prompts) == want
    assert set(calls) == {"flash_attn_varlen_func"}
    assert model.config._attn_implementation == "fastinfer"  # as it was


@pytest.mark.parametrize("page_size", [16, 64])
def test_decode_steps_over_block_tables(
    page_size: int,
    calls: dict[str, int],  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """transformers offers this path on CUDA only; the gate is opened for the test."""
    monkeypatch.setattr(initialization, "ensure_decode_fast_path_is_available", lambda *a: None)
    model = tiny("llama")
    prompts = new_prompts()
    want = one_by_one(model, prompts)
    model.set_attn_implementation("fastinfer/flash-attn2")
    assert batch(model, prompts, page_size=page_size, max_blocks_per_request=4) == want
    assert calls["flash_attn_with_kvcache"] > calls["flash_attn_varlen_func"] > 0


def test_the_manager() -> None:
    model = tiny("qwen3")
    prompts = new_prompts()
    want = one_by_one(model, prompts)
    model.set_attn_implementation("fastinfer")
    config = GenerationConfig(max_new_tokens=NEW, do_sample=False, eos_token_id=-1, pad_token_id=0)
    sizes = continuous_config(page_size=16, num_blocks=48, max_batch_tokens=24)
    with model.continuous_batching_context_manager(
        generation_config=config, continuous_batching_config=sizes
    ) as manager:
        names = [manager.add_request(p, max_new_tokens=NEW) for p in prompts]
        results = {}
        while len(results) < len(names):
            result = manager.get_result(timeout=30)
            assert result is not None and result.error is None
            if result.is_finished():
                results[result.request_id] = result.generated_tokens
    assert [results[name] for name in names] == want


def test_the_name_also_serves_generate() -> None:
    model = tiny("llama")
    prompts = new_prompts()[:2]
    want = one_by_one(model, prompts)
    model.set_attn_implementation("fastinfer/flash-attn2")
    assert one_by_one(model, prompts) == want


def test_another_loader_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    """The wrapped functions are private: another form is not wrapped."""
    monkeypatch.setattr(_loader.loader, "_lazy_imports", lambda name: None)
    assert "other arguments" in _loader.install()
    monkeypatch.delattr(_loader.loader, "_lazy_imports")
    assert "another form" in _loader.install()


@pytest.mark.parametrize("kind", ["ContinuousBatchingIOs", "ContinuousBatchingAsyncIOs"])
def test_steps_wait_for_the_stream_of_the_caller(
    kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """transformers resets the tensors of a step on one stream and fills them on another."""

    class Stream:
        device = "cuda:0"

        def wait_stream(self, other: object) -> None:
            happened.append(("waits for", other))

    class Step:
        h2d_stream, compute_stream = Stream(), None

        def get_model_kwargs(self) -> str:
            happened.append("read")
            return "made"

    if kind == "ContinuousBatchingIOs":
        Step.h2d_stream, Step.compute_stream = None, Step.h2d_stream
    happened: list[object] = []
    monkeypatch.setattr(_loader.input_outputs, kind, Step)
    monkeypatch.setattr(_loader.cuda, "Stream", Stream)
    monkeypatch.setattr(_loader.cuda, "current_stream", lambda device: f"the caller's on {device}")
    _loader.order_streams()
    _loader.order_streams()
    assert Step().get_model_kwargs() == "made"
    assert happened == [("waits for", "the caller's on cuda:0"), "read"]
    Step.h2d_stream = Step.compute_stream = None  # a CPU
    assert Step().get_model_kwargs() == "made"


def test_other_implementations_load_as_before() -> None:
    with pytest.raises(Exception, match="flash_attn_interface"):
        _loader.loader._lazy_imports("flash_attention_3")


def test_the_kernel_package(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the loader cannot be wrapped: what the `kernels` library would load by this path."""
    available = "transformers.utils.import_utils.is_kernels_available"
    monkeypatch.setenv("LOCAL_KERNELS", "a/b=/c")
    monkeypatch.setattr(available, lambda: False)
    assert not _loader.offer_package()
    monkeypatch.setattr(available, lambda: True)
    assert _loader.offer_package()
    other, ours = os.environ["LOCAL_KERNELS"].split(":")
    name, folder = ours.split("=")
    assert (other, name) == ("a/b=/c", "fastinfer/flash-attn2")
    described = json.loads((Path(folder) / "metadata.json").read_text())
    assert described["name"] == "flash-attn2" and described["python-depends"] == []
    spec = importlib.util.spec_from_file_location("package", Path(folder) / "__init__.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert module.flash_attn_varlen_func is fastinfer.flash_attn_varlen_func
    assert hasattr(module, "flash_attn_func") and hasattr(module, "flash_attn_with_kvcache")
