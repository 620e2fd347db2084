"""SmoothQuant: move the outliers of activations into the weights, so that both fit into 8 bits.

t_j = max|x_j|^alpha / max|W_:j|^(1 - alpha) per input channel; x / t is folded into the norm before
the layers, W t is rounded per output channel, activations are rounded per token at run time.

Reference: Xiao et al., "SmoothQuant: Accurate and Efficient Post-Training Quantization for Large
Language Models", 2022.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .folding import safe_factors


def smooth_factors(weight: Tensor, max_abs: Tensor, *, alpha: float = 0.5) -> Tensor:
    """Factor per input channel.

    Args:
        weight: fp32 [N, K], the rows of all layers that read the input.
        max_abs: fp32 [K], max |x| over calibration tokens.
        alpha: how much of the difficulty moves from activations to weights, 0 to 1.

    Returns:
        fp32 [K]; 1 for channels whose inputs or weights are all zero.
    """
    largest = weight.abs().amax(0)
    factors = max_abs.pow(alpha) / largest.pow(1 - alpha)
    return safe_factors(factors.clamp(min=1e-5), (max_abs > 0) & (largest > 0))


def fake_quantize_tokens(x: Tensor) -> Tensor:
    """x [n, K] as the int8 operators see it: one symmetric scale per row, absmax / 127."""
    low, high = torch.aminmax(x, dim=1, keepdim=True)
    scales = torch.maximum(high, -low) / 127
    scales = torch.where(scales == 0, torch.ones_like(scales), scales)
    return (x / scales).round_().clamp_(-127, 127).mul_(scales)
