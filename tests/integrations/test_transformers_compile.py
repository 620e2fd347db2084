"""torch.compile(fullgraph=True) and torch.export of transformers models with fastinfer's attention
and quantised linears.
"""

from __future__ import annotations

import pytest
import torch
import transformers

from fastinfer.quant import quantize_model
from integrations.hf_models import generate, logits, prompts, tiny


class Logits(torch.nn.Module):
    def __init__(self, model: torch.nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, ids, mask):
        return self.model(ids, attention_mask=mask, use_cache=False).logits


def model_of(name: str, bits: int = 4, layers: int = 3):
    model = tiny(name)
    model.model.layers, model.config.num_hidden_layers = model.model.layers[:layers], layers
    model.set_attn_implementation("fastinfer")
    return quantize_model(model, bits, 32)


@pytest.mark.parametrize("name", ["llama", pytest.param("mistral_window", marks=pytest.mark.full)])
def test_one_graph(name: str) -> None:
    """With a padded mask and no cache, and decoding over a static cache."""
    model = model_of(name, layers=1)
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, dynamic=True, backend="aot_eager")
    ids, mask = prompts(2, 11, [3, 0])
    real = mask.bool()
    got = logits(compiled, ids, mask, use_cache=False)
    want = logits(model, ids, mask, use_cache=False)
    torch.testing.assert_close(got[real], want[real], atol=1e-5, rtol=1e-5)
    caches = [transformers.StaticCache(config=model.config, max_cache_len=32) for _ in range(2)]
    for cache in caches:
        logits(model, ids, mask, cache=cache)
    for token in (5, 6):
        step = torch.full((2, 1), token)
        mask = torch.cat([mask, torch.ones(2, 1, dtype=mask.dtype)], 1)
        got = logits(compiled, step, mask, cache=caches[0])
        torch.testing.assert_close(
            got, logits(model, step, mask, cache=caches[1]), atol=1e-5, rtol=1e-5
        )


def test_fallback_in_compiled_code(lenient: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a mask and a cache transformers looks for packed sequences, a pattern of its own."""
    model = tiny("llama")
    model.model.layers, model.config.num_hidden_layers = model.model.layers[:1], 1
    model.set_attn_implementation("fastinfer")
    ids, _ = prompts(2, 11, [0, 0])
    with torch.no_grad():
        torch._dynamo.reset()
        compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
        with pytest.warns(UserWarning, match="one-sided padding"):
            got = compiled(ids, use_cache=False).logits
        want = model(ids, use_cache=False).logits
        torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-5)
        torch._dynamo.reset()
        monkeypatch.setenv("FASTINFER_STRICT", "1")
        with pytest.raises(Exception, match="one-sided padding have no kernel"):
            compiled(ids, use_cache=False)


@pytest.mark.full
@pytest.mark.parametrize("name", ["llama", "qwen3_window"])
def test_generate_with_a_compiled_step(name: str) -> None:
    """As `generate` does by itself on a GPU: a static cache, masks made outside of the graph."""
    model = model_of(name, layers=2)
    ids, mask = prompts(2, 9, [3, 0])
    want = generate(model, ids, mask)
    torch._dynamo.reset()
    options = transformers.CompileConfig(fullgraph=True, backend="aot_eager", mode=None)
    options._compile_all_devices = True
    torch._dynamo.utils.counters.clear()
    got = generate(model, ids, mask, cache_implementation="static", compile_config=options)
    assert torch.equal(got, want)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] >= 1


@pytest.mark.full
def test_compiled_by_inductor() -> None:
    model = model_of("llama", bits=8)
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True)
    ids, mask = prompts(2, 11, [0, 4])
    real = mask.bool()
    got = logits(compiled, ids, mask, use_cache=False)[real]
    want = logits(model, ids, mask, use_cache=False)[real]
    torch.testing.assert_close(got, want, atol=1e-3, rtol=1e-3)


def test_export() -> None:
    model = Logits(model_of("llama"))
    ids, mask = prompts(2, 9, [3, 0])
    batch, length = (
        torch.export.Dim("batch", min=1, max=64),
        torch.export.Dim("length", min=2, max=64),
    )
    shape = {0: batch, 1: length}
    with torch.no_grad():
        program = torch.export.export(
            model, (ids, mask), dynamic_shapes={"ids": shape, "mask": shape}
        )
        targets = [str(node.target) for node in program.graph.nodes]
        assert targets.count("fastinfer.flash_attn_kvcache.default") == 3
        assert targets.count("fastinfer.int4_linear.default") == 21
        for b, s, padding in ((3, 14, [0, 5, 2]), (1, 2, [0]), (2, 40, [0, 39])):
            ids, mask = prompts(b, s, padding)
            real = mask.bool()
            got, want = program.module()(ids, mask)[real], model(ids, mask)[real]
            torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-5)
        # Values are unknown while tracing: a mask that the kernels do not have is refused then.
        mask[0, 3] = 0
        with pytest.raises(RuntimeError, match="padded on one side only"):
            program.module()(ids, mask)
