"""GPTQ: round column by column, letting each column make up for the errors of those before it.

The error that matters is that of the outputs, tr(D H D^T) with D = W - W' and H = 2 mean(x x^T)
over calibration inputs. With H = R R^T, R upper triangular, it is the sum over columns j of

    |D_j R_jj + c_j|^2,    c_j = sum over i < j of D_i R_ij,

so the best value for column j, given the errors of the columns before it, is w_j + c_j / R_jj. This
is the published update (which goes through the Cholesky factor of H^-1) without the inverse: one
factorization, in the place of H.

Columns are held last first: then R is the ordinary lower Cholesky factor, walked from its end.

Reference: Frantar et al., "GPTQ: Accurate Post-Training Quantization for Generative Pre-trained
Transformers", 2022.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from .canonical import CanonicalWeight, QuantError
from .memory import all_finite, row_chunks
from .rtn import Grid, GridOptions, checked, find_grid

BLOCK = 128  # columns that are rounded between two matrix products
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
        if not all_finite(x):
            raise QuantError("gptq: calibration inputs must be finite, got NaN or infinity")
        total = self.count + x.shape[0]
        if total == 0:
            return
        self.matrix.addmm_(x.t(), x, beta=self.count / total, alpha=2.0 / total)
        self.count = total

    def clear(self) -> None:
        """Forget all inputs; the next ones overwrite the matrix."""
        self.count = 0
        self.matrix.zero_()


@dataclass(slots=True)
class Factor:
    """What GPTQ needs of the moments of one input; shared by all layers that read it.

    Attributes:
        lower: [K, K], lower Cholesky factor of the moments in the order of `stored`.
        stored: int64 [K], the columns in the opposite of the order they are rounded in.
        act_order: whether that order is another than the original one.
        dead: bool [K], inputs that were always zero, in original order.
        damp: share of the mean diagonal that was added to it.
        added: the same as a number.
    """

    lower: Tensor
    stored: Tensor
    act_order: bool
    dead: Tensor
    damp: float
    added: float


def factorize(
    moments: Tensor,
    *,
    act_order: bool = False,
    damp: float = 0.01,
    retries: int = _RETRIES,
    refill: Callable[[], None] | None = None,
) -> Factor:
    """Factorize the moments.

    Args:
        moments: fp32 [K, K], symmetric; left as they are, unless there is `refill`.
        act_order: round the columns with the largest moments first.
        damp: share of the mean diagonal to add to the diagonal; times 10 after each failure.
        retries: failures to accept.
        refill: writes the moments again, after a failure. The factor then takes their place, and
            there is only one [K, K] matrix.

    Raises:
        QuantError: the moments are not finite, or not positive definite however much was added.
    """
    columns = moments.shape[0]
    diagonal = moments.diagonal().clone()
    if not all_finite(moments):
        raise QuantError("gptq: moments must be finite, got NaN or infinity in the inputs")
    dead = diagonal <= 0
    stored = torch.arange(columns).flip(0)
    if act_order:
        stored = torch.argsort(diagonal, descending=True, stable=True).flip(0)
    diagonal[dead] = 1.0
    diagonal = diagonal[stored]
    mean = float(diagonal.mean()) if columns else 1.0
    failed = torch.empty((), dtype=torch.int32)
    for attempt in range(retries + 1):
        if refill is not None and attempt:
            refill()
        matrix = moments if refill is not None else moments.clone()
        for side in (matrix, matrix.t()):
            for begin, end in row_chunks(side):
                side[begin:end] = side[begin:end, stored]
        matrix.diagonal().copy_(diagonal + damp * mean)
        # Symmetric, so its transpose is the column-major matrix that is factorized in place.
        torch.linalg.cholesky_ex(matrix.t(), out=(matrix.t(), failed))
        if not failed and all_finite(matrix.diagonal()):
            return Factor(matrix.t(), stored, act_order, dead, damp, damp * mean)
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
    weight = checked(weight)
    columns = weight.shape[1]
    size, lower, stored = options.size(columns), factor.lower, factor.stored
    permuted = factor.act_order and not static_groups
    if factor.dead.any():
        weight = weight.masked_fill(factor.dead, 0.0)
    grid = find_grid(weight, options)  # not static: overwritten group by group
    group = torch.arange(columns) // size  # of each stored column
    group = group.flip(0) if not static_groups else group[stored]
    # One row per column; it holds the weights, and once it is rounded their errors.
    errors = weight.t()[stored]
    codes = torch.empty(errors.shape, dtype=torch.uint8)
    fixed = static_groups or size >= columns  # no grid depends on an error
    block = BLOCK if fixed else size * max(1, BLOCK // size)
    for end in range(columns, 0, -block):
        begin = max(end - block, 0)
        carried = lower[end:, begin:end].t() @ errors[end:]
        corner = lower[begin:end, begin:end].contiguous()
        for i in reversed(range(end - begin)):
            column, g = errors[begin + i], group[begin + i]
            if not fixed and (columns - 1 - begin - i) % size == 0:
                own = slice(max(i + 1 - size, 0), i + 1)
                # What these columns would be now if none of them had to be rounded.
                wanted = torch.linalg.solve_triangular(
                    corner[own, own].t(), carried[own], upper=True
                )
                wanted += errors[begin + own.start : begin + own.stop]
                _set_group(grid, int(g), wanted.flip(0).t(), options)
            scale = grid.scales[:, g].float()
            zero = options.middle if grid.zeros is None else grid.zeros[:, g].float()
            code = ((column + carried[i] / corner[i, i]) / scale).round_() + zero
            code = code.clamp_(0, options.top)
            codes[begin + i] = code.to(torch.uint8)
            column -= (code - zero).mul_(scale)
            carried[:i].addr_(corner[i, :i], column)
    del errors
    restored = torch.empty(weight.shape, dtype=torch.uint8)
    restored.t()[torch.arange(columns).flip(0) if permuted else stored] = codes
    perm = stored.flip(0).to(torch.int32) if permuted else None
    return CanonicalWeight(
        restored, grid.scales, grid.zeros, options.bits, options.group_size, perm
    )


def _set_group(grid: Grid, group: int, weight: Tensor, options: GridOptions) -> None:
    """Take the grid of one group from these columns."""
    whole = GridOptions(options.bits, -1, options.symmetric, options.scale_dtype)
    new = find_grid(weight, whole)
    grid.scales[:, group] = new.scales[:, 0]
    if grid.zeros is not None and new.zeros is not None:
        grid.zeros[:, group] = new.zeros[:, 0]


def output_loss(wrong: Tensor, factor: Factor) -> float:
    """tr(D H D^T) for D [N, K]: with H of `Moments`, twice the squared output error per token."""
    wrong = wrong.float().masked_fill(factor.dead, 0.0)[:, factor.stored]
    total = (wrong @ factor.lower).square_().sum(dtype=torch.float64)
    return max(float(total - factor.added * wrong.square_().sum(dtype=torch.float64)), 0.0)
