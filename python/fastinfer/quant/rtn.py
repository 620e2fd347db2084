"""Round to nearest: the grid of each group from its own weights, no calibration data.

The grid (scale and zero point per output row and group) is what every quantizer here shares; they
differ in what they do to the weights before rounding, and GPTQ also while rounding.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from .canonical import CanonicalWeight, Int8Weight, QuantError
from .memory import all_finite, row_chunks


@dataclass(frozen=True, slots=True)
class GridOptions:
    """How weights are put on a grid.

    Attributes:
        bits: 4 or 8.
        group_size: input channels per scale; -1: one scale per output channel.
        symmetric: zero points fixed in the middle of the range; scale = absmax / (2^(bits-1) - 1).
        scale_dtype: of the stored scales; weights are rounded to the grid of the stored ones.
    """

    bits: int = 4
    group_size: int = 128
    symmetric: bool = True
    scale_dtype: torch.dtype = torch.float16

    def __post_init__(self) -> None:
        if self.bits not in (4, 8):
            raise ValueError(f"quantize: bits must be 4 or 8, got {self.bits!r}")
        if self.group_size != -1 and self.group_size < 1:
            raise ValueError(
                f"quantize: group_size must be -1 or positive, got {self.group_size!r}; -1 is one "
                "scale per output channel"
            )
        if self.scale_dtype not in (torch.float16, torch.bfloat16, torch.float32):
            raise ValueError(
                f"quantize: scale_dtype must be float16, bfloat16 or float32, got "
                f"{self.scale_dtype}"
            )

    @property
    def middle(self) -> int:
        return 1 << (self.bits - 1)

    @property
    def top(self) -> int:
        return (1 << self.bits) - 1

    def size(self, in_features: int) -> int:
        """Columns per group of a layer with that many."""
        return max(in_features, 1) if self.group_size == -1 else self.group_size


@dataclass(slots=True)
class Grid:
    """scales [N, G] in their stored dtype; zeros uint8 [N, G], None when symmetric."""

    scales: Tensor
    zeros: Tensor | None


def find_grid(weight: Tensor, options: GridOptions, *, shrink: Tensor | float = 1.0) -> Grid:
    """The grid that spans each group of a weight.

    Args:
        weight: floating point [N, K], finite.
        options: bits, groups, symmetry.
        shrink: share of each group's range to span, a number or [N, G]; less than 1 clips.

    Returns:
        Scales and zero points; a group of zeros gets scale 1.

    Raises:
        QuantError: a scale does not fit into the dtype it is stored in.
    """
    parts = [
        _find_grid(
            weight[begin:end].float(),
            options,
            shrink if isinstance(shrink, float) else shrink[begin:end],
        )
        for begin, end in row_chunks(weight)
    ]
    zeros = [part.zeros for part in parts if part.zeros is not None]
    return Grid(torch.cat([part.scales for part in parts]), torch.cat(zeros) if zeros else None)


def _find_grid(weight: Tensor, options: GridOptions, shrink: Tensor | float) -> Grid:
    groups = grouped(weight, options)
    if options.symmetric:
        scales = groups.abs().amax(2) * shrink / (options.middle - 1)
    else:
        high = groups.amax(2).clamp(min=0) * shrink
        low = groups.amin(2).clamp(max=0) * shrink
        scales = high / options.top - low / options.top
    limit = torch.finfo(options.scale_dtype).max
    if scales.numel() and float(scales.max()) > limit:
        raise QuantError(
            f"quantize: weights must have scales below {limit:g} to be stored as "
            f"{options.scale_dtype}, got {float(scales.max()):g}; store scales as float32"
        )
    stored = scales.to(options.scale_dtype)
    stored = torch.where(stored == 0, torch.ones_like(stored), stored)
    if options.symmetric:
        return Grid(stored, None)
    zeros = (-low / stored.float()).round().clamp(0, options.top)
    return Grid(stored, zeros.to(torch.uint8))


def encode(weight: Tensor, grid: Grid, options: GridOptions) -> Tensor:
    """Nearest codes, uint8 [N, K]. Symmetric code 0 is used only where a range was clipped."""
    codes = torch.empty(weight.shape, dtype=torch.uint8)
    for begin, end in row_chunks(weight):
        groups = grouped(weight[begin:end].float(), options)
        zeros: Tensor | float = float(options.middle)
        if grid.zeros is not None:
            zeros = grid.zeros[begin:end].float()[..., None]
        part = (groups / grid.scales[begin:end].float()[..., None]).round_().add_(zeros)
        codes[begin:end] = part.clamp_(0, options.top).flatten(1)[:, : weight.shape[1]]
    return codes


def rtn(weight: Tensor, options: GridOptions, *, clip: bool = False) -> CanonicalWeight:
    """Quantise a weight by rounding to nearest.

    Args:
        weight: floating point [N, K].
        options: bits, groups, symmetry.
        clip: search, per group, the share of the range with the least squared error.

    Returns:
        The weight; `weight.bias` is left out.

    Raises:
        QuantError: the weight holds NaN or infinity, or a scale does not fit.
    """
    weight = checked(weight)
    shrink = search_shrink(weight, options) if clip else 1.0
    return on_grid(weight, find_grid(weight, options, shrink=shrink), options)


def rtn_int8(weight: Tensor) -> Int8Weight:
    """Signed 8-bit codes with one fp32 scale per output channel (absmax / 127), for W8A8."""
    weight = checked(weight)
    codes = torch.empty(weight.shape, dtype=torch.int8)
    scales = torch.ones(weight.shape[0])
    for begin, end in row_chunks(weight):
        part = weight[begin:end].float()
        scale = part.abs().amax(1) / 127
        scale = torch.where(scale == 0, torch.ones_like(scale), scale)
        codes[begin:end] = (part / scale[:, None]).round_().clamp_(-127, 127)
        scales[begin:end] = scale
    return Int8Weight(codes, scales)


def on_grid(weight: Tensor, grid: Grid, options: GridOptions) -> CanonicalWeight:
    """The weight rounded to a grid."""
    codes = encode(weight, grid, options)
    return CanonicalWeight(codes, grid.scales, grid.zeros, options.bits, options.group_size)


def search_shrink(
    weight: Tensor,
    options: GridOptions,
    *,
    moments: Tensor | None = None,
    steps: int = 10,
    span: float = 0.5,
) -> Tensor:
    """Share of each group's range that loses least: clipping a few outliers refines all others.

    Args:
        weight: floating point [N, K].
        options: bits, groups, symmetry.
        moments: [G, size, size], x^T x of each group's input channels; the error of the group's
            partial outputs is minimised. None: that of the weights.
        steps: shares to try: 1, 1 - span / steps, ...
        span: how far to shrink at most.

    Returns:
        fp32 [N, G].
    """
    return torch.cat(
        [
            _search_shrink(weight[begin:end].float(), options, moments, steps, span)
            for begin, end in row_chunks(weight)
        ]
    )


def _search_shrink(
    weight: Tensor, options: GridOptions, moments: Tensor | None, steps: int, span: float
) -> Tensor:
    groups = grouped(weight, options)
    best = groups.new_full(groups.shape[:2], torch.inf)
    share = torch.ones_like(best)
    for step in range(steps):
        shrink = 1.0 - span * step / steps
        grid = find_grid(weight, options, shrink=shrink)
        rounded = on_grid(weight, grid, options).dequantize()
        wrong = grouped(weight - rounded, options)
        if moments is None:
            loss = wrong.square().sum(2)
        else:
            loss = (torch.einsum("ngi,gij->ngj", wrong, moments) * wrong).sum(2)
        better = loss < best
        best = torch.where(better, loss, best)
        share = torch.where(better, torch.full_like(share, shrink), share)
    return share


def grouped(weight: Tensor, options: GridOptions) -> Tensor:
    """[N, K] -> [N, G, size]; a short last group is filled up with zeros."""
    size = options.size(weight.shape[1])
    missing = -weight.shape[1] % size
    if missing:
        weight = torch.nn.functional.pad(weight, (0, missing))
    return weight.unflatten(1, (-1, size))


def checked(weight: Tensor) -> Tensor:
    """The weight, refused when it holds NaN or infinity."""
    weight = weight.detach()
    if not all_finite(weight):
        raise QuantError("quantize: weights must be finite, got NaN or infinity")
    return weight


def weight_error(weight: Tensor, stored: CanonicalWeight | Int8Weight | Tensor) -> float:
    """||W - W'|| / ||W||, 0 for two zero weights; W' is given as such or quantised."""
    wrong = right = 0.0
    for begin, end in row_chunks(weight):
        part, rounded = unpacked(weight, begin, end), unpacked(stored, begin, end)
        wrong += float((part - rounded).square().sum(dtype=torch.float64))
        right += float(part.square().sum(dtype=torch.float64))
    return math.sqrt(wrong / right) if right > 0 else 0.0


def unpacked(stored: CanonicalWeight | Int8Weight | Tensor, begin: int, end: int) -> Tensor:
    """Rows [begin, end) of a weight, quantised or not, as fp32."""
    if isinstance(stored, Tensor):
        return stored[begin:end].float()
    return stored.rows(begin, end).dequantize()
