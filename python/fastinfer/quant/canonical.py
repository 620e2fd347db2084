"""One form for every quantised weight, between checkpoint formats and kernels.

w[n, k] = (codes[n, k] - zero) * scales[n, group of k], or, with floating-point zeros,
(codes - middle) * scales + zeros, where `middle` is 8 (4 bits) or 128 (8 bits) and also the zero
point of symmetric weights. Weights that are multiplied with int8 activations (W8A8) are plain
signed codes with one scale per row: `Int8Weight`.
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
            j multiplies input channel perm[j].
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
        if self.codes.dim() != 2 or self.codes.dtype != torch.uint8:
            raise QuantError(
                f"{name}: codes must be torch.uint8 [out, in], got {self.codes.dtype} "
                f"{list(self.codes.shape)}"
            )
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
        if has_float_zeros(self) and not (
            self.zeros.is_floating_point() and torch.isfinite(self.zeros.float()).all()
        ):
            raise QuantError(
                f"{name}: zeros must be torch.uint8 or finite floating point, got "
                f"{self.zeros.dtype}; the file is damaged"
            )
        if self.perm is not None:
            order = torch.arange(k, dtype=self.perm.dtype, device=self.perm.device)
            if self.perm.shape != (k,) or not torch.equal(self.perm.sort().values, order):
                raise QuantError(
                    f"{name}: perm must hold every column number 0..{k - 1} once, got "
                    f"{self.perm.dtype} {list(self.perm.shape)} with other values; the file is "
                    "damaged"
                )
        if self.bias is not None and self.bias.shape != (n,):
            raise QuantError(f"{name}: bias must be [{n}], got {list(self.bias.shape)}")
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


@dataclass(slots=True)
class Int8Weight:
    """A W8A8 weight [N, K]: w[n, k] = codes[n, k] * scales[n], activations int8 per token.

    Attributes:
        codes: int8 [N, K].
        scales: fp32 [N].
        bias: [N] or None.
    """

    codes: Tensor
    scales: Tensor
    bias: Tensor | None = None

    @property
    def out_features(self) -> int:
        return self.codes.shape[0]

    @property
    def in_features(self) -> int:
        return self.codes.shape[1]

    def validate(self, name: str) -> Int8Weight:
        """Raise a QuantError naming `name` unless shapes, dtypes and values fit; returns self."""
        if self.codes.dim() != 2 or self.codes.dtype != torch.int8:
            raise QuantError(
                f"{name}: codes must be torch.int8 [out, in], got {self.codes.dtype} "
                f"{list(self.codes.shape)}"
            )
        if self.scales.shape != (self.out_features,) or not self.scales.is_floating_point():
            raise QuantError(
                f"{name}: scales must be floating point [{self.out_features}], got "
                f"{self.scales.dtype} {list(self.scales.shape)}"
            )
        if not torch.isfinite(self.scales.float()).all():
            raise QuantError(
                f"{name}: scales must be finite, got NaN or infinity; the file is damaged"
            )
        return self

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """[N, K], fp32 arithmetic."""
        return (self.codes.float() * self.scales.float()[:, None]).to(dtype)

    def rows(self, begin: int, end: int) -> Int8Weight:
        """Output rows [begin, end)."""
        bias = None if self.bias is None else self.bias[begin:end]
        return Int8Weight(self.codes[begin:end], self.scales[begin:end], bias)


def same_columns(weights: Sequence[CanonicalWeight]) -> bool:
    """Whether weights that read one input can be stacked: equal bits, groups and column order.

    The result computes exactly what the parts do.
    """
    first = weights[0]
    for other in weights[1:]:
        if (other.bits, other.group_size, other.in_features) != (
            first.bits,
            first.group_size,
            first.in_features,
        ):
            return False
        # Integer zeros turned into floating-point ones would round differently.
        if has_float_zeros(other) != has_float_zeros(first):
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
    return CanonicalWeight(
        torch.cat([w.codes for w in weights]),
        torch.cat([w.scales.to(_wider([v.scales for v in weights])) for w in weights]),
        _stack_zeros(weights),
        first.bits,
        first.group_size,
        first.perm,
        _stack_biases(weights),
    )


def concat_int8(weights: Sequence[Int8Weight]) -> Int8Weight:
    """Stack the rows of W8A8 weights that read one input."""
    return Int8Weight(
        torch.cat([w.codes for w in weights]),
        torch.cat([w.scales.float() for w in weights]),
        _stack_biases(weights),
    )


def _wider(tensors: Sequence[Tensor]) -> torch.dtype:
    """A dtype that holds the values of all of these exactly."""
    dtypes = {t.dtype for t in tensors}
    return dtypes.pop() if len(dtypes) == 1 else torch.float32


def _stack_biases(weights: Sequence[CanonicalWeight] | Sequence[Int8Weight]) -> Tensor | None:
    like = next((w.bias for w in weights if w.bias is not None), None)
    if like is None:
        return None
    return torch.cat(
        [like.new_zeros(w.out_features) if w.bias is None else w.bias for w in weights]
    )


def _stack_zeros(weights: Sequence[CanonicalWeight]) -> Tensor | None:
    """Symmetric parts get explicit zero points where another part has them."""
    if all(w.zeros is None for w in weights):
        return None
    if has_float_zeros(weights[0]):
        dtype = _wider([w.zeros for w in weights if w.zeros is not None])
        return torch.cat([w.zeros.to(dtype) for w in weights if w.zeros is not None])
    return torch.cat(
        [
            w.zeros
            if w.zeros is not None
            else torch.full_like(w.scales, w.middle, dtype=torch.uint8)
            for w in weights
        ]
    )


def has_float_zeros(weight: CanonicalWeight) -> bool:
    """Whether the zeros are added after scaling instead of subtracted before."""
    return weight.zeros is not None and weight.zeros.dtype != torch.uint8
