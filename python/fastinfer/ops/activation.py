"""Gated activations between the two GEMMs of an MLP.

    out = act(gate) * up,  x = [gate, up]         (fp32 arithmetic, one rounding)

References: Shazeer, "GLU Variants Improve Transformer", 2020 (SwiGLU, GEGLU); Hendrycks and Gimpel,
"Gaussian Error Linear Units", 2016.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import _lib
from .norm import _check_codes, _codes, quantize_rows_reference

_silu_and_mul = _lib.op("silu_and_mul")
_gelu_and_mul = _lib.op("gelu_and_mul")
_silu_and_mul_quant = _lib.op("silu_and_mul_quant")


def silu_and_mul(x: Tensor, *, out: Tensor | None = None) -> Tensor:
    """silu(gate) * up with silu(g) = g * sigmoid(g) (SwiGLU).

    Args:
        x: [..., 2I], fp32, fp16 or bf16, the gate in the first half of the last dimension and the
            linear part in the second; last dimension contiguous, any outer strides.
        out: tensor [..., I] of x's dtype to write to; must not overlap x.

    Returns:
        [..., I], dtype of x.

    Raises:
        RuntimeError: wrong dtype, shape, device or strides, or an input requires grad.

    Reference: Shazeer, "GLU Variants Improve Transformer", 2020.
    """
    _lib.require_tensors("silu_and_mul", x=x)
    _lib.refuse_grad("silu_and_mul", x)
    if out is None:
        out = _empty_half("silu_and_mul", x)
    _silu_and_mul(x, out)
    return out


def gelu_and_mul(x: Tensor, approximate: str = "none", *, out: Tensor | None = None) -> Tensor:
    """gelu(gate) * up (GEGLU).

    Args:
        x: [..., 2I], fp32, fp16 or bf16, [gate, up] along the last dimension, which is contiguous;
            any outer strides.
        approximate: "none" for g * Phi(g) with the normal distribution function Phi (erf), or
            "tanh" for g * (1 + tanh(sqrt(2 / pi) * (g + 0.044715 g^3))) / 2.
        out: tensor [..., I] of x's dtype to write to; must not overlap x.

    Returns:
        [..., I], dtype of x.

    Raises:
        RuntimeError: wrong dtype, shape, device or strides, or an input requires grad.
        ValueError: approximate is neither "none" nor "tanh".

    References: Shazeer, "GLU Variants Improve Transformer", 2020; Hendrycks and Gimpel, "Gaussian
    Error Linear Units", 2016.
    """
    _lib.require_tensors("gelu_and_mul", x=x)
    _lib.refuse_grad("gelu_and_mul", x)
    if approximate not in ("none", "tanh"):
        raise ValueError(
            f"gelu_and_mul: approximate must be 'none' or 'tanh', got {approximate!r}; "
            "'none' is the exact form"
        )
    if out is None:
        out = _empty_half("gelu_and_mul", x)
    _gelu_and_mul(x, approximate == "tanh", out)
    return out


def silu_and_mul_quant(
    x: Tensor, *, symmetric: bool = True, out: Sequence[Tensor] | None = None
) -> tuple[Tensor, Tensor, Tensor | None]:
    """silu(gate) * up, then int8 codes per row: what w8a8_linear takes as its input.

    The product is quantised from fp32, without a rounding to x's dtype in between. The rule is that
    of quantize_per_token: y = (q - zero) * scale, zero = 0 when symmetric.

    Args:
        x: [..., 2I], fp32, fp16 or bf16, [gate, up] along the last dimension, which is contiguous;
            any outer strides.
        symmetric: scale = max|y| / 127 and codes in [-127, 127]; otherwise the codes span the range
            of y and 0, and zero points come back too.
        out: (q, scale), or (q, scale, zeros) when not symmetric, to write to. Allocating them takes
            the host as long as the call.

    Returns:
        (q int8 [..., I], scale fp32 [...], zeros int32 [...] or None when symmetric). A row of
        zeros has scale 1; a row that holds inf or NaN has scale NaN.

    Raises:
        RuntimeError: wrong dtype, shape, device or strides, or an input requires grad.

    References: Shazeer 2020 (SwiGLU); Dettmers et al., "LLM.int8()", 2022 (int8 per row).
    """
    name = "silu_and_mul_quant"
    _lib.require_tensors(name, x=x)
    _lib.refuse_grad(name, x)
    columns = 0 if out is not None else _half_shape(name, x)[-1]
    q, scale, zeros = _codes(name, x, columns, symmetric, out)
    _silu_and_mul_quant(x, q, scale, zeros)
    return q, scale, zeros


def silu_and_mul_reference(x: Tensor) -> Tensor:
    """silu_and_mul in plain torch (fp64 inside)."""
    gate, up = x.double().chunk(2, -1)
    return (gate * torch.sigmoid(gate) * up).to(x.dtype)


def gelu_and_mul_reference(x: Tensor, approximate: str = "none") -> Tensor:
    """gelu_and_mul in plain torch (fp64 inside)."""
    gate, up = x.double().chunk(2, -1)
    return (F.gelu(gate, approximate=approximate) * up).to(x.dtype)


def silu_and_mul_quant_reference(
    x: Tensor, *, symmetric: bool = True
) -> tuple[Tensor, Tensor, Tensor | None]:
    """silu_and_mul_quant in plain torch."""
    return quantize_rows_reference(silu_and_mul_reference(x.double()), symmetric=symmetric)


def _half_shape(name: str, x: Tensor) -> list[int]:
    _lib.check(
        x.dim() >= 1 and x.shape[-1] % 2 == 0,
        lambda: (
            f"{name}: x must have shape [..., 2I] with the gate in its first and the linear part "
            f"in its second half, got {_lib.describe(x)}; concatenate the two along the last "
            "dimension"
        ),
    )
    return [*x.shape[:-1], x.shape[-1] // 2]


def _empty_half(name: str, x: Tensor) -> Tensor:
    return x.new_empty(_half_shape(name, x))


def _check(name: str, x: Tensor, out: Tensor) -> None:
    _lib.check_dtype(name, "x", x, _lib.FLOATS)
    shape = _half_shape(name, x)
    _lib.check(
        out.dtype == x.dtype and list(out.shape) == shape,
        f"{name}: out must be {x.dtype} {shape}, got {_lib.describe(out)}",
    )


@_lib.register_fake("silu_and_mul")
def _(x: Tensor, out: Tensor) -> None:
    _check("silu_and_mul", x, out)


@_lib.register_fake("gelu_and_mul")
def _(x: Tensor, tanh_approximation: bool, out: Tensor) -> None:
    _check("gelu_and_mul", x, out)


@_lib.register_fake("silu_and_mul_quant")
def _(x: Tensor, q: Tensor, scale: Tensor, zeros: Tensor | None) -> None:
    _lib.check_dtype("silu_and_mul_quant", "x", x, _lib.FLOATS)
    _check_codes("silu_and_mul_quant", _half_shape("silu_and_mul_quant", x), q, scale, zeros)
