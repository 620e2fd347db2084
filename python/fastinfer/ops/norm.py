"""RMS normalisation, with residual addition and with int8 quantisation.

    y = x / sqrt(mean(x^2) + eps) * weight        (fp32 arithmetic whatever the dtypes)

Reference: Zhang and Sennrich, "Root Mean Square Layer Normalization", 2019.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .. import _lib

_rms_norm = _lib.op("rms_norm")
_fused_add_rms_norm = _lib.op("fused_add_rms_norm")
_rms_norm_quant = _lib.op("rms_norm_quant")


def rms_norm(x: Tensor, weight: Tensor, eps: float = 1e-6, *, out: Tensor | None = None) -> Tensor:
    """RMS normalisation over the last dimension.

    Args:
        x: [..., D], fp32, fp16 or bf16; last dimension contiguous, any outer strides, e.g. a
            [T, H, D] view of a fused projection (per-head norm).
        weight: [D], fp32, fp16 or bf16.
        eps: added to the mean square.
        out: tensor like x to write to: x itself, or apart from it.

    Returns:
        Tensor of x's shape and dtype.

    Raises:
        RuntimeError: wrong dtype, shape, device or strides, or an input requires grad.

    Reference: Zhang and Sennrich, "Root Mean Square Layer Normalization", 2019.
    """
    _lib.require_tensors("rms_norm", x=x, weight=weight)
    _lib.refuse_grad("rms_norm", x, weight)
    if out is None:
        out = torch.empty_like(x, memory_format=torch.contiguous_format)
    _rms_norm(x, weight, eps, out)
    return out


def fused_add_rms_norm(
    x: Tensor, residual: Tensor, weight: Tensor, eps: float = 1e-6
) -> tuple[Tensor, Tensor]:
    """Residual addition and RMS normalisation in one pass, in place.

    residual += x, then x = rms_norm(residual).

    Args:
        x: [..., D], the output of the previous layer; receives the normalised values.
        residual: like x, apart from it; receives the sum, rounded to its dtype before it is
            normalised.
        weight: [D].
        eps: added to the mean square.

    Returns:
        (x, residual), the same tensors.

    Raises:
        RuntimeError: wrong dtype, shape, device or strides, or an input requires grad.
    """
    _lib.require_tensors("fused_add_rms_norm", x=x, residual=residual, weight=weight)
    _lib.refuse_grad("fused_add_rms_norm", x, residual, weight)
    _fused_add_rms_norm(x, residual, weight, eps)
    return x, residual


def rms_norm_quant(
    x: Tensor,
    weight: Tensor,
    eps: float = 1e-6,
    *,
    residual: Tensor | None = None,
    symmetric: bool = True,
    out: Sequence[Tensor] | None = None,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """RMS normalisation, then int8 codes per row: what w8a8_linear takes as its input.

    The normalised row is quantised from fp32, without a rounding to x's dtype in between. The rule
    is that of quantize_per_token: y = (q - zero) * scale, zero = 0 when symmetric.

    Args:
        x: [..., D], fp32, fp16 or bf16; last dimension contiguous; not changed.
        weight: [D], fp32, fp16 or bf16.
        eps: added to the mean square.
        residual: like x, apart from it; updated in place to x + residual first (rounded to its
            dtype), and that sum is what is normalised.
        symmetric: scale = max|y| / 127 and codes in [-127, 127]; otherwise the codes span the range
            of y and 0, and zero points come back too.
        out: (q, scale), or (q, scale, zeros) when not symmetric, to write to. Allocating them takes
            the host as long as the call.

    Returns:
        (q int8 [..., D], scale fp32 [...], zeros int32 [...] or None when symmetric). A row of
        zeros has scale 1; a row that holds inf or NaN has scale NaN.

    Raises:
        RuntimeError: wrong dtype, shape, device or strides, or an input requires grad.

    References: Zhang and Sennrich 2019 (RMS norm); Dettmers et al., "LLM.int8()", 2022 (int8 per
    row).
    """
    try:
        _lib.refuse_grad("rms_norm_quant", x, residual, weight)
        q, scale, zeros = _codes("rms_norm_quant", x, None, symmetric, out)
        _rms_norm_quant(x, weight, eps, residual, q, scale, zeros)
    except Exception:  # looked at only when something was wrong
        _lib.require_tensors("rms_norm_quant", x=x, weight=weight)
        raise
    return q, scale, zeros


def _codes(
    name: str, x: Tensor, columns: int | None, symmetric: bool, out: Sequence[Tensor] | None
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Outputs of a quantising op, the caller's or new: q like x (with `columns` columns, where
    given), scale and zeros (None when symmetric) without its last dimension. torch takes lists and
    empty_like in two thirds of the time of a torch.Size.
    """
    if out is not None:
        _lib.check(
            len(out) == (2 if symmetric else 3),
            lambda: (
                f"{name}: out must be {'(q, scale)' if symmetric else '(q, scale, zeros)'}, "
                f"got {len(out)} tensors"
            ),
        )
        return out[0], out[1], None if symmetric else out[2]
    rows = [x.size(0)] if x.dim() == 2 else [*x.shape[:-1]]
    if columns is None:
        q = torch.empty_like(x, dtype=torch.int8, memory_format=torch.contiguous_format)
    else:
        q = x.new_empty([*rows, columns], dtype=torch.int8)
    scale = x.new_empty(rows, dtype=torch.float32)
    return q, scale, None if symmetric else x.new_empty(rows, dtype=torch.int32)


def quantize_rows_reference(
    y: Tensor, *, symmetric: bool = True
) -> tuple[Tensor, Tensor, Tensor | None]:
    """int8 codes per row of y [..., D] in plain torch, for the references of the quantising ops."""
    y = y.float()
    if symmetric:
        scale = y.abs().amax(-1) / 127
        scale = torch.where(scale == 0, 1, scale)
        return (y / scale[..., None]).round().clamp(-127, 127).to(torch.int8), scale, None
    low, high = y.amin(-1).clamp_max(0), y.amax(-1).clamp_min(0)
    scale = high / 255 - low / 255
    scale = torch.where(scale == 0, 1, scale)
    zeros = torch.where(low == high, 0, (-128 - low / scale).round().clamp(-128, 127))
    q = (y / scale[..., None]).round() + zeros[..., None]
    return q.clamp(-128, 127).to(torch.int8), scale, zeros.to(torch.int32)


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


def rms_norm_quant_reference(
    x: Tensor,
    weight: Tensor,
    eps: float = 1e-6,
    *,
    residual: Tensor | None = None,
    symmetric: bool = True,
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """rms_norm_quant in plain torch; returns (q, scale, zeros, new residual)."""
    total = x if residual is None else (x.float() + residual.float()).to(x.dtype)
    codes = quantize_rows_reference(
        rms_norm_reference(total.double(), weight, eps), symmetric=symmetric
    )
    return *codes, None if residual is None else total


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
def _(x: Tensor, weight: Tensor, eps: float, out: Tensor) -> None:
    _check("rms_norm", x, weight, out)


@_lib.register_fake("fused_add_rms_norm")
def _(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> None:
    _check("fused_add_rms_norm", x, weight, residual)


def _check_codes(
    name: str, shape: list[int], q: Tensor, scale: Tensor, zeros: Tensor | None
) -> None:
    """Fake-kernel check of the outputs of a quantising op; q has `shape`."""
    for arg, t, dtype, want in (
        ("q", q, torch.int8, shape),
        ("scale", scale, torch.float32, shape[:-1]),
        ("zeros", zeros, torch.int32, shape[:-1]),
    ):
        if t is not None:
            _lib.check(
                t.dtype == dtype and list(t.shape) == want,
                f"{name}: {arg} must be {dtype} {want}, got {_lib.describe(t)}",
            )


@_lib.register_fake("rms_norm_quant")
def _(
    x: Tensor,
    weight: Tensor,
    eps: float,
    residual: Tensor | None,
    q: Tensor,
    scale: Tensor,
    zeros: Tensor | None,
) -> None:
    _check("rms_norm_quant", x, weight, *(() if residual is None else (residual,)))
    _check_codes("rms_norm_quant", list(x.shape), q, scale, zeros)
