"""What each method does to one decoder block: from fp32 weights to quantised ones, with errors."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from . import awq, smoothquant
from .blocks import MODULES, Block, Part
from .calibration import Calibration, Statistics
from .canonical import CanonicalWeight, Int8Weight, QuantError
from .folding import fold_into_norm, fold_into_rows
from .gptq import Factor, Moments, factorize, gptq, output_loss
from .rtn import Grid, GridOptions, find_grid, on_grid, rtn, rtn_int8, weight_error

METHODS = ("rtn", "awq", "gptq", "smoothquant")
SAMPLE = 2048  # rows of each input that AWQ and SmoothQuant keep
_NORM_OF = {"attn.qkv_proj": "input_norm", "mlp.gate_up_proj": "post_norm"}


@dataclass(frozen=True, slots=True)
class MethodOptions:
    """What a method needs to know.

    Attributes:
        method: one of METHODS.
        grid: bits, groups, symmetry (SmoothQuant: 8 bits, one scale per channel).
        act_order: GPTQ: columns with the largest inputs first.
        static_groups: GPTQ: grids from the original weights.
        damp: GPTQ: share of the mean diagonal to add; None: 0.01, or 0.1 when there are fewer
            calibration tokens than input channels.
        alpha: SmoothQuant: how much difficulty moves into the weights.
    """

    method: str
    grid: GridOptions
    act_order: bool = False
    static_groups: bool = False
    damp: float | None = None
    alpha: float = 0.5


@dataclass(slots=True)
class Result:
    """One quantised layer.

    Attributes:
        name: of the checkpoint.
        weight: what replaces its weight.
        weight_error: ||W - W'|| / ||W|| (of the weights as scaled by AWQ or SmoothQuant).
        output_mse: mean squared error of the outputs over calibration tokens, or None.
        output_error: the same relative: ||y - y'|| / ||y||, or None.
    """

    name: str
    weight: CanonicalWeight | Int8Weight
    weight_error: float
    output_mse: float | None = None
    output_error: float | None = None


def quantize_block(
    block: Block,
    options: MethodOptions,
    calibration: Calibration | None,
    wanted: set[str],
    done: Callable[[str], None],
) -> list[Result]:
    """Quantise the wanted layers of a block.

    With calibration the hidden states move on to the next block; under GPTQ they are those of the
    quantised block, so that later blocks make up for the errors of earlier ones.

    Args:
        block: changed in place: folded factors, and under GPTQ the rounded weights.
        options: method and grid.
        calibration: hidden states before the block; None for RTN.
        wanted: names of the layers to quantise.
        done: called with the name of each finished layer.

    Returns:
        Results in the order of the checkpoint.
    """
    if options.method == "rtn":
        results = []
        for part in block.parts:
            if part.name in wanted:
                weight = _named(part.name, lambda p=part: rtn(block.weight(p), options.grid))
                error = weight_error(block.weight(part), weight.dequantize())
                results.append(Result(part.name, weight, error))
                done(part.name)
        return results
    assert calibration is not None
    run = {"gptq": _gptq, "awq": _awq, "smoothquant": _smoothquant}[options.method]
    return run(block, options, calibration, wanted, done)


def quantize_head(weight: Tensor, options: MethodOptions, inputs: list[Tensor] | None) -> Result:
    """Quantise an output head: GPTQ as such, the other methods by rounding to nearest."""
    if options.method == "smoothquant":
        stored = rtn_int8(weight)
    elif options.method == "gptq" and inputs is not None:
        moments = Moments(weight.shape[1])
        for x in inputs:
            moments.add(x)
        stored = gptq(
            weight, _factor(moments, options), options.grid, static_groups=options.static_groups
        )
        return _gptq_result("lm_head", weight, stored, moments)
    else:
        stored = rtn(weight, options.grid)
    return Result("lm_head", stored, weight_error(weight, stored.dequantize()))


def _named(name: str, run: Callable[[], CanonicalWeight]) -> CanonicalWeight:
    """Errors of the quantizers name the layer."""
    try:
        return run()
    except QuantError as error:
        raise QuantError(f"{name}: {error}") from error


# ---- GPTQ ------------------------------------------------------------------------------------


def _gptq(
    block: Block,
    options: MethodOptions,
    calibration: Calibration,
    wanted: set[str],
    done: Callable[[str], None],
) -> list[Result]:
    results = {}
    for module in MODULES:
        parts = [part for part in block.of(module) if part.name in wanted]
        if not parts:
            continue
        moments = Moments(block.linear(module).in_features)
        calibration.inputs_of(block, module, moments.add)
        factor = _factor(moments, options)
        for part in parts:
            weight = block.weight(part)
            stored = _named(
                part.name,
                lambda w=weight, f=factor: gptq(
                    w, f, options.grid, static_groups=options.static_groups
                ),
            )
            results[part.name] = _gptq_result(part.name, weight, stored, moments)
            weight.copy_(stored.dequantize())
            done(part.name)
    calibration.advance(block)
    return [results[part.name] for part in block.parts if part.name in results]


def _factor(moments: Moments, options: MethodOptions) -> Factor:
    damp = options.damp
    if damp is None:
        damp = 0.01 if moments.count >= moments.matrix.shape[0] else 0.1
    return factorize(moments.matrix, act_order=options.act_order, damp=damp)


def _gptq_result(name: str, weight: Tensor, stored: CanonicalWeight, moments: Moments) -> Result:
    rounded = stored.dequantize()
    loss = output_loss(weight, rounded, moments.matrix)
    power = output_loss(weight, torch.zeros_like(weight), moments.matrix)
    return Result(
        name,
        stored,
        weight_error(weight, rounded),
        loss / (2 * max(weight.shape[0], 1)),
        math.sqrt(max(loss, 0.0) / power) if power > 0 else 0.0,
    )


# ---- AWQ and SmoothQuant ---------------------------------------------------------------------


def _statistics(block: Block, calibration: Calibration) -> tuple[dict[str, Statistics], Tensor]:
    """Of every input of the block; and the attention module's whole input in the first step."""
    found = {
        name: Statistics(block.linear(name).in_features, sample=SAMPLE, of=calibration.tokens)
        for name in MODULES
    }
    first: list[Tensor] = []

    def take(name: str, step: int, x: Tensor) -> None:
        found[name].add(x)
        if step == 0 and name == MODULES[0]:
            first.append(x.clone())

    calibration.inputs(block, take)
    return found, first[0]


def _fold(block: Block, module: str, factors: Tensor, statistics: Statistics) -> None:
    """Apply factors to the inputs of a module, dividing in whatever produces them."""
    norm = _NORM_OF.get(module)
    if norm is not None:
        factors = fold_into_norm(block.norm(norm).weight.data, factors, block.norm_dtype(norm))
    else:
        producer = block.linear("attn.qkv_proj" if module == "attn.o_proj" else "mlp.gate_up_proj")
        rows = slice(producer.out_features - factors.shape[0], None)  # v, or up, come last
        bias = None if producer.bias is None else producer.bias.data[rows]
        fold_into_rows(producer.weight.data[rows], bias, factors)
    block.linear(module).weight.data *= factors
    statistics.divide(factors)


def _awq(
    block: Block,
    options: MethodOptions,
    calibration: Calibration,
    wanted: set[str],
    done: Callable[[str], None],
) -> list[Result]:
    found, attention_input = _statistics(block, calibration)
    heads_match = calibration.config.num_heads == calibration.config.num_kv_heads
    for module in MODULES:
        if not any(part.name in wanted for part in block.of(module)):
            continue
        if module == "attn.o_proj" and not heads_match:
            continue  # several query heads share the rows of v that would have to be divided
        linear, statistics = block.linear(module), found[module]
        weight = linear.weight.data.clone()
        sample = statistics.sample

        def inspect(candidate: Tensor, module: str = module, sample: Tensor = sample) -> Tensor:
            if module == "attn.qkv_proj":
                block.linear(module).weight.data.copy_(candidate)
                return calibration.attend(block, 0, attention_input)
            if module == "mlp.gate_up_proj":
                block.linear(module).weight.data.copy_(candidate)
                return block.layer.mlp(sample)
            return sample @ candidate.t()

        factors = awq.search_factors(weight, statistics.mean_abs, inspect, options.grid)
        linear.weight.data.copy_(weight)
        _fold(block, module, factors, statistics)
    # The factors cancel, so these are the outputs of the original block.
    calibration.advance(block)
    results = {}
    for module in MODULES:
        parts = [part for part in block.of(module) if part.name in wanted]
        if not parts:
            continue
        weight, x = block.linear(module).weight.data, found[module].sample
        share = awq.clip_factors(weight, x, options.grid)
        if module == "attn.qkv_proj":
            # Clipping q and k changes attention scores, which partial outputs do not show.
            sizes = block.linear(module).parts
            share[: sizes["q"] + sizes["k"]] = 1.0
        for part in parts:
            stored = _on_clipped_grid(part, block.weight(part), share, options.grid)
            rounded = stored.dequantize()
            results[part.name] = _result(part, block.weight(part), stored, x, x @ rounded.t())
            done(part.name)
    return [results[part.name] for part in block.parts if part.name in results]


def _on_clipped_grid(
    part: Part, weight: Tensor, share: Tensor, options: GridOptions
) -> CanonicalWeight:
    def run() -> CanonicalWeight:
        if not torch.isfinite(weight).all():
            raise QuantError("quantize: weights must be finite, got NaN or infinity")
        grid: Grid = find_grid(weight, options, shrink=share[part.begin : part.end])
        return on_grid(weight, grid, options)

    return _named(part.name, run)


def _smoothquant(
    block: Block,
    options: MethodOptions,
    calibration: Calibration,
    wanted: set[str],
    done: Callable[[str], None],
) -> list[Result]:
    found, _ = _statistics(block, calibration)
    for module in _NORM_OF:
        if any(part.name in wanted for part in block.of(module)):
            factors = smoothquant.smooth_factors(
                block.linear(module).weight.data, found[module].max_abs, alpha=options.alpha
            )
            _fold(block, module, factors, found[module])
    calibration.advance(block)
    results = []
    for part in block.parts:
        if part.name not in wanted:
            continue
        weight = block.weight(part)
        stored = rtn_int8(weight)
        x = found[part.module].sample
        outputs = smoothquant.fake_quantize_tokens(x) @ stored.dequantize().t()
        results.append(_result(part, weight, stored, x, outputs))
        done(part.name)
    return results


def _result(
    part: Part,
    weight: Tensor,
    stored: CanonicalWeight | Int8Weight,
    x: Tensor,
    outputs: Tensor,
) -> Result:
    wrong, right = outputs - x @ weight.t(), x @ weight.t()
    norm = float(right.norm())
    return Result(
        part.name,
        stored,
        weight_error(weight, stored.dequantize()),
        float(wrong.square().mean()),
        float(wrong.norm()) / norm if norm > 0 else 0.0,
    )
