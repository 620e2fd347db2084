"""What each method does to one decoder block: from fp32 weights to quantised ones, with errors."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from . import awq, smoothquant
from .blocks import MODULES, Block, Part
from .calibration import Calibration, Statistics
from .canonical import CanonicalWeight, Int8Weight, QuantError
from .folding import fold_into_norm, fold_into_rows
from .gptq import Factor, Moments, factorize, gptq, output_loss, strip_width
from .memory import row_chunks, trim_heap
from .rtn import (
    GridOptions,
    checked,
    find_grid,
    on_grid,
    rtn,
    rtn_int8,
    unpacked,
    weight_error,
)

METHODS = ("rtn", "awq", "gptq", "smoothquant")
SAMPLE = 2048  # rows of an input that AWQ and SmoothQuant keep
ATTENTION_SAMPLE = 4096  # tokens that AWQ runs through the attention module
_ROWS = 256  # rows that are multiplied together
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
    done: Callable[[Result], None],
) -> None:
    """Quantise the wanted layers of a block.

    With calibration the hidden states move on to the next block; under GPTQ they are those of the
    quantised block, so that later blocks make up for the errors of earlier ones.

    Args:
        block: changed in place: folded factors, and under GPTQ the rounded weights. `streamed`
            for RTN and GPTQ.
        options: method and grid.
        calibration: hidden states before the block; None for RTN.
        wanted: names of the layers to quantise.
        done: called with each layer as soon as it is finished.
    """
    if options.method == "rtn":
        for part in block.parts:
            if part.name in wanted:
                weight = _named(part.name, lambda p=part: rtn(block.weight(p), options.grid))
                done(Result(part.name, weight, weight_error(block.weight(part), weight)))
        return
    assert calibration is not None
    run = {"gptq": _gptq, "awq": _awq, "smoothquant": _smoothquant}[options.method]
    run(block, options, calibration, wanted, done)
    trim_heap()
    calibration.advance(block)


def quantize_head(
    weight: Tensor, options: MethodOptions, inputs: Callable[[], Iterable[Tensor]] | None
) -> Result:
    """Quantise an output head: GPTQ as such, the other methods by rounding to nearest."""
    if options.method == "smoothquant":
        stored = rtn_int8(weight)
    elif options.method == "gptq" and inputs is not None:
        again = inputs

        def see_inputs(take: Callable[[Tensor], None]) -> None:
            for x in again():
                take(x)

        factor = _factor(weight.shape[1], see_inputs, options)
        return _run_gptq("lm_head", weight, factor, options)
    else:
        stored = rtn(weight, options.grid)
    return Result("lm_head", stored, weight_error(weight, stored))


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
    done: Callable[[Result], None],
) -> None:
    for module in MODULES:
        parts = [part for part in block.of(module) if part.name in wanted]
        if not parts:
            continue
        factor = _factor_of(block, module, calibration, options)
        for part in parts:
            result = _run_gptq(part.name, block.weight(part), factor, options)
            block.replace(part, result.weight)
            done(result)
        del factor  # before the next moments


def _factor_of(
    block: Block, module: str, calibration: Calibration, options: MethodOptions
) -> Factor:
    def see_inputs(take: Callable[[Tensor], None]) -> None:
        calibration.inputs_of(block, module, lambda step, x: take(x))
        trim_heap()

    return _factor(block.linear(module).in_features, see_inputs, options)


def _factor(
    in_features: int,
    see_inputs: Callable[[Callable[[Tensor], None]], None],
    options: MethodOptions,
) -> Factor:
    """The inputs are seen twice for act-order, whose columns must be known before their moments,
    and again should the moments, which the factor overwrites, not do.
    """
    order = None
    if options.act_order:
        power = torch.zeros(in_features, dtype=torch.float64)

        def add(x: Tensor) -> None:
            for begin, end in row_chunks(x):
                power.add_(x[begin:end].square().sum(0, dtype=torch.float64))

        see_inputs(add)
        order = torch.argsort(power, descending=True, stable=True)
    width = strip_width(in_features, options.grid, static_groups=options.static_groups)
    moments = Moments(in_features, width=width, order=order)
    see_inputs(moments.add)

    def refill() -> None:
        moments.clear()
        see_inputs(moments.add)

    damp = options.damp
    if damp is None:
        damp = 0.01 if moments.count >= in_features else 0.1
    return factorize(moments, refill, damp=damp)


def _run_gptq(name: str, weight: Tensor, factor: Factor, options: MethodOptions) -> Result:
    static = options.static_groups
    stored = _named(name, lambda: gptq(weight, factor, options.grid, static_groups=static))
    loss = power = 0.0
    for begin, end in row_chunks(weight, _ROWS):
        part = weight[begin:end].float()
        loss += output_loss(part - unpacked(stored, begin, end), factor)
        power += output_loss(part, factor)
    return Result(
        name,
        stored,
        weight_error(weight, stored),
        loss / (2 * max(weight.shape[0], 1)),
        math.sqrt(loss / power) if power > 0 else 0.0,
    )


# ---- AWQ and SmoothQuant ---------------------------------------------------------------------


def _statistics(block: Block, module: str, calibration: Calibration) -> Statistics:
    """Of the inputs of one module, as the block is now."""
    found = Statistics(block.linear(module).in_features, sample=SAMPLE, of=calibration.tokens)
    calibration.inputs_of(block, module, lambda step, x: found.add(x))
    return found


def _sample(block: Block, module: str, calibration: Calibration) -> Tensor:
    """Of the inputs of one module, as the block is now."""
    return _statistics(block, module, calibration).sample


def _attention_inputs(block: Block, calibration: Calibration) -> dict[int, Tensor]:
    """Whole inputs of the attention module, of steps with ATTENTION_SAMPLE tokens in all."""
    every = max(1, -(-calibration.tokens // ATTENTION_SAMPLE))
    found: dict[int, Tensor] = {}

    def take(step: int, x: Tensor) -> None:
        if step % every == 0:
            found[step] = x.clone()

    calibration.inputs_of(block, MODULES[0], take)
    return found


def _fold(block: Block, module: str, factors: Tensor) -> None:
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


def _awq(
    block: Block,
    options: MethodOptions,
    calibration: Calibration,
    wanted: set[str],
    done: Callable[[Result], None],
) -> None:
    heads_match = calibration.config.num_heads == calibration.config.num_kv_heads
    modules = [m for m in MODULES if any(part.name in wanted for part in block.of(m))]
    for module in modules:
        if module == "attn.o_proj" and not heads_match:
            continue  # several query heads share the rows of v that would have to be divided
        _fold(block, module, _awq_factors(block, module, calibration, options.grid))
        trim_heap()
    # The factors cancel, so the outputs of the block are still the original ones.
    for module in modules:
        weight, x = block.linear(module).weight.data, _sample(block, module, calibration)
        share = awq.clip_factors(weight, x, options.grid)
        if module == "attn.qkv_proj":
            # Clipping q and k changes attention scores, which partial outputs do not show.
            sizes = block.linear(module).parts
            share[: sizes["q"] + sizes["k"]] = 1.0
        for part in block.of(module):
            if part.name in wanted:
                weight = block.weight(part)
                stored = _on_clipped_grid(part, weight, share, options.grid)
                done(_result(part, weight, stored, x, x))
        trim_heap()


def _awq_factors(
    block: Block, module: str, calibration: Calibration, options: GridOptions
) -> Tensor:
    """The best factors of one module; candidates are tried inside of the block."""
    linear = block.linear(module)
    statistics = _statistics(block, module, calibration)
    sample = statistics.sample
    attention = _attention_inputs(block, calibration) if module == "attn.qkv_proj" else {}

    def inspect(candidate: Tensor) -> Tensor:
        if attention:
            return torch.cat([calibration.attend(block, i, x) for i, x in attention.items()])
        if module == "mlp.gate_up_proj":
            return torch.cat([block.layer.mlp(x) for x in sample.split(_ROWS)])
        return sample @ candidate.t()

    original = linear.weight.data.clone()
    factors = awq.search_factors(
        original, statistics.mean_abs, inspect, options, candidate=linear.weight.data
    )
    linear.weight.data.copy_(original)
    return factors


def _on_clipped_grid(
    part: Part, weight: Tensor, share: Tensor, options: GridOptions
) -> CanonicalWeight:
    def run() -> CanonicalWeight:
        grid = find_grid(checked(weight), options, shrink=share[part.begin : part.end])
        return on_grid(weight, grid, options)

    return _named(part.name, run)


def _smoothquant(
    block: Block,
    options: MethodOptions,
    calibration: Calibration,
    wanted: set[str],
    done: Callable[[Result], None],
) -> None:
    modules = [m for m in MODULES if any(part.name in wanted for part in block.of(m))]
    for module in modules:
        if module in _NORM_OF:
            largest = _statistics(block, module, calibration).max_abs
            weight = block.linear(module).weight.data
            _fold(block, module, smoothquant.smooth_factors(weight, largest, alpha=options.alpha))
    for module in modules:
        x = _sample(block, module, calibration)
        rounded = smoothquant.fake_quantize_tokens(x)
        for part in block.of(module):
            if part.name in wanted:
                weight = block.weight(part)
                done(_result(part, weight, rtn_int8(weight), x, rounded))
        trim_heap()


def _result(
    part: Part,
    weight: Tensor,
    stored: CanonicalWeight | Int8Weight,
    x: Tensor,
    rounded: Tensor,
) -> Result:
    """Errors of a layer whose inputs x arrive as `rounded`."""
    wrong = right = 0.0
    for begin, end in row_chunks(weight, _ROWS):
        for rows, seen in zip(x.split(_ROWS), rounded.split(_ROWS), strict=True):
            exact = rows @ weight[begin:end].t()
            right += float(exact.square().sum(dtype=torch.float64))
            exact -= seen @ unpacked(stored, begin, end).t()
            wrong += float(exact.square_().sum(dtype=torch.float64))
    return Result(
        part.name,
        stored,
        weight_error(weight, stored),
        wrong / max(x.shape[0] * weight.shape[0], 1),
        math.sqrt(wrong / right) if right > 0 else 0.0,
    )
