"""AWQ: scale up the input channels that matter before rounding, then clip.

For each set of layers that read one input, t = a^r / m^(1-r) per channel, with a the mean |x| and m
the mean share of the group's largest weight; r is searched, comparing the output of the attention
or feed-forward module around the layers. 1 / t goes into whatever produces the input.

Reference: Lin et al., "AWQ: Activation-aware Weight Quantization for LLM Compression and
Acceleration", 2023.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from .folding import safe_factors
from .memory import row_chunks
from .rtn import GridOptions, find_grid, grouped, on_grid, search_shrink

STEPS = 20
CLIP_TOKENS = 512  # calibration tokens that the clip search looks at


def search_factors(
    weight: Tensor,
    mean_abs: Tensor,
    inspect: Callable[[Tensor], Tensor],
    options: GridOptions,
    *,
    steps: int = STEPS,
    candidate: Tensor | None = None,
) -> Tensor:
    """The best factor per input channel.

    Args:
        weight: fp32 [N, K], the rows of all layers that read the input.
        mean_abs: fp32 [K], mean |x| over calibration tokens.
        inspect: output of the module around these layers when they have the given weight.
        options: bits, groups, symmetry.
        steps: values of r to try; "no factors" is tried as well.
        candidate: fp32 [N, K] to put the weights to inspect into; overwritten.

    Returns:
        fp32 [K], ones where nothing helps.
    """
    alive = (mean_abs > 0) & torch.isfinite(mean_abs)
    best = torch.ones_like(mean_abs)
    if not bool(alive.any()):
        return best
    candidate = torch.empty_like(weight) if candidate is None else candidate
    reference = inspect(candidate.copy_(weight))
    magnitude = torch.zeros_like(best)
    for begin, end in row_chunks(weight):
        groups = grouped(weight[begin:end].abs(), options)
        groups = groups / groups.amax(2, keepdim=True).clamp(min=1e-30)
        magnitude += groups.flatten(1)[:, : weight.shape[1]].sum(0)
    magnitude /= max(weight.shape[0], 1)
    least = torch.inf
    for step in range(-1, steps):
        factors = torch.ones_like(best)
        if step >= 0:
            factors = _candidate(mean_abs, magnitude, step / steps, alive)
        for begin, end in row_chunks(weight):
            scaled = weight[begin:end] * factors
            rounded = on_grid(scaled, find_grid(scaled, options), options)
            torch.div(rounded.dequantize(), factors, out=candidate[begin:end])
        loss = float((inspect(candidate) - reference).square_().mean())
        if loss < least:
            best, least = factors, loss
    return best


def _candidate(mean_abs: Tensor, magnitude: Tensor, ratio: float, alive: Tensor) -> Tensor:
    factors = mean_abs.pow(ratio) / (magnitude.pow(1 - ratio) + 1e-4)
    factors = safe_factors(factors.clamp(min=1e-4), alive)
    seen = factors[alive]
    return safe_factors(factors / (seen.max() * seen.min()).sqrt(), alive)


def clip_factors(weight: Tensor, x: Tensor, options: GridOptions) -> Tensor:
    """Share of each group's range to keep, from the squared error of the groups' partial outputs.

    Args:
        weight: fp32 [N, K].
        x: fp32 [n, K], inputs; at most CLIP_TOKENS of them are used.
        options: bits, groups, symmetry.

    Returns:
        fp32 [N, G].
    """
    every = max(1, -(-x.shape[0] // CLIP_TOKENS))
    inputs = grouped(x[::every].float(), options)
    moments = torch.einsum("tgi,tgj->gij", inputs, inputs)
    return search_shrink(weight, options, moments=moments)
