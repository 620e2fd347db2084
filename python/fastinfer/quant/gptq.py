"""GPTQ: round column by column, letting each column make up for the errors of those before it.

The error that matters is that of the outputs, tr(D H D^T) with D = W - W' and H = 2 mean(x x^T)
over calibration inputs. With H = R R^T, R upper triangular, it is the sum over columns j of

    |D_j R_jj + c_j|^2,    c_j = sum over i < j of D_i R_ij,

so the best value for column j, given the errors of the columns before it, is w_j + c_j / R_jj. This
is the published update (which goes through the Cholesky factor of H^-1) without the inverse: one
factorization, in the place of H.

Of H only the upper triangle is kept, as strips of columns, each with the rows down to its end:
2 K^2 bytes in all, and a little more on the diagonal. R takes its place strip by strip.

Reference: Frantar et al., "GPTQ: Accurate Post-Training Quantization for Generative Pre-trained
Transformers", 2022.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from .canonical import CanonicalWeight, QuantError
from .memory import all_finite, row_chunks, trim_heap
from .rtn import Grid, GridOptions, checked, find_grid

STRIP = 128  # columns that are rounded between two matrix products
_RETRIES = 4


def strip_width(columns: int, options: GridOptions, *, static_groups: bool = False) -> int:
    """Columns per strip: whole groups, where a group's grid depends on the errors before it."""
    size = options.size(columns)
    if static_groups or size >= columns:
        return STRIP
    return size * max(1, STRIP // size)


def _strips(tensors: list[Tensor]) -> Iterator[tuple[int, int, Tensor]]:
    """(first column, end, strip) of each."""
    for tensor in tensors:
        end, width = tensor.shape
        yield end - width, end, tensor


class Moments:
    """Running mean of 2 x x^T over calibration inputs.

    Args:
        in_features: K.
        width: columns per strip, see `strip_width`.
        order: int64 [K], the order in which the columns will be rounded; None: as they are.

    Attributes:
        count: inputs seen.
        strips: fp32 [end, end - begin] each, rows [0, end) of the columns [begin, end).
        order: int64 [K].
        reordered: whether an order was given.
    """

    def __init__(
        self, in_features: int, *, width: int = STRIP, order: Tensor | None = None
    ) -> None:
        self.count = 0
        ends = [*range(width, in_features, width), in_features]
        self.strips = [torch.zeros(end, end - i * width) for i, end in enumerate(ends)]
        self.reordered = order is not None
        self.order = torch.arange(in_features) if order is None else order

    def add(self, x: Tensor) -> None:
        """Take inputs [n, K]."""
        x = x.detach().float()
        if not all_finite(x):
            raise QuantError("gptq: calibration inputs must be finite, got NaN or infinity")
        total = self.count + x.shape[0]
        if total == 0:
            return
        if self.reordered:
            x = x[:, self.order]
        for begin, end, strip in _strips(self.strips):
            strip.addmm_(
                x[:, :end].t(), x[:, begin:end], beta=self.count / total, alpha=2.0 / total
            )
        self.count = total

    def diagonal(self) -> Tensor:
        """A copy, in the order of rounding."""
        return torch.cat(
            [strip[begin:end].diagonal() for begin, end, strip in _strips(self.strips)]
        )

    def clear(self) -> None:
        """Forget all inputs; the next ones overwrite the strips."""
        self.count = 0
        for strip in self.strips:
            strip.zero_()


@dataclass(slots=True)
class Factor:
    """What GPTQ needs of the moments of one input; shared by all layers that read it.

    Attributes:
        strips: R, upper triangular, in the strips of the moments.
        order: int64 [K], the columns in the order they are rounded in.
        act_order: whether that is another than the original one.
        dead: bool [K], inputs that were always zero, in original order.
        damp: share of the mean diagonal that was added to it.
        added: the same as a number.
    """

    strips: list[Tensor]
    order: Tensor
    act_order: bool
    dead: Tensor
    damp: float
    added: float


def factorize(
    moments: Moments, refill: Callable[[], None], *, damp: float = 0.01, retries: int = _RETRIES
) -> Factor:
    """Factorize the moments, in their place.

    Args:
        moments: of the inputs.
        refill: computes the moments again, after a failure.
        damp: share of the mean diagonal to add to the diagonal; times 10 after each failure.
        retries: failures to accept.

    Raises:
        QuantError: the moments are not finite, or not positive definite however much was added.
    """
    diagonal = moments.diagonal()
    if not all(all_finite(strip) for strip in moments.strips):
        raise QuantError("gptq: moments must be finite, got NaN or infinity in the inputs")
    dead = torch.zeros(diagonal.shape, dtype=torch.bool)
    dead[moments.order] = diagonal <= 0
    diagonal = torch.where(diagonal <= 0, 1.0, diagonal)
    mean = float(diagonal.mean()) if diagonal.numel() else 1.0
    for attempt in range(retries + 1):
        if attempt:
            refill()
        if _factorize(moments.strips, diagonal + damp * mean):
            order, reordered = moments.order, moments.reordered
            return Factor(moments.strips, order, reordered, dead, damp, damp * mean)
        damp *= 10
    raise QuantError(
        f"gptq: moments of the inputs must be positive definite, got others even with "
        f"{damp / 10:g} of their mean added; calibrate on more text"
    )


def _factorize(strips: list[Tensor], diagonal: Tensor) -> bool:
    """R R^T of the strips with this diagonal, last columns first. False: it has no such root."""
    for i, (begin, end, strip) in reversed([*enumerate(_strips(strips))]):
        corner = strip[begin:]
        corner.diagonal().copy_(diagonal[begin:end])
        for later in strips[i + 1 :]:
            strip.addmm_(later[:end], later[begin:end].t(), alpha=-1)
        lower, failed = torch.linalg.cholesky_ex(corner.flip(0, 1))
        if failed or not all_finite(lower):
            return False
        corner.copy_(lower.flip(0, 1))
        above = strip[:begin]
        above.copy_(torch.linalg.solve_triangular(corner.t(), above, upper=False, left=False))
    return True


def gptq(
    weight: Tensor, factor: Factor, options: GridOptions, *, static_groups: bool = False
) -> CanonicalWeight:
    """Quantise a weight.

    Args:
        weight: floating point [N, K]; there will be one copy of it, in fp32.
        factor: of the moments of its inputs, in strips of `strip_width`.
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
    size, order = options.size(columns), factor.order
    permuted = factor.act_order and not static_groups
    fixed = static_groups or size >= columns  # no grid depends on an error
    group = (order if static_groups else torch.arange(columns)) // size
    # One row per column; it holds the weights, and once it is rounded their errors.
    errors, grid = _in_order(weight, factor, options)  # not fixed: overwritten group by group
    codes = torch.empty(errors.shape, dtype=torch.uint8)
    for begin, end, strip in _strips(factor.strips):
        carried = strip[:begin].t() @ errors[:begin]
        corner = strip[begin:]
        for i in range(end - begin):
            column, g = errors[begin + i], group[begin + i]
            if not fixed and (begin + i) % size == 0:
                own = slice(i, i + size)
                # What these columns would be now if none of them had to be rounded.
                wanted = torch.linalg.solve_triangular(
                    corner[own, own].t(), carried[own], upper=False
                )
                wanted += errors[begin + i : min(begin + i + size, end)]
                _set_group(grid, int(g), wanted.t(), options)
            scale = grid.scales[:, g].float()
            zero = options.middle if grid.zeros is None else grid.zeros[:, g].float()
            code = ((column + carried[i] / corner[i, i]) / scale).round_() + zero
            code = code.clamp_(0, options.top)
            codes[begin + i] = code.to(torch.uint8)
            column -= (code - zero).mul_(scale)
            carried[i + 1 :].addr_(corner[i, i + 1 :], column)
    del errors, carried, corner
    trim_heap()
    restored = torch.empty(weight.shape, dtype=torch.uint8)
    restored.t()[torch.arange(columns) if permuted else order] = codes
    perm = order.to(torch.int32) if permuted else None
    return CanonicalWeight(
        restored, grid.scales, grid.zeros, options.bits, options.group_size, perm
    )


def _in_order(weight: Tensor, factor: Factor, options: GridOptions) -> tuple[Tensor, Grid]:
    """The columns as fp32 rows in the order of rounding, dead ones zero, and their grids."""
    columns = torch.empty(weight.shape[1], weight.shape[0])
    grids = []
    for begin, end in row_chunks(weight):
        part = weight[begin:end].float().masked_fill(factor.dead, 0.0)
        columns[:, begin:end] = part.t()[factor.order]
        grids.append(find_grid(part, options))
    zeros = [grid.zeros for grid in grids if grid.zeros is not None]
    return columns, Grid(
        torch.cat([grid.scales for grid in grids]), torch.cat(zeros) if zeros else None
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
    wrong = wrong.float().masked_fill(factor.dead, 0.0)[:, factor.order]
    total = -factor.added * float(wrong.square().sum(dtype=torch.float64))
    for _, end, strip in _strips(factor.strips):
        total += float((wrong[:, :end] @ strip).square_().sum(dtype=torch.float64))
    return max(total, 0.0)
