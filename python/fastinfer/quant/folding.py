"""Moves a factor per channel from the inputs of a layer into whatever produces them.

x W^T = (x / t) (W t)^T: AWQ and SmoothQuant choose t so that W t, or x / t, loses less by rounding.
"""

from __future__ import annotations

import torch
from torch import Tensor


def safe_factors(factors: Tensor, alive: Tensor) -> Tensor:
    """Factors with 1 where a channel is dead (always zero) or the factor is not a usable number."""
    usable = alive & torch.isfinite(factors) & (factors > 0)
    return torch.where(usable, factors, torch.ones_like(factors))


def fold_into_norm(norm: Tensor, factors: Tensor, stored: torch.dtype) -> Tensor:
    """Divide a norm's weight by the factors, in place.

    The weight is rounded to the dtype it will be stored in, so the factors that were really applied
    differ a little; using those leaves no error.

    Args:
        norm: fp32 [K], weight of the norm.
        factors: fp32 [K].
        stored: dtype of the norm's weight in the checkpoint.

    Returns:
        The factors to multiply the columns of the weights with.
    """
    folded = (norm / factors).to(stored).float()
    usable = torch.isfinite(folded) & (folded != 0) & (norm != 0)
    applied = torch.where(usable, norm / folded, torch.ones_like(norm))
    norm.copy_(torch.where(usable, folded, norm))
    return applied


def fold_into_rows(weight: Tensor, bias: Tensor | None, factors: Tensor) -> None:
    """Divide the rows of the linear layer that produces the channels, in place."""
    weight /= factors[:, None]
    if bias is not None:
        bias /= factors
