"""Several linear layers over one input, as one module: q/k/v and gate/up.

Weights whose columns agree are stacked into one packed weight. Weights that differ in bits, groups
or act-order stay apart, and each writes its slice of the one output.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from fastinfer import ops

from .canonical import CanonicalWeight, Int8Weight, concat, concat_int8, same_columns
from .formats import Stored
from .layers import QuantLinear, W8A8Linear, has_kernel
from .notes import note


class DenseLinear(nn.Module):
    """A part that is not quantised: y = x @ weight.T + bias.

    Args:
        weight: [N, K].
    """

    batch_invariant = False

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight, requires_grad=False)
        self.out_features, self.in_features = weight.shape

    def run(self, x: Tensor, bias: Tensor | None, out: Tensor | None = None) -> Tensor:
        """As in `QuantLinear`."""
        return ops.linear(x, self.weight, bias, batch_invariant=self.batch_invariant, out=out)


class FusedLinear(nn.Module):
    """y = x @ [weight of each part].T + bias.

    Args:
        weights: parts in the order of their output columns; a Tensor is an unquantised [N, K].
        dtype: of activations and of unquantised weights.
        device: where the layer lives.

    The bias stays with the caller, who passes it to `forward`.
    """

    def __init__(
        self, weights: Sequence[Stored], *, dtype: torch.dtype, device: torch.device
    ) -> None:
        super().__init__()
        self.linears = nn.ModuleList(
            _module(weight, dtype=dtype, device=device) for weight in stack(weights)
        )
        # (looking into a ModuleList costs microseconds at every call)
        self._parts: tuple[nn.Module, ...] = tuple(self.linears)
        self.in_features: int = self.linears[0].in_features
        self.out_features: int = sum(linear.out_features for linear in self.linears)

    def forward(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """x [..., K], bias [N total] or None -> [..., N total], x's dtype."""
        if len(self._parts) == 1:
            return self._parts[0].run(x, bias)  # type: ignore[operator]
        out = torch.empty((*x.shape[:-1], self.out_features), dtype=x.dtype, device=x.device)
        x2, out2 = x.reshape(-1, x.shape[-1]), out.view(-1, self.out_features)
        begin = 0
        for linear in self._parts:
            end = begin + linear.out_features
            linear.run(x2, None if bias is None else bias[begin:end], out2[:, begin:end])
            begin = end
        return out


def stack(weights: Sequence[Stored]) -> list[Stored]:
    """Merge neighbours that one kernel call can compute, exactly as apart."""
    runs: list[list[Stored]] = []
    for weight in weights:
        if runs and _stackable(runs[-1][0], weight):
            runs[-1].append(weight)
        else:
            runs.append([weight])
    return [_merge(run) for run in runs]


def _stackable(a: Stored, b: Stored) -> bool:
    if isinstance(a, CanonicalWeight) and isinstance(b, CanonicalWeight):
        return same_columns([a, b])
    return type(a) is type(b) and not isinstance(a, CanonicalWeight)


def _merge(run: list[Stored]) -> Stored:
    if len(run) == 1:
        return run[0]
    if isinstance(run[0], CanonicalWeight):
        return concat(run)
    return concat_int8(run) if isinstance(run[0], Int8Weight) else torch.cat(run)


def _module(weight: Stored, *, dtype: torch.dtype, device: torch.device) -> nn.Module:
    if isinstance(weight, CanonicalWeight):
        return QuantLinear.from_canonical(weight, device=device)
    if isinstance(weight, Int8Weight):
        return W8A8Linear.from_canonical(weight, device=device)
    return DenseLinear(weight.to(device, dtype))


def runnable(name: str, stored: Stored, requantize: int | None = None) -> Stored:
    """What the kernels can run of what a file holds.

    Args:
        name: of the layer, for notes.
        stored: as read.
        requantize: 4 or 8: quantise a dequantised weight again, rounding to nearest in groups of
            64 input channels. None: leave it.

    Returns:
        `stored`, or the dequantised weight where the group size has no kernel, or the requantised
        one.
    """
    if isinstance(stored, CanonicalWeight) and not has_kernel(stored.group_size):
        note(
            name,
            f"dequantised, because the kernels take groups of a multiple of 8 channels, not "
            f"{stored.group_size}",
        )
        stored = stored.dequantize()
    if isinstance(stored, Tensor) and requantize is not None:
        codes, scales, zeros = ops.quantize_weight(stored.contiguous(), requantize, 64)
        return CanonicalWeight(codes, scales, zeros, requantize, 64)
    return stored
