"""RMS normalisation, with residual addition and with int8 quantisation.

    y = x / sqrt(mean(x^2) + eps) * weight        (fp32 arithmetic whatever the dtypes)

Reference: Zhang and Sennrich, "Root Mean Square Layer Normalization", 2019.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .. import _lib

_rms_norm = _lib.op("rms_norm")
_fused_add_rms_norm = _lib.op("fused_add_rms_norm")


def rms_norm(x: Tensor, weight: Tensor, eps: float = 1e-6, *, out: Tensor | None = None) -> Tensor:
    """RMS normalisation over the last dimension.

    Args:
        x: [..., D], fp32, fp16 or bf16; last dimension contiguous, e.g. a [T, H, D] view of a fused projection (per-head norm).
        weight: [D], fp32, fp16 or bf16.
        eps: added to the mean square.
        out: tensor like x to write to; may be x itself.

    Returns:
        Tensor of x's shape and dtype.

    Raises:
        RuntimeError: wrong dtype, shape, device or strides, or an input requires grad.

    Reference: Zhang and Sennrich, "Root Mean Square Layer Normalization", 2019.
    """
    _lib.refuse_grad("rms_norm", x, weight)
    if out is None:
        out = torch.empty_like(x, memory_format=torch.contiguous_format)
    _rms_norm(x, weight, eps, out=out)
    return out


def fused_add_rms_norm(
    x: Tensor, residual: Tensor, weight: Tensor, eps: float = 1e-6
) -> tuple[Tensor, Tensor]:
    """Residual addition and RMS normalisation in one pass, in place: residual += x, then x = rms_norm(residual).

    Args:
        x: [..., D], the output of the previous layer; receives the normalised values.
        residual: like x; receives the sum, rounded to its dtype before it is normalised.
        weight: [D].
        eps: added to the mean square.

    Returns:
        (x, residual), the same tensors.

    Raises:
        RuntimeError: wrong dtype, shape, device or strides, or an input requires grad.
    """
    _lib.refuse_grad("fused_add_rms_norm", x, residual, weight)
    _fused_add_rms_norm(x, residual, weight, eps)
    return x, residual


def rms_norm_reference(x: Tensor, weight: Tensor, eps: float = 1e-6) -> Tensor:
    """rms_norm in plain torch (fp64 inside)."""
    x64 = x.double()
    y = x64 * torch.rsqrt(x64.square().mean(-1, keepdim=True) + eps) * weight.double()
    return y.to(x.dtype)


def fused_add_rms_norm_reference(
    x: Tensor, residual: Tensor, weight: Tensor, eps: float = 1e-6
) -> tuple[Tensor, Tensor]:
    """fused_add_rms_norm in plain torch; returns new tensors."""
    total = (x.float() + residual.float()).to(x.dtype)
    return rms_norm_reference(total, weight, eps), total


def _check(name: str, x: Tensor, weight: Tensor, *like_x: Tensor) -> None:
    _lib.check_dtype(name, "x", x, _lib.FLOATS)
    _lib.check_dtype(name, "weight", weight, _lib.FLOATS)
    _lib.check(
        weight.dim() == 1 and weight.shape[0] == x.shape[-1],
        f"{name}: weight must have shape [{x.shape[-1]}], got {_lib.describe(weight)}",
    )
    for t in like_x:
        _lib.check(
            t.shape == x.shape and t.dtype == x.dtype,
            f"{name}: residual and out must be like x ({_lib.describe(x)}), got {_lib.describe(t)}",
        )


@_lib.register_fake("rms_norm")
def _(x: Tensor, weight: Tensor, eps: float, *, out: Tensor) -> None:
    _check("rms_norm", x, weight, out)


@_lib.register_fake("fused_add_rms_norm")
def _(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> None:
    _check("fused_add_rms_norm", x, weight, residual)
