"""One form for every quantised weight, between checkpoint formats and kernels.

w[n, k] = (codes[n, k] - zero) * scales[n, group of k], or, with floating-point zeros, (codes -
middle) * scales + zeros,
where `middle` is 8 (4 bits) or 128 (8 bits) and also the zero point of symmetric weights.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


class QuantError(ValueError):
    """A quantised checkpoint that cannot be read as it says it should be."""


@dataclass(slots=True)
class CanonicalWeight:
    """A quantised [N, K] weight.

    Attributes:
        codes: uint8 [N, K], values below 2^bits. With `perm` the columns are in group order: column
            j multiplies
            input channel perm[j].
        scales: fp32, fp16 or bf16 [N, G], as stored.
        zeros: None (symmetric), uint8 [N, G], or floating point [N, G].
        bits: 4 or 8.
        group_size: columns per group, -1 for one group per row; the last group may be short.
        perm: int32 [K] or None.
        bias: [N] or None.
    """

    codes: Tensor
    scales: Tensor
    zeros: Tensor | None
    bits: int
    group_size: int
    perm: Tensor | None = None
    bias: Tensor | None = None

    @property
    def out_features(self) -> int:
        return self.codes.shape[0]

    @property
    def in_features(self) -> int:
        return self.codes.shape[1]

    @property
    def middle(self) -> int:
        """Zero point of symmetric codes."""
        return 1 << (self.bits - 1)

    @property
    def groups(self) -> int:
        size = self.in_features if self.group_size == -1 else self.group_size
        return -(-self.in_features // size) if size else 0

    def validate(self, name: str) -> CanonicalWeight:
        """Raise a QuantError naming `name` unless all shapes and values fit together; returns
        self.
        """
        n, k = self.codes.shape
        if self.bits not in (4, 8):
            raise QuantError(f"{name}: bits must be 4 or 8, got {self.bits}")
        if self.group_size != -1 and self.group_size < 1:
            raise QuantError(f"{name}: group_size must be -1 or positive, got {self.group_size}")
        expected = (n, self.groups)
        for what, tensor in (("scales", self.scales), ("zeros", self.zeros)):
            if tensor is not None and tuple(tensor.shape) != expected:
                raise QuantError(
                    f"{name}: {what} must be {list(expected)} ([out, groups] with group_size "
                    f"{self.group_size}), got {list(tensor.shape)}; the file and its "
                    "quantization_config do not belong together"
                )
        if not torch.isfinite(self.scales.float()).all():
            raise QuantError(
                f"{name}: scales must be finite, got NaN or infinity; the file is damaged"
            )
        if self.perm is not None:
            sorted_perm = self.perm.sort().values
            if not torch.equal(
                sorted_perm, torch.arange(k, dtype=sorted_perm.dtype, device=sorted_perm.device)
            ):
                raise QuantError(f"{name}: perm must be a permutation of 0..{k - 1}")
        return self

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """[N, K] in the original column order; fp32 arithmetic."""
        size = self.in_features if self.group_size == -1 else self.group_size
        group = torch.arange(self.in_features, device=self.codes.device) // max(size, 1)
        scales = self.scales.float()[:, group]
        codes = self.codes.float()
        if self.zeros is None:
            weight = (codes - self.middle) * scales
        elif self.zeros.dtype == torch.uint8:
            weight = (codes - self.zeros.float()[:, group]) * scales
        else:
            weight = (codes - self.middle) * scales + self.zeros.float()[:, group]
        if self.perm is not None:
            out = torch.empty_like(weight)
            out[:, self.perm.long()] = weight
            weight = out
        return weight.to(dtype)

    def rows(self, begin: int, end: int) -> CanonicalWeight:
        """Output rows [begin, end): what a fused layer or a tensor-parallel rank takes."""

        def cut(t: Tensor | None) -> Tensor | None:
            return None if t is None else t[begin:end]

        return CanonicalWeight(
            self.codes[begin:end],
            self.scales[begin:end],
            cut(self.zeros),
            self.bits,
            self.group_size,
            self.perm,
            cut(self.bias),
        )


def same_columns(weights: Sequence[CanonicalWeight]) -> bool:
    """Whether weights that read one input can be stacked: equal bits, groups and column order."""
    first = weights[0]
    for other in weights[1:]:
        if (other.bits, other.group_size, other.in_features) != (
            first.bits,
            first.group_size,
            first.in_features,
        ):
            return False
        if (other.perm is None) != (first.perm is None):
            return False
        if first.perm is not None and not torch.equal(first.perm, other.perm):
            return False
    return True


def concat(weights: Sequence[CanonicalWeight]) -> CanonicalWeight:
    """Stack the rows of weights for which `same_columns` holds."""
    first = weights[0]
    if len(weights) == 1:
        return first
    if not same_columns(weights):
        raise QuantError("concat: the weights differ in bits, group size or column order")
    zeros = _stack_zeros(weights)
    bias = None
    if any(w.bias is not None for w in weights):
        like = next(w.bias for w in weights if w.bias is not None)
        bias = torch.cat(
            [w.bias if w.bias is not None else like.new_zeros(w.out_features) for w in weights]
        )
    return CanonicalWeight(
        torch.cat([w.codes for w in weights]),
        torch.cat([w.scales for w in weights]),
        zeros,
        first.bits,
        first.group_size,
        first.perm,
        bias,
    )


def _stack_zeros(weights: Sequence[CanonicalWeight]) -> Tensor | None:
    """Zeros of mixed kinds: symmetric parts get explicit ones, floating-point ones win."""
    kinds = {None if w.zeros is None else w.zeros.dtype for w in weights}
    if kinds == {None}:
        return None
    floats = [k for k in kinds if k is not None and k != torch.uint8]
    if not floats:
        return torch.cat(
            [
                w.zeros
                if w.zeros is not None
                else torch.full_like(w.codes[:, : w.groups], w.middle)
                for w in weights
            ]
        )
    return torch.cat([_float_zeros(w) for w in weights])


def _float_zeros(w: CanonicalWeight) -> Tensor:
    if w.zeros is None:
        return torch.zeros_like(w.scales, dtype=torch.float32)
    if w.zeros.dtype == torch.uint8:
        return (w.middle - w.zeros.float()) * w.scales.float()
    return w.zeros.float()
