"""GPTQ: round column by column, moving each column's error onto the columns still to come.

The error that matters is that of the outputs, tr((W - W') H (W - W')^T) with H = 2 mean(x x^T) over
calibration inputs. With U the upper Cholesky factor of H^-1, rounding column i with error e =
(w_i - w'_i) / U_ii is best compensated by W[:, j] -= e U_ij for all j > i.

Reference: Frantar et al., "GPTQ: Accurate Post-Training Quantization for Generative Pre-trained
Transformers", 2022.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .canonical import CanonicalWeight, QuantError
from .rtn import Grid, GridOptions, checked, find_grid

BLOCK = 128  # columns whose errors are collected before the rest of the matrix is updated
_RETRIES = 4


class Moments:
    """Running mean of 2 x x^T over calibration inputs.

    Args:
        in_features: K.
    """

    def __init__(self, in_features: int) -> None:
        self.count = 0
        self.matrix = torch.zeros(in_features, in_features)

    def add(self, x: Tensor) -> None:
        """Take inputs [n, K]."""
        x = x.detach().float()
        if not torch.isfinite(x).all():
            raise QuantError("gptq: calibration inputs must be finite, got NaN or infinity")
        total = self.count + x.shape[0]
        if total == 0:
            return
        self.matrix *= self.count / total
        self.matrix.addmm_(x.t(), x, alpha=2.0 / total)
        self.count = total


@dataclass(slots=True)
class Factor:
    """What GPTQ needs of the moments of one input; shared by all layers that read it.

    Attributes:
        upper: [K, K], upper Cholesky factor of the inverse, in the order of `order`.
        order: int64 [K], the columns in the order they are rounded in; None: as they are.
        dead: bool [K], inputs that were always zero, in original order.
        damp: share of the mean diagonal that was added to it.
    """

    upper: Tensor
    order: Tensor | None
    dead: Tensor
    damp: float


def factorize(
    moments: Tensor, *, act_order: bool = False, damp: float = 0.01, retries: int = _RETRIES
) -> Factor:
    """Invert the moments.

    Args:
        moments: fp32 [K, K], symmetric.
        act_order: round the columns with the largest moments first.
        damp: share of the mean diagonal to add to the diagonal; times 10 after each failure.
        retries: failures to accept.

    Raises:
        QuantError: the moments are not finite, or not positive definite however much was added.
    """
    if not torch.isfinite(moments).all():
        raise QuantError("gptq: moments must be finite, got NaN or infinity in the inputs")
    matrix = moments.float().clone()
    diagonal = matrix.diagonal()
    dead = diagonal <= 0
    order = None
    if act_order:
        order = torch.argsort(diagonal, descending=True, stable=True)
    diagonal[dead] = 1.0
    if order is not None:
        matrix = matrix[order][:, order]
    mean = float(matrix.diagonal().mean()) if matrix.numel() else 1.0
    for _ in range(retries + 1):
        damped = matrix.clone()
        damped.diagonal().add_(damp * mean)
        lower, failed = torch.linalg.cholesky_ex(damped)
        if not failed:
            inverse = torch.cholesky_inverse(lower)
            upper, failed = torch.linalg.cholesky_ex(inverse, upper=True)
            if not failed and torch.isfinite(upper).all():
                return Factor(upper, order, dead, damp)
        damp *= 10
    raise QuantError(
        f"gptq: moments of the inputs must be positive definite, got others even with "
        f"{damp / 10:g} of their mean added; calibrate on more text"
    )


def gptq(
    weight: Tensor, factor: Factor, options: GridOptions, *, static_groups: bool = False
) -> CanonicalWeight:
    """Quantise a weight.

    Args:
        weight: floating point [N, K].
        factor: of the moments of its inputs.
        options: bits, groups, symmetry.
        static_groups: take every grid from the original weights, groups being neighbours in
            original order; with act-order nothing then has to be permuted at run time. Otherwise a
            grid is taken when its first column is reached, from the compensated weights.

    Returns:
        The weight; with `perm` when the columns were reordered and groups are not static.

    Raises:
        QuantError: the weight holds NaN or infinity.
    """
    weight = checked(weight).clone()
    weight[:, factor.dead] = 0.0
    columns = weight.shape[1]
    size = options.size(columns)
    group = torch.arange(columns) // size
    order = factor.order
    grid = find_grid(weight, options)  # not static: overwritten group by group
    if order is not None:
        weight = weight[:, order]
        if static_groups:
            group = group[order]
    codes = torch.empty(weight.shape, dtype=torch.uint8)
    upper = factor.upper
    for begin in range(0, columns, BLOCK):
        end = min(begin + BLOCK, columns)
        errors = torch.empty(weight.shape[0], end - begin)
        for i in range(begin, end):
            if not static_groups and i % size == 0:
                current = weight[:, i : i + size].clone()
                if i + size > end:  # columns of later blocks lack the errors of this one
                    late = errors[:, : i - begin] @ upper[begin:i, end : i + size]
                    current[:, end - i :] -= late
                _set_group(grid, i // size, current, options)
            column = weight[:, i]
            scale = grid.scales[:, group[i]].float()
            zero = options.middle if grid.zeros is None else grid.zeros[:, group[i]].float()
            code = ((column / scale).round() + zero).clamp(0, options.top)
            codes[:, i] = code.to(torch.uint8)
            error = (column - (code - zero) * scale) / upper[i, i]
            weight[:, i + 1 : end].addr_(error, upper[i, i + 1 : end], alpha=-1)
            errors[:, i - begin] = error
        weight[:, end:].addmm_(errors, upper[begin:end, end:], alpha=-1)
    perm = None
    if order is not None and static_groups:
        original = torch.empty_like(codes)
        original[:, order] = codes
        codes = original
    elif order is not None:
        perm = order.to(torch.int32)
    bits, group_size = options.bits, options.group_size
    return CanonicalWeight(codes, grid.scales, grid.zeros, bits, group_size, perm)


def _set_group(grid: Grid, group: int, weight: Tensor, options: GridOptions) -> None:
    """Take the grid of one group from these columns."""
    whole = GridOptions(options.bits, -1, options.symmetric, options.scale_dtype)
    new = find_grid(weight, whole)
    grid.scales[:, group] = new.scales[:, 0]
    if grid.zeros is not None and new.zeros is not None:
        grid.zeros[:, group] = new.zeros[:, 0]


def output_loss(weight: Tensor, rounded: Tensor, moments: Tensor) -> float:
    """tr((W - W') H (W - W')^T), with H of `Moments` twice the squared output error per token."""
    wrong = weight.float() - rounded.float()
    return float(((wrong @ moments) * wrong).sum())
