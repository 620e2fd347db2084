"""Random weights for benchmarks: `load_format="dummy"`, with or without quantisation."""

from __future__ import annotations

from collections.abc import Callable

import torch

from ..quant.canonical import CanonicalWeight, Int8Weight
from ..quant.config import LinearScheme, QuantConfig
from ..quant.formats import Stored
from ..quant.formats.common import num_groups
from ..quant.fused import runnable
from .config import ModelConfig
from .decoder import CausalLM
from .layers import ParallelEmbedding, RMSNorm, give_memory
from .quantized import QuantizedLinear
from .weights import targets_here, weight_targets

_STD = 0.02

Exchange = Callable[[CausalLM, str, ModelConfig, torch.device], QuantizedLinear]


def fill_random(
    model: CausalLM,
    config: ModelConfig,
    quant: QuantConfig | None,
    device: torch.device,
    *,
    exchange: Exchange,
    requantize: int | None = None,
) -> None:
    """Give a model on the meta device small random weights from a fixed seed.

    Args:
        model: to fill, the whole or a part.
        config: of the whole model.
        quant: quantisation that config.json declares; those layers get random codes.
        device: where the model shall live.
        exchange: puts a quantised layer in the place of a plain one.
        requantize: as in `load_model`.
    """
    quantized = {}
    here = targets_here(weight_targets(config), model.shard, config.tie_word_embeddings)
    for tensor, target in here.items():
        if quant is None or not target.is_linear_weight:
            continue
        scheme = quant.for_module(tensor.removesuffix(".weight"))
        if scheme is not None:
            quantized[tensor] = (target, scheme)
    for target, _ in quantized.values():
        exchange(model, target.module, config, device)
    give_memory(model, device)
    generator = torch.Generator(device=device).manual_seed(0)
    for module in model.modules():
        for param in module.parameters(recurse=False):
            if isinstance(module, RMSNorm):
                param.fill_(1.0)
            else:
                param.normal_(std=_STD, generator=generator)
        if isinstance(module, ParallelEmbedding):
            module.clear_padding()
    for tensor, target in here.items():
        layer = model.get_submodule(target.module)
        if not isinstance(layer, QuantizedLinear) or target.param != "weight":
            continue
        rows, columns = layer.local_shape(target.parts)
        weight: Stored
        if tensor in quantized:
            weight = _random(quantized[tensor][1], rows, columns, generator, config.dtype)
            weight = runnable(tensor, weight, requantize)
        else:
            weight = _normal(rows, columns, generator)
        layer.load_quantized(target.parts, weight)


def _normal(rows: int, columns: int, generator: torch.Generator) -> torch.Tensor:
    return _STD * torch.randn(rows, columns, generator=generator, device=generator.device)


def _random(
    scheme: LinearScheme,
    rows: int,
    columns: int,
    generator: torch.Generator,
    dtype: torch.dtype | None,
) -> Stored:
    """`dtype`: of the scales of weight-only formats, which quantizers store in the model's."""
    if scheme.method == "bitsandbytes" and scheme.style != "int8":
        return _normal(rows, columns, generator)
    device = generator.device
    codes = torch.randint(
        0,
        1 << scheme.bits,
        (rows, columns),
        dtype=torch.uint8,
        generator=generator,
        device=device,
    )
    # Uniform codes have a standard deviation of 2^bits / sqrt(12).
    scale = _STD * 12**0.5 / (1 << scheme.bits)
    if scheme.activations is not None:
        return Int8Weight(codes.view(torch.int8), torch.full((rows,), scale, device=device))
    groups = num_groups(columns, scheme.group_size)
    scales = torch.full((rows, groups), scale, dtype=dtype, device=device)
    return CanonicalWeight(codes, scales, None, scheme.bits, scheme.group_size)
