"""Linear layers: 16-bit and fp32 weights, 4- and 8-bit packed weights, int8 x int8.

    Y[M, N] = X[M, K] W[N, K]^T + bias[N]

Sums run in fp32 (int8 x int8: exactly, in int32), the result is rounded once. Packed weights come
from `fastinfer.ops.quantization.pack_weight`; quantised activations from `quantize_per_token`.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .. import _lib

_linear = _lib.op("linear")
_int4_linear = _lib.op("int4_linear")
_int8_linear = _lib.op("int8_linear")
_w8a8_linear = _lib.op("w8a8_linear")


def _rows(name: str, arg: str, x: Tensor) -> Tensor:
    """x [..., K] as [M, K]; a view where the strides allow it."""
    if x.dim() == 2:
        return x
    if x.dim() == 0:  # (a message is only put together when it is needed)
        raise RuntimeError(
            f"{name}: {arg} must have shape [..., in_features], got {_lib.describe(x)}"
        )
    return x.reshape(math.prod(x.shape[:-1]), x.shape[-1])


def _output(
    name: str, x: Tensor, n: int, dtype: torch.dtype, out: Tensor | None
) -> tuple[Tensor, Tensor]:
    """The tensor to return, [..., N], and the same memory as [M, N]."""
    if out is None:
        out = x.new_empty((*x.shape[:-1], n), dtype=dtype)
    elif out.dim() != 2 or x.dim() != 2:
        _lib.check(
            out.shape == (*x.shape[:-1], n) and out.is_contiguous(),
            f"{name}: out must be contiguous with shape {[*x.shape[:-1], n]}, "
            f"got {_lib.describe(out)}",
        )
    return out, _rows(name, "out", out)


def linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    batch_invariant: bool = False,
    out: Tensor | None = None,
) -> Tensor:
    """Linear layer with unquantised weights.

    Few tokens run through a kernel that streams the weights once; more go to torch's own matrix
    product where that is faster (on the CPU above 16 tokens; in bf16 above 4 on processors with
    bf16 instructions, and in 16 bit never on those without; on CUDA in 16 bit above 16 tokens, and
    for layers where cuBLAS was measured to be faster). The choice is made in C++, so a compiled
    graph follows the M of each call.

    Args:
        x: [..., K], fp32, fp16 or bf16, last dimension contiguous.
        weight: [N, K], x's dtype, last dimension contiguous.
        bias: [N], x's dtype.
        batch_invariant: use the streaming kernel for every M: the bits of a row then do not depend
            on the other rows. Slower for large M. On CUDA 16-bit types only, weight rows at
            multiples of 16 bytes.
        out: [..., N], x's dtype, to write to.

    Returns:
        [..., N], x's dtype.

    Raises:
        RuntimeError: wrong dtype, shape, device or strides, or an input requires grad.

    Reference: batch invariance: He et al., "Defeating Nondeterminism in LLM Inference", 2025.
    """
    _lib.require_tensors("linear", x=x, weight=weight)
    _lib.refuse_grad("linear", x, weight, bias)
    out, out2 = _output("linear", x, weight.shape[:1].numel(), x.dtype, out)
    _linear(_rows("linear", "x", x), weight, bias, batch_invariant=batch_invariant, out=out2)
    return out


def int4_linear(
    x: Tensor,
    qweight: Tensor,
    scales: Tensor,
    zeros: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    group_size: int,
    out_features: int,
    perm: Tensor | None = None,
    batch_invariant: bool = False,
    out: Tensor | None = None,
    workspace: Tensor | None = None,
) -> Tensor:
    """Linear layer with packed 4-bit weights and full-precision activations (W4A16).

    w = (code - z) * s with z = 8 or an integer zero point, or (code - 8) * s + z with float zeros.
    Codes and zero points are applied exactly, scales in fp32. On the CPU a row's bits never depend
    on the other rows or on the number of threads.

    With the environment variable FASTINFER_CPU_INT8_ACTIVATIONS=1, read at every call, the CPU
    also rounds x to int8: one symmetric scale, absmax / 127, per token and group (groups longer
    than 32768 columns: per 32768). It is faster and adds about 0.6% of relative error at
    group_size 128; one scale over all of K (group_size -1) suffers when x has outliers. A row with
    NaN or inf is then NaN in all its outputs.

    Args:
        x: [..., K], fp32 (CPU only), fp16 or bf16, last dimension contiguous.
        qweight, scales, zeros: as made by `pack_weight(bits=4)` for x's device.
        bias: [N], x's dtype.
        group_size: columns per scale: -1 (all of K) or a positive multiple of 8.
        out_features: N, which the padded layout does not tell.
        perm: int32 [K]: packed column j multiplies x[..., perm[j]] (act-order); the `perm` given to
            `pack_weight`.
        batch_invariant: one tile and one order of summation for every M (always so on the CPU).
        out: [..., N], x's dtype, to write to.
        workspace: scratch of the CUDA kernels, zeroed once by the caller and left zeroed; needed
            only by GPUs older than sm_90, which otherwise allocate it per call. Unused on the CPU.

    Returns:
        [..., N], x's dtype.

    Raises:
        RuntimeError: wrong dtype, shape, device, layout or strides, or an input requires grad.

    Reference: Frantar et al., "GPTQ", 2022, and "MARLIN", 2024; Lin et al., "AWQ", 2023.
    """
    name = "int4_linear"
    _lib.require_tensors(name, x=x, qweight=qweight, scales=scales)
    _lib.refuse_grad(name, x, scales, zeros, bias)
    out, out2 = _output(name, x, out_features, x.dtype, out)
    _int4_linear(
        _rows(name, "x", x),
        qweight,
        scales,
        zeros,
        bias,
        group_size=group_size,
        perm=perm,
        batch_invariant=batch_invariant,
        out=out2,
        workspace=workspace,
    )
    return out


def int8_linear(
    x: Tensor,
    qweight: Tensor,
    scales: Tensor,
    zeros: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    group_size: int,
    out_features: int,
    perm: Tensor | None = None,
    batch_invariant: bool = False,
    out: Tensor | None = None,
    workspace: Tensor | None = None,
) -> Tensor:
    """Linear layer with packed 8-bit weights and full-precision activations (W8A16).

    w = (code - z) * s with z = 128 or an integer zero point, or (code - 128) * s + z with float
    zeros. Everything else, FASTINFER_CPU_INT8_ACTIVATIONS=1 included, is as in `int4_linear`.

    Args:
        x: [..., K], fp32 (CPU only), fp16 or bf16, last dimension contiguous.
        qweight, scales, zeros: as made by `pack_weight(bits=8)` for x's device.
        bias: [N], x's dtype.
        group_size: columns per scale: -1 (all of K) or a positive multiple of 8.
        out_features: N.
        perm: int32 [K], act-order as in `int4_linear`.
        batch_invariant: one tile and one order of summation for every M (always so on the CPU).
        out: [..., N], x's dtype, to write to.
        workspace: scratch of the CUDA kernels; unused on the CPU.

    Returns:
        [..., N], x's dtype.

    Raises:
        RuntimeError: wrong dtype, shape, device, layout or strides, or an input requires grad.

    Reference: Frantar et al., "GPTQ", 2022.
    """
    name = "int8_linear"
    _lib.require_tensors(name, x=x, qweight=qweight, scales=scales)
    _lib.refuse_grad(name, x, scales, zeros, bias)
    out, out2 = _output(name, x, out_features, x.dtype, out)
    _int8_linear(
        _rows(name, "x", x),
        qweight,
        scales,
        zeros,
        bias,
        group_size=group_size,
        perm=perm,
        batch_invariant=batch_invariant,
        out=out2,
        workspace=workspace,
    )
    return out


def w8a8_linear(
    x_q: Tensor,
    x_scale: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None = None,
    *,
    x_zeros: Tensor | None = None,
    weight_sum: Tensor | None = None,
    out_dtype: torch.dtype = torch.bfloat16,
    batch_invariant: bool = False,
    out: Tensor | None = None,
    workspace: Tensor | None = None,
) -> Tensor:
    """Linear layer with int8 activations and int8 weights (dynamic or static W8A8).

    y = float(sum_k (x_q - x_zeros) * weight) * x_scale * weight_scale + bias: the sum is exact
    int32, the rest fp32 in this order, rounded once to `out_dtype`. Every instruction-set level of
    the CPU gives the same bits.

    Args:
        x_q: int8 [..., K] of M rows, from `quantize_per_token`, `rms_norm_quant`, ...
        x_scale: fp32 [M], or [...] as the fused ops return it.
        weight: int8 [N, K], last dimension contiguous.
        weight_scale: fp32 [N].
        bias: [N], of `out_dtype`.
        x_zeros: int32, like x_scale, zero points of asymmetric activations.
        weight_sum: int32 [N], row sums of `weight`, saves adding them up when `x_zeros` is given.
        out_dtype: fp32, fp16 or bf16; ignored when `out` is given.
        batch_invariant: one tile and one order of summation for every M (always so on the CPU).
        out: [..., N] to write to.
        workspace: scratch of the CUDA kernels; unused on the CPU.

    Returns:
        [..., N] of `out_dtype`.

    Raises:
        RuntimeError: wrong dtype, shape, device or strides, K beyond exact int32 sums (131071, with
            zero points 65793), or an input requires grad.

    Reference: Xiao et al., "SmoothQuant", 2022.
    """
    name = "w8a8_linear"
    _lib.require_tensors(name, x_q=x_q, weight=weight)
    _lib.refuse_grad(name, x_scale, weight_scale, bias)
    out, out2 = _output(name, x_q, weight.shape[:1].numel(), out_dtype, out)
    if x_q.dim() > 2 and x_scale.shape == x_q.shape[:-1]:  # as rms_norm_quant returns them
        x_scale = x_scale.reshape(-1)
        x_zeros = None if x_zeros is None else x_zeros.reshape(-1)
    _w8a8_linear(
        _rows(name, "x_q", x_q),
        x_scale,
        weight,
        weight_scale,
        bias,
        x_zeros=x_zeros,
        weight_sum=weight_sum,
        batch_invariant=batch_invariant,
        out=out2,
        workspace=workspace,
    )
    return out


def _check_common(
    name: str, x: Tensor, n: int, bias: Tensor | None, out: Tensor, dtype: torch.dtype
) -> None:
    _lib.check(x.dim() == 2, f"{name}: x must have 2 dimensions, got {_lib.describe(x)}")
    _lib.check(
        out.shape == (x.shape[0], n) and out.dtype == dtype,
        f"{name}: out must be {dtype} [{x.shape[0]}, {n}], got {_lib.describe(out)}",
    )
    if bias is not None:
        _lib.check(
            bias.shape == (n,) and bias.dtype == dtype,
            f"{name}: bias must be {dtype} [{n}], got {_lib.describe(bias)}",
        )


@_lib.register_fake("linear")
def _(
    x: Tensor, weight: Tensor, bias: Tensor | None, *, batch_invariant: bool, out: Tensor
) -> None:
    _lib.check_dtype("linear", "x", x, _lib.FLOATS)
    _check_common("linear", x, weight.shape[0], bias, out, x.dtype)
    _lib.check(
        weight.dim() == 2 and weight.shape[1] == x.shape[1] and weight.dtype == x.dtype,
        f"linear: weight must be {x.dtype} [*, {x.shape[1]}], got {_lib.describe(weight)}",
    )


def _fake_packed(name: str) -> None:
    @_lib.register_fake(name)
    def _(
        x: Tensor,
        qweight: Tensor,
        scales: Tensor,
        zeros: Tensor | None,
        bias: Tensor | None,
        *,
        group_size: int,
        perm: Tensor | None,
        batch_invariant: bool,
        out: Tensor,
        workspace: Tensor | None,
    ) -> None:
        _lib.check_dtype(name, "x", x, _lib.FLOATS)
        _lib.check(out.dim() == 2, f"{name}: out must have 2 dimensions, got {_lib.describe(out)}")
        _check_common(name, x, out.shape[1], bias, out, x.dtype)
        _lib.check_dtype(name, "qweight", qweight, (torch.int32,))
        _lib.check(
            group_size == -1 or (group_size > 0 and group_size % 8 == 0),
            f"{name}: group_size must be -1 or a positive multiple of 8, got {group_size}",
        )


_fake_packed("int4_linear")
_fake_packed("int8_linear")


@_lib.register_fake("w8a8_linear")
def _(
    x_q: Tensor,
    x_scale: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None,
    *,
    x_zeros: Tensor | None,
    weight_sum: Tensor | None,
    batch_invariant: bool,
    out: Tensor,
    workspace: Tensor | None,
) -> None:
    name = "w8a8_linear"
    _lib.check_dtype(name, "x_q", x_q, (torch.int8,))
    _lib.check_dtype(name, "weight", weight, (torch.int8,))
    _lib.check_dtype(name, "out", out, _lib.FLOATS)
    _check_common(name, x_q, weight.shape[0], bias, out, out.dtype)
    _lib.check(
        weight.dim() == 2 and weight.shape[1] == x_q.shape[1],
        f"{name}: weight must have shape [*, {x_q.shape[1]}], got {_lib.describe(weight)}",
    )
