"""From float weights to packed ones, and activations to int8.

    weights      w ~ (code - z) * s          code in [0, 2^bits - 1], one s (and z) per output
                                             channel and group of input channels
    activations  x ~ (q - zero) * scale      q int8, one scale per token

Canonical form: codes uint8 [N, K], scales [N, G], zeros uint8 or float [N, G] or None (z = 8 for
4 bit, 128 for 8 bit). `pack_weight` turns it into what `int4_linear` and `int8_linear` read;
csrc/ops/linear_layout.h describes those layouts bit by bit.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .. import _lib
from .linear import _rows
from .norm import _codes

_quantize_weight = _lib.op("quantize_weight")
_pack_weight = _lib.op("pack_weight")
_dequantize_weight = _lib.op("dequantize_weight")
_quantize_per_token = _lib.op("quantize_per_token")


class QuantizedWeight(NamedTuple):
    """Canonical quantised weight: codes uint8 [N, K], scales [N, G], zeros uint8 [N, G] or None."""

    codes: Tensor
    scales: Tensor
    zeros: Tensor | None


class PackedWeight(NamedTuple):
    """A weight in a kernel's layout: the first arguments of `int4_linear` and `int8_linear`."""

    qweight: Tensor
    scales: Tensor
    zeros: Tensor | None


def _groups(name: str, group_size: int, k: int) -> int:
    _lib.check(
        group_size == -1 or (group_size > 0 and group_size % 8 == 0),
        f"{name}: group_size must be -1 (one group per output channel) or a positive multiple "
        f"of 8, got {group_size}",
    )
    return (k + group_size - 1) // group_size if group_size > 0 else min(k, 1)


def _check_bits(name: str, bits: int) -> None:
    _lib.check(bits in (4, 8), f"{name}: bits must be 4 or 8, got {bits}")


def quantize_weight(
    weight: Tensor,
    bits: int = 4,
    group_size: int = 128,
    *,
    symmetric: bool = True,
    scale_dtype: torch.dtype = torch.float32,
) -> QuantizedWeight:
    """Round-to-nearest quantisation of a weight, needing no data.

    Symmetric: s = absmax / 7 (4 bit) or absmax / 127 (8 bit), so that no value is clipped; codes
    run around z = 8 or 128 and code 0 stays unused. Asymmetric: s = (max - min) / (2^bits - 1) over
    the group with 0 included, z = round(-min / s). s is rounded to `scale_dtype` before the codes
    are computed from it. A group of zeros (or one whose s vanishes in `scale_dtype`) gets s = 1;
    one that holds inf or NaN gets s = NaN.

    The relative error on Gaussian weights is about 0.117 (4 bit, groups of 128; 0.101 asymmetric)
    and 0.0064 (8 bit). absmax / 7.5 would use all 16 codes at the price of clipping the largest
    positive value of many groups; absmax / 7 keeps outliers exact to half a step.

    Args:
        weight: [N, K], fp32, fp16 or bf16, last dimension contiguous.
        bits: 4 or 8.
        group_size: columns per scale: -1 (all of K) or a positive multiple of 8; the last group may
            be short.
        symmetric: False adds integer zero points.
        scale_dtype: fp32, fp16 or bf16.

    Returns:
        QuantizedWeight(codes uint8 [N, K], scales [N, G], zeros uint8 [N, G] or None).

    Raises:
        RuntimeError: wrong dtype, shape or option, or the weight requires grad.
    """
    name = "quantize_weight"
    _lib.require_tensors(name, weight=weight)
    _lib.refuse_grad(name, weight)
    _lib.check(
        weight.dim() == 2, f"{name}: weight must have 2 dimensions, got {_lib.describe(weight)}"
    )
    n, k = weight.shape
    groups = _groups(name, group_size, k)
    codes = torch.empty((n, k), dtype=torch.uint8, device=weight.device)
    scales = torch.empty((n, groups), dtype=scale_dtype, device=weight.device)
    zeros = None
    if not symmetric:
        zeros = torch.empty((n, groups), dtype=torch.uint8, device=weight.device)
    _quantize_weight(
        weight, bits=bits, group_size=group_size, codes=codes, scales=scales, zeros=zeros
    )
    return QuantizedWeight(codes, scales, zeros)


def pack_weight(
    codes: Tensor,
    scales: Tensor,
    zeros: Tensor | None = None,
    *,
    bits: int = 4,
    group_size: int = 128,
    perm: Tensor | None = None,
    layout: str | None = None,
) -> PackedWeight:
    """Pack canonical codes, scales and zero points into the layout that a device's kernels read.

    Any N and K: padding is added inside. With `perm` (act-order) give the codes in their ORIGINAL
    column order; they are permuted here, packed column j = codes[:, perm[j]], and row g of the
    scales belongs to packed columns g * group_size and on. For a GPTQ checkpoint with `g_idx` that
    means: codes and scales exactly as stored, perm = torch.argsort(g_idx, stable=True); then give
    the same perm (int32) to `int4_linear` and `dequantize_weight`.

    Args:
        codes: uint8 [N, K], values below 2^bits.
        scales: [N, G], fp32, fp16 or bf16.
        zeros: uint8 [N, G] (w = (code - z) * s), float [N, G] (w = (code - 2^(bits-1)) * s + z) or
            None (z = 2^(bits-1)).
        bits: 4 or 8.
        group_size: columns per scale: -1 or a positive multiple of 8.
        perm: int [K], a permutation of the columns.
        layout: "cpu" or "cuda"; None: that of codes.device. A "cuda" layout made from CPU tensors
            stays on the CPU until it is moved.

    Returns:
        PackedWeight(qweight int32, scales, zeros): "cpu" int32 [ceil(N/16), ceil(K*bits/32), 16]
        with scales and float zeros in fp32, [G, N rounded up to 16]; "cuda" int32
        [ceil(N/64), ceil(K/64), 128*bits] with scales and zeros [G, ceil(N/64), 8, 8] in their own
        dtypes.

    Raises:
        RuntimeError: wrong dtype, shape or option, a code that does not fit into `bits`, a perm
            that is no permutation, or an input requires grad.

    Reference: CUDA layout: operand fragments of mma.m16n8k16, NVIDIA PTX ISA.
    """
    name = "pack_weight"
    _lib.require_tensors(name, codes=codes, scales=scales)
    _lib.refuse_grad(name, scales, zeros)
    _check_bits(name, bits)
    _lib.check(
        codes.dim() == 2, f"{name}: codes must have 2 dimensions, got {_lib.describe(codes)}"
    )
    layout = codes.device.type if layout is None else layout
    _lib.check(
        layout in ("cpu", "cuda"), f'{name}: layout must be "cpu", "cuda" or None, got {layout!r}'
    )
    n, k = codes.shape
    groups = _groups(name, group_size, k)
    if perm is not None:
        _check_permutation(name, perm, k)
        codes = codes.index_select(1, perm)
    if layout == "cpu":
        blocks, steps = -(-n // 16), -(-k * bits // 32)
        shape, scale_shape = (blocks, steps, 16), (groups, blocks * 16)
    else:
        blocks, steps = -(-n // 64), -(-k // 64)
        shape, scale_shape = (blocks, steps, 128 * bits), (groups, blocks, 8, 8)

    def packed(t: Tensor) -> Tensor:
        keep = layout == "cuda" or t.dtype == torch.uint8
        dtype = t.dtype if keep else torch.float32
        return torch.empty(scale_shape, dtype=dtype, device=codes.device)

    qweight = torch.empty(shape, dtype=torch.int32, device=codes.device)
    packed_scales = packed(scales)
    packed_zeros = None if zeros is None else packed(zeros)
    _pack_weight(
        codes,
        scales.contiguous(),
        None if zeros is None else zeros.contiguous(),
        bits=bits,
        group_size=group_size,
        qweight=qweight,
        packed_scales=packed_scales,
        packed_zeros=packed_zeros,
    )
    return PackedWeight(qweight, packed_scales, packed_zeros)


def _check_permutation(name: str, perm: Tensor, k: int) -> None:
    _lib.check(
        perm.shape == (k,) and perm.dtype in (torch.int32, torch.int64),
        f"{name}: perm must be torch.int32 or torch.int64 [{k}], got {_lib.describe(perm)}",
    )
    if not torch.compiler.is_compiling():
        order = torch.arange(k, device=perm.device, dtype=perm.dtype)
        _lib.check(
            torch.equal(perm.sort().values, order),
            f"{name}: perm must hold every column number 0..{k - 1} once; for a GPTQ checkpoint it "
            "is torch.argsort(g_idx, stable=True)",
        )


def dequantize_weight(
    qweight: Tensor,
    scales: Tensor,
    zeros: Tensor | None = None,
    *,
    bits: int,
    group_size: int,
    out_features: int,
    in_features: int,
    perm: Tensor | None = None,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """The weight that packed tensors stand for, in either layout, as a matrix.

    Args:
        qweight, scales, zeros: from `pack_weight`; the last dimension of qweight tells the layout.
        bits: 4 or 8.
        group_size: as given to `pack_weight`.
        out_features: N.
        in_features: K.
        perm: int32 [K], as given to `pack_weight`.
        dtype: of the result: fp32 (exact products), fp16 or bf16.

    Returns:
        [N, K] in the original column order, perm undone.

    Raises:
        RuntimeError: wrong dtype, shape or option, or an input requires grad.
    """
    _lib.require_tensors("dequantize_weight", qweight=qweight, scales=scales)
    _lib.refuse_grad("dequantize_weight", scales, zeros)
    out = torch.empty((out_features, in_features), dtype=dtype, device=qweight.device)
    _dequantize_weight(qweight, scales, zeros, bits=bits, group_size=group_size, perm=perm, out=out)
    return out


def quantize_per_token(
    x: Tensor,
    scale: Tensor | None = None,
    *,
    symmetric: bool = True,
    out: Tensor | tuple[Tensor, ...] | None = None,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Quantise activations to int8, one scale per token.

    Symmetric: scale = absmax / 127, q = clamp(round(x / scale), -127, 127). Asymmetric: scale =
    (max - min) / 255 with 0 in the range, zero = round(-128 - min / scale), q = round(x / scale) +
    zero in [-128, 127]. Rounding is to nearest even, all in fp32. A row of zeros gets scale 1 and
    zeros; a row that holds inf or NaN gets scale NaN and zeros, so that its outputs are NaN and
    those of other rows are not touched. A row's bits depend on that row alone.

    Args:
        x: [..., K] of M rows, fp32, fp16 or bf16, last dimension contiguous.
        scale: fp32, one value: a static scale for every row instead of the computed ones.
        symmetric: False adds zero points.
        out: int8, x's shape, contiguous, to write q to; or (q, scale), or (q, scale, zeros) when
            not symmetric. Each one that is allocated takes the host 2 us on a GPU.

    Returns:
        (q int8 like x, scale fp32 [M], zeros int32 [M] or None); x ~ (q - zeros) * scale.

    Raises:
        RuntimeError: wrong dtype, shape or strides, a static scale with symmetric=False, or an
            input requires grad.

    Reference: Dettmers et al., "LLM.int8()", 2022; Xiao et al., "SmoothQuant", 2022.
    """
    name = "quantize_per_token"
    _lib.require_tensors(name, x=x)
    _lib.refuse_grad(name, x, scale)
    x2 = _rows(name, "x", x)
    row_scale = zeros = None
    if isinstance(out, tuple):
        out, row_scale, zeros = _codes(name, x, None, symmetric, out)
    if out is None:
        out = torch.empty_like(x, dtype=torch.int8, memory_format=torch.contiguous_format)
    elif out.shape != x.shape or not (out.dim() == 2 or out.is_contiguous()):
        raise RuntimeError(
            f"{name}: out must be contiguous with shape {list(x.shape)}, got {_lib.describe(out)}"
        )
    if row_scale is None:
        row_scale = x.new_empty([x2.size(0)], dtype=torch.float32)
    if zeros is None and not symmetric:
        zeros = x.new_empty([x2.size(0)], dtype=torch.int32)
    _quantize_per_token(x2, scale, _rows(name, "out", out), row_scale, zeros)
    return out, row_scale, zeros


@_lib.register_fake("quantize_weight")
def _(
    weight: Tensor,
    *,
    bits: int,
    group_size: int,
    codes: Tensor,
    scales: Tensor,
    zeros: Tensor | None,
) -> None:
    name = "quantize_weight"
    _check_bits(name, bits)
    _lib.check_dtype(name, "weight", weight, _lib.FLOATS)
    _lib.check_dtype(name, "scales", scales, _lib.FLOATS)
    groups = _groups(name, group_size, weight.shape[1])
    _lib.check(
        scales.shape == (weight.shape[0], groups),
        f"{name}: scales must have shape {[weight.shape[0], groups]}, got {_lib.describe(scales)}",
    )


@_lib.register_fake("pack_weight")
def _(
    codes: Tensor,
    scales: Tensor,
    zeros: Tensor | None,
    *,
    bits: int,
    group_size: int,
    qweight: Tensor,
    packed_scales: Tensor,
    packed_zeros: Tensor | None,
) -> None:
    name = "pack_weight"
    _check_bits(name, bits)
    _lib.check_dtype(name, "codes", codes, (torch.uint8,))
    _lib.check_dtype(name, "scales", scales, _lib.FLOATS)
    groups = _groups(name, group_size, codes.shape[1])
    _lib.check(
        scales.shape == (codes.shape[0], groups),
        f"{name}: scales must have shape [{codes.shape[0]}, {groups}], got {_lib.describe(scales)}",
    )


@_lib.register_fake("dequantize_weight")
def _(
    qweight: Tensor,
    scales: Tensor,
    zeros: Tensor | None,
    *,
    bits: int,
    group_size: int,
    perm: Tensor | None,
    out: Tensor,
) -> None:
    _check_bits("dequantize_weight", bits)
    _lib.check_dtype("dequantize_weight", "qweight", qweight, (torch.int32,))
    _lib.check_dtype("dequantize_weight", "out", out, _lib.FLOATS)
    _groups("dequantize_weight", group_size, out.shape[1])


@_lib.register_fake("quantize_per_token")
def _(
    x: Tensor,
    static_scale: Tensor | None,
    q: Tensor,
    scale: Tensor,
    zeros: Tensor | None,
) -> None:
    name = "quantize_per_token"
    _lib.check_dtype(name, "x", x, _lib.FLOATS)
    _lib.check(
        q.shape == x.shape and q.dtype == torch.int8,
        f"{name}: q must be torch.int8 {list(x.shape)}, got {_lib.describe(q)}",
    )
